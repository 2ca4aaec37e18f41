"""Pictures: what is written on them, and that a strategy looks the same everywhere."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from kvrag.bench import plots
from kvrag.bench.curve_plot import plot_curve
from kvrag.bench.labels import Label, Stroke, place
from kvrag.bench.looks import line_of, look_of
from kvrag.fusion import strategy_names


def texts(files: list[Path]) -> list[str]:
    """All that is written in the SVG of a picture."""
    (svg,) = (file for file in files if file.suffix == ".svg")
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())


def point(ttft_s, kl, ratio):
    return {
        "ttft_s": ttft_s,
        "kl": kl,
        "effective_ratio": ratio,
        "ci95": {"kl": [0.8 * kl, 1.2 * kl]},
    }


def test_lengths_are_labelled_with_plain_numbers(tmp_path):
    lengths = {
        context: {
            "context_tokens": context,
            "ttft_s": {"fast": context / 2000},
            "ttft_range_s": {"fast": (context / 2500, context / 1500)},
        }
        for context in (500, 1024, 4096, 7680)
    }
    facts = {"threads": 1, "dtype": "float32", "model": "name", "repetitions": 3}
    written = texts(plots.plot_lengths(tmp_path, lengths, facts))
    assert {"500", "1k", "4k", "7.5k", "0.5", "1", "2"} <= set(written)
    assert not any("10^" in text or "\N{MULTIPLICATION SIGN}" in text for text in written)


def test_a_strategy_at_several_ratios_is_one_line_with_its_rows(tmp_path):
    of = {
        "reuse": point(0.2, 0.1, 0.0),
        "fast:ratio=0.3": point(0.8, 0.02, 0.31),
        "fast:ratio=0.1": point(0.5, 0.04, 0.11),
        "cacheblend:ratio=0.1": point(0.6, 0.08, 0.12),
    }
    full = {"lamps": {"ttft_s": 4.0, "n": 7, "prompt_tokens": 812.4}}
    written = texts(plots.plot_frontier(tmp_path, {"lamps": of}, full))
    assert {"reuse", "fast", "cacheblend", "lamps, 7 items, 812 prompt tokens"} <= set(written)
    assert not any("ratio=" in text for text in written)
    # Rows in percent stand at the points of a line; what is one point needs none.
    assert [text for text in ("31", "11", "12", "0") if text in written] == ["31", "11"]


def test_labels_stand_on_no_other_and_on_no_point():
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.add_subplot()
    points = [(n / 9, 0.5 + (n % 3) / 30) for n in range(10)] + [(0.5, 0.5)] * 20
    axes.plot(*zip(*points, strict=True), "o")
    labels = [Label(axes, x, y, f"{x:.2f}", "black") for x, y in points]
    place(figure, labels, [Stroke(axes, points)])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert 10 < len(boxes) < len(points), "twenty have no room at one point"
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    spots = axes.transData.transform(points)
    assert not any(box.contains(*spot) for box in boxes for spot in spots)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("fast", "fast"),
        ("fast:ratio=0.1", "fast"),
        ("fast:most_rows=0,ratio=0.1", "fast:most_rows=0"),
        ("fast:ratio=0.1,most_rows=0", "fast:most_rows=0"),
    ],
)
def test_a_ratio_does_not_change_the_look(name, line):
    assert line_of(name) == line
    assert look_of(name) == look_of(line)


def test_every_strategy_looks_different():
    looks = {name: look_of(name) for name in (*strategy_names(), "transformers", "vllm")}
    assert len(set(looks.values())) == len(looks)
    assert look_of("fast:most_rows=0") not in looks.values()
    assert look_of("wish") == look_of("wish")


def test_the_curve_of_the_store_has_a_line_a_policy(tmp_path):
    points = [
        {"policy": policy, "blocks": blocks, "get_us": 9, "put_us": 12, "bytes_per_block": 300}
        for policy in ("lru", "lfu", "cost", "s3-fifo")
        for blocks in (1000, 1_000_000)
    ]
    files = plot_curve(tmp_path, points)
    assert [file.name for file in files] == ["store_curve.png", "store_curve.svg"]
    written = texts(files)
    assert {"lru", "lfu", "cost", "s3-fifo", "1,000", "1,000,000", "blocks held"} <= set(written)
