"""Pictures of the benchmarks, PNG and SVG: the same figures give the same SVG.

They show what the result's JSON says, and know nothing of how it was measured. matplotlib is
imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrag.bench.contestants import PREFIX_CACHED
from kvrag.bench.labels import Label, Stroke, place
from kvrag.bench.looks import line_of, look_of
from kvrag.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "against_size",
    "check_plotting",
    "new_figure",
    "plain_numbers",
    "plot_frontier",
    "plot_lengths",
    "plot_spans",
    "save",
]

#: What TTFT is made of: name in the JSON, in the legend, colour and hatching.
_PARTS = (
    ("compute", "computing", "#0072B2", ""),
    ("compute_loading", "computing while stored KV loads beside it", "#56B4E9", "//"),
    ("stall", "waiting for stored KV", "#D55E00", ""),
    ("other", "layout, first token's choice", "#999999", ""),
)
_WHOLE = ("another engine, not split", "#DDDDDD")
_HEIGHT = 0.65
_DPI = 150


def check_plotting() -> None:
    """Nothing if pictures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as exc:
        raise MissingExtraError(
            "pictures need matplotlib: pip install 'kvrag[bench]', or leave out --plot"
        ) from exc


def plot_lengths(
    folder: Path, lengths: Mapping[int, Mapping[str, Any]], facts: Mapping[str, Any]
) -> list[Path]:
    """TTFT against context tokens, a line a contestant, both axes logarithmic.

    Args:
        lengths: the benchmark's figures by context tokens.
        facts: what holds at every length.

    Returns:
        The files `ttft_by_context.png` and `.svg`.

    Raises:
        InputError: the folder cannot be written.
        MissingExtraError: see `check_plotting`.
    """
    figure = new_figure(8.4, 4.6)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for of in lengths.values() for name in of["ttft_range_s"]))
    for name in names:
        points = [
            (of["context_tokens"], of["ttft_s"][name], *of["ttft_range_s"][name])
            for of in lengths.values()
            if name in of["ttft_s"]
        ]
        tokens, seconds, low, high = zip(*points, strict=True)
        look, cached = look_of(name.removesuffix(PREFIX_CACHED)), name.endswith(PREFIX_CACHED)
        axes.plot(
            tokens,
            seconds,
            marker=look.marker,
            color=look.colour,
            markerfacecolor="white" if cached else look.colour,
            linestyle="--" if cached else look.line,
            label=name,
        )
        axes.fill_between(tokens, low, high, color=look.colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [_tokens(context) for context in sorted(lengths)])
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis, (1, 2, 5))
    axes.grid(visible=True, linewidth=0.6, alpha=0.6)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("time to first token (s)")
    axes.set_title(_title("Time to first token by context length", facts))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return save(figure, folder, "ttft_by_context")


def plot_spans(folder: Path, figures: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Path]:
    """Where the time goes: TTFT of one context length, a bar a contestant, split into its parts.

    kvrag's own bars stand once more below, as shares: beside a full prefill they are short.

    Args:
        figures: the benchmark's figures of that length.
        facts: what holds at every length.

    Returns:
        The files `ttft_spans.png` and `.svg`.

    Raises:
        InputError: the folder cannot be written.
        MissingExtraError: see `check_plotting`.
    """
    seconds = figures["ttft_s"]
    names = sorted(figures["ttft_range_s"], key=lambda name: float(seconds[name]))
    split = [name for name in names if name in figures["spans_s"]]
    figure = new_figure(8.4, 2.8 + 0.36 * (len(names) + len(split)))
    grid = figure.add_gridspec(2, 1, height_ratios=(len(names) + 1, len(split) + 1))
    above, below = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    handles = _bars(above, names, figures, {name: seconds[name] for name in split})
    longest = seconds[names[-1]]
    for row, name in enumerate(names):
        end = seconds[name] + longest / 100
        above.text(end, row, f"{seconds[name]:.3g}", va="center", fontsize=9)
    above.set_xlim(0, longest * 1.1)
    above.set_xlabel("time to first token (s)")
    tokens = figures["context_tokens"]
    above.set_title(_title(f"Where the time goes at {tokens:,} context tokens", facts))
    _bars(below, split, figures, dict.fromkeys(split, 100.0))
    below.set_xlim(0, 100)
    below.set_xlabel("share of kvrag's time to first token (%)")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return save(figure, folder, "ttft_spans")


def plot_frontier(
    folder: Path,
    sets: Mapping[str, Mapping[str, Mapping[str, Any]]],
    full: Mapping[str, Mapping[str, Any]],
) -> list[Path]:
    """The frontier: what a strategy costs against how far it is from full prefill, a panel a set.

    A strategy at several ratios is a line whose points show how many percent of the rows they
    compute.

    Args:
        sets: the fidelity benchmark's figures by set and strategy.
        full: those of full prefill by set.

    Returns:
        The files `frontier.png` and `.svg`.

    Raises:
        InputError: the folder cannot be written.
        MissingExtraError: see `check_plotting`.
    """
    columns = min(3, len(sets))
    lines = -(-len(sets) // columns)
    figure = new_figure(1.2 + 4.8 * columns, 1.0 + 3.9 * lines)
    handles: dict[str, Any] = {}
    labels: list[Label] = []
    strokes: list[Stroke] = []
    for at, (title, of) in enumerate(sets.items(), start=1):
        axes = figure.add_subplot(lines, columns, at)
        for line, points in _lines(of).items():
            look = look_of(line)
            x = [100 * point["ttft_s"] / full[title]["ttft_s"] for point in points]
            kl = [point["kl"] for point in points]
            low, high = zip(*(point["ci95"]["kl"] for point in points), strict=True)
            handles[line] = axes.errorbar(
                x,
                kl,
                yerr=[
                    [value - end for value, end in zip(kl, low, strict=True)],
                    [end - value for value, end in zip(kl, high, strict=True)],
                ],
                fmt=look.marker,
                linestyle=look.line,
                color=look.colour,
                markersize=6,
                capsize=2,
                linewidth=1.4,
                elinewidth=0.7,
            )
            strokes.append(Stroke(axes, list(zip(x, kl, strict=True))))
            for point, right, up in zip(points, x, kl, strict=True):
                strokes.append(Stroke(axes, [(right, end) for end in point["ci95"]["kl"]]))
                text = _percent(point["effective_ratio"]) if len(points) > 1 else ""
                labels.append(Label(axes, right, up, text, look.colour))
        tokens = full[title]["prompt_tokens"]
        axes.set_title(f"{title}, {full[title]['n']} items, {tokens:,.0f} prompt tokens")
        axes.set_xscale("log")
        plain_numbers(axes.xaxis, (1, 1.5, 2, 3, 5, 7))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("TTFT (% of full prefill's)")
        axes.set_ylabel("KL to full prefill (nats)")
        axes.grid(visible=True, linewidth=0.6, alpha=0.5)
        axes.set_axisbelow(True)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        title="numbers at points: % of the context's rows computed"
        if any(label.text for label in labels)
        else None,
    )
    place(figure, labels, strokes)
    return save(figure, folder, "frontier")


def _lines(of: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Figures of the points of each line, by rising share of computed rows."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for name, figures in of.items():
        lines.setdefault(line_of(name), []).append(figures)
    return {
        line: sorted(points, key=lambda point: float(point["effective_ratio"]))
        for line, points in lines.items()
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2g}" if share < 0.995 else "100"


def _tokens(number: int) -> str:
    """4096 is 4k and 7680 is 7.5k; what is no multiple of 128 is written out."""
    return f"{number:,}" if number % 128 or number < 1024 else f"{number / 1024:.4g}k"


def against_size(axes: Axes, size: str, value: str) -> None:
    """Label axes of a value, over a size on a logarithmic scale with its numbers written out."""
    axes.set_xscale("log")
    plain_numbers(axes.xaxis, (1,))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(size)
    axes.set_ylabel(value)
    axes.grid(visible=True, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)


def plain_numbers(axis: Axis, steps: Sequence[float]) -> None:
    """Such multiples of powers of ten along a logarithmic axis, written out."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _bars(
    axes: Axes, names: Sequence[str], figures: Mapping[str, Any], totals: Mapping[str, float]
) -> list[Any]:
    """A bar a name, from the top; those in `totals` split into parts. What the legend shows."""
    split = [place for place, name in enumerate(names) if name in totals]
    left, handles = [0.0] * len(split), []
    for part, label, colour, hatch in _PARTS:
        widths = [_share(figures, names[place], part) * totals[names[place]] for place in split]
        bars = axes.barh(
            split,
            widths,
            left=left,
            height=_HEIGHT,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
            label=label,
        )
        handles.append(bars)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    whole = [place for place, name in enumerate(names) if name not in totals]
    if whole:
        seconds = [figures["ttft_s"][names[place]] for place in whole]
        label, colour = _WHOLE
        handles.append(axes.barh(whole, seconds, height=_HEIGHT, color=colour, label=label))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=True, axis="x", linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    return handles


def _share(figures: Mapping[str, Any], name: str, part: str) -> float:
    """The parts are means and the bar is a median: they are scaled to it."""
    spans = figures["spans_s"][name]
    return float(spans[part] / sum(spans.values()))


def _title(what: str, figures: Mapping[str, Any]) -> str:
    threads = "1 thread" if figures["threads"] == 1 else f"{figures['threads']} threads"
    model = Path(str(figures["model"])).name
    return f"{what}\n{model}, {figures['dtype']}, {threads}, median of {figures['repetitions']}"


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches that belongs to no window and to no list of open figures."""
    check_plotting()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `name`.png and .svg. Raises `InputError` if the folder cannot be written."""
    from matplotlib import rc_context

    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    # Without the salt ids are random, and SVG has the date: no two pictures would be the same.
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(files[0], dpi=_DPI)
            figure.savefig(files[1], metadata={"Date": None})
        except OSError as exc:
            raise InputError(f"{folder} cannot be written: {exc.strerror or exc}") from exc
    return files
