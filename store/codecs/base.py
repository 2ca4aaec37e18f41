"""What a codec is: K and V of one layer to bytes and back.

A codec knows tensors and one layer. It does not know keys, files, checksums or padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

    from ..header import BlockHeader

__all__ = ["Codec", "Unpack"]


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

    def layers(
        self, buffer: Buffer, header: BlockHeader
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V of all layers, (layers, kv_heads, tokens, head_dim), in the memory of `buffer`.

        None from a codec that must decode, and where they do not fit the header.

        `buffer` is all segments in one piece, padding included, which need not be verified yet:
        nothing is read. All segments are of one length, and those of a layer lie in its own.
        Read-only by contract.
        """
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
