"""The blocked attention kernel against its dense reference, and the choice of a compute dtype."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.kernels import compute_dtype
from kvrag.kernels.cpu import cpu_kernels
from kvrag.kernels.reference import attention as reference

attention = cpu_kernels(None).attention

TOLERANCES = [
    # Held against the reference in float64; bfloat16 rounds scores, weights and result to 8 bits.
    (torch.float64, 1e-12, 1e-12),
    (torch.float32, 1e-5, 1e-5),
    (torch.bfloat16, 2e-2, 2e-2),
]
ROWS = (1, 7, 63, 64, 65, 130, 257)
GROUPS = (1, 3, 8)
WINDOWS = (None, 1, 5, 64, 100)


def tensors(heads, kv_heads, rows, keys, dim=16, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, rows, dim), (kv_heads, keys, dim), (kv_heads, keys, dim))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def scattered(rows, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(keys, generator=generator)[:rows].sort().values


def check(q, k, v, positions, window, atol=1e-12, rtol=1e-12, scale=None):
    out = attention(q, k, v, positions, scale=scale, window=window)
    assert out.dtype is q.dtype
    assert out.shape == (q.shape[1], q.shape[0] * q.shape[2])
    # In float64, so that the tolerance is of the kernel alone.
    wide = q.double(), k.double(), v.double()
    dense = reference(*wide, positions, scale=scale, window=window)
    torch.testing.assert_close(out.double(), dense, atol=atol, rtol=rtol)
    return out


def seen(positions, keys, window):
    """Which keys some row sees, by the definition of the mask: bool (keys,)."""
    distance = positions[:, None] - torch.arange(keys)
    return ((distance >= 0) & (distance < (window or keys))).any(dim=0)


def check_unseen(q, k, v, positions, window, scale=None):
    """NaN in K and V wherever no row looks, and the result is the same, bit for bit."""
    clean = check(q, k, v, positions, window, scale=scale)
    k, v = k.clone(), v.clone()
    unseen = ~seen(positions, k.shape[1], window)
    k[:, unseen], v[:, unseen] = torch.nan, torch.nan
    assert torch.equal(attention(q, k, v, positions, scale=scale, window=window), clean)
    return int(unseen.sum())


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("group", GROUPS)
def test_scattered_rows(dtype, atol, rtol, rows, group):
    q, k, v = tensors(2 * group, 2, rows, 300, dtype=dtype, seed=rows)
    for window in WINDOWS:
        check(q, k, v, scattered(rows, 300, seed=group), window, atol, rtol)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("before", [0, 1, 64, 99])
def test_contiguous_tail(rows, before):
    keys = before + rows
    q, k, v = tensors(6, 2, rows, keys)
    for window in WINDOWS:
        check(q, k, v, torch.arange(before, keys), window)


@pytest.mark.parametrize("window", WINDOWS)
def test_positions_at_block_borders(window):
    """Blocks whose first row is far from, next to, or at the last key of the block before."""
    q, k, v = tensors(4, 2, 130, 400)
    for gap_at in (63, 64, 65):
        positions = torch.cat((torch.arange(gap_at), torch.arange(200, 330 - gap_at)))
        check(q[:, : len(positions)], k, v, positions, window)
    first_and_last = torch.tensor([0, 399])
    check(q[:, :2], k, v, first_and_last, window)
    far = torch.cat((torch.arange(64), torch.tensor([399])))
    check(q[:, :65], k, v, far, window)


@pytest.mark.parametrize("window", [None, 5])
def test_inputs_that_are_not_contiguous(window):
    q, k, v = tensors(6, 2, 70, 90)
    strided_q = q.transpose(0, 1).contiguous().transpose(0, 1)
    roomy_k = torch.full((2, 200, 16), torch.nan, dtype=q.dtype)
    roomy_v = roomy_k.clone()
    roomy_k[:, :90], roomy_v[:, :90] = k, v
    wide = torch.stack((q, q), dim=-1)[..., 0]
    positions = scattered(70, 90)
    plain = attention(q, k, v, positions, window=window)
    for strided in (strided_q, wide):
        assert not strided.is_contiguous()
        out = attention(strided, roomy_k[:, :90], roomy_v[:, :90], positions, window=window)
        torch.testing.assert_close(out, plain, atol=1e-12, rtol=1e-12)


def test_what_a_row_may_not_see_takes_no_part():
    """Keys behind a row's position may hold anything, a number or not."""
    q, k, v = tensors(4, 2, 3, 100)
    positions = torch.tensor([10, 40, 70])
    out = attention(q, k, v, positions)
    k, v = k.clone(), v.clone()
    k[:, 71:], v[:, 71:] = torch.nan, torch.nan
    torch.testing.assert_close(attention(q, k, v, positions), out, atol=0, rtol=0)
    k[:, 41:71] = 1e3
    v[:, 41:71] = -1e3
    torch.testing.assert_close(attention(q, k, v, positions)[:2], out[:2], atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 7, 63, 64, 65])
@pytest.mark.parametrize(
    "positions",
    [
        [0],
        [399],
        [150],
        [10, 399],
        [5, 6, 7, 200, 201, 390],
        list(range(0, 400, 40)),
        list(range(0, 400, 65)),
        list(range(0, 400, 3)),
        [*range(60), *range(300, 390)],
        [*range(64), 399],
        [0, *range(130, 194), *range(260, 325), 398],
        list(range(100, 230)),
    ],
    ids=lambda positions: f"{len(positions)} from {positions[0]} to {positions[-1]}",
)
def test_keys_outside_of_all_windows_are_never_touched(positions, window):
    """They may hold NaN: where fusion loads nothing, the cache is undefined. 0 × NaN is NaN."""
    q, k, v = tensors(6, 2, len(positions), 400, dim=8)
    unseen = check_unseen(q, k, v, torch.tensor(positions), window)
    if positions[-1] < 399 or window == 1:
        assert unseen


def test_one_row_reads_its_window_alone():
    q, k, v = tensors(8, 2, 1, 100)
    for position, window in ((99, 5), (50, 5), (50, 1), (50, None), (3, 5), (0, 1)):
        check_unseen(q, k, v, torch.tensor([position]), window)


@pytest.mark.parametrize("scale", [None, 0.015625, 1.0, 3.0, 168**-0.5])
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("window", [None, 5])
def test_scale(scale, rows, window):
    q, k, v = tensors(6, 2, rows, 90)
    positions = scattered(rows, 90)
    out = check(q, k, v, positions, window, scale=scale)
    # The scale is of the scores, and head_dim ** -0.5 where none is given.
    plain = attention(q * (16**-0.5 if scale is None else scale), k, v, positions, scale=1.0)
    if window is None:
        torch.testing.assert_close(out, plain, atol=1e-12, rtol=1e-12)


def test_the_reference_by_hand():
    """Two rows, three keys, one head: what the dense form itself is held against."""
    q = torch.tensor([[[2.0], [1.0]]], dtype=torch.float64)
    k = torch.tensor([[[1.0], [0.0], [3.0]]], dtype=torch.float64)
    v = torch.tensor([[[10.0], [20.0], [40.0]]], dtype=torch.float64)
    positions = torch.tensor([1, 2])
    one = (math.exp(1) * 10 + 20) / (math.exp(1) + 1)
    two = (math.exp(0.5) * 10 + 20 + math.exp(1.5) * 40) / (math.exp(0.5) + 1 + math.exp(1.5))
    two_near = (20 + math.exp(1.5) * 40) / (1 + math.exp(1.5))
    for kernel in (reference, attention):
        out = kernel(q, k, v, positions, scale=0.5)
        torch.testing.assert_close(out.flatten().tolist(), [one, two])
        out = kernel(q, k, v, positions, scale=0.5, window=2)
        torch.testing.assert_close(out.flatten().tolist(), [one, two_near])
        out = kernel(q, k, v, positions, scale=0.5, window=1)
        torch.testing.assert_close(out.flatten().tolist(), [20.0, 40.0])


def test_inputs_are_left_as_they_were():
    given_tensors = tensors(4, 2, 70, 90)
    before = [tensor.clone() for tensor in given_tensors]
    attention(*given_tensors, scattered(70, 90), window=7)
    for tensor, old in zip(given_tensors, before, strict=True):
        assert torch.equal(tensor, old)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    keys=st.integers(1, 200),
    group=st.sampled_from([1, 2, 3, 8]),
    kv_heads=st.sampled_from([1, 2]),
    window=st.one_of(st.none(), st.integers(1, 12), st.integers(1, 210)),
    scale=st.one_of(st.none(), st.floats(0.01, 4.0)),
)
def test_any_sorted_positions(data, keys, group, kv_heads, window, scale):
    """Few and scattered, or in runs; what no row sees is NaN."""
    some = st.sets(st.integers(0, keys - 1), min_size=1)
    runs = st.lists(
        st.tuples(st.integers(0, keys - 1), st.integers(1, 80)), min_size=1, max_size=4
    ).map(lambda made: {p for begin, n in made for p in range(begin, min(begin + n, keys))})
    positions = torch.tensor(sorted(data.draw(some | runs, "positions")))
    q, k, v = tensors(group * kv_heads, kv_heads, len(positions), keys, dim=4)
    check_unseen(q, k, v, positions, window, scale)


@pytest.mark.parametrize(
    ("stored", "capability", "computed"),
    [
        (torch.bfloat16, "avx512_bf16", torch.bfloat16),
        (torch.bfloat16, "amx_bf16", torch.bfloat16),
        (torch.bfloat16, "arm_bf16", torch.bfloat16),
        (torch.bfloat16, "avx2", torch.float32),
        (torch.bfloat16, "avx512_fp16", torch.float32),
        (torch.float16, "avx512_fp16", torch.float16),
        (torch.float16, "amx_fp16", torch.float16),
        (torch.float16, "avx512_bf16", torch.float32),
        (torch.float32, "avx512_bf16", torch.float32),
        (torch.float64, "avx2", torch.float64),
    ],
)
def test_compute_dtype_by_capability(monkeypatch, stored, capability, computed):
    """This machine has one set of instructions; the others are told to it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    assert compute_dtype(stored, torch.device("cpu")) is computed


def test_compute_dtype_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert compute_dtype(torch.bfloat16, torch.device("cuda")) is torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert compute_dtype(torch.bfloat16, torch.device("cpu")) is torch.float32
