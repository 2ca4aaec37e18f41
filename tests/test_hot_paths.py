"""Nothing between a prompt and its answer waits for the device, but for what is listed here.

On a GPU, the value of a tensor on the host is a wait for all that was begun before it. Such a look
is one of a few methods of a tensor (instrumented here), or an operation whose result has a size
that only the data tell (watched for by a dispatch mode). A whole answer runs under both.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvrag
from kvrag.fusion import strategy_names
from kvrag.models.layer import Layer
from tests.engine.test_answers import ask, open_engine

METHODS = ("cpu", "item", "numpy", "tolist", "__int__", "__bool__", "__float__", "__index__")
OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")
ROOT = Path(kvrag.__file__).parent

#: Where the host may look, and why.
ALLOWED = {
    ("generation/sampling.py", "sample"): "the token, once a token: the answer is text",
    ("prefill.py", "_accounts"): "the chosen rows for the report, once, behind the last layer",
}
#: Before any layer runs, of numbers that are the host's.
PLANNED = {("fusion/epic.py", "begin"): "which rows begin is known without the device"}
#: Kernels for the CPU plan their blocks from positions that lie on the CPU.
CPU_KERNELS = ("kernels/cpu/", "kernels/native/")


class Looks(TorchDispatchMode):
    """Counts looks by the function of ours that is nearest, and notes how."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = Counter()
        for name in METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._counting(name))

    def _counting(self, name):
        method = getattr(torch.Tensor, name)

        def counted(*args, **kwargs):
            self.note(name)
            return method(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        masks = any(x is not None and x.dtype is torch.bool for x in chosen)
        if name in OPERATIONS or masks:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, how):
        frame = sys._getframe(2)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                self.found[str(path.relative_to(ROOT)), frame.f_code.co_name, how] += 1
                return
            frame = frame.f_back
        self.found["elsewhere", "", how] += 1


def looks(engine, monkeypatch, **options):
    """The places at which a whole answer of five tokens looks, with stored blocks."""
    ask(engine, max_tokens=5, **options)
    with monkeypatch.context() as patch, Looks(patch) as watched:
        answer = ask(engine, max_tokens=5, **options)
    assert len(answer.token_ids) == 5
    return watched.found


def forbidden(found, allowed):
    return {
        place: count
        for place, count in found.items()
        if place[:2] not in allowed and not place[0].startswith(CPU_KERNELS)
    }


@pytest.fixture
def endless(tiny, tmp_path):
    """`engine(kernels, …)`, whose answers no end-of-sequence token cuts short."""
    opened = []

    def engine(kernels, family="qwen3", rope="llama3", **settings):
        home = tmp_path / f"home{len(opened)}"
        options = {"dtype": "float32", "kernels": kernels} | settings
        opened.append(open_engine(tiny(family, rope), home, **options))
        object.__setattr__(opened[-1].model, "eos_token_ids", frozenset())
        return opened[-1]

    yield engine
    for each in opened:
        each.close()


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize("name", ["fast", "true", "cacheblend", "reuse", "full"])
def test_an_answer_looks_at_tokens_alone(endless, monkeypatch, kernels, name):
    engine = endless(kernels)
    for options in ({"strategy": name}, {"strategy": name, "ratio": 0.4}):
        found = looks(engine, monkeypatch, **options)
        assert forbidden(found, ALLOWED) == {}
        sampled = [n for place, n in found.items() if place[0] == "generation/sampling.py"]
        # `int` of a tensor is one look, seen as a method and as an operation.
        assert set(sampled) == {5}
        accounts = [n for place, n in found.items() if place[1] == "_accounts"]
        assert accounts == [1]


def test_windows_and_device_copies_add_none(endless, monkeypatch):
    """Which chunks a window needs, and what is staged, is known on the host."""
    engine = endless("torch", "gemma3", "linear", device_bytes=2**24)
    for name in ("fast", "cacheblend"):
        engine.device_cache.clear()
        assert forbidden(looks(engine, monkeypatch, strategy=name), ALLOWED) == {}
        assert engine.device_cache.stats().hits > 0


def test_other_strategies(endless, monkeypatch):
    """Each that is registered; what is planned on the host before the first layer is no wait."""
    engine = endless("torch")
    for name in strategy_names():
        found = looks(engine, monkeypatch, strategy=name, ratio=0.3)
        assert forbidden(found, ALLOWED | PLANNED) == {}, name


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x[0, 0].item(),
        lambda x: int(x[0, 0]),
        lambda x: bool(x[0, 0] > 0),
        lambda x: range(10)[x[0, 0].long()],
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
    ],
)
def test_a_look_is_seen(endless, monkeypatch, look):
    """Put where every layer of every strategy comes by."""
    engine, finish = endless("torch"), Layer.finish

    def finish_and_look(self, x, mixed):
        look(x)
        return finish(self, x, mixed)

    monkeypatch.setattr(Layer, "finish", finish_and_look)
    found = forbidden(looks(engine, monkeypatch, strategy="reuse"), ALLOWED)
    counts = Counter()
    for (_, _, how), count in found.items():
        counts[how] += count
    # The prompt's layers, and those of the four steps behind the first token.
    assert set(counts.values()) == {engine.model.decoder.config.num_layers * 5}
