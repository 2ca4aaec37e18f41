"""int8 and int4: how far from what was given, how many bytes, and which bytes."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.store.codecs import GroupedCodec, codec
from kvrag.store.codecs.bits import ceil_bfloat16, floor_bfloat16, join, split
from kvrag.store.codecs.hadamard import block_width, hadamard, parts
from kvrag.store.codecs.torch_unpack import group_ends
from kvrag.store.errors import BlockFormatError, UnencodableError, UnknownCodecError

#: What rounding a scale to bfloat16 adds to a step, and the last rounding to a number's size.
SCALE, LAST = 1 + 2**-7, {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float64: 2**-20}


def header_of(k, v):
    return SimpleNamespace(
        k_shape=(1, *k.shape), v_shape=(1, *v.shape), dtype=str(k.dtype).removeprefix("torch.")
    )


def both_ways(made, k, v, layer=0):
    encoded = made.encode(k, v, layer=layer)
    return *made.decode(encoded, header_of(k, v)), encoded


def draw(*shape, seed=0, dtype=torch.float32):
    """Channels of sizes and means that differ, as K's do."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randn(shape[-1], generator=random).exp()
    middles = 5 * torch.randn(shape[-1], generator=random)
    return (torch.randn(shape, generator=random) * sizes + middles).to(dtype)


@given(
    heads=st.integers(1, 3),
    tokens=st.integers(0, 400),
    k_dim=st.integers(1, 130),
    v_dim=st.sampled_from([1, 5, 8, 24, 64, 80, 96, 128, 256]),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
    every=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_what_comes_back_is_within_half_a_step(
    heads, tokens, k_dim, v_dim, bits, dtype, size, every, seed
):
    k = draw(heads, tokens, k_dim, seed=seed, dtype=dtype) * size
    v = draw(heads, tokens, v_dim, seed=seed + 1, dtype=dtype) * size
    channels = list(range(0, k_dim, every))
    fine = [[channels if head else [] for head in range(heads)]] if bits == 4 else ()
    got_k, got_v, _ = both_ways(GroupedCodec(bits, fine=fine), k, v)
    assert (got_k.dtype, got_k.shape) == (dtype, k.shape)
    assert (got_v.dtype, got_v.shape) == (dtype, v.shape)
    levels = torch.full((heads, k_dim), 2.0**bits - 1)
    for head, of_head in enumerate(fine[0] if fine else ()):
        levels[head, of_head] = 255
    start = 0
    for end in group_ends(tokens, min(tokens, max(1, tokens // 128))):
        wide, got = k[:, start:end].double(), got_k[:, start:end].double()
        low, high = wide.amin(1), wide.amax(1)
        # The lowest level is a bfloat16 below the lowest number.
        reach = high - low + low.abs() * 2**-7
        largest = wide.abs().amax(1) * LAST[dtype]
        bound = reach / levels / 2 * SCALE + largest
        assert bool(((got - wide).abs() <= bound[:, None]).all())
        start = end
    count = parts(v_dim)
    block = block_width(v_dim // count)
    shape = (heads, tokens, count, v_dim // count)
    wide, got = v.double().view(shape), got_v.double().view(shape)
    step = hadamard(wide, block).abs().amax(-1) * 2 / (2**bits - 1) * SCALE
    last = wide.square().sum(-1).sqrt() * LAST[dtype]
    bound = (shape[-1] / block) ** 0.5 * step / 2 + last
    # The transform spreads an error, so that the bound is one of the whole part.
    assert bool(((got - wide).square().sum(-1).sqrt() <= bound * (1 + 1e-5)).all())


def test_the_error_against_raw():
    """Relative squared error on normal numbers, 256 tokens, 3 heads of 64."""
    random = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, 256, 64, generator=random)
    fine = [[list(range(0, 64, 8))] * 3]
    found = {}
    for made in (codec("int8"), codec("int4", fine=fine)):
        got_k, got_v, _ = both_ways(made, k, v)
        found[made.name] = [float((got - x).square().mean()) for got, x in ((got_k, k), (got_v, v))]
    assert found["int8"] == pytest.approx([4.0e-5, 3.5e-5], rel=0.3)
    assert found["int4"] == pytest.approx([1.0e-2, 8.6e-3], rel=0.3)


@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (1, 256), (8, 128)])
@pytest.mark.parametrize("tokens", [64, 100, 127, 128, 255, 256, 500, 2048])
def test_bytes_of_raw(heads, dim, tokens):
    """At most 29 % with an eighth of the channels fine, 53 % with 8 bits."""
    k = draw(heads, tokens, dim, dtype=torch.bfloat16)
    raw = len(codec("raw").encode(k, k, layer=0))
    fine = [[list(range(0, dim, 8))] * heads]
    assert len(codec("int4", fine=fine).encode(k, k, layer=0)) <= 0.29 * raw
    assert len(codec("int8").encode(k, k, layer=0)) <= 0.53 * raw


def test_constants_are_kept():
    """A channel that does not vary, zeros, and numbers next to the least there are."""
    for constant in (0.0, 3.0, -0.75, 1e30, -1e-40):
        k = torch.full((2, 9, 16), constant)
        for made in (codec("int8"), codec("int4")):
            got_k, got_v, _ = both_ways(made, k, torch.zeros_like(k))
            torch.testing.assert_close(got_k, k, rtol=2**-11, atol=1e-41)
            assert not bool(got_v.any())
            stored = k.bfloat16()
            assert torch.equal(both_ways(made, stored, stored)[0], stored)


def test_tensors_of_any_strides_into_memory_of_its_own():
    k = draw(5, 4, 6).transpose(0, 1)[::2]
    v = draw(5, 4, 6).transpose(0, 1)[::2].requires_grad_()
    for made in (codec("int8"), codec("int4")):
        encoded = made.encode(k, v, layer=0)
        assert bytes(encoded) == bytes(made.encode(k.contiguous(), v.detach().clone(), layer=0))
    given = draw(1, 3, 8)
    encoded = codec("int8").encode(given, given, layer=0)
    before = bytes(encoded)
    given.zero_()
    assert bytes(encoded) == before


def test_what_it_refuses():
    fine = [[[0, 3], [1]]]
    made, k = GroupedCodec(4, fine=fine), draw(2, 3, 4)
    for value in (torch.nan, torch.inf, -torch.inf, 2e36):
        bad = k.clone()
        bad[1, 2, 3] = value
        for pair in ((bad, k), (k, bad)):
            with pytest.raises(UnencodableError, match="takes finite numbers up to 1e\\+36"):
                made.encode(*pair, layer=0)
    with pytest.raises(UnencodableError, match="holds inf"):
        made.encode(k.double() * 1e60, k.double(), layer=0)
    for pair in (
        (k.half(), k.half()),
        (k, k.double()),
        (k[0], k[0]),
        (k, k[:, :2]),
        (k[..., :0],) * 2,
    ):
        with pytest.raises(UnencodableError, match="int4 takes K and V of"):
            made.encode(*pair, layer=0)
    with pytest.raises(UnencodableError, match="not of layer 1"):
        made.encode(k, k, layer=1)
    with pytest.raises(UnencodableError, match="with 1 heads"):
        made.encode(k[:1], k[:1], layer=0)
    with pytest.raises(UnencodableError, match="of only 3"):
        made.encode(k[..., :3], k, layer=0)
    for wrong in ([[[1, 0]]], [[[2, 2]]], [[[-1]]]):
        with pytest.raises(UnencodableError, match="must ascend"):
            GroupedCodec(4, fine=wrong)
    for bits, channels in ((8, fine), (3, ())):
        with pytest.raises(UnencodableError, match="4 or 8 bits"):
            GroupedCodec(bits, fine=channels)
    with pytest.raises(UnknownCodecError, match="raw takes no fine channels"):
        codec("raw", fine=fine)


def test_a_layer_that_is_too_short():
    fine = [[[0, 3], [1]]]
    for made in (GroupedCodec(4, fine=fine), GroupedCodec(8)):
        k = draw(2, 3, 4)
        encoded = bytes(made.encode(k, k, layer=0))
        padded = made.decode(encoded + bytes(99), header_of(k, k))
        assert torch.equal(padded[0], made.decode(encoded, header_of(k, k))[0])
        for length in (0, 5, len(encoded) - 1):
            with pytest.raises(BlockFormatError, match=f"got {length}"):
                made.decode(encoded[:length], header_of(k, k))
    with pytest.raises(BlockFormatError, match="not float16"):
        made.decode(encoded, SimpleNamespace(k_shape=(1,), v_shape=(1,), dtype="float16"))


def test_parameters_are_in_the_digest_and_in_the_bytes():
    """Who decodes needs no parameters; blocks of others have other keys."""
    k, v = draw(1, 5, 8), draw(1, 5, 8, seed=1)
    made, plain = GroupedCodec(4, fine=[[[1, 6]]]), GroupedCodec(4)
    assert plain.params_digest == codec("int8").params_digest == ""
    digests = {GroupedCodec(4, fine=[[c]]).params_digest for c in ([1, 6], [1], [6])}
    assert len(digests | {""}) == 4
    encoded = made.encode(k, v, layer=0)
    for one, other in zip(
        *(c.decode(encoded, header_of(k, v)) for c in (made, plain)), strict=True
    ):
        assert torch.equal(one, other)


# ---- the format, which must not change without a new version ----------------------------------


def golden_layer():
    """Numbers that every machine has exactly."""
    k = ((torch.arange(2 * 300 * 40) * 7919) % 1009 - 500).view(2, 300, 40) / 64
    v = ((torch.arange(2 * 300 * 80) * 6007) % 1013 - 506).view(2, 300, 80) / 64
    return k, v


def test_golden_bytes():
    k = torch.tensor([[[0.0, 1.0, -1.0], [15.0, 2.5, -1.0]]])
    v = torch.tensor([[[1.0, 1.0], [4.0, 0.0]]])
    _, _, encoded = both_ways(GroupedCodec(4, fine=[[[1]]]), k, v)
    assert bytes(encoded).hex(" ") == GOLDEN
    digests = {}
    for name, fine in (("int8", ()), ("int4", ()), ("int4", [[[0, 7, 39], [5]]])):
        made = codec(name, fine=fine)
        k, v = golden_layer()
        got_k, got_v, encoded = both_ways(made, k, v)
        digest = hashlib.sha256(encoded)
        digest.update(got_k.bfloat16().view(torch.uint8).numpy())
        digest.update(got_v.bfloat16().view(torch.uint8).numpy())
        digests[name, bool(fine)] = digest.hexdigest()[:32]
    assert digests == GOLDEN_DIGESTS


GOLDEN = "00 00 80 3f 80 bf 80 3f c1 3b 00 00 89 3e 09 3f 02 00 00 00 0f 0f 0f 8f ff"
GOLDEN_DIGESTS = {
    ("int8", False): "eb0510951878e673bc1f5a8cf4879d7d",
    ("int4", False): "a0fd52a3e86a6a910d834420530a7705",
    ("int4", True): "ff59625a353cb0146b8df3ae81407758",
}


# ---- pieces ------------------------------------------------------------------------------------


@given(st.floats(0, 2.0**120, width=32), st.booleans())
def test_scales_are_rounded_to_the_safe_side(x, negative):
    given_x = torch.tensor([-x if negative else x])
    low = floor_bfloat16(given_x)
    assert torch.equal(low.bfloat16().float(), low)
    assert given_x - given_x.abs() * 2**-7 - 2e-40 <= low <= given_x
    if not negative:
        step = ceil_bfloat16(given_x)
        assert torch.equal(step.bfloat16().float(), step)
        assert given_x <= step <= given_x * (1 + 2**-7) + 2e-40


@pytest.mark.parametrize("n", [0, 1, 2, 7, 64])
def test_codes_join_and_split(n):
    codes = torch.randint(0, 16, (3, n), dtype=torch.uint8)
    joined = join(codes, 4)
    assert joined.shape == (3, (n + 1) // 2)
    assert torch.equal(split(joined, n, 4), codes)
    assert torch.equal(split(join(codes * 17, 8), n, 8), codes * 17)


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_hadamard_is_sylvesters_matrix(block):
    x = torch.randint(-9, 9, (5, 3 * block)).float()
    signs = torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    )
    expected = (x.view(5, 3, block) @ signs).view(5, -1)
    assert torch.equal(hadamard(x, block), expected)
    assert torch.equal(hadamard(expected, block), x * block)


def test_parts_of_a_row():
    assert [(parts(d), block_width(d // parts(d))) for d in (1, 64, 65, 80, 96, 128, 130, 256)] == [
        (1, 1), (1, 64), (1, 1), (2, 8), (2, 16), (2, 64), (1, 2), (4, 64)
    ]  # fmt: skip
