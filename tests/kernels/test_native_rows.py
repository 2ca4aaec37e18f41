"""A layer's work on many rows, in one native call or one each side of attention, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvrag.kernels.native import LayersShape, Panels, RowLayer

HIDDEN, HEADS, KV_HEADS, DIM, MLP = 40, 4, 2, 16, 72
Q, KV = HEADS * DIM, KV_HEADS * DIM
EPS, RESIDUAL = 1e-5, 0.75
SHAPES = {
    "qkv": (Q + 2 * KV, HIDDEN),
    "output": (HIDDEN, Q),
    "gate_up": (2 * MLP, HIDDEN),
    "down": (HIDDEN, MLP),
}
NORMS = {
    "before_attention": HIDDEN,
    "q": DIM,
    "k": DIM,
    "after_attention": HIDDEN,
    "before_mlp": HIDDEN,
    "after_mlp": HIDDEN,
}
WHOLE = {**NORMS, "q": Q, "k": KV}
LLAMA = dict.fromkeys(("before_attention", "before_mlp"), HIDDEN)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """The same layer in native code and in torch, which calculates in float64."""

    def __init__(
        self, native, norms, *, activation="silu", dtype=torch.bfloat16, bias=True, window=None
    ):
        shape = LayersShape(
            hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, mlp=MLP,
            activation=activation, norm_eps=EPS, attention_scale=1.0, residual_scale=RESIDUAL,
        )  # fmt: skip
        self.gelu = activation == "gelu_tanh"
        self.weights = {
            name: (draw(*size, seed=i) / 8).to(dtype)
            for i, (name, size) in enumerate(SHAPES.items())
        }
        self.biases = {
            name: draw(size[0], seed=9 + i) if bias else None
            for i, (name, size) in enumerate(SHAPES.items())
        }
        self.norms = {name: draw(size, seed=20 + i) for i, (name, size) in enumerate(norms.items())}
        panels = {name: Panels(native, w, self.biases[name]) for name, w in self.weights.items()}
        self.window = window
        self.rows = RowLayer(native, shape, self.norms, panels, window)

    def norm(self, name, x):
        weight = self.norms.get(name)
        if weight is None:
            return x
        by_weight = x.reshape(len(x), x.shape[1] // len(weight), len(weight))
        return F.rms_norm(by_weight, weight.shape, weight.double(), EPS).reshape(x.shape)

    def linear(self, name, x):
        bias = self.biases[name]
        return F.linear(x, self.weights[name].double(), None if bias is None else bias.double())

    def project(self, x):
        qkv = self.linear("qkv", self.norm("before_attention", x.double()))
        q, k, v = torch.split(qkv, [Q, KV, KV], dim=-1)
        return torch.cat((self.norm("q", q), self.norm("k", k), v), dim=-1)

    def advance(self, x, at, tables, k, v):
        """By the definition, with K and V as they are in the cache afterwards, in float64."""
        q, own_k, own_v = torch.split(
            self.project(x).view(len(x), HEADS + 2 * KV_HEADS, DIM), [HEADS, KV_HEADS, KV_HEADS], 1
        )
        if tables is not None:
            q, own_k = (turned(part, at, tables) for part in (q, own_k))
        k, v = k.double(), v.double()
        k[:, at], v[:, at] = own_k.transpose(0, 1), own_v.transpose(0, 1)
        keys = torch.arange(k.shape[1])
        hidden = keys > at[:, None]
        if self.window is not None:
            hidden |= keys <= at[:, None] - self.window
        unseen = hidden.all(0)
        k[:, unseen], v[:, unseen] = 0, 0
        each = [x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v)]
        scores = (q.transpose(0, 1) @ each[0].transpose(1, 2)).masked_fill(hidden, -torch.inf)
        mixed = (scores.softmax(-1) @ each[1]).transpose(0, 1).flatten(1)
        return self.finish(x, mixed), own_k.transpose(0, 1), own_v.transpose(0, 1)

    def finish(self, x, mixed):
        x = x.double()
        x = x + RESIDUAL * self.norm("after_attention", self.linear("output", mixed.double()))
        gate, up = self.linear("gate_up", self.norm("before_mlp", x)).chunk(2, -1)
        act = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return x + RESIDUAL * self.norm("after_mlp", self.linear("down", act * up))


def turned(x, at, tables):
    cos, sin = (table[at].double()[:, None] for table in tables)
    rotary = cos.shape[-1]
    a, b = x[..., :rotary].chunk(2, -1)
    return torch.cat((x[..., :rotary] * cos + torch.cat((b, a), -1) * sin, x[..., rotary:]), -1)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [0, 1, 5, 17, 130, 1100])
@pytest.mark.parametrize("norms", [LLAMA, NORMS, WHOLE, {}], ids=["llama", "heads", "all", "none"])
def test_rows_are_those_of_torch(native, norms, n):
    """1,100 rows go through the MLP in three parts."""
    layer = Layer(native, norms)
    x, mixed = draw(n, HIDDEN, seed=70), draw(n, Q, seed=71)
    before = x.clone()
    close(layer.rows.project(x), layer.project(x))
    close(layer.rows.finish(x, mixed), layer.finish(x, mixed))
    assert torch.equal(x, before)


@pytest.mark.parametrize("rotary", [0, 10, DIM])
@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.parametrize("n", [0, 1, 17, 130])
@pytest.mark.parametrize("norms", [LLAMA, NORMS, WHOLE], ids=["llama", "heads", "all"])
def test_rows_through_a_layer_are_those_of_torch(native, norms, n, window, rotary):
    """Scattered rows, some farther apart than a window; what none of them sees is undefined."""
    layer = Layer(native, norms, window=window)
    end = 400
    at = torch.randperm(end, generator=torch.Generator().manual_seed(n))[:n].sort().values
    tables = (draw(end, rotary, seed=3), draw(end, rotary, seed=4)) if rotary else None
    x = draw(n, HIDDEN, seed=70)
    k, v = (draw(KV_HEADS, end + 9, DIM, seed=seed) for seed in (5, 6))
    seen = torch.zeros(end + 9, dtype=torch.bool)
    for position in at.tolist():
        seen[max(0, position + 1 - (window or end)) : position + 1] = True
    k[:, ~seen], v[:, ~seen] = torch.nan, torch.nan
    expected, own_k, own_v = layer.advance(x, at, tables, k, v)
    rest = torch.ones(end + 9, dtype=torch.bool)
    rest[at] = False

    def run():
        into_k, into_v = k.clone(), v.clone()
        out = layer.rows.advance(x, at, tables, into_k, into_v)
        close(into_k[:, at], own_k)
        close(into_v[:, at], own_v)
        for into, before in ((into_k, k), (into_v, v)):
            torch.testing.assert_close(
                into[:, rest], before[:, rest], atol=0, rtol=0, equal_nan=True
            )
        return out

    found = run()
    close(found, expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(run(), found)
    finally:
        torch.set_num_threads(threads)


def test_rows_that_do_not_fit_into_a_cache_are_refused(native):
    layer = Layer(native, LLAMA)
    x, at = draw(3, HIDDEN, seed=1), torch.tensor([1, 2, 5])
    k, v = torch.zeros(KV_HEADS, 6, DIM), torch.zeros(KV_HEADS, 6, DIM)
    short = torch.ones(5, DIM), torch.ones(5, DIM)
    for positions, tables in (
        (torch.tensor([1, 2, 6]), None),
        (torch.tensor([-1, 2, 5]), None),
        (torch.tensor([2, 1, 5]), None),
        (at, short),
    ):
        with pytest.raises(ValueError, match="positions must ascend within"):
            layer.rows.advance(x, positions, tables, k, v)
    for positions in (at[:2], at.int()):
        with pytest.raises(ValueError, match="3 positions cannot be"):
            layer.rows.advance(x, positions, None, k, v)
    with pytest.raises(ValueError, match=r"k \(1, 6, 16\) is not"):
        layer.rows.advance(x, at, None, k[:1], v[:1])
    with pytest.raises(ValueError, match="must be alike"):
        layer.rows.advance(x, at, None, k, v[:1])
    with pytest.raises(ValueError, match="k must be float32"):
        layer.rows.advance(x, at, None, k.double(), v)
    assert not k.any()
    assert not v.any()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_weight(native, activation, dtype, bias):
    layer = Layer(native, LLAMA, activation=activation, dtype=dtype, bias=bias)
    # Rows that are no neighbours in memory.
    x, mixed = draw(7, 2 * HIDDEN, seed=70)[:, ::2], draw(14, Q, seed=71)[::2]
    close(layer.rows.project(x), layer.project(x))
    close(layer.rows.finish(x, mixed), layer.finish(x, mixed))


def test_a_row_depends_on_no_other_and_on_no_thread_count(native):
    layer = Layer(native, NORMS)
    x, mixed = draw(900, HIDDEN, seed=70), draw(900, Q, seed=71)
    whole = layer.rows.project(x), layer.rows.finish(x, mixed)
    alone = layer.rows.project(x[600:607]), layer.rows.finish(x[600:607], mixed[600:607])
    assert torch.equal(whole[0][600:607], alone[0])
    assert torch.equal(whole[1][600:607], alone[1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(layer.rows.project(x), whole[0])
        assert torch.equal(layer.rows.finish(x, mixed), whole[1])
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused(native):
    layer = Layer(native, LLAMA)
    x, mixed = draw(3, HIDDEN, seed=1), draw(3, Q, seed=2)
    for wrong in (x[:, 1:], x.double(), x[0]):
        with pytest.raises(ValueError, match="x must be float32"):
            layer.rows.project(wrong)
    with pytest.raises(ValueError, match="mixed must be float32"):
        layer.rows.finish(x, mixed[:, 1:])
    with pytest.raises(ValueError, match="mixed has 2 rows, and x 3"):
        layer.rows.finish(x, mixed[:2])
    with pytest.raises(ValueError, match="the norm 'q'"):
        Layer(native, {"q": DIM + 1})
    panels = {name: Panels(native, w) for name, w in layer.weights.items()}
    with pytest.raises(ValueError, match="'down' maps"):
        RowLayer(native, layer.rows._shape, {}, {**panels, "down": panels["output"]})
