"""`int8` and `int4`: K by channel in groups of tokens, V by token behind a Hadamard transform.

K's channels differ far more than its tokens do, and V's the other way round (KIVI, arXiv
2402.02750, section 3), so K has one `low` and `step` a channel and group of 128 to 255 tokens, and
V one `step` a token and part of at most 64 channels. Under `int4` the channels of K that bring most
noise to the attention scores, `fine`, have 8 bits: they are chosen once a model (FireQ, arXiv
2505.20839, has 8 bits for outlier pairs; K is stored un-rotated here, so single channels will do).

One segment, numbers little-endian, everything in C order and without gaps:

    K's scales   bfloat16 (kv_heads, groups, 2, head_dim): low, step; number = low + step * code
    V's steps    bfloat16 (kv_heads, tokens, parts): number = (code - middle) * step, middle being
                 7.5 or 127.5, then the transform (`hadamard`) over the widest power of two that
                 divides a part, divided by that
    fine         kv_heads times ceil(head_dim / 8) bytes: bit d % 8 of byte d // 8 is channel d
    K's rows     a head after the other, a row a token: codes of 4 or 8 bits (`bits.join`), and
                 with 4 bits behind them 4 low bits of each fine channel, whose code's high bits
                 stand among the others
    V's rows     (kv_heads, tokens) rows of codes

Group g of n ends before token (g + 1) * tokens // n. Scales are rounded to the safe side, so that
every number of K is within half a step. V's steps are those of least squared error among a few.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UnencodableError
from .base import Layout
from .bits import ceil_bfloat16, floor_bfloat16, join
from .hadamard import block_width, hadamard, parts
from .memory import check_length, check_pair, dtype_of, joined, tensor_over
from .torch_unpack import group_ends, torch_unpack

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..header import BlockHeader
    from .base import Unpack

__all__ = ["GroupedCodec"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
#: Least tokens that share K's scales. Groups of half that are no better (docs/codecs.md).
GROUP_TOKENS = 128
#: Sums of 64 numbers and distances of two stay far from the end of float32.
LARGEST = 1e36
#: Which shares of V's greatest magnitude the outermost level is tried at.
_CLIPPED = {4: (1.0, 0.95, 0.9, 0.85), 8: (1.0,)}


class GroupedCodec:
    """Takes and gives bfloat16, float32 and float64; calculates in float32.

    Args:
        bits: 4 or 8.
        fine: with 4 bits, for each layer the channels of K, by head, that have 8.
        unpack: what decodes bfloat16 and float32; torch, if none is given.

    Raises:
        UnencodableError: other bits, `fine` without 4 bits, or channels that do not ascend from 0.
    """

    version = 1

    def __init__(
        self,
        bits: int,
        *,
        fine: Sequence[Sequence[Sequence[int]]] = (),
        unpack: Unpack | None = None,
    ) -> None:
        if bits not in (4, 8) or (fine and bits != 4):
            raise UnencodableError(f"codes have 4 or 8 bits, and fine channels beside 4: {bits}")
        self._bits, self._unpack = bits, unpack or torch_unpack
        self._fine = [[list(head) for head in layer] for layer in fine]
        for head in (head for layer in self._fine for head in layer):
            if sorted(set(head)) != head or (head and head[0] < 0):
                raise UnencodableError(f"fine channels must ascend from 0 or more, got {head}")
        self.name = f"int{bits}"
        self.params_digest = (
            hashlib.blake2b(repr(self._fine).encode(), digest_size=16).hexdigest()
            if self._fine
            else ""
        )

    def encode(self, k: Tensor, v: Tensor, *, layer: int) -> Buffer:
        """See `Codec.encode`.

        Raises:
            UnencodableError: another shape or dtype, a number that is not finite or beyond 1e36,
                or heads and channels that the fine ones were not chosen for.
        """
        check_pair(self.name, k, v, _DTYPES)
        k, v = self._numbers("K", k), self._numbers("V", v)
        fine = self._fine_mask(layer, k)
        scales, codes = self._k_codes(k, fine)
        steps, v_codes = self._v_codes(v)
        rows = [self._k_rows(head, mask) for head, mask in zip(codes, fine, strict=True)]
        masks = _mask_bytes(fine)
        v_rows = join(v_codes, self._bits)
        return joined((scales.bfloat16(), steps.bfloat16(), masks, *rows, v_rows))

    def decode(self, buffer: Buffer, header: BlockHeader) -> tuple[Tensor, Tensor]:
        """See `Codec.decode`; K and V have memory of their own."""
        dtype = dtype_of(self.name, header.dtype, _DTYPES)
        layer = tensor_over(buffer)
        k = torch.empty(header.k_shape[1:], dtype=dtype)
        v = torch.empty(header.v_shape[1:], dtype=dtype)
        unpack = torch_unpack if dtype is torch.float64 else self._unpack
        groups, count = _groups(k.shape[1]), parts(v.shape[2])
        needed = unpack(layer, k, v, bits=self._bits, groups=groups, parts=count)
        check_length(len(layer), needed)
        return k, v

    def layout(self, header: BlockHeader) -> Layout | None:
        """See `Codec.layout`."""
        dtype = _DTYPES.get(header.dtype)
        if dtype is None or header.k_shape != header.v_shape:
            return None
        _, heads, tokens, dim = header.k_shape
        shape = heads, tokens, dim
        return Layout(dtype, shape, self._bits, _groups(tokens), parts(dim))

    def _numbers(self, name: str, x: Tensor) -> Tensor:
        wide = x.detach().to("cpu", torch.float32).contiguous()
        if not bool((wide.abs() <= LARGEST).all()):
            raise UnencodableError(
                f"{self.name} takes finite numbers up to {LARGEST:g}, and {name} holds "
                f"{'NaN' if bool(wide.isnan().any()) else f'{wide.abs().max():g}'}"
            )
        return wide

    def _fine_mask(self, layer: int, k: Tensor) -> Tensor:
        """bool (heads, head_dim)."""
        heads, _, dim = k.shape
        mask = torch.zeros(heads, dim, dtype=torch.bool)
        if not self._fine:
            return mask
        if layer >= len(self._fine) or len(self._fine[layer]) != heads:
            raise UnencodableError(
                f"{self.name} has fine channels of {len(self._fine)} layers, and not of layer "
                f"{layer} with {heads} heads"
            )
        for row, channels in zip(mask, self._fine[layer], strict=True):
            if channels and channels[-1] >= dim:
                raise UnencodableError(f"{self.name} has fine channels {channels} of only {dim}")
            row[channels] = True
        return mask

    def _k_codes(self, k: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (heads, groups, 2, head_dim) and codes, uint8, the shape of K."""
        heads, tokens, dim = k.shape
        most = torch.where(fine, 255.0, 2.0**self._bits - 1)  # (heads, head_dim)
        scales = torch.empty(heads, _groups(tokens), 2, dim)
        codes = torch.empty(k.shape, dtype=torch.uint8)
        start = 0
        for group, end in enumerate(group_ends(tokens, _groups(tokens))):
            numbers = k[:, start:end]
            low = floor_bfloat16(numbers.amin(1))
            step = ceil_bfloat16((numbers.amax(1) - low) / most)
            codes[:, start:end] = _nearest(numbers - low[:, None], step[:, None], most[:, None])
            scales[:, group, 0], scales[:, group, 1] = low, step
            start = end
        return scales, codes

    def _k_rows(self, codes: Tensor, fine: Tensor) -> Tensor:
        """Rows of one head."""
        if self._bits == 8:
            return codes
        high = torch.where(fine, codes >> 4, codes)
        return torch.cat((join(high, 4), join(codes[:, fine] & 15, 4)), dim=-1)

    def _v_codes(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Steps (heads, tokens, parts) and codes, uint8, the shape of V."""
        heads, tokens, dim = v.shape
        most, count = 2.0**self._bits - 1, parts(dim)
        spread = hadamard(v.view(heads, tokens, count, dim // count), block_width(dim // count))
        reach = spread.abs().amax(-1, keepdim=True) * 2 / most
        best = _Rounded(spread, ceil_bfloat16(reach), most)
        for share in _CLIPPED[self._bits][1:]:
            best.improve(ceil_bfloat16(reach * share))
        return best.step[..., 0], best.codes.view(v.shape)


class _Rounded:
    """The codes of V of least squared error so far, part by part."""

    def __init__(self, numbers: Tensor, step: Tensor, most: float) -> None:
        self._numbers, self._most = numbers, most
        self.step = step
        self.codes, self._error = self._tried(step)

    def improve(self, step: Tensor) -> None:
        codes, error = self._tried(step)
        better = error < self._error
        self.step = torch.where(better, step, self.step)
        self.codes = torch.where(better, codes, self.codes)
        self._error = torch.where(better, error, self._error)

    def _tried(self, step: Tensor) -> tuple[Tensor, Tensor]:
        middle = self._most / 2
        codes = _nearest(self._numbers + middle * step, step, torch.tensor(self._most))
        error = self._numbers - (codes.float() - middle) * step
        return codes, error.square().sum(-1, keepdim=True)


def _groups(tokens: int) -> int:
    return min(tokens, max(1, tokens // GROUP_TOKENS))


def _nearest(above: Tensor, step: Tensor, most: Tensor) -> Tensor:
    """Codes of numbers above the lowest level; 0 where the step is 0."""
    whole = (above / torch.where(step > 0, step, torch.ones_like(step))).round()
    return torch.minimum(whole.clamp(min=0), most).to(torch.uint8)


def _mask_bytes(mask: Tensor) -> Tensor:
    """bool (heads, n) to uint8 (heads, ceil(n / 8)), the lowest bit first."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8))
    places = 1 << torch.arange(8)
    return (padded.view(len(mask), -1, 8) * places).sum(-1).to(torch.uint8)
