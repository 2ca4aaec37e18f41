"""A corpus whose chunks have two blocks each: making, losing, asking and deleting them."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvrag import Engine, Settings
from kvrag.errors import EmptyCorpusError, PromptTooLongError, SettingsError
from kvrag.retrieval import Document
from tests.tiny import make_tiny_embedder, make_tiny_model

CONTEXT = "Ferry\nThe ferry leaves at night.\n\nOil\nThe lamps burn oil."
TEXTS = {
    "Karsk": "Anna keeps the lamp of Karsk. She was born there in the year of the flood.",
    "Orrel": "The cableway of Orrel was built by Bela and is painted green every spring.",
    "Vessin": "Vessin has a lead mine, closed since the river took its lowest gallery.",
}
DOCUMENTS = [Document(text, title=title) for title, text in TEXTS.items()]
PASSAGES = [{"title": title, "text": text} for title, text in TEXTS.items()]
QUESTION = "Who keeps the lamp?"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return make_tiny_model(root / "model"), make_tiny_embedder(root / "embedder")


@pytest.fixture
def opened(models, tmp_path):
    """Open an engine over the test's home; options override the settings."""
    model, embedder = map(str, models)

    def open_(**options):
        values = {
            "home": tmp_path / "home",
            "embedder": embedder,
            "dtype": "float64",
            "threads": 1,
            "corpus_context": CONTEXT,
        }
        return Engine.open(Settings(model=model, **(values | options)))

    return open_


def files(tmp_path):
    return sorted((tmp_path / "home" / "kv" / "blocks").rglob("*.kv"))


def prefill(engine, **options):
    prefilled = engine.prefill(QUESTION, **({"strategy": "reuse", "new_tokens": 1} | options))
    tokens = prefilled.tokens
    assert tokens.prompt == tokens.reused + tokens.recomputed + tokens.computed
    return prefilled


def kinds(engine):
    """The corpus's blocks for later places, and for the first."""
    _, blocks, _ = engine._open_corpus()
    later, first = blocks.kinds(())
    return later, first


def chunk_ids(engine):
    return [item.chunk.token_ids for item in engine.retrieve(QUESTION, k=99)]


# ---- making them ---------------------------------------------------------------------------------


def test_a_chunk_is_stored_for_both_places(opened, tmp_path):
    with opened() as engine:
        done = engine.add(DOCUMENTS)
        chunks = chunk_ids(engine)
        assert (done.chunks_done, done.chunks_stored_before) == (3, 0)
        assert done.tokens_computed == 2 * sum(map(len, chunks))
        assert done.bytes_written == sum(path.stat().st_size for path in files(tmp_path))
        assert len(files(tmp_path)) == engine.counts().blocks == 6
        again = engine.add(DOCUMENTS)
        assert (again.chunks_stored_before, again.tokens_computed) == (3, 0)
    with opened() as engine:
        prefilled = prefill(engine, k=3)
        assert prefilled.tiers == ("disk",) * 3
        assert prefilled.prompt.prefix_match
        assert prefilled.tokens.computed == prefilled.tokens.prompt - sum(map(len, chunks))
        # Each chunk may be the first.
        for question in TEXTS:
            alone = engine.prefill(question, k=1, new_tokens=1, strategy="reuse")
            exact = engine.prefill(question, k=1, new_tokens=1, strategy="full")
            assert alone.tiers[0] in ("disk", "ram")
            torch.testing.assert_close(alone.logits, exact.logits, atol=1e-8, rtol=0)


def test_without_first_blocks_there_is_one_and_a_chunk_alone_is_exact(opened, tmp_path):
    with opened(first_blocks=False) as engine:
        done = engine.add(DOCUMENTS)
        assert done.tokens_computed == sum(map(len, chunk_ids(engine)))
        assert len(files(tmp_path)) == engine.counts().blocks == 3
        together = prefill(engine, k=3)
        assert "computed" not in together.tiers
        assert not together.prompt.prefix_match
        alone, exact = prefill(engine, k=1), prefill(engine, k=1, strategy="full")
        assert alone.tiers == ("computed",)
        assert alone.prompt.prefix_match
        torch.testing.assert_close(alone.logits, exact.logits, atol=1e-8, rtol=0)
        # From now on it is there, referred to, and the exact beginning of longer prompts.
        assert prefill(engine, k=1).tiers == ("ram",)
        assert engine.counts().blocks == 4
        assert prefill(engine, k=3).prompt.prefix_match
        assert engine.complete().tokens_computed == 0
    with opened() as engine:
        assert engine.complete().chunks_stored_before == 1
        assert len(files(tmp_path)) == 6


_KILLED = """
import os, signal, sys
from kvrag import Engine, Settings
from kvrag.blocks import ChunkBlocks
from kvrag.retrieval import Document

model, embedder, home, context = sys.argv[1:]
settings = Settings(
    model=model, embedder=embedder, home=home, dtype="float64", threads=1, corpus_context=context
)
compute, computed = ChunkBlocks.compute, []

def killed(self, token_ids):
    if len(computed) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    computed.append(token_ids)
    return compute(self, token_ids)

ChunkBlocks.compute = killed
with Engine.open(settings) as engine:
    engine.add([Document("The ferry leaves."), Document("The lamp burns."), Document("Oil.")])
"""


def test_a_kill_between_a_chunks_two_blocks_loses_neither(opened, models, tmp_path):
    """What is missing, and no more, is made: the kill costs what was on its way to the disk."""
    arguments = [*map(str, models), str(tmp_path / "home"), CONTEXT]
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    # Three were computed, of which two chunks were in hand, a block of each.
    assert 1 <= len(before) <= 3
    with opened() as engine:
        texts = ("The ferry leaves.", "The lamp burns.", "Oil.")
        done = engine.add([Document(text) for text in texts])
        assert (done.chunks_done, done.documents_added + done.documents_known) == (3, 3)
        assert len(files(tmp_path)) == 6
        made = [path for path in files(tmp_path) if path not in before]
        assert done.bytes_written == sum(path.stat().st_size for path in made)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert engine.complete().tokens_computed == 0


def test_a_lost_block_of_either_kind_is_made_again_and_missed_by_no_answer(opened, tmp_path):
    with opened() as engine:
        engine.add(DOCUMENTS)
        one, two, three = chunk_ids(engine)
        later, first = kinds(engine)
        for blocks, token_ids in ((first, one), (later, two)):
            assert engine.store.delete(blocks.key(token_ids))
        answered = prefill(engine, k=3)
        assert "computed" not in answered.tiers
        assert not answered.prompt.prefix_match
        done = engine.complete()
        assert (done.chunks_done, done.chunks_stored_before) == (3, 1)
        assert done.tokens_computed == len(one) + len(two)
        assert len(files(tmp_path)) == 6
        assert prefill(engine, k=3).prompt.prefix_match
        for blocks in (first, later):
            assert engine.store.delete(blocks.key(three))
        assert prefill(engine, k=3).tiers == ("ram", "ram", "computed")


# ---- deleting them -------------------------------------------------------------------------------


def test_deleting_a_document_deletes_both(opened, tmp_path):
    with opened(device_bytes=2**24) as engine:
        engine.add(DOCUMENTS)
        prefill(engine, k=3)
        assert engine.device_cache.stats().used_bytes > 0
        gone = chunk_ids(engine)[0]
        document = engine.retrieve(QUESTION, k=1)[0].chunk.document
        assert engine.delete(document)
        assert engine.device_cache.stats().used_bytes == 0
        assert len(files(tmp_path)) == engine.counts().blocks == 4
        assert all(blocks.open(gone) is None for blocks in kinds(engine))
        for rest in engine.documents():
            engine.delete(rest.id)
        assert files(tmp_path) == []


def test_what_a_chunk_left_alone_had_computed_goes_with_its_document(opened, tmp_path):
    """It was computed as a first one, since the others did not fit; that block had no reference."""
    with opened(first_blocks=False) as engine:
        engine.add(DOCUMENTS)
        nearest = engine.retrieve(QUESTION, k=1)[0].chunk
        passage = {"title": nearest.title, "text": nearest.text}
        alone = engine.prompt(QUESTION, [passage]).length
        squeezed = prefill(
            engine, k=3, new_tokens=engine.model.decoder.config.max_positions - alone
        )
        assert squeezed.tiers == ("computed",)
        assert len(files(tmp_path)) == engine.counts().blocks == 4
        for document in engine.documents():
            engine.delete(document.id)
        assert files(tmp_path) == []


# ---- whose context -------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [None, "", "Oil\nThe lamps burn oil."])
def test_a_corpus_keeps_the_context_that_it_was_made_with(opened, other):
    with opened(first_blocks=False) as engine:
        engine.add(DOCUMENTS)
        expected = kinds(engine)[0].prefix_ids
    with opened(first_blocks=False, corpus_context=other) as engine:
        assert kinds(engine)[0].prefix_ids == expected
        assert prefill(engine, k=3).tiers == ("disk",) * 3
        done = engine.complete()
        assert (done.tokens_computed, done.chunks_stored_before) == (0, 3)
        # Passages have the context of the settings.
        assert engine.passage_blocks.prefixes[1] != expected
        assert prefill(engine, passages=PASSAGES[:2]).tiers == ("computed",) * 2


def test_a_corpus_of_before_there_were_contexts_goes_on_without(opened, tmp_path):
    with opened(corpus_context="") as engine:
        engine.add(DOCUMENTS)
    with sqlite3.connect(tmp_path / "home" / "catalog.sqlite") as catalog:
        gone = catalog.execute("DELETE FROM settings WHERE key = 'corpus_context'")
        assert gone.rowcount == 1
    catalog.close()
    for look_first in (True, False):
        with opened() as engine:
            if look_first:
                assert prefill(engine, k=3).tiers == ("disk",) * 3
            done = engine.add(DOCUMENTS)
            assert (done.tokens_computed, done.chunks_stored_before) == (0, 3)
            assert prefill(engine, k=3).prompt.prefix_match
            assert len(files(tmp_path)) == 3


def test_looking_does_not_fix_the_context(opened):
    with opened(corpus_context="") as engine, pytest.raises(EmptyCorpusError):
        prefill(engine, k=3)
    with opened() as engine:
        assert engine.add(DOCUMENTS).bytes_written
        assert len(kinds(engine)[0].prefix_ids) > len(kinds(engine)[1].prefix_ids)


def test_two_engines_that_make_a_corpus_at_once_agree_on_its_context(opened, tmp_path):
    contexts = [CONTEXT, "Oil\nThe lamps burn oil."]
    with opened(corpus_context=contexts[0]) as one, opened(corpus_context=contexts[1]) as two:
        engines, ready = [one, two], threading.Barrier(2)
        for engine in engines:
            assert engine.documents() == []  # each has its own corpus open, empty

        def add(engine, documents):
            ready.wait()
            engine.add(documents)

        with ThreadPoolExecutor(2) as pool:
            parts = [DOCUMENTS[:2], DOCUMENTS[1:]]
            for future in [
                pool.submit(add, e, part) for e, part in zip(engines, parts, strict=True)
            ]:
                future.result()
        assert kinds(one)[0].prefix_ids == kinds(two)[0].prefix_ids
        assert len(files(tmp_path)) == 6
        for engine in engines:
            assert engine.complete().tokens_computed == 0
            assert prefill(engine, k=3).prompt.prefix_match


def test_a_block_that_is_lost_behind_the_choice_leaves_nothing_undeleted(opened, tmp_path):
    """The run chose anew, computed the other block, and no document's end took that along."""
    with opened(first_blocks=False) as engine:
        engine.add(DOCUMENTS)
        stream = engine.stream(QUESTION, k=2, max_tokens=1, strategy="reuse")
        later, _ = kinds(engine)
        engine.store.delete(later.key(engine.retrieve(QUESTION, k=2)[0].chunk.token_ids))
        for _ in stream:
            pass
        assert [source.tier for source in stream.sources] == ["computed", "disk"]
        assert len(files(tmp_path)) == engine.counts().blocks == 3
        for document in engine.documents():
            engine.delete(document.id)
        assert files(tmp_path) == []


@pytest.mark.parametrize(
    "own", [{"corpus_context": "Tide\nThe tide is low."}, {"instruction": "Be brief."}]
)
def test_who_opened_an_empty_corpus_follows_who_makes_it(opened, tmp_path, own):
    """A server went on behind its own settings, for which nothing was stored."""
    with opened(**own) as server:
        assert server.documents() == []
        with opened() as maker:
            maker.add(DOCUMENTS)
        answer = server.answer(QUESTION, k=2, max_tokens=1, strategy="reuse")
        assert {source.tier for source in answer.sources} == {"disk"}
        assert len(files(tmp_path)) == server.counts().blocks == 6


def test_another_length_of_the_context_keeps_all_blocks(opened):
    with opened() as engine:
        engine.add(DOCUMENTS)
        expected = kinds(engine)[0].prefix_ids
    with opened(context_length=256) as engine:
        assert kinds(engine)[0].prefix_ids == expected
        assert prefill(engine, k=2).tiers == ("disk",) * 2


def test_what_cannot_be_computed_is_refused_by_name(opened):
    with pytest.raises(SettingsError, match=r"corpus_context.*at most 2048"):
        opened(corpus_context="lamp " * 3000)
    with opened(context_length=40) as engine, pytest.raises(PromptTooLongError, match="holds 40"):
        engine.add(DOCUMENTS)


def test_the_context_is_no_part_of_what_a_chunk_is_said_to_cost(opened, monkeypatch):
    """Its passages are computed once a process; the next chunk was foreseen to take as long."""
    told = []
    with opened(
        corpus_context="The lamps burn oil in the long night of the year.\n\n" * 20
    ) as engine:
        controller = type(engine.controller)
        tell = controller.computed_alone

        def listen(self, prefix, tokens, seconds):
            told.append(seconds)
            tell(self, prefix, tokens, seconds)

        monkeypatch.setattr(controller, "computed_alone", listen)
        appended = []
        fill = type(engine._prefixes).fill

        def note(self, cache, prefix_ids):
            appended.append((len(told), len(prefix_ids), done := fill(self, cache, prefix_ids)))
            return done

        monkeypatch.setattr(type(engine._prefixes), "fill", note)
        prefill(engine, passages=PASSAGES)
    assert len(told) == 3
    # Each prefix is there before the clock of its chunk starts: `compute` finds it.
    longest = max(length for _, length, _ in appended)
    assert [done for _, length, done in appended if length == longest] == [False, True, True, True]
