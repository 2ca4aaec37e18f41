"""Blocks of right checksums whose segments are shorter than their K and V: a writer's bug."""

from __future__ import annotations

import pytest
import torch

from kvrag.store.block import encode_block
from kvrag.store.disk import DiskTier
from kvrag.store.maintenance import read_block

from .test_shared_misses import PASSAGES, ask, open_engine

#: What a block says of itself besides its segments.
NAMES = (
    "key", "kind", "fingerprint", "token_ids", "k_shape", "v_shape", "dtype", "codec",
    "codec_version", "codec_digest",
)  # fmt: skip


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("ram_bytes", [0, 2**26])
@pytest.mark.parametrize("codec", ["int4", "raw"])
def test_it_is_computed_anew_and_replaced(tiny, tmp_path, codec, ram_bytes, kernels):
    """Its padding was taken for numbers, in one place though not in another."""
    options = {"codec": codec, "ram_bytes": ram_bytes, "kernels": kernels}
    with open_engine(tiny("llama"), tmp_path / "home", **options) as engine:
        sound = ask(engine, PASSAGES[:1])
        (key,) = engine.store.keys()
        with DiskTier(tmp_path / "home" / "kv") as disk:
            block = read_block(disk, key)
            header = block.header
            parts = zip(header.segments, block.segments, strict=True)
            cut = [segment[: part.length - 8] for part, segment in parts]
            said = {name: getattr(header, name) for name in NAMES}
            engine.store.put(key, encode_block(segments=cut, **said))
            found = ask(engine, PASSAGES[:1])
            assert found.tiers == ("computed",)
            assert torch.equal(found.logits, sound.logits)
            assert read_block(disk, key).header == header
