"""Many chunks into a cache in one native call, against one `rotate_into` of torch for each."""

from __future__ import annotations

import pytest
import torch

from kvrag.kernels import reference
from kvrag.kernels.native import put_chunks


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def caches(heads, capacity, dim):
    """K and V of one layer, as they lie in a cache, and what stands in nobody's positions."""
    whole = torch.full((3, 2, heads, capacity, dim), 7.0)
    return whole, whole[1, 0], whole[1, 1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("heads", "dim", "rotary"), [(1, 8, 8), (3, 64, 64), (2, 27, 20), (2, 5, 0)]
)
@pytest.mark.parametrize("dtypes", [["bfloat16"], ["float32", "float16", "bfloat16"]])
def test_chunks_land_where_each_alone_would(native, threads, heads, dim, rotary, dtypes):
    chunks, at = [], 2
    for i, n in enumerate([1, 7, 0, 31, 32, 33, 100, 700]):
        dtype = getattr(torch, dtypes[i % len(dtypes)])
        # K in tokens before heads and V in rows that are further apart, as some are.
        k = draw(n, heads, dim, seed=i, dtype=dtype).transpose(0, 1)
        v = draw(heads, n, dim + 3, seed=i + 50, dtype=dtype)[..., :dim]
        chunks.append((k, v, at))
        at += n + i % 3
    cos, sin = draw(at + 5, rotary, seed=98), draw(at + 5, rotary, seed=99)
    tables = (cos, sin) if rotary else None
    expected, k_slow, v_slow = caches(heads, at, dim)
    for k, v, start in chunks:
        place = slice(start, start + k.shape[1])
        reference.rotate_into(k, *(tables or (None, None)), k_slow, place)
        reference.rotate_into(v, None, None, v_slow, place)
    whole, into_k, into_v = caches(heads, at, dim)
    torch.set_num_threads(threads)
    put_chunks(native, chunks[::-1], tables, into_k, into_v)
    torch.set_num_threads(1)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(into_v, v_slow)


def test_rows_that_are_not_contiguous_and_no_chunks_at_all(native):
    k, v = draw(2, 8, 5, dtype=torch.bfloat16).transpose(1, 2), draw(2, 8, 5, seed=1).bfloat16()
    whole, into_k, into_v = caches(2, 9, 8)
    put_chunks(native, [], None, into_k, into_v)
    assert (whole == 7).all()
    put_chunks(native, [(k, v.transpose(1, 2), 4)], None, into_k, into_v)
    assert torch.equal(into_k[:, 4:], k.float())
    assert torch.equal(into_v[:, 4:], v.transpose(1, 2).float())
    assert (whole[:, :, :, :4] == 7).all()


def test_what_does_not_fit_is_refused_and_nothing_is_written(native):
    whole, into_k, into_v = caches(2, 9, 8)
    fits = (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), 0)
    tables = (torch.zeros(9, 8), torch.zeros(9, 8))
    for k, v, start in [
        (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), 7),
        (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), -1),
        (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8), 0),
        (torch.zeros(2, 3, 8), torch.zeros(2, 2, 8), 0),
        (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8).half(), 0),
        (torch.zeros(2, 3, 8).double(), torch.zeros(2, 3, 8).double(), 0),
    ]:
        with pytest.raises(ValueError, match=r"positions|chunks must be|cannot place"):
            put_chunks(native, [fits, (k, v, start)], tables, into_k, into_v)
    for short in ((torch.zeros(2, 8),) * 2, (torch.zeros(9, 10),) * 2, (torch.zeros(9, 7),) * 2,
                  (torch.zeros(9, 8), torch.zeros(8, 8)), (torch.zeros(8, 9).t(),) * 2,
                  (torch.zeros(9, 8).double(),) * 2):  # fmt: skip
        with pytest.raises(ValueError, match=r"positions|serve|contiguous|float32"):
            put_chunks(native, [fits], short, into_k, into_v)
    for k, v in ((into_k, into_v[:, :8]), (into_k.double(), into_v.double()),
                 (into_k.transpose(1, 2), into_v.transpose(1, 2))):  # fmt: skip
        with pytest.raises(ValueError, match=r"alike|float32"):
            put_chunks(native, [], None, k, v)
    assert (whole == 7).all()
