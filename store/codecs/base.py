"""What a codec is: K and V of one layer to bytes and back.

A codec knows tensors and one layer. It does not know keys, files, checksums or padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

    from ..header import BlockHeader

__all__ = ["Codec"]


class Codec(Protocol):
    """Encodes one layer. Stateless and thread-safe.

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

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> Buffer:
        """One layer's segment, without padding, in memory of its own.

        k: (kv_heads, tokens, head_dim), v: (kv_heads, tokens, head_dim_v), same dtype, any device,
        any strides. Raises `ValueError` for another shape or dtype than the codec takes.
        """
        ...

    def decode(self, buffer: Buffer, header: BlockHeader) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, of the shapes and dtype in `header`, on the CPU.

        `buffer` is one segment, with or without its padding, already verified. The tensors may
        alias it: they are read-only by contract. Raises `BlockFormatError` if they do not fit.
        """
        ...
