"""Engines with lossy codecs: one calibration a home and model, keys of their own, near answers."""

from __future__ import annotations

import pytest

from kvrag import Engine, Settings

PASSAGES = ["Anna keeps the lamp of Karsk.", "The ferry leaves when the lamp is lit."]
QUESTION = "Who keeps the lamp?"


def open_engine(folder, home, codec):
    options = {"dtype": "float32", "threads": 1, "corpus_context": ""}
    models = home.parent / "models"
    return Engine.open(
        Settings(model=str(folder), home=home, models_dir=models, codec=codec, **options)
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_answer_from_coded_blocks(tiny, tmp_path, family):
    """In one home, side by side; what is computed and what is loaded is the same."""
    folder = tiny(family)
    logprobs, loaded, sizes = {}, {}, {}
    for codec in ("raw", "int8", "int4"):
        with open_engine(folder, tmp_path / "home", codec) as engine:
            found = []
            before = set(engine.store.keys())
            for tier in ("computed", "ram"):
                filled = engine.prefill(QUESTION, passages=PASSAGES, strategy="reuse", new_tokens=1)
                assert set(filled.tiers) == {tier}
                found.append(filled.logits.log_softmax(-1))
            logprobs[codec], loaded[codec] = found
            sizes[codec] = len(set(engine.store.keys()) - before)
    assert sizes == {"raw": 2, "int8": 2, "int4": 2}  # nobody takes another's blocks
    for codec, logprob in logprobs.items():
        assert (logprob == loaded[codec]).all()
    off = {codec: float((logprobs[codec] - logprobs["raw"]).norm()) for codec in logprobs}
    # Four bits are 17 times coarser than eight.
    assert 0 < 3 * off["int8"] < off["int4"] < 0.2 * float(logprobs["raw"].norm())


def test_a_home_is_calibrated_once(tiny, tmp_path, monkeypatch):
    folder = tiny("llama")
    with open_engine(folder, tmp_path / "home", "int4") as engine:
        digest = engine.passage_blocks.codec.params_digest
        assert digest
    monkeypatch.setattr("kvrag.engine.fine_channels", lambda model: pytest.fail("calibrated again"))
    with open_engine(folder, tmp_path / "home", "int4") as engine:
        assert engine.passage_blocks.codec.params_digest == digest
