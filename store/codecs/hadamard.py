"""The Hadamard transform of parts of a row: it spreads what a few channels have over all of them.

By butterflies, whose order of additions is fixed: a product with the matrix would give other bits
on another machine, and the stored bytes depend on them.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["block_width", "hadamard", "parts"]

#: Widest part, and so the widest transform.
_WIDEST = 64


def parts(dim: int) -> int:
    """Into how many equal parts a row of `dim` numbers is cut: the fewest of at most 64, or one."""
    count = max(1, -(-dim // _WIDEST))
    return count if dim % count == 0 else 1


def block_width(part: int) -> int:
    """The widest power of two, at most 64, that divides a part."""
    return min(_WIDEST, part & -part) if part else 1


def hadamard(x: Tensor, block: int) -> Tensor:
    """Sylvester's matrix of ones and minus ones times each run of `block` numbers of the last axis.

    Its own inverse but for the factor `block`.
    """
    shape, stride = x.shape, 1
    while stride < block:
        pairs = x.reshape(-1, 2, stride)
        first, second = pairs[:, 0], pairs[:, 1]
        x = x.new_empty(pairs.shape)
        x[:, 0], x[:, 1] = first + second, first - second
        stride *= 2
    return x.reshape(shape)
