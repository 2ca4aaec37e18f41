"""One row through layers in one native call, against the same written down in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.config import Settings
from kvrag.kernels import reference
from kvrag.kernels.native import (
    Int8Weights,
    LayerParts,
    LayersShape,
    NativeLayers,
    Product,
)

KINDS = ("float32", "bfloat16", "float16", "int8")
NORMS = ("before_attention", "q", "k", "after_attention", "before_mlp", "after_mlp")


def test_the_kept_folder_is_the_one_of_the_settings(pytestconfig):
    """Or the fixture compiled for itself what the other tests keep."""
    kept = pytestconfig.cache.mkdir("kvrag-kernels")
    assert Settings().kernels_dir.resolve() == kept.resolve()


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(kind, *shape, seed):
    """A weight as it is stored, and the numbers that it stands for."""
    plain = draw(*shape, seed=seed) / shape[1] ** 0.5
    if kind != "int8":
        stored = plain.to(getattr(torch, kind))
        return stored, stored.double()
    int8 = Int8Weights.of(plain)
    return int8, int8.values.double() * int8.scales.double().repeat_interleave(64, 1)


def made_layer(shape, kind, norms, *, biased, all_heads, rope, window, seed):
    """The parts of a layer, and the same as float64 numbers."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shapes = {
        "q": (q, shape.hidden),
        "k": (kv, shape.hidden),
        "v": (kv, shape.hidden),
        "output": (shape.hidden, q),
        "gate": (shape.mlp, shape.hidden),
        "up": (shape.mlp, shape.hidden),
        "down": (shape.hidden, shape.mlp),
    }
    sizes = {
        "q": q if all_heads else shape.head_dim,
        "k": kv if all_heads else shape.head_dim,
    }
    products, wide = {}, {}
    for at, (name, (outputs, inputs)) in enumerate(shapes.items()):
        weight, exact = weight_of(kind, outputs, inputs, seed=seed + at)
        bias = draw(outputs, seed=seed + 50 + at) if biased else None
        products[name], wide[name] = Product(weight, bias), (exact, bias)
    weights = {
        name: 1 + draw(sizes.get(name, shape.hidden), seed=seed + 90 + at) / 4
        for at, name in enumerate(norms)
    }
    return LayerParts(products, weights, rope, window), wide


def by_definition(shape, parts, wide, x, k, v, position, tables):
    """The row behind a layer, all in float64; its K and V are written to `k` and `v`."""

    def normed(name, row):
        weight = parts.norms.get(name)
        if weight is None:
            return row
        groups = row.view(-1, len(weight))
        return F.rms_norm(groups, weight.shape, weight.double(), shape.norm_eps).view(1, -1)

    def times(name, row):
        weight, bias = wide[name]
        return F.linear(row, weight, None if bias is None else bias.double())

    row, dim = normed("before_attention", x), shape.head_dim
    fresh = {n: normed(n, times(n, row)).view(-1, 1, dim) for n in ("q", "k")}
    cos, sin = (None, None) if parts.rope is None else tables[parts.rope]
    reference.KERNELS.rotate_into(fresh["k"], cos, sin, k, slice(position, position + 1))
    v[:, position] = times("v", row).view(-1, dim)
    q = torch.zeros(shape.heads, position + 1, dim, dtype=torch.float64)
    reference.KERNELS.rotate_into(fresh["q"], cos, sin, q, slice(position, position + 1))
    first = 0 if parts.window is None else max(0, position + 1 - parts.window)
    mixed = reference.KERNELS.attention(
        q[:, -1:],
        k[:, first : position + 1],
        v[:, first : position + 1],
        torch.tensor([position - first]),
        scale=shape.attention_scale,
    )
    x = x + shape.residual_scale * normed("after_attention", times("output", mixed))
    row = normed("before_mlp", x)
    gate = times("gate", row)
    gate = F.silu(gate) if shape.activation == "silu" else F.gelu(gate, approximate="tanh")
    return x + shape.residual_scale * normed("after_mlp", times("down", gate * times("up", row)))


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([8, 10, 64]),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    norms=st.sets(st.sampled_from(NORMS)),
    options=st.tuples(st.booleans(), st.booleans()),
    ropes=st.tuples(*[st.sampled_from([None, 0, 1])] * 2),
    windows=st.tuples(*[st.sampled_from([None, 1, 7, 300])] * 2),
    position=st.one_of(st.integers(0, 20), st.integers(250, 600)),
    seed=st.integers(0, 2**16),
)
def test_a_step_is_what_its_definition_says(
    native, kind, kv_heads, group, head_dim, activation, norms, options, ropes, windows, position,
    seed,
):  # fmt: skip
    if kind == "int8":
        head_dim = 64
    biased, all_heads = options
    shape = LayersShape(
        hidden=64 if kind == "int8" else 37,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=128 if kind == "int8" else 43,
        activation=activation,
        norm_eps=1e-5,
        attention_scale=0.3,
        residual_scale=0.7,
    )
    common = {"biased": biased, "all_heads": all_heads}
    made = [
        made_layer(shape, kind, sorted(norms), rope=rope, window=window, seed=seed + at, **common)
        for at, rope, window in zip((0, 100), ropes, windows, strict=True)
    ]
    capacity = position + 1 + seed % 3
    # One RoPE turns all dimensions, the other a part.
    tables = [
        (draw(capacity, rotary, seed=1), draw(capacity, rotary, seed=2))
        for rotary in (head_dim, head_dim // 4 * 2)
    ]
    kv = draw(2, 2, kv_heads, capacity, head_dim, seed=seed + 7)
    kv[..., position:, :] = torch.nan
    x = draw(1, shape.hidden, seed=seed + 8)
    run = NativeLayers(native, shape, [parts for parts, _ in made])

    exact, caches = x.double(), kv.double()
    doubles = [(cos.double(), sin.double()) for cos, sin in tables]
    for (parts, wide), (k, v) in zip(made, caches, strict=True):
        exact = by_definition(shape, parts, wide, exact, k, v, position, doubles)

    before, given_kv = x.clone(), kv.clone()
    out = run(x, kv, position, tables)
    assert torch.equal(x, before)
    torch.testing.assert_close(out.double(), exact, rtol=2e-4, atol=2e-4)
    written = slice(position, position + 1)
    torch.testing.assert_close(
        kv[..., written, :].double(), caches[..., written, :], rtol=2e-4, atol=2e-4
    )
    kv[..., written, :] = given_kv[..., written, :]
    torch.testing.assert_close(kv, given_kv, rtol=0, atol=0, equal_nan=True)


SHAPE = LayersShape(
    hidden=512, heads=8, kv_heads=2, head_dim=64, mlp=1024, activation="silu", norm_eps=1e-5,
    attention_scale=0.1, residual_scale=1.0,
)  # fmt: skip
LAYER = {"biased": True, "all_heads": False, "rope": 0, "window": None, "seed": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(native, kind):
    """The products and the attention here are large enough to be shared."""
    parts, _ = made_layer(SHAPE, kind, NORMS, **LAYER)
    run, tables = NativeLayers(native, SHAPE, [parts]), [(draw(2000, 64, seed=1),) * 2]
    x, kv, results = draw(1, 512, seed=5), draw(1, 2, 2, 2000, 64, seed=6), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(x, kv, 1999, tables))
    torch.set_num_threads(1)
    assert torch.equal(*results)


def test_weights_that_do_not_fit_are_refused(native):
    parts, _ = made_layer(SHAPE, "bfloat16", NORMS, **LAYER)

    def refused(match, *, shape=SHAPE, norms=parts.norms, **products):
        changed = dataclasses.replace(parts, products={**parts.products, **products}, norms=norms)
        with pytest.raises(ValueError, match=match):
            NativeLayers(native, shape, [changed])

    down = parts.products["down"]
    refused("share", shape=dataclasses.replace(SHAPE, kv_heads=3))
    refused("'q'", shape=dataclasses.replace(SHAPE, hidden=511))
    refused("'down'", down=Product(down.weight[:, :512]))
    refused("'down'", down=Product(down.weight.t()))
    refused("float64", down=Product(down.weight.double()))
    refused("int8", down=Product(down.weight.to(torch.int8)))
    refused("bias 'down'", down=Product(down.weight, torch.zeros(3)))
    refused("bias 'down'", down=Product(down.weight, torch.zeros(512).double()))
    refused("norm 'q' has 63", norms={"q": torch.ones(63)})
    refused("norm 'before_mlp'", norms={"before_mlp": torch.ones(512).double()})


def test_a_step_that_does_not_fit_is_refused(native):
    parts, _ = made_layer(SHAPE, "bfloat16", NORMS, **LAYER)
    run = NativeLayers(native, SHAPE, [parts])
    x, kv, table = torch.ones(1, 512), torch.zeros(1, 2, 2, 9, 64), torch.ones(9, 64)
    tables = [(table, table)]
    for bad, match in [
        ((x, kv, 9, tables), "position 9"),
        ((x, kv, -1, tables), "position -1"),
        ((x, kv[0], 0, tables), "position 0"),
        ((x.expand(2, 512), kv, 0, tables), "x must"),
        ((x.double(), kv, 0, tables), "x must"),
        ((x, kv.double(), 0, tables), "kv must"),
        ((x, kv.expand(2, 2, 2, 9, 64), 0, tables), "kv must"),
        ((x, kv[:, :, :, ::2], 0, tables), "kv must"),
        ((x, kv, 0, []), "1 tables"),
        ((x, kv, 8, [(table[:8], table[:8])]), "position 8"),
        ((x, kv, 0, [(table, table[:, :32])]), "sin must"),
        ((x, kv, 0, [(torch.ones(9, 66),) * 2]), "64 dimensions"),
    ]:
        with pytest.raises(ValueError, match=match):
            run(*bad)
    assert not kv.any()
