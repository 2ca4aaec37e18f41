"""Documents that change, vanish and are shared out: what the corpus holds in the end."""

from __future__ import annotations

import json
import threading

import pytest

from kvrag import Engine, Settings
from kvrag.errors import CorpusSettingsError, InputError
from kvrag.precompute.shard import Shard
from kvrag.retrieval import Document, read
from tests.tiny import make_tiny_embedder


@pytest.fixture
def opened(models, tmp_path):
    def open_(home="home", **options):
        values = {
            "home": tmp_path / home,
            "model": models["model"],
            "embedder": models["embedder"],
            "dtype": "float32",
            "threads": 1,
            "corpus_context": "",  # one block a chunk, so that they can be counted
        }
        return Engine.open(Settings(**(values | options)))

    return open_


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "docs"
    path.mkdir()
    return path


def texts(engine):
    corpus, _, _ = engine._open_corpus()
    ids = list(corpus.catalog.chunk_ids(corpus.namespace))
    return sorted(chunk.text for chunk in corpus.catalog.chunk(ids))


def blocks(engine):
    return engine.stats().tiers[1].blocks


def test_a_changed_file_replaces_what_it_held_and_touches_nothing_else(opened, folder):
    (folder / "a.txt").write_text("The lamp burns.")
    (folder / "b.txt").write_text("The ferry leaves.")
    lines = [json.dumps({"text": f"Line {n}."}) for n in range(3)]
    (folder / "c.jsonl").write_text("\n".join(lines))
    with opened() as engine:
        assert engine.add(read([folder])).documents_added == 5
        (folder / "a.txt").write_text("The lamp is out.")
        (folder / "c.jsonl").write_text("\n".join(["", lines[2], lines[0]]))
        done = engine.add(read([folder]))
        assert (done.documents_added, done.documents_known, done.documents_replaced) == (1, 3, 2)
        assert done.chunks_done - done.chunks_stored_before == 1
        assert texts(engine) == ["Line 0.", "Line 2.", "The ferry leaves.", "The lamp is out."]
        assert blocks(engine) == 4
        assert engine.add(read([folder])).documents_replaced == 0


def test_a_document_stays_as_long_as_a_file_or_a_person_holds_it(opened, folder):
    for name in ("x", "y"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text("The lamp burns.")
    (folder / "b.txt").write_text("The ferry leaves.")
    with opened() as engine:
        done = engine.add(read([folder]))
        assert (done.documents_added, done.documents_known) == (2, 1)
        engine.add([Document("The ferry leaves.", title="b")])
        (folder / "x" / "a.txt").write_text("The lamp is out.")
        (folder / "b.txt").write_text("The ferry stays.")
        assert engine.add(read([folder])).documents_replaced == 0
        (folder / "y" / "a.txt").write_text("The lamp is out.")
        assert engine.add(read([folder])).documents_replaced == 1
        assert texts(engine) == ["The ferry leaves.", "The ferry stays.", "The lamp is out."]


def test_a_file_that_was_not_read_whole_replaces_nothing(opened, folder):
    (folder / "a.jsonl").write_text('{"text": "One."}\n{"text": "Two."}')
    with opened() as engine:
        engine.add(read([folder]))
        (folder / "a.jsonl").write_text('{"text": "One."}\n{"text": "Tw')
        done = engine.add(read([folder]))
        assert (len(done.skipped), done.documents_replaced) == (1, 0)
        (folder / "a.jsonl").write_bytes(b"\0")
        engine.add(read([folder]))
        assert texts(engine) == ["One.", "Two."]


def test_vanished_documents_go_on_request_and_below_the_given_paths_alone(opened, folder):
    other = folder.parent / "docs-other"
    other.mkdir()
    for path in (folder / "a.txt", folder / "b.txt", other / "c.txt"):
        path.write_text(path.name)
    with opened() as engine:
        engine.add(read([folder, other]))
        (folder / "a.txt").unlink()
        (other / "c.txt").unlink()
        assert engine.add(read([folder])).documents_replaced == 0
        assert len(texts(engine)) == 3
        assert engine.prune([folder]) == 1
        assert texts(engine) == ["b.txt", "c.txt"]
        assert engine.prune([str(folder.parent / "docs-*" / "*.txt")]) == 1
        assert blocks(engine) == 1


def test_shards_share_the_documents_out_without_a_word(opened, folder):
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"Lamp {n} burns.")
    held = []
    for number in (1, 2, 3):
        with opened(f"home-{number}") as engine:
            done = engine.add(read([folder]), shard=Shard(number, 3))
            held.append(texts(engine))
            assert done.documents_added == len(held[-1])
            assert done.documents_elsewhere == 12 - len(held[-1])
    assert sorted(text for part in held for text in part) == sorted(
        f"Lamp {n} burns." for n in range(12)
    )
    assert sum(map(bool, held)) > 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0"])
def test_shards_that_make_no_sense(text):
    with pytest.raises(InputError, match="I"):
        Shard.parse(text)


def test_other_chunks_are_refused_until_the_corpus_is_rebuilt(opened, folder):
    (folder / "a.txt").write_text("The lamp burns all night. " * 20)
    (folder / "b.txt").write_text("The ferry leaves.")
    with opened(chunk_tokens=128) as engine:
        engine.add(read([folder]))
        before = texts(engine)
    with opened(chunk_tokens=64) as engine:
        with pytest.raises(CorpusSettingsError, match=r"chunk_tokens.*128.*--rebuild"):
            engine.add(read([folder]))
        assert texts(engine) == before
        done = engine.add(read([folder]), rebuild=True)
        assert (done.documents_added, done.documents_known) == (1, 1)
        assert len(texts(engine)) > len(before)
        assert blocks(engine) == len(set(texts(engine)))
        assert engine.add(read([folder])).documents_known == 2


def test_another_embedder_is_refused_until_the_corpus_is_rebuilt(opened, folder, tmp_path):
    (folder / "a.txt").write_text("The lamp burns.")
    with opened() as engine:
        engine.add(read([folder]))
    other = make_tiny_embedder(tmp_path / "other")
    config = other / "config.json"
    config.write_text(config.read_text() + "\n")  # other bytes, another fingerprint
    with opened(embedder=str(other)) as engine:
        with pytest.raises(CorpusSettingsError, match="another embedder"):
            engine.add(read([folder]))
        assert engine.add(read([folder]), rebuild=True).documents_known == 1
        assert engine.add(read([folder])).documents_known == 1


def test_the_manifest_depends_on_documents_and_settings_alone(opened, folder, tmp_path):
    for n in range(3):
        (folder / f"{n}.txt").write_text(f"Lamp {n} burns.")
    paths = [folder / f"{n}.txt" for n in range(3)]
    manifests = []
    for home, order in (("one", paths), ("two", paths[::-1])):
        with opened(home) as engine:
            engine.add(read(order))
            engine.write_manifest(tmp_path / "manifest.jsonl")
        manifests.append((tmp_path / "manifest.jsonl").read_text())
    assert manifests[0] == manifests[1]
    header, *documents = map(json.loads, manifests[0].splitlines())
    assert header["chunk_tokens"] == 256
    assert [len(document["chunks"]) for document in documents] == [1, 1, 1]
    assert [d["document"] for d in documents] == sorted(d["document"] for d in documents)
    assert not list(tmp_path.glob("*.partial"))


def test_a_plan_foresees_the_bytes_and_stores_nothing(opened, folder):
    (folder / "a.txt").write_text(" ".join(f"The lamp burns in night {n}." for n in range(30)))
    (folder / "b.png").write_bytes(b"\x89PNG")
    with opened(corpus_context=None) as engine:
        plan = engine.plan(read([folder]), Shard())
        assert (plan.documents, plan.blocks, len(plan.skipped)) == (1, 2 * plan.chunks, 1)
        assert engine.counts().documents == 0
        assert blocks(engine) == 0
        done = engine.add(read([folder]))
        assert done.tokens_computed == plan.tokens
        assert done.bytes_written <= plan.nbytes["raw"] <= 1.25 * done.bytes_written
        assert plan.nbytes["int4"] <= plan.nbytes["int8"] <= plan.nbytes["raw"]
        assert plan.seconds > 0
        assert engine.plan(read([folder]), Shard()).documents_known == 1


def test_storing_overlaps_computing(opened, monkeypatch):
    """The second chunk is computed while the first one's block is on its way to the disk."""
    from kvrag.blocks import ChunkBlocks

    compute, put = ChunkBlocks.compute, ChunkBlocks.put
    computed, overlapped = [], []
    both = threading.Event()

    def counted(self, token_ids):
        block = compute(self, token_ids)
        computed.append(token_ids)
        if len(computed) == 2:
            both.set()
        return block

    def slow(self, block, **options):
        overlapped.append(both.wait(timeout=60))
        return put(self, block, **options)

    monkeypatch.setattr(ChunkBlocks, "compute", counted)
    monkeypatch.setattr(ChunkBlocks, "put", slow)
    with opened() as engine:
        done = engine.add([Document("The lamp burns."), Document("The ferry leaves.")])
    assert overlapped == [True, True]
    assert done.chunks_done == 2


def test_a_loader_that_fails_ends_the_job_with_what_came_before(opened):
    def documents():
        yield Document("The lamp burns.")
        raise OSError("the cable is cut")

    with opened() as engine:
        with pytest.raises(OSError, match="cable"):
            engine.add(documents())
        engine.complete()
        assert len(texts(engine)) <= 1
        assert engine.add([Document("The lamp burns.")]).chunks_done == 1


def test_named_documents_are_replaced_and_shared_out(opened):
    first = Document("The lamp burns.", id="lamp/1", metadata={"year": 1})
    again = Document("The lamp is out.", id="lamp/1")
    with opened() as engine:
        assert engine.add([first, Document("Boats come.", id="boats")]).documents_added == 2
        described = Document(first.text, id=first.id, metadata={"year": 2})
        assert engine.add([described]).documents_known == 1
        assert engine.document("lamp/1").metadata == {"year": 2}
        # The last of one id counts, also within one job.
        done = engine.add([again, first, again])
        assert (done.documents_added, done.documents_replaced) == (3, 3)
        assert engine.document_text("lamp/1") == again.text
        assert blocks(engine) == engine.counts().chunks
        owned = [Shard(n, 2).owns("lamp/1") for n in (1, 2)]
        assert sorted(owned) == [False, True]


@pytest.mark.parametrize("ids", [("", ""), ("one", "two")])
def test_a_document_that_moves_to_another_file_stays(opened, folder, ids):
    one, two = (
        json.dumps({"text": text} | ({"id": given} if given else {}))
        for text, given in zip(("The lamp burns.", "The ferry leaves."), ids, strict=True)
    )
    (folder / "a.jsonl").write_text(f"{one}\n{two}")
    with opened() as engine:
        engine.add(read([folder]))
        (folder / "a.jsonl").write_text(two)
        (folder / "b.jsonl").write_text(one)
        for _ in range(2):
            engine.add(read([folder]))
            assert texts(engine) == ["The ferry leaves.", "The lamp burns."]
            assert blocks(engine) == 2


def test_of_a_document_that_comes_twice_the_last_is_described(opened):
    first = Document("The lamp burns.", id="lamp", metadata={"version": 1})
    with opened() as engine:
        engine.add([first])
        engine.add([first, Document("The lamp is out.", id="lamp", metadata={"version": 2})])
        corpus, _, _ = engine._open_corpus()
        assert corpus.text("lamp") == "The lamp is out."
        assert corpus.catalog.document("default", "lamp").metadata == {"version": 2}
