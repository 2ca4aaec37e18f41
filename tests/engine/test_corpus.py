"""A corpus through the engine: tiny models, a tiny embedder, real SQLite, FAISS and files."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvrag import Engine, Settings
from kvrag.errors import ClosedError, InputError
from kvrag.retrieval import Document, Skipped
from kvrag.retriever import KVRetriever
from kvrag.searching import Search
from kvrag.store.errors import TierError
from tests.tiny import make_tiny_embedder, make_tiny_model

TEXTS = {
    "Karsk": "Anna keeps the lamp of Karsk. She was born there in the year of the flood.",
    "Orrel": "The cableway of Orrel was built by Bela and is painted green every spring.",
    "Vessin": "Vessin has a lead mine, closed since the river took its lowest gallery.",
}
DOCUMENTS = [Document(text, title=title) for title, text in TEXTS.items()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "model": make_tiny_model(root / "model"),
        "other": make_tiny_model(root / "other", family="qwen3", seed=5),
        "embedder": make_tiny_embedder(root / "embedder"),
    }


@pytest.fixture
def opened(models, tmp_path):
    """Open an engine over the test's home; options override the settings."""

    def open_(model="model", **options):
        values = {
            "home": tmp_path / "home",
            "embedder": str(models["embedder"]),
            "dtype": "float32",
            "threads": 1,
            "k": 2,
            # One block a chunk, so that they can be counted; `test_places.py` has two.
            "corpus_context": "",
        }
        return Engine.open(Settings(model=str(models[model]), **(values | options)))

    return open_


def files(tmp_path):
    return sorted((tmp_path / "home" / "kv" / "blocks").rglob("*.kv"))


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)  # what is waited for happens in a thread of the engine's
    assert condition()


def ask(engine, **options):
    return engine.answer("Who keeps the lamp?", max_tokens=4, **options)


def test_documents_are_stored_once_and_answered_from_the_store(opened):
    with opened() as engine:
        first = engine.add(DOCUMENTS)
        assert (first.documents_added, first.chunks_done, first.chunks_stored_before) == (3, 3, 0)
        assert first.bytes_written > 0
        before = engine.stats().tiers[1]
        again = engine.add(DOCUMENTS)
        assert (again.documents_added, again.documents_known) == (0, 3)
        assert (again.chunks_stored_before, again.tokens_computed) == (3, 0)
        after = engine.stats().tiers[1]
        assert (after.blocks, after.bytes_written) == (before.blocks, before.bytes_written)
    with opened() as engine:
        answer = ask(engine, k=2)
        assert [source.tier for source in answer.sources] == ["disk", "disk"]
        assert all(source.document for source in answer.sources)
        assert answer.sources[0].score >= answer.sources[1].score
        assert answer.report.prefix_match
        assert answer.report.tokens.computed < answer.report.tokens.prompt
        assert [s.tier for s in ask(engine, k=2).sources] == ["ram", "ram"]


def test_k_beyond_the_corpus_gives_all_and_k_below_one_is_refused(opened):
    with opened() as engine:
        engine.add(DOCUMENTS)
        assert len(ask(engine, k=99).sources) == 3
        for k in (0, -1, True, 1.5):
            with pytest.raises(InputError, match="k is"):
                ask(engine, k=k)
        with pytest.raises(InputError, match="not both"):
            ask(engine, k=1, passages=["x"])


def test_an_empty_corpus_is_a_sentence(opened):
    with opened() as engine:
        with pytest.raises(InputError, match="corpus is empty"):
            ask(engine)
        assert engine.complete().total_chunks == 0


def test_deleting_takes_rows_vectors_and_blocks_that_nobody_else_needs(opened):
    shared = "The same words stand in both."
    with opened() as engine:
        engine.add([*DOCUMENTS, Document(shared, source="a"), Document(shared + " ", source="b")])
        blocks = engine.stats().tiers[1].blocks
        gone = DOCUMENTS[0]
        assert engine.delete(gone.id)
        assert not engine.delete(gone.id)
        assert engine.document(gone.id) is None
        assert engine.stats().tiers[1].blocks == blocks - 1
        assert gone.id not in {item.chunk.document for item in engine.retrieve("lamp", k=9)}
        # Both documents hold one block: it stays until the second goes.
        twins = [d for d in engine.documents() if d.source in ("a", "b")]
        assert len(twins) == 2
        engine.delete(twins[0].id)
        assert engine.stats().tiers[1].blocks == blocks - 1
        engine.delete(twins[1].id)
        assert engine.stats().tiers[1].blocks == blocks - 2


def test_the_corpus_prefix_is_fixed_by_who_made_the_corpus(opened):
    with opened() as engine:
        engine.add(DOCUMENTS)
    with opened(instruction="Answer like a pirate of few words.") as engine:
        answer = ask(engine, strategy="cacheblend", ratio=0.5)
        assert not answer.report.prefix_match
        assert [source.tier for source in answer.sources] == ["disk", "disk"]
        # Nothing is exact behind another prefix, so the first chunk may be chosen, too.
        first = len(engine.retrieve("Who keeps the lamp?", k=1)[0].chunk.token_ids)
        assert answer.report.tokens.recomputed > 0
        total = answer.report.tokens.recomputed + answer.report.tokens.reused
        assert total > first


def test_another_model_in_the_same_home_sees_only_its_own_blocks(opened):
    with opened() as engine:
        engine.add(DOCUMENTS)
        expected = ask(engine).token_ids
    with opened("other") as engine:
        assert [s.tier for s in ask(engine).sources] == ["computed", "computed"]
        done = engine.complete()
        assert done.chunks_done == 3
        assert engine.stats().tiers[1].blocks == 6
    with opened() as engine:
        answer = ask(engine)
        assert answer.token_ids == expected
        assert [s.tier for s in answer.sources] == ["disk", "disk"]


def test_a_corpus_block_outlives_any_number_of_passages(opened, tmp_path):
    with opened() as engine:
        engine.add(DOCUMENTS)
        size = engine.stats().tiers[1].nbytes
    with opened(disk_bytes=size * 2, ram_bytes=size) as engine:
        for n in range(20):
            engine.answer("Why?", passages=[f"Passage {n} of no account at all."], max_tokens=1)
        assert engine.stats().tiers[1].evictions > 0
    with opened() as engine:
        assert engine.complete().chunks_stored_before == 3


def test_disk_bytes_that_were_lowered_hold_from_the_start(opened, tmp_path):
    with opened() as engine:
        engine.add(DOCUMENTS)
        size = engine.stats().tiers[1].nbytes
        for n in range(6):
            engine.answer("Why?", passages=[f"Passage {n} of no account at all."], max_tokens=1)
        assert len(files(tmp_path)) == 9
    with opened(disk_bytes=size) as engine:
        wait_until(lambda: len(files(tmp_path)) == 3)
        assert engine.complete().chunks_stored_before == 3


def test_a_lost_or_damaged_corpus_block_is_computed_again(opened, tmp_path):
    with opened() as engine:
        engine.add(DOCUMENTS)
        expected = ask(engine, strategy="reuse").token_ids
    lost, damaged, _ = files(tmp_path)
    lost.unlink()
    content = bytearray(damaged.read_bytes())
    content[-5000] ^= 4
    damaged.write_bytes(content)
    with opened() as engine:
        answer = ask(engine, k=3, strategy="reuse")
        assert sorted(s.tier for s in answer.sources) == ["computed", "computed", "disk"]
        assert ask(engine, strategy="reuse").token_ids == expected
        assert engine.stats().tiers[1].damaged == 1
    with opened() as engine:
        assert engine.complete().chunks_stored_before == 3


def test_handles_know_their_tier_load_ahead_and_release(opened):
    with opened() as engine:
        engine.add(DOCUMENTS)
    with opened() as engine:
        plain = engine.retrieve("lamp", k=2)
        assert [(i.handle.tier, i.handle.state) for i in plain] == [("disk", "stored")] * 2
        ahead = engine.retrieve("lamp", k=2, prefetch=True)
        wait_until(lambda: {i.handle.state for i in ahead} == {"loaded"})
        assert engine.stats().open_blocks == 2
        assert {s.tier for s in ask(engine, k=2).sources} <= {"ram", "disk"}
        for item in ahead:
            item.handle.release()
            item.handle.cancel()
        assert {i.handle.state for i in ahead} == {"released"}
        assert engine.stats().open_blocks == 0
        unread = engine.retrieve("lamp", k=2, prefetch=True)
    # Closing leaves no pin behind.
    assert {i.handle.state for i in unread} == {"released"}


def test_a_prefetched_block_is_released_when_nobody_comes_for_it(opened):
    """Expired handles kept their pins until the next retrieval."""
    with opened() as engine:
        engine.add(DOCUMENTS)
        corpus, blocks, _ = engine._open_corpus()
        retriever = KVRetriever(corpus, blocks, engine.store.locate, ttl_s=0.2)
        found = retriever.retrieve("lamp", 2, Search("dense", mmr=1.0, distinct=1.0), prefetch=True)
        wait_until(lambda: {i.handle.state for i in found} == {"released"})
        wait_until(lambda: engine.stats().open_blocks == 0)
        retriever.close()
        with pytest.raises(ClosedError):
            retriever.retrieve("lamp", 2, Search("dense", mmr=1.0, distinct=1.0), prefetch=True)


def test_a_missing_block_is_missing_also_when_prefetched(opened, tmp_path):
    with opened() as engine:
        engine.add(DOCUMENTS)
        for path in files(tmp_path):
            path.unlink()
        found = engine.retrieve("lamp", k=2, prefetch=True)
        wait_until(lambda: {i.handle.state for i in found} == {"missing"})
        assert {i.handle.tier for i in found} == {None}


# ---- what the corpus refers to ---------------------------------------------------------------


def test_blocks_that_a_question_had_to_compute_go_with_their_document(opened, tmp_path):
    """They were protected without a reference: nothing ever deleted them."""
    with opened() as engine:
        engine.add(DOCUMENTS)
    with opened("other") as engine:
        ask(engine, k=3)
        assert len(files(tmp_path)) == 6
        assert engine.counts().blocks == 6
        for document in engine.documents():
            engine.delete(document.id)
        assert files(tmp_path) == []


def test_a_passage_that_becomes_a_document_is_protected(opened):
    """Its block is stored already, so the job left it for eviction."""
    with opened() as engine:
        for title, text in TEXTS.items():
            ask(engine, passages=[{"title": title, "text": text}])
        assert engine.add(DOCUMENTS).chunks_stored_before == 3
        size = engine.stats().tiers[1].nbytes
    with opened(disk_bytes=int(size * 1.4)) as engine:
        for n in range(6):
            ask(engine, passages=[f"Passage {n} of no account."])
        assert engine.complete().chunks_stored_before == 3


def test_blocks_of_another_process_are_protected(opened, tmp_path):
    """A server protected what the corpus referred to when it was opened, and nothing later."""
    with opened() as first:
        first.add(DOCUMENTS[:1])
        size = first.stats().tiers[1].nbytes
        with opened(disk_bytes=4 * size) as server, opened() as job:
            server.add([])
            job.add(DOCUMENTS)
            for n in range(8):
                ask(server, passages=[f"Passage {n} of no account."])
            assert job.complete().chunks_stored_before == 3


def test_adding_and_deleting_the_same_words_at_once_loses_nothing(opened, tmp_path):
    """A block was deleted between the reference of a twin and the delete of the first."""
    twins = [Document("The same words." + " " * n, source=str(n)) for n in range(2)]
    with opened() as engine:
        engine.add(DOCUMENTS)

        def churn(document):
            for _ in range(15):
                engine.add([document])
                engine.delete(document.id)
            engine.add([document])

        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(churn, twin) for twin in twins]:
                future.result()
        assert len(files(tmp_path)) == 4
        assert engine.complete().chunks_stored_before == 5


def test_an_outage_while_deleting_is_no_error(opened, monkeypatch, tmp_path):
    with opened() as engine:
        engine.add(DOCUMENTS)

        def fail(key):
            raise TierError("disk", "gone")

        with monkeypatch.context() as patch:
            patch.setattr(engine.store, "delete", fail)
            assert engine.delete(DOCUMENTS[0].id)
        assert engine.document(DOCUMENTS[0].id) is None


def test_looking_does_not_fix_the_corpus_prefix(opened):
    """Listing an empty corpus wrote the instruction of whoever looked first."""
    with opened(instruction="The wrong one.") as engine:
        assert engine.documents() == []
        with pytest.raises(InputError):
            ask(engine)
    with opened(instruction="The right one.") as engine:
        engine.add(DOCUMENTS)
        assert ask(engine).report.prefix_match


def test_two_namespaces_share_a_home_and_nothing_else(opened, tmp_path):
    with opened(namespace="a") as a, opened(namespace="b") as b:
        a.add(DOCUMENTS)
        assert b.documents() == []
        assert b.counts().documents == 0
        assert b.document(DOCUMENTS[0].id) is None
        assert not b.delete(DOCUMENTS[0].id)
        with pytest.raises(InputError, match="empty"):
            b.retrieve("lamp")
        assert b.add(DOCUMENTS).chunks_stored_before == 0
        assert len(files(tmp_path)) == 6
        for document in b.documents():
            b.delete(document.id)
        assert a.complete().chunks_stored_before == 3
        assert [s.tier for s in ask(a, k=3).sources] == ["disk"] * 3


def test_closing_under_a_job_is_said(opened):
    engine = opened()

    def close(progress):
        engine.close()

    with pytest.raises(ClosedError):
        engine.add(DOCUMENTS, close)


def test_home_is_for_its_owner_alone(opened, tmp_path):
    with opened():
        assert (tmp_path / "home").stat().st_mode & 0o077 == 0


def test_skipped_files_are_carried_through(opened):
    with opened() as engine:
        progress = engine.add([Skipped("a.bin", "binary"), DOCUMENTS[0]])
        assert progress.documents_added == 1
        assert [item.source for item in progress.skipped] == ["a.bin"]


def test_use_after_close_is_refused(opened):
    engine = opened()
    engine.add(DOCUMENTS)
    engine.close()
    engine.close()
    for call in (lambda: ask(engine), lambda: engine.add([]), engine.stats, engine.documents):
        with pytest.raises(ClosedError):
            call()


_PRECOMPUTE = """
import resource, sys
from kvrag import Engine, Settings
from kvrag.retrieval import Document

model, embedder, home, count = sys.argv[1:]
documents = (
    Document(f"Lamp {n} of the row. " * 12, title=f"Lamp {n}") for n in range(int(count))
)
settings = Settings(model=model, embedder=embedder, home=home, dtype="float32", threads=1)
with Engine.open(settings) as engine:
    done = engine.add(documents)
print(done.bytes_written, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_of_the_corpus_job_does_not_grow_with_the_corpus(models, tmp_path):
    """Blocks of some 100 MB more must not show; the bound is far above the index's own growth."""
    wide = make_tiny_model(
        tmp_path / "wide", num_hidden_layers=8, num_key_value_heads=4, head_dim=128
    )

    def run(count):
        arguments = [str(wide), str(models["embedder"]), str(tmp_path / f"home{count}"), str(count)]
        done = subprocess.run(
            [sys.executable, "-c", _PRECOMPUTE, *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        return [int(word) for word in done.stdout.split()]

    small_bytes, small_rss = run(10)
    large_bytes, large_rss = run(60)
    assert large_bytes - small_bytes > 100e6
    assert large_rss - small_rss < 0.25 * (large_bytes - small_bytes)
