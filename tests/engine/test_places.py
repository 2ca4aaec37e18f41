"""A chunk's two blocks: as a prompt's first, and for later places behind a context."""

from __future__ import annotations

import pytest
import torch

from kvrag import Engine, Settings
from kvrag.fusion import Prompt, strategy_names
from tests.fusion.dense import Dense

CONTEXT = "Ferry\nThe ferry leaves at night.\n\nOil\nThe lamps burn oil."
A, B, C = "Anna keeps the lamp of Karsk.", "The ferry leaves when the lamp is lit.", "It burns."
QUESTION = "Who keeps the lamp?"


def open_engine(folder, home, **settings):
    options = {"dtype": "float64", "threads": 1, "corpus_context": CONTEXT} | settings
    return Engine.open(
        Settings(model=str(folder), home=home, models_dir=home.parent / "models", **options)
    )


@pytest.fixture
def folder(tiny):
    return tiny("qwen3", "llama3", max_position_embeddings=2048)


@pytest.fixture
def engine(folder, tmp_path):
    with open_engine(folder, tmp_path / "home") as engine:
        yield engine


def prefill(engine, *passages, **options):
    prefilled = engine.prefill(
        QUESTION, passages=passages, **({"strategy": "reuse", "new_tokens": 1} | options)
    )
    tokens = prefilled.tokens
    assert tokens.prompt == tokens.reused + tokens.recomputed + tokens.computed
    assert min(tokens.reused, tokens.recomputed, tokens.computed) >= 0
    return prefilled


def passages_ids(engine, text):
    """Ids of the context's passages, each encoded alone."""
    encode = engine.model.tokenizer.encode
    return [token_id for passage in text.split("\n\n") for token_id in encode(passage + "\n\n")]


def loaded(blocks, token_ids):
    """The stored K and V of each layer; None if there is no such block."""
    reader = blocks.open(token_ids)
    if reader is None:
        return None
    with reader:
        segments = reader.read(0, len(reader.header.segments))
        return [blocks.codec.decode(segment, reader.header) for segment in segments]


# ---- what they hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [("qwen3", "llama3"), ("gemma3", "linear")])
def test_each_place_has_the_kv_of_a_plain_pass_behind_what_it_expects(tiny, tmp_path, family):
    folder = tiny(*family, max_position_embeddings=2048)
    dense = Dense(tiny.reference(folder))
    with open_engine(folder, tmp_path / "home") as engine:
        prompt = prefill(engine, A, B, C).prompt
        behind = passages_ids(engine, CONTEXT)
        assert behind
        first, later = (engine.passage_blocks.kinds(())[place] for place in (1, 0))
        for place, span in enumerate(prompt.chunks):
            made, other = (later, first) if place else (first, later)
            prefix = [*prompt.prefix_ids, *(behind if place else ())]
            expected = dense.isolated(prefix, span.token_ids)
            for ours, theirs in zip(loaded(made, span.token_ids), expected, strict=True):
                for stored, wanted in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(stored, wanted, atol=1e-8, rtol=0)
            assert loaded(other, span.token_ids) is None


@pytest.mark.parametrize("name", strategy_names())
def test_one_passage_is_exact_also_when_it_is_stored_for_a_later_place(engine, tiny, folder, name):
    dense = Dense(tiny.reference(folder))
    prefill(engine, A, B)
    for _ in range(2):  # computed, and loaded
        alone = prefill(engine, B, strategy=name)
        logits, _ = dense.causal(alone.prompt.token_ids)
        torch.testing.assert_close(alone.logits, logits[-1:], atol=1e-8, rtol=0)
        assert alone.prompt.prefix_match


# ---- which one is loaded -------------------------------------------------------------------------


@pytest.mark.parametrize("device_bytes", [0, 2**24])
def test_another_order_computes_nothing_again(folder, tmp_path, device_bytes):
    with open_engine(folder, tmp_path / "home", device_bytes=device_bytes) as engine:
        straight = prefill(engine, A, B)
        assert straight.prompt.prefix_match
        assert straight.tiers == ("computed", "computed")
        turned = prefill(engine, B, A)
        assert not turned.prompt.prefix_match
        assert turned.tiers == (("device",) if device_bytes else ("ram",)) * 2
        assert turned.tokens.computed == len(turned.prompt.question_ids)
        assert prefill(engine, A, B).tiers == turned.tiers
        assert prefill(engine, A, B).prompt.prefix_match
        assert engine.stats().tiers[1].blocks == 2
    with open_engine(folder, tmp_path / "fresh", device_bytes=device_bytes) as engine:
        fresh = prefill(engine, B, A)
        assert fresh.prompt.prefix_match
        assert fresh.tiers == ("computed", "computed")
        # Blocks for the other places are other blocks.
        assert not torch.equal(fresh.logits, turned.logits)


def test_the_device_holds_the_blocks_of_both_places(folder, tmp_path):
    with (
        open_engine(folder, tmp_path / "plain") as plain,
        open_engine(folder, tmp_path / "device", device_bytes=2**24) as device,
    ):
        for passages in ([A, B], [B, A], [B], [A], [B, A], [A, B]):
            expected, found = prefill(plain, *passages), prefill(device, *passages)
            assert torch.equal(found.logits, expected.logits)
            assert found.prompt.prefix_match == expected.prompt.prefix_match
            assert [tier == "computed" for tier in found.tiers] == [
                tier == "computed" for tier in expected.tiers
            ]
        # B was computed as a first one when it was alone.
        assert found.tiers == ("device", "device")
        assert found.prompt.prefix_match


def test_without_a_context_there_is_one_block_a_chunk(folder, tmp_path):
    with open_engine(folder, tmp_path / "home", corpus_context="") as engine:
        for passages in ([A, B], [B, A], [B], [A]):
            assert prefill(engine, *passages).prompt.prefix_match
        assert engine.stats().tiers[1].blocks == 2
        blocks = engine.passage_blocks
        assert blocks.prefixes[0] == blocks.prefixes[1]


def test_passages_are_computed_behind_the_context_of_the_settings(folder, tmp_path):
    home = tmp_path / "home"
    with open_engine(folder, home) as engine:
        prefill(engine, A, B)
    with open_engine(folder, home, corpus_context="Oil\nThe lamps burn oil.") as engine:
        prefilled = prefill(engine, A, B)
        assert prefilled.tiers == ("disk", "computed")
        behind = tuple(passages_ids(engine, "Oil\nThe lamps burn oil."))
        _, later = engine.passage_blocks.prefixes
        assert later == prefilled.prompt.prefix_ids + behind
    with open_engine(folder, home, corpus_context="") as engine:
        assert prefill(engine, A, B).tiers == ("disk", "computed")
    with open_engine(folder, home) as engine:
        assert prefill(engine, A, B).tiers == ("disk", "disk")


def test_a_chunk_that_the_context_leaves_no_room_for_is_stored_as_a_first_one(tiny, tmp_path):
    folder = tiny("qwen3", "llama3")
    with open_engine(folder, tmp_path / "home", corpus_context="x" * 50) as engine:
        positions = engine.model.decoder.config.max_positions
        blocks = engine.passage_blocks
        prefix = blocks.first.prefix_ids
        context = len(blocks.prefixes[1]) - len(prefix)
        assert context > 10
        # It fits behind the context to a token; one more, and it does not.
        fitting = positions - len(prefix) - context
        for length, whose in ((fitting, blocks.prefixes[1]), (fitting + 1, prefix)):
            chunk = [5 + n % 200 for n in range(length)]
            prompt = Prompt.build(prefix, [[7, 8], chunk], [9, 9], prefix_match=True)
            assert blocks.later(chunk).prefix_ids == whose
            assert engine.fill(prompt, new_tokens=1, strategy="reuse").tiers[1] == "computed"
            assert engine.fill(prompt, new_tokens=1, strategy="reuse").tiers[1] == "ram"
            assert loaded(blocks.later(chunk), chunk) is not None
            assert (loaded(blocks.first, chunk) is None) == (whose != prefix)
