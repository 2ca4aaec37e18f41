"""int8 decoding products against the dense product, within the bound that they promise."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from kvrag.kernels import Int8Decoding, linear
from kvrag.kernels.int8 import BLOCK_OUTPUTS, LEAST_WEIGHTS

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines,
    reason="this torch or this CPU has no FBGEMM",
)

#: (out, in), each large enough for int8: whole blocks, one output more or less, odd, one block.
SHAPES = [(960, 576), (961, 577), (1151, 512), (97, 8191), (1, LEAST_WEIGHTS), (LEAST_WEIGHTS, 1)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoding(weight, bias=None):
    """The int8 product and the full one, the weight being large enough for int8."""
    full = linear(weight, bias, torch.float32)
    product = Int8Decoding(torch.float32, CPU).linear(weight, bias, full)
    assert product is not full
    return product, full


def bound(weight, x):
    """What the docstring promises for each output: float64 (out,)."""
    outputs = len(weight)
    padded = F.pad(weight.double(), (0, 0, 0, -outputs % BLOCK_OUTPUTS))
    blocks = padded.view(-1, BLOCK_OUTPUTS, weight.shape[1])
    error = (blocks.amax(1) - blocks.amin(1)) / 510 + 1e-8  # (blocks, in)
    rounding = 1e-6 * blocks.abs().amax(1)
    limit = (error + rounding) @ x.double().abs()
    return limit.repeat_interleave(BLOCK_OUTPUTS)[:outputs]


def check(weight, x, bias=None):
    product, _ = decoding(weight, bias)
    out = product(x)
    assert out.dtype is torch.float32
    assert out.shape == (1, len(weight))
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    excess = (out.double() - exact).abs()[0] - bound(weight, x[0])
    assert excess.max() <= 0, f"output {excess.argmax()} is {excess.max()} beyond the bound"
    return out, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_row_keeps_the_bound(shape, dtype):
    out, exact = check(normal(*shape, dtype=dtype), normal(1, shape[1], seed=1))
    # Not the full product by accident: rounded, and by little.
    error = (out - exact).norm() / exact.norm()
    assert 1e-5 < error < 1e-2 or shape[0] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias(dtype):
    bias = 100 * normal(961, seed=2, dtype=dtype)
    check(normal(961, 577, dtype=dtype), normal(1, 577, seed=1), bias)
    assert torch.equal(bias, 100 * normal(961, seed=2, dtype=dtype))


def test_large_inputs_and_outputs_keep_the_bound():
    weight = normal(960, 576)
    weight[:, 7] *= 1000
    weight[100] *= 1000
    x = normal(1, 576, seed=1)
    x[0, 3] = 1e4
    check(weight, x)


def test_a_large_weight_costs_nothing_to_other_inputs_and_blocks():
    weight, x = normal(960, 576), normal(1, 576, seed=1)
    plain, _ = check(weight, x)
    weight[5, 9] = 1e4
    marred, _ = check(weight, x)
    assert torch.equal(marred[:, BLOCK_OUTPUTS:], plain[:, BLOCK_OUTPUTS:])
    x[0, 9] = 0
    unmarred, _ = check(weight, x)
    plain, _ = check(normal(960, 576), x)
    beside = torch.arange(960) != 5
    torch.testing.assert_close(unmarred[:, beside], plain[:, beside], rtol=0, atol=1e-5)


def test_constant_and_zero_rows_are_exact():
    x = torch.arange(576.0)[None]
    for value in (0.0, 0.5, -2.0):
        out, exact = check(torch.full((960, 576), value), x)
        assert torch.equal(out.double(), exact)


def test_tiny_weights_keep_the_bound():
    check(1e-9 * normal(960, 576), normal(1, 576, seed=1))


@pytest.mark.parametrize("rows", [0, 2, 3, 16, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_rows_are_the_full_product(rows, dtype):
    product, full = decoding(normal(960, 576, dtype=dtype), normal(960, seed=2, dtype=dtype))
    x = normal(rows, 576, seed=1)
    assert torch.equal(product(x), full(x))


def test_non_contiguous_input():
    weight, wide = normal(960, 576), normal(576, 6, seed=1)
    product, _ = decoding(weight)
    x = wide[:, 2][None]
    assert not x.squeeze().is_contiguous()
    assert torch.equal(product(x), product(x.contiguous()))
    one_block, _ = decoding(normal(1, LEAST_WEIGHTS))
    x = normal(LEAST_WEIGHTS, 2, seed=1)[:, 0][None]
    assert torch.equal(one_block(x), one_block(x.contiguous()))


def test_non_contiguous_weight():
    weight, x = normal(576, 960).t(), normal(1, 576, seed=1)
    assert torch.equal(decoding(weight)[0](x), decoding(weight.contiguous())[0](x))


def test_input_and_weight_are_left_alone():
    weight, x = normal(960, 576), normal(1, 576, seed=1)
    product, _ = decoding(weight)
    before = product(x)
    assert torch.equal(x, normal(1, 576, seed=1))
    weight.zero_()
    assert torch.equal(product(x), before)
    before.zero_()
    assert product(x).any()


def test_products_of_one_shape_keep_their_own_weights():
    maker = Int8Decoding(torch.float32, CPU)
    x = normal(1, 576, seed=1)
    for seed, outputs in ((2, 960), (3, 960), (4, 959), (5, 1056)):
        weight = normal(outputs, 576, seed=seed)
        shared = maker.linear(weight, None, linear(weight, None, torch.float32))
        assert torch.equal(shared(x), decoding(weight)[0](x))


def test_threads_share_a_product():
    product, _ = decoding(normal(960, 576))
    rows = normal(8, 1, 576, seed=1)
    expected = [product(x) for x in rows]
    wrong = []

    def work(x, out):
        wrong.extend(1 for _ in range(50) if not torch.equal(product(x), out))

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(rows, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_weights_that_int8_cannot_hold_stay_full(value):
    weight = normal(960, 576)
    weight[3, 4] = value
    full = linear(weight, None, torch.float32)
    assert Int8Decoding(torch.float32, CPU).linear(weight, None, full) is full


@pytest.mark.parametrize("shape", [(512, 576), (LEAST_WEIGHTS - 1, 1), (0, 576)])
def test_small_weights_stay_full(shape):
    weight = normal(*shape)
    full = linear(weight, None, torch.float32)
    assert Int8Decoding(torch.float32, CPU).linear(weight, None, full) is full


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_compute_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"in float32, and the compute dtype is {dtype}"):
        Int8Decoding(dtype, CPU)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="on the CPU, and the model is on meta"):
        Int8Decoding(torch.float32, torch.device("meta"))
