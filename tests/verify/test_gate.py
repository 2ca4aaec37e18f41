"""The checks on tiny random models: what they pass, and what they find when fusion is broken."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvrag.config import Settings
from kvrag.errors import InputError
from kvrag.fusion import base, create, register
from kvrag.fusion.reuse import Reuse
from kvrag.models.layer import Layer
from kvrag.models.source import open_model
from kvrag.verify import fidelity
from kvrag.verify.gate import blending_of, verify
from tests.verify.broken import ROPE_BREAKS, break_mask, break_rope

#: Two kinds of RoPE, and windows.
MIXED = ("gemma3", "linear")
DTYPES = ("float64", "float32", "bfloat16")
NAMES = {"ratio 1", "ratio 1 KV", "one chunk", "mask", "position", "fidelity"}


def settings_for(folder, **values) -> Settings:
    return Settings(model=str(folder), threads=1, **({"dtype": "float32"} | values))


def failed(verdict) -> set[tuple[str, str]]:
    return {(check.name, check.subject) for check in verdict.checks if not check.passed}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [("llama", "llama3"), MIXED, ("smollm3-window", "yarn-mscale")])
def test_sound_models_pass(tiny, variant, dtype):
    verdict = verify(settings_for(tiny(*variant), dtype=dtype))
    assert failed(verdict) == set()
    assert verdict.passed
    assert verdict.reason is None
    names = {check.name for check in verdict.checks}
    assert names == NAMES


def test_every_blending_strategy_is_checked(tiny):
    verdict = verify(settings_for(tiny("llama")))
    checked = {check.subject for check in verdict.checks if check.name == "position"}
    blending = {name for name in base.strategy_names() if create(name).uses_blocks}
    assert blending <= checked
    by_name = {(c.name, c.subject): c for c in verdict.checks}
    assert ("ratio 1", "cacheblend") in by_name
    assert ("ratio 1", "reuse") not in by_name, "its result does not depend on the ratio"
    assert by_name["mask", "cacheblend"].value is not None


def test_random_weights_have_no_fidelity_to_be_held_to(tiny):
    (check,) = [c for c in verify(settings_for(tiny("llama"))).checks if c.name == "fidelity"]
    assert check.passed
    assert check.value is None
    assert "not trained" in check.sentence


def test_kinds_of_layers_are_checked_apart(tiny):
    subjects = [c.subject for c in verify(settings_for(tiny(*MIXED)), short=True).checks]
    assert {"layers 0-4, 6", "layer 5", "attention", "attention, window 7"} <= set(subjects)


def test_nothing_is_left_behind_and_the_home_is_not_touched(tiny, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    verify(settings_for(tiny("llama"), home=tmp_path / "home"), short=True)
    assert not (tmp_path / "home").exists()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("ram_bytes", [0, 2**30])
def test_a_homes_rules_do_not_change_the_verdict(tiny, ram_bytes):
    """Its quota held in the gate's own home, too, which then lacked the blocks it looked for."""
    rules = {
        "namespace_disk_bytes": 1,
        "namespace_ram_bytes": 1,
        "ttl_s": 1e-9,
        "ram_admission": "second-use",
        "disk_admission": "second-use",
        "disk_write": "back",
    }
    verdict = verify(settings_for(tiny("llama"), ram_bytes=ram_bytes, **rules), short=True)
    assert verdict.passed, verdict.reason


def test_the_short_form_leaves_out_the_rows_of_strategies(tiny):
    verdict = verify(settings_for(tiny("llama")), short=True)
    assert verdict.short
    assert ("mask", "cacheblend") not in {(c.name, c.subject) for c in verdict.checks}
    assert {c.name for c in verdict.checks} == NAMES


def test_what_is_checked_next_is_told(tiny):
    told: list[str] = []
    verify(settings_for(tiny("llama")), report=told.append)
    assert len(told) == len(set(told)) == 7


def test_a_context_that_is_too_short_is_named(tiny):
    with pytest.raises(InputError, match="the context of 150 tokens leaves"):
        verify(settings_for(tiny("llama"), context_length=150))


def test_a_verdict_is_json(tiny):
    verdict = verify(settings_for(tiny("llama")), short=True)
    content = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert content["passed"] is True
    assert len(content["checks"]) == len(verdict.checks)


# ---- broken places -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ROPE_BREAKS)
def test_wrong_places_are_found(tiny, monkeypatch, how, dtype):
    break_rope(monkeypatch, ROPE_BREAKS[how])
    found = failed(verify(settings_for(tiny("llama"), dtype=dtype), short=True))
    assert {("position", "layers 0-3"), ("position", "reuse")} <= found


@pytest.mark.parametrize("how", ROPE_BREAKS)
def test_a_wrong_place_in_one_kind_of_layer_alone_is_found(tiny, monkeypatch, how):
    """Layer 0 cannot tell of layers whose RoPE is another."""
    break_rope(monkeypatch, ROPE_BREAKS[how], layers={5})
    found = failed(verify(settings_for(tiny(*MIXED)), short=True))
    assert ("position", "layer 5") in found
    assert not {("position", "layers 0-4, 6"), ("position", "reuse")} & found


def test_one_chunk_tells_of_a_wrong_place_too(tiny, monkeypatch):
    break_rope(monkeypatch, ROPE_BREAKS["rotated twice"])
    assert ("one chunk", "reuse") in failed(verify(settings_for(tiny("llama")), short=True))


# ---- broken masks and strategies -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_that_counts_from_the_end_is_found(tiny, monkeypatch, dtype):
    """At ratio 1, where rows are not scattered, it cannot be seen."""
    break_mask(monkeypatch)
    found = failed(verify(settings_for(tiny("llama"), dtype=dtype)))
    assert {("mask", "attention"), ("mask", "cacheblend")} <= found
    assert not {("ratio 1", "cacheblend"), ("one chunk", "reuse")} & found


def test_a_strategy_that_gives_its_rows_other_positions_to_attend_at_is_found(tiny, registered):
    """Each attention is right for the positions it is given; the places of the rows are not."""
    blend = type(create("cacheblend"))

    @registered
    @dataclass(frozen=True, slots=True)
    class Late(blend):
        name: ClassVar[str] = "late"

        def start(self, decoder, prompt, layers, cache):
            shifted = copy.copy(decoder)
            shifted.layers = [LateLayer(layer) for layer in decoder.layers]
            return blend.start(self, shifted, prompt, layers, cache)

    found = failed(verify(settings_for(tiny("llama")), short=True))
    assert {subject for _, subject in found} == {"late"}
    assert ("ratio 1 KV", "late") in found


class LateLayer(Layer):
    """Context rows attend as if they stood one place later."""

    def __init__(self, layer):
        self.__dict__.update(vars(layer))

    def attend(self, q, k, v, positions):
        return super().attend(q, k, v, (positions + 1).clamp(max=k.shape[1] - 1))


def test_a_strategy_that_attends_out_of_sight_is_found(tiny, registered):
    @registered
    @dataclass(frozen=True, slots=True)
    class Hidden(Reuse):
        name: ClassVar[str] = "hidden"

        def start(self, decoder, prompt, layers, cache):
            plain = copy.copy(decoder)
            plain.layers = [Plain(layer) for layer in decoder.layers]
            return Reuse.start(self, plain, prompt, layers, cache)

    assert failed(verify(settings_for(tiny("llama")))) == {("mask", "hidden")}


class Plain(Layer):
    """A layer that nobody watches."""

    def __init__(self, layer):
        self.__dict__.update(vars(layer))


@pytest.fixture
def registered(monkeypatch):
    """`register` within a test alone."""
    monkeypatch.setattr(base, "_STRATEGIES", dict(base._STRATEGIES))
    return register


def test_a_strategy_that_forgets_rows_at_ratio_1_is_found(tiny, registered):
    blend = type(create("cacheblend"))

    @registered
    @dataclass(frozen=True, slots=True)
    class Forgetful(blend):
        name: ClassVar[str] = "forgetful"

        def start(self, decoder, prompt, layers, cache):
            return create("cacheblend", 0.97 * self.ratio).start(decoder, prompt, layers, cache)

    found = failed(verify(settings_for(tiny("llama")), short=True))
    assert ("ratio 1 KV", "forgetful") in found
    assert {subject for _, subject in found} == {"forgetful"}


def test_numbers_that_are_none_fail_and_can_still_be_told(tiny, registered):
    @registered
    @dataclass(frozen=True, slots=True)
    class Undefined(Reuse):
        name: ClassVar[str] = "undefined"

        def start(self, decoder, prompt, layers, cache):
            cache.k[0].fill_(torch.nan)
            return Reuse.start(self, decoder, prompt, layers, cache)

    verdict = verify(settings_for(tiny("llama")), short=True)
    assert ("position", "undefined") in failed(verdict)
    json.dumps(verdict.to_dict(), allow_nan=False)
    assert "undefined" in verdict.reason


# ---- fidelity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reuse", "default", "expected"),
    [
        (0.10, 0.07, set()),
        (0.01, 0.03, set()),
        (0.10, 0.15, {"cacheblend"}),
        (0.70, 0.30, {"reuse"}),
        (2.40, 2.20, {"reuse", "cacheblend"}),
        (float("nan"), 0.1, {"reuse", "cacheblend"}),
    ],
)
def test_fidelity_is_held_against_bounds(tiny, monkeypatch, reuse, default, expected):
    monkeypatch.setattr(fidelity, "_nll", lambda engine, prompt: 3.0)
    monkeypatch.setattr(
        fidelity, "divergences", lambda engine, prompts, tokens, how: [[reuse], [default]]
    )
    verdict = verify(settings_for(tiny("llama"), strategy="cacheblend"), short=True)
    assert failed(verdict) == {("fidelity", name) for name in expected}


@pytest.mark.parametrize("strategy", ["full", "reuse"])
def test_a_default_that_does_not_repair_has_nothing_to_add(tiny, monkeypatch, strategy):
    monkeypatch.setattr(fidelity, "_nll", lambda engine, prompt: 3.0)
    monkeypatch.setattr(
        fidelity, "divergences", lambda engine, prompts, tokens, how: [[0.1], [0.0]]
    )
    checks = verify(settings_for(tiny("llama"), strategy=strategy), short=True).checks
    assert [c.subject for c in checks if c.name == "fidelity"] == ["reuse"]


# ---- what a server makes of it -------------------------------------------------------------------


def test_a_verdict_decides_about_blending(tiny, monkeypatch, caplog):
    settings = settings_for(tiny("llama"))
    model = open_model(settings.model, settings.models_dir, dtype=torch.float32)
    with caplog.at_level("INFO", logger="kvrag"):
        blending = blending_of(settings, model)
    assert blending.allowed
    assert blending.checks
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert " s" in record.getMessage()
    caplog.clear()
    break_rope(monkeypatch, ROPE_BREAKS["not rotated"])
    blending = blending_of(settings, model)
    assert not blending.allowed
    assert "position, reuse" in blending.reason
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert blending.reason in record.getMessage()


def test_what_cannot_be_checked_is_refused(tiny, caplog):
    settings = settings_for(tiny("llama"), context_length=150)
    model = open_model(settings.model, settings.models_dir, dtype=torch.float32, context_length=150)
    blending = blending_of(settings, model)
    assert not blending.allowed
    assert "could not be run: the context of 150 tokens" in blending.reason
    assert [record.levelname for record in caplog.records] == ["ERROR"]
