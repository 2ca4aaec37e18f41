"""What each kind of work costs, fitted while running: seconds = costs x amounts, costs >= 0.

Least squares of the *relative* error, older measurements counting less and less. Where the
measurements cannot tell two kinds of work apart, the less stiff one is given the time. One
measurement that is far off changes nothing; the second of its kind in a row does, and at once: then
the machine has become faster or slower, and what was learnt of the proportions stays.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fit"]

Vector = NDArray[np.float64]

#: How much of a measurement's weight is left when the next one comes.
MEMORY = 0.8
#: A measurement further from what was expected than by this factor must be confirmed.
FAR = 2.0


class Fit:
    """Costs of a few kinds of work. Not thread-safe.

    Args:
        stiffness: one a kind, relative: the time of kinds that always come together goes to them
            in inverse proportion.
        like: by kind, another one whose amounts are of the same unit: a kind that was hardly seen
            is then held to the other's scale, so that no noise can make it dear.
    """

    def __init__(self, stiffness: Sequence[float], like: Mapping[int, int] | None = None) -> None:
        kinds = len(stiffness)
        self._stiffness = np.array(stiffness, dtype=np.float64)
        self._like = [(like or {}).get(kind, kind) for kind in range(kinds)]
        # Sums over rows of amounts / seconds, whose product with the costs should be 1.
        self._gram, self._moment = np.zeros((kinds, kinds)), np.zeros(kinds)
        self._amounts, self._seconds = np.zeros(kinds), 0.0
        self._doubted: tuple[Vector, float, float] | None = None
        self._costs: list[float] | None = None
        self.count = 0

    def add(self, amounts: Sequence[float], seconds: float) -> None:
        """A measurement: what was done, in how many seconds (above 0)."""
        row, predicted = np.array(amounts, dtype=np.float64), self.predict(amounts)
        self.count += 1
        if predicted is not None and self.count > 2:
            off = seconds / predicted if predicted > 0 else FAR
            if not 1 / FAR <= off <= FAR:
                self._doubt(row, seconds, off)
                return
        self._doubted = None
        self._learn(row, seconds)

    def predict(self, amounts: Sequence[float]) -> float | None:
        """Seconds, or None before the first measurement."""
        if not self._seconds:
            return None
        if self._costs is None:
            penalty = self._stiffness * np.maximum(
                self._gram.diagonal(), self._gram.diagonal()[self._like]
            )
            self._costs = _non_negative(self._gram + np.diag(penalty), self._moment).tolist()
        # As plain numbers: a forecast asks once a layer, and an array takes longer to make.
        return float(sum(map(operator.mul, self._costs, amounts)))

    def cost(self, kind: int) -> float | None:
        """Seconds a unit of one kind of work."""
        unit = np.zeros(len(self._moment))
        unit[kind] = 1.0
        return self.predict(unit.tolist())

    def rate(self, kind: int) -> float | None:
        """Units of one kind a second, all other work of the time included."""
        return float(self._amounts[kind] / self._seconds) if self._seconds else None

    def _doubt(self, row: Vector, seconds: float, off: float) -> None:
        before, self._doubted = self._doubted, (row, seconds, off)
        if before is None or (before[2] > 1) != (off > 1):
            return
        factor = (before[2] * off) ** 0.5
        self._gram /= factor**2
        self._moment /= factor
        self._seconds *= factor
        self._doubted = None
        self._learn(*before[:2])
        self._learn(row, seconds)

    def _learn(self, row: Vector, seconds: float) -> None:
        share = row / seconds
        self._gram = MEMORY * self._gram + np.outer(share, share)
        self._moment = MEMORY * self._moment + share
        self._amounts = MEMORY * self._amounts + row
        self._seconds = MEMORY * self._seconds + seconds
        self._costs = None


def _non_negative(gram: Vector, moment: Vector) -> Vector:
    """The x >= 0 of least x'Gx - 2m'x: the best of the free minima of all subsets of kinds."""
    kinds_in_all, seen = len(moment), np.flatnonzero(gram.diagonal() > 0)
    # Amounts are of very different size: in units of their own, the numbers stay sound.
    unit = np.sqrt(gram.diagonal()[seen])
    gram, moment = gram[np.ix_(seen, seen)] / np.outer(unit, unit), moment[seen] / unit
    best, least = np.zeros(len(seen)), 0.0
    for size in range(1, len(seen) + 1):
        for kinds in map(list, combinations(range(len(seen)), size)):
            x = np.linalg.solve(gram[np.ix_(kinds, kinds)], moment[kinds])
            value = -float(moment[kinds] @ x)
            if value < least and (x >= 0).all():
                least, best = value, np.zeros(len(seen))
                best[kinds] = x
    costs = np.zeros(kinds_in_all)
    costs[seen] = best / unit
    return costs
