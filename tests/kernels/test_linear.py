"""The product with a stored weight, packed or not, against a plain one in float64."""

from __future__ import annotations

import pytest
import torch

from kvrag.kernels import linear
from kvrag.kernels.linear import row_major
from kvrag.kernels.native import Panels

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
    check_product(outputs, rows, bias, stored, compute, bound, None)


# 6 rows are a group, 20 groups go through a panel of 16 outputs together, 288 inputs at a time.
@pytest.mark.parametrize("outputs", [1, 15, 16, 33, 257])
@pytest.mark.parametrize("inputs", [1, 31, 288, 290, 1000])
@pytest.mark.parametrize("rows", [0, 1, 5, 6, 7, 17, 121, 250])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_native_products(native, outputs, inputs, rows, stored):
    check_product(outputs, rows, rows % 2, stored, torch.float32, 1e-5, native, inputs)


def test_native_products_of_numbers_that_are_far_apart(native):
    """What float16 cannot hold is multiplied as it is, and special numbers stay in their place."""
    weight = numbers(40, 33, dtype=torch.bfloat16)
    weight[3, 5], weight[4, 5], weight[20, 7], weight[21, 8] = 1e30, 1e-30, torch.nan, torch.inf
    x = numbers(9, 33, seed=1)
    product = linear(weight, None, torch.float32, native)(x)
    torch.testing.assert_close(product, x @ weight.float().t(), equal_nan=True)
    assert product[:, [20]].isnan().all()
    assert product[:, [19, 22]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_native_product_depends_on_no_other(native, threads):
    weight, x = numbers(3000, 300, dtype=torch.bfloat16), numbers(130, 300, seed=1)
    product = linear(weight, None, torch.float32, native)
    alone = torch.cat([product(row[None]) for row in x])
    torch.set_num_threads(threads)
    together = product(x)
    torch.set_num_threads(1)
    assert torch.equal(together, alone)


def test_native_products_of_rows_that_are_not_contiguous(native):
    weight, x = numbers(50, 33, dtype=torch.bfloat16), numbers(33, 80, seed=1)
    product = linear(weight, None, torch.float32, native)
    assert torch.equal(product(x.t()), product(x.t().contiguous()))
    wide = numbers(9, 90, seed=2)
    assert torch.equal(product(wide[:, 7:40]), product(wide[:, 7:40].contiguous()))


def test_native_products_refuse_what_does_not_fit(native):
    weight = numbers(8, 33, dtype=torch.bfloat16)
    for x in (numbers(2, 32), numbers(33), numbers(2, 33).double()):
        with pytest.raises(ValueError, match=r"float32 \(n, 33\)"):
            Panels(native, weight)(x)
    for bad in (weight.float(), weight[0]):
        with pytest.raises(ValueError, match="bfloat16 or float16"):
            Panels(native, bad)
    for bias in (numbers(7), numbers(8).double()):
        with pytest.raises(ValueError, match=r"bias must be float32 \(8,\)"):
            Panels(native, weight, bias)


def check_product(outputs, rows, bias, stored, compute, bound, native, inputs=33):
    weight, x = numbers(outputs, inputs, dtype=stored), numbers(rows, inputs, seed=1, dtype=compute)
    added = numbers(outputs, seed=2, dtype=stored) if bias else None
    product = linear(weight, added, compute, native)(x)
    exact = x.double() @ weight.double().t()
    if added is not None:
        exact = exact + added.double()
    assert product.dtype is compute
    torch.testing.assert_close(product.double(), exact, atol=bound * inputs**0.5, rtol=bound)


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
def test_row_major_products(request, outputs, rows, stored, natively):
    native = request.getfixturevalue("native") if natively else None
    weight, x = numbers(outputs, 33, dtype=stored), numbers(rows, 33, seed=1)
    product = row_major(weight, torch.float32, native)(x)
    assert product.dtype is torch.float32
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(product.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_row_major_weight_is_packed_when_several_rows_come(native):
    """The packed head of a large vocabulary takes as much memory again as the embedding."""
    weight, x = numbers(96, 33, dtype=torch.bfloat16), numbers(2, 33, seed=1)
    product = row_major(weight, torch.float32, native)
    one = product(x[:1])
    weight.mul_(2)  # Seen by what reads the weight itself.
    assert torch.equal(product(x[:1]), 2 * one)
    several = product(x)
    torch.testing.assert_close(several[:1], 2 * one)
