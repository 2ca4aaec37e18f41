"""The product with a stored weight, packed or not, against a plain one in float64."""

from __future__ import annotations

import pytest
import torch

from kvrag.kernels import linear
from kvrag.kernels.linear import row_major
from kvrag.kernels.native import load

needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines,
    reason="this CPU or this build of torch has no FBGEMM",
)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# 8,192 outputs are a part of a packed weight: below, at, and beyond one and two.
@pytest.mark.parametrize("outputs", [1, 7, 96, 8191, 8192, 8193, 16385])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("stored", "compute", "bound"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 1e-5),
        pytest.param(torch.bfloat16, torch.float32, 1e-5, marks=needs_fbgemm),
        pytest.param(torch.float16, torch.float32, 1e-5, marks=needs_fbgemm),
        (torch.bfloat16, torch.bfloat16, 0.1),
    ],
)
def test_products(outputs, rows, bias, stored, compute, bound):
    weight, x = numbers(outputs, 33, dtype=stored), numbers(rows, 33, seed=1, dtype=compute)
    added = numbers(outputs, seed=2, dtype=stored) if bias else None
    product = linear(weight, added, compute)(x)
    exact = x.double() @ weight.double().t()
    if added is not None:
        exact = exact + added.double()
    assert product.dtype is compute
    torch.testing.assert_close(product.double(), exact, atol=bound, rtol=bound)


@needs_fbgemm
@pytest.mark.parametrize("value", [70000.0, float("inf"), float("nan")])
def test_weights_that_float16_cannot_hold_are_not_packed(value):
    weight = numbers(8, 33, dtype=torch.bfloat16)
    weight[3, 5] = value
    x = numbers(2, 33, seed=1)
    product = linear(weight, None, torch.float32)(x)
    torch.testing.assert_close(product, x @ weight.float().t(), equal_nan=True)


@pytest.mark.parametrize("outputs", [1, 96, 8193])
@pytest.mark.parametrize("rows", [0, 1, 2, 5])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("natively", [False, True])
def test_row_major_products(pytestconfig, outputs, rows, stored, natively):
    native = load(pytestconfig.cache.mkdir("kvrag-kernels")) if natively else None
    if natively and native is None:
        pytest.skip("native code cannot be compiled here")
    weight, x = numbers(outputs, 33, dtype=stored), numbers(rows, 33, seed=1)
    product = row_major(weight, torch.float32, native)(x)
    assert product.dtype is torch.float32
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(product.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_row_major_weight_is_packed_when_several_rows_come(pytestconfig):
    """The packed head of a large vocabulary takes as much memory again as the embedding."""
    native = load(pytestconfig.cache.mkdir("kvrag-kernels"))
    if native is None:
        pytest.skip("native code cannot be compiled here")
    weight, x = numbers(96, 33, dtype=torch.bfloat16), numbers(2, 33, seed=1)
    product = row_major(weight, torch.float32, native)
    one = product(x[:1])
    weight.mul_(2)  # Seen by what reads the weight itself.
    assert torch.equal(product(x[:1]), 2 * one)
    several = product(x)
    torch.testing.assert_close(several[:1], 2 * one)
