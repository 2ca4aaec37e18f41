"""The weights of one projection: whole, and by the parts that it joins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Projection", "Taken", "projection"]

#: A tensor by name and shape, rounded to the stored dtype.
Taken = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Projection:
    """Products that read the same rows, joined into one.

    weight: (out, in). bias: (out,) or None. sizes: the outputs of each part.
    parts: the weights of the parts; they share memory with `weight` or with the file, if they can.
    """

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]
    parts: tuple[Tensor, ...]

    def biases(self) -> tuple[Tensor | None, ...]:
        """The parts of the bias."""
        if self.bias is None:
            return (None,) * len(self.sizes)
        return torch.split(self.bias, self.sizes)


def projection(
    take: Taken, outputs: Mapping[str, int], inputs: int, *, bias: bool, fused: str | None = None
) -> Projection:
    """Read the parts by the names in `outputs`, or the tensor `fused` that holds all of them."""
    sizes = list(outputs.values())

    def taken(kind: str, *shape: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        if fused is not None:
            whole = take(f"{fused}.{kind}", sum(sizes), *shape)
            return whole, tuple(torch.split(whole, sizes))
        parts = tuple(take(f"{name}.{kind}", size, *shape) for name, size in outputs.items())
        return torch.cat(parts) if len(parts) > 1 else parts[0], parts

    weight, parts = taken("weight", inputs)
    return Projection(weight, taken("bias")[0] if bias else None, sizes, parts)
