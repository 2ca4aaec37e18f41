"""What every implementation of the kernels must pass, held against the reference in float64.

Tolerances are of the dtype: scores, weights and results are rounded to it. A subclass names the
implementation and the dtypes, which `conftest.py` gives to its tests. Sizes are odd on purpose,
and small, because one implementation runs in an interpreter here.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from kvrag.kernels import Kernels
from kvrag.kernels.reference import KERNELS as REFERENCE

NAN = float("nan")
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}

#: heads, kv_heads, query rows, keys, head_dim, window
ATTENTION = [
    (1, 1, 1, 1, 16, None),
    (3, 1, 3, 3, 64, None),
    (8, 2, 17, 17, 80, None),
    (4, 4, 5, 64, 96, None),
    (6, 2, 65, 65, 16, None),
    (3, 1, 20, 130, 64, None),
    (8, 1, 1, 300, 16, None),
    (3, 3, 3, 3, 16, 1),
    (8, 2, 17, 65, 80, 7),
    (3, 1, 64, 130, 64, 64),
    (8, 1, 9, 300, 16, 20),
    (4, 1, 30, 64, 96, 1000),
]
#: rows, head_dim, rotary_dim
ROTATED = [(1, 16, 16), (3, 80, 20), (17, 96, 48), (65, 64, 64)]


def draw(*shape, dtype, seed=0, strided=False):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    wide = torch.randn(*shape, 2, generator=generator, dtype=torch.float64).to(dtype)
    return wide[..., 0] if strided else wide[..., 0].contiguous()


def scattered(rows, keys):
    generator = torch.Generator().manual_seed(rows)
    return torch.randperm(keys, generator=generator)[:rows].sort().values


def seen(positions, keys, window):
    distance = positions[:, None] - torch.arange(keys)
    return ((distance >= 0) & (distance < (window or keys))).any(dim=0)


def wide(tensors):
    return [tensor.double() for tensor in tensors]


class KernelsContract:
    kernels: ClassVar[Kernels]
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    def close(self, ours, expected, dtype, times=1):
        assert ours.shape == expected.shape
        tolerance = TOLERANCE[dtype] * times
        torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)

    @pytest.mark.parametrize(("heads", "kv_heads", "rows", "keys", "dim", "window"), ATTENTION)
    def test_attention(self, dtype, heads, kv_heads, rows, keys, dim, window):
        """Of scattered rows, with what the keys receive; what no row sees is NaN."""
        q = draw(heads, rows, dim, dtype=dtype, strided=rows % 2 == 0)
        k, v = (draw(kv_heads, keys, dim, dtype=dtype, seed=s, strided=s == 2) for s in (1, 2))
        positions = scattered(rows, keys)
        unseen = ~seen(positions, keys, window)
        k[:, unseen], v[:, unseen] = NAN, NAN
        counted = slice(rows // 3, None)
        mixed, received = self.kernels.attention_received(
            q, k, v, positions, rows=counted, window=window
        )
        k, v = (torch.where(unseen[:, None], 0.0, tensor) for tensor in (k, v))
        expected = REFERENCE.attention_received(
            *wide((q, k, v)), positions, rows=counted, window=window
        )
        assert mixed.dtype is dtype
        self.close(mixed, expected[0], dtype)
        # A sum over rows and heads.
        self.close(received, expected[1], dtype, times=8)
        assert received.dtype is (dtype if dtype is torch.float64 else torch.float32)

    @pytest.mark.parametrize("window", [None, 5])
    def test_attention_alone_is_the_same(self, window):
        q, k, v = (draw(h, 40, 16, dtype=torch.float32, seed=h) for h in (4, 2, 2))
        positions, options = torch.arange(40), {"window": window, "scale": 0.5}
        mixed = self.kernels.attention(q, k, v, positions, **options)
        both, received = self.kernels.attention_received(
            q, k, v, positions, rows=slice(3, 3), **options
        )
        assert torch.equal(mixed, both)
        assert not received.any()
        expected = REFERENCE.attention(*wide((q, k, v)), positions, **options)
        self.close(mixed, expected, torch.float32)

    def test_a_step_between_counted_rows_is_refused(self):
        q, k, v = (draw(2, 4, 16, dtype=torch.float32) for _ in range(3))
        with pytest.raises(ValueError, match="without a step"):
            self.kernels.attention_received(q, k, v, torch.arange(4), rows=slice(0, 4, 2))

    @pytest.mark.parametrize("window", [None, 1, 20])
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "dim", "lengths"),
        [
            (3, 1, 64, (130,)),
            (8, 1, 16, (1,)),
            (6, 2, 80, (1, 17, 65, 300)),
            (4, 4, 96, (33, 7)),
        ],
    )
    def test_decode_attention(self, dtype, heads, kv_heads, dim, lengths, window):
        """Sequences of all lengths, whose caches are NaN behind them."""
        q = draw(heads, len(lengths), dim, dtype=dtype)
        keys, values = (
            [draw(kv_heads, n + 1 + n % 40, dim, dtype=dtype, seed=seed) for n in lengths]
            for seed in (1, 2)
        )
        expected = REFERENCE.decode_attention(
            q.double(), wide(keys), wide(values), lengths, window=window
        )
        for tensors in (keys, values):
            for tensor, length in zip(tensors, lengths, strict=True):
                tensor[:, length:] = NAN
                tensor[:, : max(0, length - (window or length))] = NAN
        ours = self.kernels.decode_attention(q, keys, values, lengths, window=window)
        assert ours.dtype is dtype
        self.close(ours, expected, dtype)

    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(("rows", "dim", "rotary_dim"), ROTATED)
    def test_rotate_into(self, dtype, stored, rows, dim, rotary_dim):
        x = draw(2, rows, dim, dtype=stored, strided=rows % 2 == 0)
        angles = draw(200, rotary_dim // 2, dtype=torch.float64)
        cos = angles.cos().repeat(1, 2).to(dtype)
        sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(dtype)
        for positions in (slice(5, 5 + rows), scattered(rows, 140)):
            for tables in ((cos, sin), (None, None)):
                out = torch.full((2, 150, dim), NAN, dtype=dtype)
                expected = out.double()
                self.kernels.rotate_into(x, *tables, out, positions)
                wide_tables = [None if table is None else table.double() for table in tables]
                REFERENCE.rotate_into(x.double(), *wide_tables, expected, positions)
                assert torch.equal(out.isnan(), expected.isnan())
                self.close(out.nan_to_num(), expected.nan_to_num(), dtype)

    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("heads", "rows", "dim"), [(1, 1, 16), (3, 65, 80), (2, 17, 64)])
    def test_deviation(self, dtype, stored, heads, rows, dim):
        fresh = draw(heads, rows, dim, dtype=dtype)
        stored = draw(heads, rows, dim, dtype=stored, seed=1, strided=True)
        ours = self.kernels.deviation(fresh, stored)
        assert ours.dtype is (dtype if dtype is torch.float64 else torch.float32)
        # The inputs' dtypes are exact here: the sum is not of the dtype of `fresh`.
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        self.close(ours, REFERENCE.deviation(fresh.double(), stored.double()), exact)

    @pytest.mark.parametrize("shape", [(1, 16), (3, 576), (2, 5, 80)])
    def test_rms_norm(self, dtype, shape):
        x = 30 * draw(*shape, dtype=dtype, strided=True)
        weight = draw(
            shape[-1], dtype=torch.float64 if dtype is torch.float64 else torch.float32, seed=1
        )
        ours = self.kernels.rms_norm(x, weight, 1e-5)
        assert ours.dtype is dtype
        self.close(ours, REFERENCE.rms_norm(x.double(), weight.double(), 1e-5), dtype)

    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    @pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 1536), (2, 2500)])
    def test_gated(self, dtype, activation, rows, size):
        gate_up = 4 * draw(rows, 2 * size, dtype=dtype, strided=rows == 2)
        gate_up[0, :4] = torch.tensor([-80.0, 80.0, 0.0, -0.0], dtype=dtype)
        before = gate_up.clone()
        ours = self.kernels.gated(gate_up, activation)
        assert ours.dtype is dtype
        self.close(ours, REFERENCE.gated(gate_up.double(), activation), dtype)
        assert torch.equal(gate_up, before)

    def test_no_rows(self):
        q, k = torch.empty(4, 0, 16), torch.randn(2, 3, 16)
        none = torch.empty(0, dtype=torch.int64)
        mixed, received = self.kernels.attention_received(q, k, k, none)
        assert mixed.shape == self.kernels.attention(q, k, k, none).shape == (0, 64)
        assert received.tolist() == [0, 0, 0]
        assert self.kernels.deviation(q, q).shape == (0,)
        assert self.kernels.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
        assert self.kernels.gated(torch.empty(0, 8), "silu").shape == (0, 4)
        self.kernels.rotate_into(k[:, :0], None, None, k.clone(), slice(2, 2))
