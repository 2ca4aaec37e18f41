"""A process killed while it adds and deletes leaves whole documents, or none."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvrag.retrieval import LexicalIndex, VectorIndex

from .helpers import DIM, EMBEDDER, TOKENIZER, add, make_document, open_catalog, unit_vectors

WORKER = """
import sys
from pathlib import Path
from kvrag.retrieval import VectorIndex
from tests.retrieval.helpers import DIM, EMBEDDER, add, make_document, open_catalog
folder = Path(sys.argv[1])
catalog = open_catalog(folder)
index = VectorIndex.open(folder / "index.faiss", catalog, "default", EMBEDDER, DIM)
number = int(sys.argv[2])
while True:
    add(catalog, number, chunks=5)
    for chunk_id in catalog.document_chunks("default", make_document(number).id):
        catalog.add_block_ref(f"key-{chunk_id}", chunk_id, "m")
    print(number, flush=True)
    if number % 3 == 0:
        catalog.delete_document("default", make_document(number).id)
    index.save()
    number += 1
"""


@pytest.mark.parametrize("delay_s", [0.05, 0.21, 0.4])
def test_killed_while_adding(tmp_path, delay_s):
    first = 0
    for _ in range(2):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(first)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        reported = [int(worker.stdout.readline())]
        time.sleep(delay_s)
        worker.send_signal(signal.SIGKILL)
        reported += [int(line) for line in worker.stdout.read().split()]
        worker.stdout.close()
        assert worker.wait() == -signal.SIGKILL
        first = check(tmp_path, reported)


def check(folder, reported):
    with open_catalog(folder) as catalog:
        documents = catalog.documents("default", limit=10**6)
        present = {document.id for document in documents}
        # What was reported is there, but for the document that was being deleted.
        for number in reported:
            if number % 3:
                assert make_document(number).id in present, number
        for document in documents:
            ids = catalog.document_chunks("default", document.id)
            assert len(ids) == document.num_chunks == 5
            assert None not in catalog.token_ids(ids, TOKENIZER)
            assert all(row is not None for row in catalog.vectors(ids, EMBEDDER))
        counts = catalog.counts("default")
        assert counts.chunks == counts.vectors == 5 * len(documents)
        index = VectorIndex.open(folder / "index.faiss", catalog, "default", EMBEDDER, DIM)
        found = index.search(unit_vectors(1, 1)[0], 10**6)
        assert sorted(i for i, _ in found) == catalog.vector_ids("default", EMBEDDER).tolist()
        by_words = LexicalIndex(catalog, "default").search("part", 10**6)
        assert sorted(i for i, _ in by_words) == sorted(i for i, _ in found)
        next_number = max(reported) + 2
        assert add(catalog, next_number, chunks=5)
    db = sqlite3.connect(folder / "catalog.sqlite")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    db.close()
    return next_number + 1
