"""Native decoding of int8 and int4 gives what torch gives, and refuses what it cannot trust."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.kernels.native import NativeUnpack, load
from kvrag.store.codecs import GroupedCodec
from kvrag.store.codecs.hadamard import parts
from kvrag.store.codecs.torch_unpack import torch_unpack

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def unpack(tmp_path_factory):
    native = load(tmp_path_factory.mktemp("native") / "kept")
    assert native is not None, "the C kernels did not compile; the log says why"
    return NativeUnpack(native)


def outputs(k, v, dtype):
    return torch.full(k.shape, 7, dtype=dtype), torch.full(v.shape, 7, dtype=dtype)


@given(
    heads=st.integers(1, 3),
    tokens=st.integers(0, 300),
    k_dim=st.integers(1, 130),
    v_dim=st.sampled_from([1, 5, 8, 24, 64, 80, 96, 128, 256]),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    every=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_as_torch(unpack, heads, tokens, k_dim, v_dim, bits, dtype, every, seed):
    random = torch.Generator().manual_seed(seed)
    k = torch.randn(heads, tokens, k_dim, generator=random)
    v = torch.randn(heads, tokens, v_dim, generator=random)
    fine = [[list(range(head, k_dim, every)) for head in range(heads)]] if bits == 4 else ()
    encoded = GroupedCodec(bits, fine=fine).encode(k, v, layer=0)
    layer = torch.frombuffer(bytearray(bytes(encoded) + bytes(9)), dtype=torch.uint8)
    sizes = {"bits": bits, "groups": min(tokens, max(1, tokens // 128)), "parts": parts(v_dim)}
    expected, got = outputs(k, v, dtype), outputs(k, v, dtype)
    assert unpack(layer, *got, **sizes) == torch_unpack(layer, *expected, **sizes) == len(encoded)
    assert all(map(torch.equal, got, expected))  # every product is exact
    cut = layer[: max(0, len(encoded) - 1)]
    left = outputs(k, v, dtype)
    if len(encoded):
        # Of a layer that ends too soon nothing is decoded, wherever it ends.
        assert unpack(cut, *left, **sizes) > len(cut)
        assert unpack(cut[: len(cut) // 2], *left, **sizes) > len(cut) // 2
        assert bool((left[0] == 7).all())
        assert bool((left[1] == 7).all())


def test_refusals(unpack):
    layer, k = torch.zeros(999, dtype=torch.uint8), torch.zeros(2, 3, 8)
    sizes = {"bits": 4, "groups": 1, "parts": 1}
    for arguments, wrong in (
        ((layer.char(), k, k), {}),
        ((layer, k.double(), k.double()), {}),
        ((layer, k, k.bfloat16()), {}),
        ((layer, k, k[:1]), {}),
        ((layer, k.transpose(0, 1), k), {}),
        ((layer, k[..., :0].contiguous(), k), {}),
        ((layer, k, k), {"bits": 5}),
        ((layer, k, k), {"groups": 4}),
        ((layer, k, k), {"groups": 0}),
        ((layer, k, k), {"parts": 3}),
        ((layer, k, k), {"parts": 0}),
    ):
        with pytest.raises(ValueError, match=r"must be|bits|groups|one at least"):
            unpack(*arguments, **(sizes | wrong))
