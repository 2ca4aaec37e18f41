"""What a codec is: K and V of one layer to bytes and back.

A codec knows tensors and one layer. It does not know keys, files, checksums or padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

    from ..header import BlockHeader

__all__ = ["Codec", "Layout", "Unpack"]


class Layout(NamedTuple):
    """How K and V of one layer lie in a segment, at its beginning, for native code.

    dtype: what they are decoded to. shape: (kv_heads, tokens, head_dim), of K and of V. bits: 0
    for numbers in C order, K then V; 4 or 8 for codes as `grouped` describes them, with `groups` of
    tokens that share K's scales and `parts` of a row of V.
    """

    dtype: torch.dtype
    shape: tuple[int, int, int]
    bits: int = 0
    groups: int = 0
    parts: int = 1


class Codec(Protocol):
    """Encodes one layer. Immutable and thread-safe.

    `name`, `version` and `params_digest` are part of every block key: change the bytes a codec
    makes, and one of them must change.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def params_digest(self) -> str:
        """Digest of the parameters; empty if there are none."""
        ...

    def encode(self, k: torch.Tensor, v: torch.Tensor, *, layer: int) -> Buffer:
        """One layer's segment, without padding, in memory of its own.

        k: (kv_heads, tokens, head_dim), v: (kv_heads, tokens, head_dim_v), same dtype, any device,
        any strides. Raises `UnencodableError` for what the codec does not take.
        """
        ...

    def decode(self, buffer: Buffer, header: BlockHeader) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, of the shapes and dtype in `header`, on the CPU.

        `buffer` is one segment, with or without its padding, already verified. The tensors may
        alias it: they are read-only by contract. Raises `BlockFormatError` if they do not fit.
        """
        ...

    def layout(self, header: BlockHeader) -> Layout | None:
        """How a block's segments hold K and V; None where `decode` alone can tell."""
        ...


class Unpack(Protocol):
    """Decodes one layer of codes, for codecs whose decoding is worth native code."""

    def __call__(
        self,
        layer: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        bits: int,
        groups: int,
        parts: int,
    ) -> int:
        """Fill `k` and `v`, and return how many bytes a layer of these codes takes.

        If that is more than there are, `k` and `v` are left as they were.

        Args:
            layer: uint8 (n,), a segment as `grouped` describes it, or more than that.
            k, v: bfloat16 or float32 (kv_heads, tokens, head_dim), contiguous.
            bits: 4 or 8. groups: of tokens, that share K's scales. parts: of a row of V.
        """
        ...
