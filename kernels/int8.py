"""One-row products with int8 weights: decoding reads every weight, here in half the bytes.

For CPUs that calculate in float32. Native code has a product of its own (`native.Int8Weights`);
this is for those without. torch has no fast product of a float32 row with int8 weights, but FBGEMM
has a fast weighted sum of int8 rows, the embedding bag, and `y = sum_k x[k] * W[:, k]`
is one: its rows are the columns of `W`, cut into blocks of outputs whose sums stay in registers.
Each row of a block has a scale and an offset of its own, applied at no extra cost; the activations
stay float32.

This is for decoding alone: the weights are rounded, so whatever is stored must come out of the
full-precision product. That one decodes several rows at a time, too: a bag would read the weights
once a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import Linear

__all__ = ["Int8Decoding"]

#: Outputs a block: 12 registers of 8 sums, as many as FBGEMM keeps through one pass over the rows.
BLOCK_OUTPUTS = 96

#: Behind the numbers of a row stand its scale and its offset, float32 each.
ROW_NBYTES = BLOCK_OUTPUTS + 8

#: Weights of a product from which on an int8 row is used. Against the packed float16 product it was
#: measured 10 % slower at 512 x 512, even at 576 x 576, and 12 to 25 % faster at 960 x 576.
LEAST_WEIGHTS = 1 << 19

#: The distance of two weights must be a float32, too.
LARGEST_WEIGHT = 1e38


class Int8Decoding:
    """Makes the decoding products of one model, which share what depends on their shape alone.

    Raises:
        ValueError: int8 decoding cannot run on `device`, in `compute_dtype` or with this torch.
    """

    def __init__(self, compute_dtype: torch.dtype, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(f"int8 decoding runs on the CPU, and the model is on {device}")
        if compute_dtype is not torch.float32:
            raise ValueError(
                f"int8 decoding calculates in float32, and the compute dtype is {compute_dtype}"
            )
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            raise ValueError(
                "int8 decoding needs FBGEMM, which this CPU or this build of torch lacks"
            )
        self._bags: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def linear(self, weight: Tensor, bias: Tensor | None, full: Linear) -> Linear:
        """One row (1, in) times int8 weights; more rows go through `full`, bit for bit.

        A weight differs from its int8 value by at most `(high - low) / 510 + 1e-8`, `low` and
        `high` being the least and the greatest of the 96 weights that lead from the same input to
        the outputs of its block (zeros fill up the last block). So an output differs from the
        exact one by at most the sum of `abs(x)` times that, and by float32 rounding.

        Takes 13/12 bytes a weight beside `full`.

        Args:
            weight: (out, in), any floating dtype, on the CPU; not kept.
            bias: (out,) or None.
            full: the full-precision product with the same weight and bias.

        Returns:
            `full` itself where int8 is not faster (fewer than `LEAST_WEIGHTS`), or where a weight
            is beyond `LARGEST_WEIGHT` or not a number.
        """
        if weight.numel() < LEAST_WEIGHTS or not bool(weight.abs().max() <= LARGEST_WEIGHT):
            return full
        outputs, inputs = weight.shape
        shape = (-(-outputs // BLOCK_OUTPUTS), inputs)
        if shape not in self._bags:
            self._bags[shape] = _bags(*shape)
        return _Int8Row(weight, bias, full, *self._bags[shape])


class _Int8Row:
    """FBGEMM's weighted sums of int8 rows, one bag a block of outputs.

    indices: int32 (blocks * in,), the row of the table of each summand.
    offsets: int32 (blocks + 1,), where each bag begins in `indices`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        full: Linear,
        indices: Tensor,
        offsets: Tensor,
    ) -> None:
        self._bias = None if bias is None else bias.float()
        self._full, self._outputs = full, weight.shape[0]
        self._indices, self._offsets = indices, offsets
        self._blocks = len(offsets) - 1
        self._table = _table(weight, self._blocks)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] != 1:
            return self._full(x)
        sums: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self._table,
            self._indices,
            self._offsets,
            mode=0,  # a sum, not a mean
            per_sample_weights=x.reshape(-1).repeat(self._blocks),
            include_last_offset=True,
        )
        product = sums.view(1, -1)[:, : self._outputs]
        return product if self._bias is None else product.add_(self._bias)


def _bags(blocks: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Indices and offsets of bags that read the table once, from front to back."""
    rows = blocks * inputs
    offsets = torch.arange(0, rows + 1, inputs, dtype=torch.int32)
    return torch.arange(rows, dtype=torch.int32), offsets


def _table(weight: Tensor, blocks: int) -> Tensor:
    """The quantised columns of `weight`, block by block: uint8 (blocks * in, ROW_NBYTES)."""
    inputs = weight.shape[1]
    table = torch.empty(blocks, inputs, ROW_NBYTES, dtype=torch.uint8)
    for part, rows in zip(torch.split(weight, BLOCK_OUTPUTS), table, strict=True):
        columns = torch.zeros(inputs, BLOCK_OUTPUTS)
        columns[:, : len(part)] = part.t()
        rows.copy_(torch.ops.quantized.embedding_bag_byte_prepack(columns))
    return table.view(blocks * inputs, ROW_NBYTES)
