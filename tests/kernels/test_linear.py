"""The product with a stored weight, packed or not, against a plain one in float64."""

from __future__ import annotations

import pytest
import torch

from kvrag.kernels import linear

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
