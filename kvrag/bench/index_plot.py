"""A picture of what each kind of vector index reaches and takes, by the number of vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvrag.bench.plots import against_size, new_figure, plain_numbers, save

__all__ = ["plot_growth"]

#: Okabe and Ito's colours: people who are colour-blind tell them apart.
_LOOKS = {"flat": ("#000000", "v"), "hnsw": ("#0072B2", "o"), "ivfpq": ("#D55E00", "s")}
_LINES = {"all": "-", "even half": "-", "default": "--"}
_PANELS = (
    ("recall@10", "recall@10", False),
    ("cpu_p50_ms", "a search, median (ms of one processor)", True),
    ("build_cpu_s", "build (s of one processor)", True),
    ("bytes_per_vector", "bytes a vector", False),
)


def plot_growth(folder: Path, points: Sequence[Mapping[str, Any]], recall: float) -> list[Path]:
    """A panel a figure, a line a kind: solid with the effort chosen for `recall`, dashed as set.

    Args:
        points: those of the index benchmark's result.

    Returns:
        The files `index_growth.png` and `.svg`.

    Raises:
        InputError: the folder cannot be written.
        MissingExtraError: see `plots.check_plotting`.
    """
    figure = new_figure(14.4, 3.9)
    handles: dict[str, Any] = {}
    for at, (name, label, logarithmic) in enumerate(_PANELS, start=1):
        axes = figure.add_subplot(1, len(_PANELS), at)
        for kind, chosen in dict.fromkeys((str(p["kind"]), str(p["chosen"])) for p in points):
            of = [p for p in points if (p["kind"], p["chosen"]) == (kind, chosen)]
            colour, marker = _LOOKS[kind]
            (handle,) = axes.plot(
                [p["vectors"] for p in of],
                [p[name] for p in of],
                marker=marker,
                color=colour,
                linestyle=_LINES[chosen],
            )
            handles[kind if chosen == "all" else f"{kind}, effort: {chosen}"] = handle
        against_size(axes, "vectors", label)
        if logarithmic:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis, (1, 3))
        else:
            axes.set_ylim(bottom=0)
        if name == "recall@10":
            axes.set_ylim(0.5, 1.01)
            axes.axhline(recall, color="grey", linewidth=0.8, linestyle=":")
    figure.suptitle("The vector index as it grows")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False
    )
    return save(figure, folder, "index_growth")
