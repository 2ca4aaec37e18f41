"""The C kernels against float64 references, and what happens where they cannot be built."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrag.kernels import reference
from kvrag.kernels.errors import KernelsUnavailableError
from kvrag.kernels.native import Int8Weights, empty_huge, load
from kvrag.kernels.native import check as native_check

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

STORED = (torch.float32, torch.bfloat16, torch.float16)
THREADS = (1, 2)
EPS = torch.finfo(torch.float32).eps

# The fixture of each test only resets what a test may have changed.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

sizes = st.integers(1, 70)
seeds = st.integers(0, 2**16)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("native") / "kept"


@pytest.fixture(scope="session")
def native(folder):
    native = load(folder)
    assert native is not None, "the C kernels did not compile; the log says why"
    return native


@pytest.fixture(autouse=True)
def _fresh():
    """Every test that loads, loads anew."""
    load.cache_clear()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(tensor, padding=3):
    """The same numbers in rows that are further apart."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + padding), torch.nan)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def each_thread_count(function):
    """The result, which is the same, bit for bit, with every number of threads."""
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        results.append(function())
    torch.set_num_threads(1)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=0, rtol=0, equal_nan=True)
    return results[0]


def attended(q, k, v, first, last, counted, scale):
    """In float64, by the definition: what rows mix, what keys receive, which keys each row sees."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    columns = torch.arange(k.shape[1])
    visible = (columns >= torch.tensor(first)[:, None]) & (columns < torch.tensor(last)[:, None])
    weights = (scale * q @ k.transpose(1, 2)).masked_fill(~visible, -torch.inf).softmax(-1)
    received = weights[:, counted.start : counted.stop].sum((0, 1))
    return (weights @ v).transpose(0, 1).flatten(1), received, visible


@given(
    n=sizes,
    keys=st.integers(1, 300),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8]),
    dim=st.sampled_from([1, 7, 8, 31, 64, 80, 96]),
    scale=st.sampled_from([None, 0.3, -1.0]),
    padding=st.integers(0, 9),
    seed=seeds,
)
@RELAXED
def test_attend(native, n, keys, kv_heads, group, dim, scale, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, keys, (n,), generator=generator).sort().values
    wide = torch.rand(n, generator=generator) * (keys - first)
    last = torch.maximum(first + 1, (first + 1 + wide).long()).clamp(max=keys).cummax(0).values
    first, last = first.tolist(), last.tolist()
    counted = range(seed % n, n - seed % 3 // 2)
    q = strided(draw(n, kv_heads * group, dim, seed=seed), padding).transpose(0, 1)
    k, v = (strided(draw(kv_heads, keys, dim, seed=seed + i), padding) for i in (1, 2))
    factor = dim**-0.5 if scale is None else scale
    mixed, given_to, visible = attended(q, k, v, first, last, counted, factor)
    # The rounding of a score is relative to it, and is a relative error of its weight.
    greatest = float((q.abs().amax((0, 1)) * k.abs().amax((0, 1))).sum()) * abs(factor)
    slack = EPS * (16 + greatest)
    # Before the first row's keys and behind the last row's anything may stand.
    k[:, : first[0]], k[:, last[-1] :] = torch.nan, torch.nan
    v[:, : first[0]], v[:, last[-1] :] = torch.nan, torch.nan

    def run():
        out, received = torch.full((n, kv_heads * group * dim), torch.nan), torch.ones(keys)
        options = {"scale": scale, "received": received, "counted": counted}
        native.attend(q, k, v, first, last, out, **options)
        alone = torch.empty_like(out)
        native.attend(q, k, v, first, last, alone, scale=scale)
        assert torch.equal(alone, out)
        return out, received

    out, received = each_thread_count(run)
    torch.testing.assert_close(out.double(), mixed, rtol=slack, atol=4 * slack)
    torch.testing.assert_close(received.double(), 1 + given_to, rtol=slack, atol=slack)
    assert (received[~visible[counted.start : counted.stop].any(0)] == 1).all()
    # A row does not depend on those that it is attended with, but for where its blocks begin.
    native.attend(q[:, -1:], k, v, first[-1:], last[-1:], out[:1])
    row, _, _ = attended(q[:, -1:], k.nan_to_num(), v.nan_to_num(), first[-1:], last[-1:],
                         range(1), dim**-0.5)  # fmt: skip
    torch.testing.assert_close(out[:1].double(), row, rtol=1e-5, atol=1e-5)


def test_attention_is_exact_to_a_few_units_where_scores_are(native):
    """Over the whole range of e^x: the scores here are numbers that float32 holds exactly, and each
    key's value is a dimension of its own in turn."""
    keys = 87 * 8
    k = -torch.arange(keys, dtype=torch.float32)[None, :, None] / 8
    received, out = torch.zeros(keys), torch.empty(1, 1)
    options = {"scale": 1.0, "received": received}
    native.attend(torch.ones(1, 1, 1), k, torch.ones_like(k), [0], [keys], out, **options)
    expected = k.flatten().double().softmax(0)
    error = (received.double() / expected - 1).abs()
    # x log2 e is rounded, which is relative to x; the polynomial and the sums are the rest.
    assert (error < EPS * (6 + torch.arange(keys) / 8)).all()
    torch.testing.assert_close(out.item(), 1.0)


@pytest.mark.parametrize("keys", [100, 8000])
def test_attention_does_not_lose_precision_with_length(native, keys):
    """What each block of keys adds must not be off in one direction."""
    q, k, v = draw(6, 17, 64), draw(2, keys, 64, seed=1), draw(2, keys, 64, seed=2)
    first, last = [0] * 17, list(range(keys - 16, keys + 1))
    out = torch.empty(17, 6 * 64)
    native.attend(q, k, v, first, last, out)
    mixed, _, _ = attended(q, k, v, first, last, range(17), 64**-0.5)
    error = (out.double() - mixed.reshape(17, -1)).norm() / mixed.norm()
    assert error < 8 * EPS


@pytest.mark.parametrize("keys", [3, 64, 65, 200])
def test_attention_of_special_scores(native, keys):
    """-inf weighs nothing, also where a whole block is that; NaN stays in its row."""
    v = draw(1, keys, 8)

    def run(scores):
        k, out = torch.zeros(1, keys, 8), torch.empty(2, 8)
        k[0, :, 3] = scores
        # The other row sees the first key alone.
        rows = torch.ones(1, 2, 8)
        native.attend(rows, k, v, [0, 0], [1, keys], out, scale=1.0)
        if scores[0].isfinite():
            torch.testing.assert_close(out[0], v[0, 0])
        return out[1]

    plain = draw(keys, seed=1)
    for at in (0, keys - 1):
        for special in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-42):
            scores = plain.clone()
            scores[at] = special
            torch.testing.assert_close(
                run(scores), scores.softmax(-1) @ v[0], equal_nan=True, rtol=1e-5, atol=1e-6
            )
    # Their distance overflows, which they do not.
    far = torch.full((keys,), -3e38)
    far[-1] = 3e38
    torch.testing.assert_close(run(far), v[0, -1])
    hidden = torch.full((keys,), -torch.inf)
    hidden[-1] = -1e30
    torch.testing.assert_close(run(hidden), v[0, -1])
    hidden[-1] = -torch.inf
    assert run(hidden).isnan().all()


def test_attend_refuses_what_does_not_fit(native):
    q, k, out = torch.zeros(4, 2, 8), torch.zeros(2, 5, 8), torch.full((2, 32), 7.0)
    for first, last in [
        ([0, 0], [1, 6]), ([-1, 0], [5, 5]), ([2, 3], [2, 4]), ([0], [1]), ([1, 0], [2, 2]),
        ([0, 0], [3, 2]), ([0, 0, 0], [1, 1, 1]),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="first and last"):
            native.attend(q, k, k, first, last, out)
    fits = ([0, 0], [1, 5])
    with pytest.raises(ValueError, match="share"):
        native.attend(q[:3], k, k, *fits, out)
    with pytest.raises(ValueError, match="must be"):
        native.attend(q, k, k[..., :4], *fits, out)
    with pytest.raises(ValueError, match="out"):
        native.attend(q, k, k, *fits, out[:1])
    with pytest.raises(ValueError, match="contiguous"):
        native.attend(q, k.transpose(1, 2), k, *fits, out)
    with pytest.raises(ValueError, match="float64"):
        native.attend(q.double(), k, k, *fits, out)
    with pytest.raises(ValueError, match="received has 4"):
        native.attend(q, k, k, *fits, out, received=torch.zeros(4))
    for counted in (range(3), range(0, 2, 2), range(-1, 2)):
        with pytest.raises(ValueError, match="within 2 rows"):
            native.attend(q, k, k, *fits, out, counted=counted)
    assert (out == 7).all()


@given(
    heads=st.integers(1, 4),
    n=sizes,
    dim=st.integers(1, 90),
    dtype=st.sampled_from(STORED),
    partial=st.floats(0, 1),
    scattered=st.booleans(),
    padding=st.integers(0, 5),
    seed=seeds,
)
@RELAXED
def test_rotate_into(native, heads, n, dim, dtype, partial, scattered, padding, seed):
    rotary = int(dim * partial) // 2 * 2
    capacity = n + seed % 40
    x = strided(draw(heads, n, dim, seed=seed, dtype=dtype), padding)
    if seed % 2:  # tokens before heads, as a projection leaves them
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    cos, sin = (
        (draw(capacity + 2, rotary, seed=seed + i) for i in (1, 2)) if rotary else (None,) * 2
    )
    if scattered:
        random = torch.Generator().manual_seed(seed)
        at = positions = torch.randperm(capacity, generator=random)[:n].sort().values
    else:
        start = seed % (capacity - n + 1)
        at, positions = torch.arange(start, start + n), slice(start, start + n)

    def run():
        out = strided(torch.full((heads, capacity, dim), 7.0), padding)
        native.rotate_into(x, cos, sin, out, positions)
        return out

    out = each_thread_count(run)
    expected = torch.full((heads, capacity, dim), 7.0, dtype=torch.float64)
    wide = x.double()
    if rotary:
        half = rotary // 2
        swapped = torch.cat((wide[..., half:rotary], wide[..., :half]), -1)
        turned = wide[..., :rotary] * cos[at].double() + swapped * sin[at].double()
        wide = torch.cat((turned, wide[..., rotary:]), -1)
    expected[:, at] = wide
    torch.testing.assert_close(out.double(), expected, rtol=4 * EPS, atol=8 * EPS * 4)
    if not rotary:
        assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_stored_number_is_widened_exactly(native, dtype):
    """Denormals, infinities and NaN among them."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(4, -1, 64)
    out = torch.empty(x.shape)
    native.rotate_into(x, None, None, out, slice(0, x.shape[1]))
    torch.testing.assert_close(out, x.float(), atol=0, rtol=0, equal_nan=True)


def test_rotating_in_place(native):
    x, cos, sin = draw(2, 9, 24), draw(9, 24, seed=1), draw(9, 24, seed=2)
    out = torch.empty(2, 9, 24)
    native.rotate_into(x, cos, sin, out, slice(0, 9))
    native.rotate_into(x, cos, sin, x, slice(0, 9))
    assert torch.equal(x, out)


def test_rotate_into_refuses_what_does_not_fit(native):
    x, table, out = torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.zeros(2, 5, 8)
    for positions in (torch.tensor([0, 1, 5]), torch.tensor([-1, 0, 1]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"positions|fit"):
            native.rotate_into(x, None, None, out, positions)
    for positions in (slice(3, 6), slice(0, 2), slice(0, 6, 2)):
        with pytest.raises(ValueError, match="positions"):
            native.rotate_into(x, None, None, out, positions)
    with pytest.raises(ValueError, match="serve"):
        native.rotate_into(x, table, table, out, slice(2, 5))
    with pytest.raises(ValueError, match="fit"):
        native.rotate_into(x, None, None, torch.zeros(3, 5, 8), slice(0, 3))
    with pytest.raises(ValueError, match="rotate"):
        native.rotate_into(x.double(), None, None, out, slice(0, 3))


@given(
    n=sizes,
    heads=st.integers(1, 3),
    dim=st.integers(1, 200),
    seed=seeds,
    magnitude=st.sampled_from([1e-25, 1.0, 1e15]),
    padding=st.integers(0, 5),
)
@RELAXED
def test_rms_norm(native, n, heads, dim, seed, magnitude, padding):
    x, weight = strided(magnitude * draw(n, heads, dim, seed=seed), padding), draw(dim, seed=1)
    out = each_thread_count(lambda: native.rms_norm(x, weight, 1e-5))
    expected = F.rms_norm(x.double(), (dim,), weight.double(), 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@given(n=sizes, size=st.integers(1, 200), seed=seeds, magnitude=st.sampled_from([1e-3, 1.0, 30.0]))
@RELAXED
def test_gated(native, activation, n, size, seed, magnitude):
    x = strided(magnitude * draw(n, 2 * size, seed=seed))
    out = each_thread_count(lambda: native.gated(x, activation))
    gate, up = x.double().chunk(2, -1)
    one = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
    slack = EPS * (8 + 4 * float(gate.abs().max()))
    # Where tanh is almost -1, the reference itself cancels.
    torch.testing.assert_close(out.double(), one(gate) * up, rtol=slack, atol=1e-13)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_of_special_numbers(native, activation):
    special = [0.0, -0.0, 88.0, -88.0, 89.0, -89.0, 1e4, -1e4, 3e38, -3e38, torch.inf, torch.nan]
    gate = torch.tensor([special])
    out = native.gated(torch.cat((gate, torch.ones_like(gate)), -1), activation)
    one = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
    # atol: what e^88 makes as small as that may be 0.
    torch.testing.assert_close(out, one(gate), equal_nan=True, rtol=1e-4, atol=1e-30)


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    dim=st.sampled_from([1, 7, 8, 31, 64, 80, 96]),
    seed=seeds,
    window=st.sampled_from([None, 1, 5, 256, 300]),
    scale=st.sampled_from([None, 0.3]),
)
@RELAXED
def test_decode_attention(native, lengths, kv_heads, group, dim, seed, window, scale):
    q = draw(kv_heads * group, len(lengths), dim, seed=seed)
    caches = [[], []]
    for i, length in enumerate(lengths):
        for tensors in caches:
            cache = draw(kv_heads, length + seed % 9, dim, seed=seed + 2 * i + len(tensors))
            # Behind the end and before the window, anything may stand.
            cache[:, length:] = torch.nan
            if window is not None:
                cache[:, : max(0, length - window)] = torch.nan
            tensors.append(strided(cache, seed % 4))
    keys, values = caches

    def run():
        return native.decode_attention(q, keys, values, lengths, scale=scale, window=window)

    out = each_thread_count(run)
    for i, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        k, v = keys[i][:, first:length].double(), values[i][:, first:length].double()
        position = torch.tensor([length - first - 1])
        expected = reference.attention(q[:, i : i + 1].double(), k, v, position, scale=scale)
        torch.testing.assert_close(out[i : i + 1].double(), expected, rtol=1e-5, atol=1e-5)
        # Batch mates change nothing.
        alone = native.decode_attention(
            q[:, i : i + 1], [keys[i]], [values[i]], [length], scale=scale, window=window
        )
        assert torch.equal(alone[0], out[i])


def test_decode_attention_of_special_scores(native):
    """A whole piece that is far below, or at -inf, weighs nothing; NaN stays NaN."""
    q, k, v = torch.ones(2, 1, 8), draw(1, 600, 8), draw(1, 600, 8, seed=1)
    for low in (-1e30, -torch.inf):
        k[:, :300] = low
        out = native.decode_attention(q, [k], [v], [600])
        expected = reference.attention(q, k[:, 300:], v[:, 300:], torch.tensor([299]))
        torch.testing.assert_close(out, expected)
    k[0, 5, 0] = torch.nan
    assert native.decode_attention(q, [k], [v], [600]).isnan().all()


def test_decode_attention_refuses_what_does_not_fit(native):
    q, k = torch.zeros(4, 1, 8), torch.zeros(2, 5, 8)
    for length in (0, 6):
        with pytest.raises(ValueError, match="length"):
            native.decode_attention(q, [k], [k], [length])
    with pytest.raises(ValueError, match="share"):
        native.decode_attention(q[:3], [k], [k], [5])
    with pytest.raises(ValueError, match="must be"):
        native.decode_attention(q, [k], [k[..., :4]], [5])
    with pytest.raises(ValueError, match="need 1"):
        native.decode_attention(q, [k], [k], [5, 5])
    assert native.decode_attention(q[:, :0], [], [], []).shape == (0, 32)


@given(
    outputs=sizes,
    inputs=st.integers(1, 300),
    dtype=st.sampled_from(STORED[1:]),
    seed=seeds,
    biased=st.booleans(),
)
@RELAXED
def test_gemv(native, outputs, inputs, dtype, seed, biased):
    weight, x = draw(outputs, inputs, seed=seed, dtype=dtype), draw(1, inputs, seed=1)
    bias = draw(outputs, seed=2) if biased else None
    got = each_thread_count(lambda: native.gemv(weight, x, bias))
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    scale = F.linear(x.double().abs(), weight.double().abs()) + 3
    assert ((got - expected).abs() <= 16 * EPS * scale).all()


@given(outputs=sizes, groups=st.integers(1, 8), seed=seeds, zeros=st.booleans())
@RELAXED
def test_int8_gemv(native, outputs, groups, seed, zeros):
    weight, x = draw(outputs, 64 * groups, seed=seed), draw(1, 64 * groups, seed=1)
    if zeros:
        weight[:, :64] = 0
    int8 = Int8Weights.of(weight)
    rounded = int8.values.double() * int8.scales.double().repeat_interleave(64, 1)
    most = weight.view(outputs, groups, 64).abs().amax(-1).repeat_interleave(64, 1)
    assert ((rounded - weight).abs() <= most * (1 / 254 + EPS)).all()
    got = each_thread_count(lambda: native.gemv(int8, x))
    scale = F.linear(x.double().abs(), rounded.abs())
    assert ((got - F.linear(x.double(), rounded)).abs() <= 16 * EPS * scale).all()


def test_gemv_refuses_what_does_not_fit(native):
    weight, x = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(1, 64)
    for bad in (weight.float(), weight.double(), weight.t().contiguous().t(), weight[:, :32]):
        with pytest.raises(ValueError, match=r"weight|x \(1, 64\)"):
            native.gemv(bad, x)
    with pytest.raises(ValueError, match="must be"):
        native.gemv(weight, x.expand(2, 64))
    with pytest.raises(ValueError, match="bias has 2"):
        native.gemv(weight, x, torch.zeros(2))


def test_int8_weights_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="multiple of 64"):
        Int8Weights.of(torch.zeros(2, 65))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite"):
            Int8Weights.of(torch.full((2, 64), bad))


@pytest.mark.parametrize(
    ("values", "scales", "says"),
    [
        (torch.zeros(3, 96, dtype=torch.int8), torch.ones(3, 1), "multiple of 64 inputs"),
        (torch.zeros(64, dtype=torch.int8), torch.ones(1), "multiple of 64 inputs"),
        (torch.zeros(3, 128), torch.ones(3, 2), "values .* must be contiguous torch.int8"),
        (torch.zeros(128, 3, dtype=torch.int8).t(), torch.ones(3, 2), "values .* strides"),
        (torch.zeros(3, 128, dtype=torch.int8), torch.ones(3, 1), r"scales .* \(3, 2\)"),
        (torch.zeros(3, 128, dtype=torch.int8), torch.ones(2, 2), r"scales .* \(3, 2\)"),
        (torch.zeros(3, 128, dtype=torch.int8), torch.ones(6), r"scales .* \(3, 2\)"),
        (torch.zeros(3, 128, dtype=torch.int8), torch.ones(3, 2).half(), "scales .* torch.float16"),
        (torch.zeros(3, 128, dtype=torch.int8), torch.ones(2, 3).t(), "scales .* strides"),
        (torch.zeros(3, 128, dtype=torch.int8), torch.ones(3, 2, device="meta"), "on meta"),
    ],
)
def test_int8_weights_are_never_of_a_form_that_native_code_would_misread(values, scales, says):
    """Regression: a product with too few scales read beyond their end."""
    with pytest.raises(ValueError, match=says):
        Int8Weights(values, scales)


def test_two_threads_really_share_large_work(native):
    """Above the size from which work is shared, results are the same, bit for bit."""
    x, weight, k = draw(300, 1030), draw(1030, 1030), draw(3, 4000, 64)
    cos, out = draw(4000, 64), torch.empty(3, 4000, 64)

    def run():
        mixed, received = torch.empty(40, 9, 64), torch.zeros(4000)
        native.rotate_into(k, cos, cos, out, slice(0, 4000))
        native.attend(
            draw(9, 40, 64), k, out, [0] * 40, range(3961, 4001), mixed, received=received
        )
        return (
            mixed,
            received,
            out.clone(),
            native.rms_norm(x, weight[0], 1e-5),
            native.gated(x, "silu"),
            native.decode_attention(draw(9, 1, 64), [k], [out], [3999]),
            native.gemv(weight.bfloat16(), x[:1]),
            native.gemv(Int8Weights.of(weight[:, :1024].contiguous()), x[:1, :1024]),
        )

    each_thread_count(run)


def test_nothing_in_nothing_out(native):
    native.attend(
        torch.empty(4, 0, 8), torch.ones(2, 3, 8), torch.ones(2, 3, 8), [], [], torch.empty(0)
    )
    native.rotate_into(torch.empty(2, 0, 8), None, None, torch.empty(2, 3, 8), slice(1, 1))
    none = torch.empty(0, dtype=torch.int64)
    native.rotate_into(torch.empty(2, 0, 8), None, None, torch.empty(2, 3, 8), none)
    assert native.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert native.gated(torch.empty(0, 8), "silu").shape == (0, 4)
    assert native.gemv(torch.empty(0, 8, dtype=torch.bfloat16), torch.ones(1, 8)).shape == (1, 0)


@pytest.mark.parametrize("shape", [(0, 3), (5,), (3, 1 << 20), (2, 3, 700_000)])
@pytest.mark.parametrize("dtype", STORED)
def test_huge_memory_is_a_tensor_like_any_other(shape, dtype):
    tensor = empty_huge(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert tensor.fill_(1).double().sum() == tensor.numel()


def unavailable(caplog, folder, **options):
    """The one reason in the log why `load` gave nothing, however often it is asked."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load(folder, **options) is None
        assert load(folder, **options) is None
    (record,) = caplog.records
    return record.getMessage()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_library_is_compiled_once_and_found_again(native, folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (library,) = folder.iterdir()
    written = library.stat().st_mtime_ns
    assert load(folder) is not None
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [written]


def compiler_of(path, library):
    """A compiler that is done at once: what it links is `library`."""
    words = f'case " $* " in *" -E "*) cc "$@";; *" -shared "*) cp {library} "$3";; esac'
    return script(path, words)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_library_is_compiled_again(native, folder, tmp_path, damage):
    """A truncated library would kill the process when its missing pages are touched."""
    (library,) = folder.iterdir()
    content = bytearray(library.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    (tmp_path / "kept").mkdir(mode=0o700)
    (tmp_path / "kept" / library.name).write_bytes(content)
    compiler = compiler_of(tmp_path / "cc", library)
    assert load(tmp_path / "kept", compiler=compiler) is not None
    (again,) = (tmp_path / "kept").iterdir()
    assert (again.name, again.read_bytes()) == (library.name, library.read_bytes())


def test_another_compiler_gets_another_library(native, folder, tmp_path):
    """The macros stand for the compiler's version and the CPU's features."""
    before = set(folder.iterdir())
    compiler = compiler_of(tmp_path / "same", *before)
    assert load(folder, compiler=compiler) is not None
    assert set(folder.iterdir()) == before
    other = compiler_of(tmp_path / "other", *before)
    Path(other).write_text(Path(other).read_text().replace('"$@"', '"$@" -DANOTHER_CPU=1'))
    assert load(folder, compiler=other) is not None
    (added,) = set(folder.iterdir()) - before
    added.unlink()


def test_no_compiler(caplog, tmp_path):
    assert "no C compiler 'ccc'" in unavailable(caplog, tmp_path / "kept", compiler="ccc")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("when", ["-E", "-c", "-shared"])
def test_a_compiler_that_fails(caplog, tmp_path, when):
    text = f'for a; do [ "$a" = {when} ] && echo no such CPU >&2 && exit 3; done; exit 0'
    compiler = script(tmp_path / "cc", text)
    reason = unavailable(caplog, tmp_path / "kept", compiler=compiler)
    assert "status 3" in reason
    assert "no such CPU" in reason
    assert list((tmp_path / "kept").glob("*")) == []


def test_a_compiler_that_does_not_run(caplog, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_bytes(b"\x7fELF no program")
    compiler.chmod(0o755)
    assert "did not run" in unavailable(caplog, tmp_path / "kept", compiler=str(compiler))


def test_a_compiler_that_makes_no_library(caplog, tmp_path):
    (tmp_path / "text").write_text("no library")
    compiler = compiler_of(tmp_path / "cc", tmp_path / "text")
    assert "cannot be loaded" in unavailable(caplog, tmp_path / "kept", compiler=compiler)


def test_a_folder_that_cannot_be_written(caplog, tmp_path):
    (tmp_path / "file").write_text("")
    assert "no library can be kept" in unavailable(caplog, tmp_path / "file" / "kept")


def test_a_read_only_folder(caplog):
    """As somebody who is not root, who can write everywhere."""
    nobody, user = 65534, os.geteuid()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "kept")
        folder.mkdir()
        folder.chmod(0o500)
        if user == 0:
            Path(parent).chmod(0o755)
            os.chown(folder, nobody, nobody)
            os.seteuid(nobody)
        try:
            assert "no library can be kept" in unavailable(caplog, folder)
        finally:
            os.seteuid(user)


def test_a_folder_that_others_can_write(caplog, tmp_path):
    """What lies in it would run as this user."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept").chmod(0o770)
    assert "mode 0770" in unavailable(caplog, tmp_path / "kept")


@pytest.mark.parametrize(
    "name", ["attend", "rotate_into", "rms_norm", "gated", "decode_attention", "gemv"]
)
def test_a_kernel_that_calculates_wrongly_is_not_trusted(native, name):
    """The check after loading notices each kernel that is off by a thousandth."""

    class Wrong:
        def __getattr__(self, attribute):
            right = getattr(native, attribute)

            def wrong(*args, **options):
                result = right(*args, **options)
                written = {"attend": 5, "rotate_into": 3}.get(name)
                (result if written is None else args[written]).mul_(1.001)
                return result

            return wrong if attribute == name else right

    with pytest.raises(KernelsUnavailableError, match="off by"):
        native_check.check(Wrong())
