"""One process answers while the other adds, deletes and saves: every answer is of whole documents.

Whoever answers reads the documents' chunks before and behind each search. A document that was there
both times is found with all its chunks, and what was there neither time is not found. That none of
it is of a state in between shows where an answer holds all chunks: those of one document go
together.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvrag.retrieval import IndexRule, VectorIndex

from .helpers import DIM, EMBEDDER, add, make_document, open_catalog, unit_vectors

CHUNKS = 3

WORKER = """
import sys
from pathlib import Path
from kvrag.retrieval import IndexRule, VectorIndex
from tests.retrieval.helpers import DIM, EMBEDDER, add, make_document, open_catalog
folder, kind, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rule = IndexRule(kind, written_most=6)
with open_catalog(folder) as catalog:
    index = VectorIndex.open(folder / "index.faiss", catalog, "default", EMBEDDER, DIM, rule)
    for number in range(20, last):
        add(catalog, number, chunks=3)
        if number % 2:
            catalog.delete_document("default", make_document(number - 3).id)
        if number % 4 == 0:
            index.save()
        print(number, flush=True)
    sys.stdin.read()
    index.save(now=True)
"""


def whole(catalog) -> dict[str, tuple[int, ...]]:
    """Chunks by document, of one state of the catalog."""
    rows = catalog._rows("SELECT document_id, id FROM chunks ORDER BY id", ())
    found: dict[str, list[int]] = {}
    for document, chunk_id in rows:
        found.setdefault(document, []).append(chunk_id)
    return {document: tuple(ids) for document, ids in found.items()}


@pytest.mark.parametrize(("kind", "last"), [("flat", 90), ("hnsw", 90)])
def test_one_answers_while_the_other_adds_and_deletes(tmp_path, kind, last):
    rule = IndexRule(kind)
    with open_catalog(tmp_path) as catalog:
        for number in range(20):
            add(catalog, number, chunks=CHUNKS)
        path = tmp_path / "index.faiss"
        index = VectorIndex.open(path, catalog, "default", EMBEDDER, DIM, rule)
        assert index.save()
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), kind, str(last)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        try:
            worker.stdout.readline()
            states = set()
            while True:
                before = whole(catalog)
                index.refresh()
                found = {i for i, _ in index.search(unit_vectors(1, 1)[0], 10_000)}
                after = whole(catalog)
                for document, ids in (before | after).items():
                    inside = found & set(ids)
                    assert inside in (set(), set(ids)), "a document is found in part"
                    if before.get(document) == after.get(document):
                        assert inside == set(ids)
                known = {i for ids in (*before.values(), *after.values()) for i in ids}
                assert found <= known
                states.add(frozenset(found))
                if make_document(last - 1).id in before:
                    break
                # As often opened anew, from whatever file is in force then.
                if len(states) % 5 == 0:
                    index = VectorIndex.open(path, catalog, "default", EMBEDDER, DIM, rule)
            assert len(states) > 5
            worker.communicate(timeout=120)
            assert worker.returncode == 0
        finally:
            worker.kill()
            worker.wait()
        again = VectorIndex.open(path, catalog, "default", EMBEDDER, DIM, rule)
        assert again.is_saved
        ids = {i for i, _ in again.search(unit_vectors(1, 1)[0], 10_000)}
        assert ids == set(catalog.vector_ids("default", EMBEDDER).tolist())
        assert index.save(now=True)
        assert len(list(tmp_path.glob("index.*.faiss"))) == 1


def test_killed_while_it_saves(tmp_path):
    """Whatever instant: the file that is in force is whole, and what it lacks is caught up with."""
    with open_catalog(tmp_path) as catalog:
        for number in range(20):
            add(catalog, number, chunks=CHUNKS)
        path = tmp_path / "index.faiss"
        saving = "index.save(now=True)\n        print(number, flush=True)"
        source = WORKER.replace("print(number, flush=True)", saving)
        for attempt in range(4):
            worker = subprocess.Popen(
                [sys.executable, "-c", source, str(tmp_path), "flat", "1000"],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
            for _ in range(3 + 5 * attempt):
                assert worker.stdout.readline()
            worker.send_signal(signal.SIGKILL)
            worker.stdout.close()
            assert worker.wait() == -signal.SIGKILL
            index = VectorIndex.open(path, catalog, "default", EMBEDDER, DIM)
            assert index._saved is not None, "a whole version was there"
            ids = {i for i, _ in index.search(unit_vectors(1, 1)[0], 10_000)}
            assert ids == set(catalog.vector_ids("default", EMBEDDER).tolist())
