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
FIRST = torch.zeros(1, dtype=torch.int64)

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


def softmax(scores, first, last, scale=1.0):
    """In float64, by the definition."""
    columns, period = torch.arange(scores.shape[1]), len(first)
    repeated = [bound.repeat(len(scores) // period)[:, None] for bound in (first, last)]
    visible = (columns >= repeated[0]) & (columns < repeated[1])
    return (scores.double() * scale).masked_fill(~visible, -torch.inf).softmax(-1), visible


@given(
    group=st.integers(1, 4),
    period=sizes,
    columns=st.integers(1, 600),
    seed=seeds,
    scale=st.sampled_from([0.125, 1.0, 40.0]),
    padding=st.integers(0, 9),
)
@RELAXED
def test_softmax_of_ranges(native, group, period, columns, seed, scale, padding):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, columns, (period,), generator=generator)
    last = first + 1 + (torch.rand(period, generator=generator) * (columns - first)).long()
    last = last.clamp(max=columns)
    counted = range(seed % period, period - seed % 3 // 2)
    clean = draw(group * period, columns, seed=seed)
    expected, visible = softmax(clean, first, last, scale)
    # What a row does not see may be NaN.
    given_scores = strided(clean.masked_fill(~visible, torch.nan), padding)

    def run():
        scores, received = given_scores.clone(), torch.ones(columns)
        native.softmax_rows_(scores, first, last, scale=scale, received=received, counted=counted)
        return scores, received

    scores, received = each_thread_count(run)
    # The scores' own rounding is a relative error as large as they are.
    slack = 8 * EPS * (1 + 8 * scale)
    torch.testing.assert_close(scores.double(), expected, rtol=slack, atol=1e-37)
    assert (scores[~visible] == 0).all()
    rows = expected.view(group, period, columns)[:, counted.start : counted.stop]
    torch.testing.assert_close(
        received.double(), 1 + rows.sum((0, 1)), rtol=slack + group * period * EPS, atol=1e-6
    )


def test_softmax_is_exact_to_two_units_where_scores_are(native):
    """Over the whole range of e^x: the scores here are numbers that float32 holds exactly."""
    scores = -torch.arange(0, 87 * 64, dtype=torch.float32)[None] / 64
    expected, _ = softmax(scores, FIRST, torch.tensor([scores.shape[1]]))
    native.softmax_rows_(scores, FIRST, torch.tensor([scores.shape[1]]))
    error = (scores.double() / expected - 1).abs()
    # x log2 e is rounded, which is relative to x; the polynomial and the sum are the rest.
    assert (error < EPS * (3 + 0.75 * torch.arange(error.shape[1]) / 64)).all()


@pytest.mark.parametrize("columns", [3, 8, 9, 40, 100])
def test_softmax_of_special_scores(native, columns):
    def run(row):
        row = row[None].clone()
        native.softmax_rows_(row, FIRST, torch.tensor([columns]))
        return row[0]

    plain = draw(columns)
    for at in (0, columns - 1):
        for special in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-42):
            row = plain.clone()
            row[at] = special
            torch.testing.assert_close(run(row), row.softmax(-1), equal_nan=True)
    hidden = torch.full((columns,), -torch.inf)
    assert run(hidden).isnan().all()
    hidden[1] = -1e30
    assert run(hidden).tolist() == [float(j == 1) for j in range(columns)]
    assert run(torch.arange(columns) * -200.0).tolist()[1:] == [0.0] * (columns - 1)


def test_softmax_refuses_ranges_outside(native):
    scores = torch.zeros(4, 5)
    for first, last in [([0], [6]), ([-1], [5]), ([2], [2]), ([0, 0, 0], [1, 1, 1]), ([0], [1, 2])]:
        with pytest.raises(ValueError, match=r"first|divides"):
            native.softmax_rows_(scores, torch.tensor(first), torch.tensor(last))
    with pytest.raises(ValueError, match="scale"):
        native.softmax_rows_(scores, FIRST, FIRST + 5, scale=0)
    with pytest.raises(ValueError, match="contiguous"):
        native.softmax_rows_(scores.t(), FIRST, FIRST + 4)
    with pytest.raises(ValueError, match="float64"):
        native.softmax_rows_(scores.double(), FIRST, FIRST + 5)
    assert (scores == 0).all()


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
    scores, last = draw(130, 1024), torch.arange(900, 1030).clamp(max=1024)
    first = torch.zeros(130, dtype=torch.int64)
    x, weight, k = draw(300, 1030), draw(1030, 1030), draw(3, 4000, 64)
    cos, out = draw(4000, 64), torch.empty(3, 4000, 64)

    def run():
        weights, received = scores.clone(), torch.zeros(1024)
        native.softmax_rows_(weights, first, last, received=received)
        native.rotate_into(k, cos, cos, out, slice(0, 4000))
        return (
            weights,
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
    native.softmax_rows_(torch.empty(0, 4), FIRST[:0], FIRST[:0])
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
    "name", ["softmax_rows_", "rotate_into", "rms_norm", "gated", "decode_attention", "gemv"]
)
def test_a_kernel_that_calculates_wrongly_is_not_trusted(native, name):
    """The check after loading notices each kernel that is off by a thousandth."""

    class Wrong:
        def __getattr__(self, attribute):
            right = getattr(native, attribute)

            def wrong(*args, **options):
                result = right(*args, **options)
                written = {"softmax_rows_": 0, "rotate_into": 3}.get(name)
                (result if written is None else args[written]).mul_(1.001)
                return result

            return wrong if attribute == name else right

    with pytest.raises(KernelsUnavailableError, match="off by"):
        native_check.check(Wrong())
