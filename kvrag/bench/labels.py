"""Small labels beside the points of a picture, none on another or on a point."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Label", "Stroke", "place"]

#: Where a label may stand, in typographic points from what it belongs to, best first.
_OFFSETS = (
    (5, 4), (-5, -4), (5, -4), (-5, 4), (0, 6), (0, -6), (7, 0), (-7, 0),
    (8, 9), (-8, -9), (8, -9), (-8, 9), (0, 13), (0, -13),
)  # fmt: skip
_REACH = 4


class Label(NamedTuple):
    """A text for the point (x, y) of the data; without one the point is only kept free."""

    axes: Axes
    x: float
    y: float
    text: str
    colour: str


class Stroke(NamedTuple):
    """A drawn line through points of the data, on which no label should stand."""

    axes: Axes
    points: Sequence[tuple[float, float]]


def place(figure: Figure, labels: Sequence[Label], strokes: Sequence[Stroke]) -> None:
    """Write each label where it is free; one for which nowhere is stays away.

    Where it cannot stand free of strokes it may cross them. The picture must be complete but for
    the labels, since its layout is fixed by this.
    """
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    reach = _REACH * figure.dpi / 72
    boxes = []
    for label in labels:
        x, y = label.axes.transData.transform((label.x, label.y))
        boxes.append(Bbox.from_extents(x - reach, y - reach, x + reach, y + reach))
    lines = [
        Path(stroke.axes.transData.transform(stroke.points))
        for stroke in strokes
        if len(stroke.points) > 1
    ]
    for label in filter(lambda label: label.text, labels):
        inside = label.axes.get_window_extent()
        for avoided, (right, up) in product((lines, []), _OFFSETS):
            text = label.axes.annotate(
                label.text,
                (label.x, label.y),
                (right, up),
                textcoords="offset points",
                ha="center" if not right else "left" if right > 0 else "right",
                va="center" if not up else "bottom" if up > 0 else "top",
                fontsize=7,
                color=label.colour,
            )
            box = text.get_window_extent()
            free = not any(box.overlaps(other) for other in boxes) and not any(
                line.intersects_bbox(box, filled=False) for line in avoided
            )
            if free and inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1):
                boxes.append(box)
                break
            text.remove()
