from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from kvrag.store.codecs import Codec, codec, codec_names
from kvrag.store.errors import BlockFormatError, UnknownCodecError

from .helpers import make_block

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def block_of(k, v, dtype):
    """k, v: (layers, kv_heads, tokens, head_dim)."""
    raw = codec("raw")
    return make_block(
        1,
        tokens=k.shape[2],
        k_shape=k.shape,
        v_shape=v.shape,
        dtype=dtype,
        segments=[raw.encode(k[layer], v[layer], layer=layer) for layer in range(len(k))],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "tokens", "k_dim", "v_dim"), [(3, 7, 64, 64), (1, 1, 3, 5)])
def test_raw_keeps_every_bit(dtype, heads, tokens, k_dim, v_dim):
    size = DTYPES[dtype].itemsize
    # All bit patterns, NaNs and infinities among them.
    k = torch.randint(0, 256, (2, heads, tokens, k_dim * size), dtype=torch.uint8)
    v = torch.randint(0, 256, (2, heads, tokens, v_dim * size), dtype=torch.uint8)
    block = block_of(k.view(DTYPES[dtype]), v.view(DTYPES[dtype]), dtype)
    for layer in range(2):
        got_k, got_v = codec("raw").decode(block.segments[layer], block.header)
        assert got_k.dtype == got_v.dtype == DTYPES[dtype]
        assert got_k.shape == (heads, tokens, k_dim)
        assert got_v.shape == (heads, tokens, v_dim)
        assert torch.equal(got_k.view(torch.uint8), k[layer])
        assert torch.equal(got_v.view(torch.uint8), v[layer])


def test_raw_takes_tensors_of_any_strides():
    k = torch.randn(4, 5, 6).transpose(0, 1)[::2]
    v = torch.randn(5, 4, 6).permute(0, 1, 2)[::2].requires_grad_()
    block = block_of(k[None], v[None], "float32")
    got_k, got_v = codec("raw").decode(block.segments[0], block.header)
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v.detach())


def test_raw_encodes_into_memory_of_its_own():
    k, v = torch.ones(1, 2, 4), torch.ones(1, 2, 4)
    encoded = codec("raw").encode(k, v, layer=0)
    before = bytes(encoded)
    k.zero_()
    assert bytes(encoded) == before


def test_raw_decodes_in_place_and_keeps_the_memory_alive():
    k, v = torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16)
    block = block_of(k, v, "float32")
    header = block.header
    data = bytearray(block.segments[0])
    got_k, _ = codec("raw").decode(memoryview(data).toreadonly(), header)
    data[0:4] = b"\0\0\x80\x3f"
    assert got_k[0, 0, 0] == 1.0  # it is the same memory
    got_k, got_v = codec("raw").decode(bytes(block.segments[0]), header)
    del block, data
    gc.collect()
    assert torch.equal(got_k, k[0])
    assert torch.equal(got_v, v[0])


def test_raw_refuses():
    raw = codec("raw")
    k = torch.randn(1, 2, 4)
    for other_k, other_v in (
        (k, k.half()),
        (k.int(), k.int()),
        (k[0], k[0]),
        (k, torch.randn(1, 3, 4)),
    ):
        with pytest.raises(ValueError, match="raw takes"):
            raw.encode(other_k, other_v, layer=0)
    block = block_of(k[None], k[None], "float32")
    with pytest.raises(BlockFormatError, match="takes 64 bytes, got 63"):
        raw.decode(block.segments[0][:63], block.header)
    odd = make_block(1, dtype="int3")
    with pytest.raises(BlockFormatError, match="not int3"):
        raw.decode(odd.segments[0], odd.header)


def test_an_unknown_codec_names_the_known_ones():
    assert codec_names() == ("raw", "int8", "int4")
    with pytest.raises(UnknownCodecError, match="'zip'; known: raw, int8, int4"):
        codec("zip")
    made: Codec = codec("raw")
    assert (made.name, made.version, made.params_digest) == ("raw", 1, "")


def test_only_codecs_import_torch():
    code = (
        "import sys, kvrag.store.tiered, kvrag.store.ram, kvrag.store.disk, kvrag.store.secret;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"
