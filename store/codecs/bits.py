"""Codes in bytes, and scales in bfloat16 that are rounded to the safe side."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ceil_bfloat16", "floor_bfloat16", "join", "row_nbytes", "split"]

#: The bits of a float32 that a bfloat16 lacks.
_LOST = 0xFFFF
_UNIT = 0x10000


def row_nbytes(numbers: int, bits: int) -> int:
    """Bytes of a row of codes of 4 or 8 bits."""
    return numbers if bits == 8 else -(-numbers // 2)


def join(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) below 2 ** bits to bytes (..., row_nbytes(n, bits)), both uint8.

    With 4 bits, byte j holds number j in its low half and number j + ceil(n / 2) in its high half:
    both halves of a row then lie in order, as wide instructions want them.
    """
    if bits == 8:
        return codes
    width = row_nbytes(codes.shape[-1], bits)
    joined = codes[..., :width].clone()
    joined[..., : codes.shape[-1] - width] |= codes[..., width:] << 4
    return joined


def split(rows: Tensor, numbers: int, bits: int) -> Tensor:
    """What `join` was given: uint8 (..., numbers)."""
    if bits == 8:
        return rows
    return torch.cat((rows & 15, rows >> 4), dim=-1)[..., :numbers]


def floor_bfloat16(x: Tensor) -> Tensor:
    """The greatest bfloat16 that is not above x, as float32. x: float32, finite, below 1e38."""
    bits = x.contiguous().view(torch.int32)
    away = ((bits & _LOST) != 0) & (bits < 0)
    return ((bits & ~_LOST) + away.int() * _UNIT).view(torch.float32)


def ceil_bfloat16(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below x, as float32. x: float32, from 0 to 1e38."""
    bits = x.contiguous().view(torch.int32)
    return ((bits & ~_LOST) + ((bits & _LOST) != 0).int() * _UNIT).view(torch.float32)
