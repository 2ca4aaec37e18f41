"""A picture of what the store takes beside its tiers, by the number of blocks that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvrag.bench.plots import against_size, new_figure, save

__all__ = ["plot_curve"]

#: Okabe and Ito's colours: people who are colour-blind tell them apart.
_LOOKS = {
    "lru": ("#0072B2", "o"),
    "lfu": ("#D55E00", "s"),
    "cost": ("#009E73", "^"),
    "s3-fifo": ("#CC79A7", "D"),
}
_OTHER = ("#000000", "v")
_PANELS = (
    ("get_us", "get, median (us)"),
    ("put_us", "put that evicts, median (us)"),
    ("bytes_per_block", "memory a block (bytes)"),
)


def plot_curve(folder: Path, points: Sequence[Mapping[str, Any]]) -> list[Path]:
    """A panel a figure, a line a policy, the number of blocks on a logarithmic axis.

    Args:
        points: the eviction benchmark's `curve`.

    Returns:
        The files `store_curve.png` and `.svg`.

    Raises:
        InputError: the folder cannot be written.
        MissingExtraError: see `plots.check_plotting`.
    """
    figure = new_figure(11.4, 3.9)
    handles: dict[str, Any] = {}
    for at, (name, label) in enumerate(_PANELS, start=1):
        axes = figure.add_subplot(1, len(_PANELS), at)
        for policy in dict.fromkeys(str(point["policy"]) for point in points):
            colour, marker = _LOOKS.get(policy, _OTHER)
            of = sorted((p["blocks"], p[name]) for p in points if p["policy"] == policy)
            blocks, values = zip(*of, strict=True)
            (handles[policy],) = axes.plot(blocks, values, marker=marker, color=colour)
        against_size(axes, "blocks held", label)
        axes.set_ylim(0, 1.1 * max(point[name] for point in points))
    figure.suptitle("What the store takes beside its tiers: processor time and memory")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    return save(figure, folder, "store_curve")
