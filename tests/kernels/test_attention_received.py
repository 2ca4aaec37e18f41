"""What each key receives from the query rows that count, against the dense reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.kernels.cpu import cpu_kernels
from kvrag.kernels.reference import attention_received as reference
from tests.kernels.test_attention import GROUPS, TOLERANCES, scattered, seen, tensors

CPU = cpu_kernels(None)
attention, attention_received = CPU.attention, CPU.attention_received

WINDOWS = (None, 1, 64)


def check(q, k, v, positions, *, rows=slice(None), scale=None, window=None, atol=1e-12):
    options = {"scale": scale, "window": window}
    mixed, received = attention_received(q, k, v, positions, rows=rows, **options)
    assert torch.equal(mixed, attention(q, k, v, positions, **options)) or len(positions) == 1
    wide = q.double(), k.double(), v.double()
    dense, given_to = reference(*wide, positions, rows=rows, **options)
    torch.testing.assert_close(mixed.double(), dense, atol=atol, rtol=atol)
    # Sums over many rows: each may be off by a rounding.
    assert received.dtype is (torch.float64 if q.dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(received.double(), given_to, atol=atol * 8, rtol=atol * 8)
    return received


@pytest.mark.parametrize(("dtype", "atol", "_"), TOLERANCES)
@pytest.mark.parametrize("count", [1, 63, 65, 130])
@pytest.mark.parametrize("group", GROUPS)
def test_scattered_rows(dtype, atol, _, count, group):
    q, k, v = tensors(2 * group, 2, count, 300, dtype=dtype, seed=count)
    for window in WINDOWS:
        for rows in (slice(None), slice(count // 2, None), slice(3, 64), slice(-1, None)):
            check(q, k, v, scattered(count, 300), rows=rows, window=window, atol=atol)


def test_the_sum_is_of_all_heads_and_counted_rows():
    """Every row gives each head's probabilities, which sum to one."""
    q, k, v = tensors(6, 2, 90, 120)
    for rows, count in ((slice(None), 90), (slice(60, 90), 30), (slice(5, 5), 0)):
        received = check(q, k, v, scattered(90, 120), rows=rows)
        torch.testing.assert_close(float(received.sum()), 6.0 * count)


def test_keys_that_no_counted_row_sees_receive_nothing():
    q, k, v = tensors(4, 2, 70, 200)
    positions = torch.arange(100, 170)
    received = check(q, k, v, positions, rows=slice(0, 20), window=7)
    alone = seen(positions[:20], 200, 7)
    assert not received[~alone].any()
    assert received[alone].gt(0).all()


def test_by_hand():
    """Equal scores: each row shares 1 among the keys it sees."""
    q, k, v = torch.zeros(2, 3, 4), torch.zeros(1, 5, 4), torch.zeros(1, 5, 4)
    _, received = attention_received(q, k, v, torch.tensor([0, 1, 3]))
    expected = [1 + 1 / 2 + 1 / 4, 1 / 2 + 1 / 4, 1 / 4, 1 / 4, 0]
    assert received.tolist() == [2 * share for share in expected]


@pytest.mark.parametrize("rows", [slice(None, None, 2), slice(None, None, -1)])
def test_rows_with_a_step_are_refused(rows):
    q, k, v = tensors(2, 1, 4, 4)
    for kernel in (attention_received, reference):
        with pytest.raises(ValueError, match="without a step"):
            kernel(q, k, v, torch.arange(4), rows=rows)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    keys=st.integers(1, 200),
    group=st.sampled_from([1, 3]),
    window=st.one_of(st.none(), st.integers(1, 12), st.integers(1, 210)),
    scale=st.one_of(st.none(), st.floats(0.01, 4.0)),
)
def test_any_rows_and_positions(data, keys, group, window, scale):
    """What no row sees is NaN, and leaks nowhere."""
    drawn = data.draw(st.sets(st.integers(0, keys - 1), min_size=1), "positions")
    positions = torch.tensor(sorted(drawn))
    bounds = st.integers(-len(drawn) - 1, len(drawn) + 1)
    rows = data.draw(st.slices(len(drawn)) | st.builds(slice, bounds, bounds), "rows")
    rows = slice(rows.start, rows.stop)
    q, k, v = tensors(2 * group, 2, len(drawn), keys, dim=4)
    clean = check(q, k, v, positions, rows=rows, window=window, scale=scale)
    unseen = ~seen(positions, keys, window)
    k[:, unseen], v[:, unseen] = torch.nan, torch.nan
    _, received = attention_received(q, k, v, positions, rows=rows, window=window, scale=scale)
    assert torch.equal(received, clean)
