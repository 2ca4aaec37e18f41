"""What can go wrong in the store.

    StoreError
    ├── InvalidKeyError   (ValueError)  text or parts that make no block key
    ├── SecretError                     the file of the key secret cannot be used
    ├── EncryptionKeyError (ValueError) no such key, or not the one of this home
    ├── UnknownCodecError (ValueError)  no codec has that name
    ├── UnencodableError  (ValueError)  K and V, or parameters, that a codec does not take
    ├── BlockFormatError  (ValueError)  bytes that are no sound block: bounds, types, checksums
    ├── DamagedBlockError               no tier has a sound copy of an opened block (any more)
    └── TierError                       a tier is out of service; carries its name
        └── TierFullError               … for writing: no space, read-only, or too large a block

A miss is none of these: it is `None`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .keys import BlockKey

__all__ = [
    "BlockFormatError",
    "DamagedBlockError",
    "EncryptionKeyError",
    "InvalidKeyError",
    "SecretError",
    "StoreError",
    "TierError",
    "TierFullError",
    "UnencodableError",
    "UnknownCodecError",
]


class StoreError(Exception):
    """Base of everything the store raises on purpose."""


class InvalidKeyError(StoreError, ValueError):
    """Text or parts that make no block key."""


class SecretError(StoreError):
    """The file of the key secret is malformed or cannot be read or made."""


class EncryptionKeyError(StoreError, ValueError):
    """The encryption key is malformed, missing, or not the one that the home was made with."""


class UnknownCodecError(StoreError, ValueError):
    """No codec is registered under the name."""


class UnencodableError(StoreError, ValueError):
    """K and V, or parameters, that a codec does not take: shape, dtype, NaN, infinity."""


class BlockFormatError(StoreError, ValueError):
    """Bytes that are no sound block. The message is a sentence that says what is wrong."""


class DamagedBlockError(StoreError):
    """No tier holds a sound copy of a block that was opened.

    `key` is the block's, `tier` the name of the tier that was read last, `reason` a sentence. The
    damaged copies are already quarantined: compute the block again and put it.
    """

    def __init__(self, key: BlockKey, tier: str, reason: str) -> None:
        super().__init__(f"block {key} cannot be read any more (last tried {tier}): {reason}")
        self.key = key
        self.tier = tier
        self.reason = reason


class TierError(StoreError):
    """A tier is out of service. `tier` is its name; the cause is chained."""

    def __init__(self, tier: str, reason: str) -> None:
        super().__init__(f"tier {tier}: {reason}")
        self.tier = tier
        self.reason = reason


class TierFullError(TierError):
    """A tier cannot take a block. Reading from it still works.

    The device behind it is full or may not be written, or the block is larger than the tier can
    hold.
    """
