"""`kvrag documents`: over a real home, without a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import pytest

from kvrag.retrieval.catalog import Catalog

from .homes import TEXT, block_files


@pytest.fixture
def two(kvrag, tmp_path, environment):
    """A home with two documents, one text, so that they share every block."""
    lines = [f'{{"title": "Karsk", "text": "{TEXT * 6}", "source": "a"}}']
    lines.append(f'{{"title": "Karsk", "text": "{TEXT * 6} ", "source": "b"}}')
    lines.append('{"title": "Other", "text": "The ferry leaves at nine."}')
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    assert kvrag("precompute", tmp_path / "notes.jsonl").code == 0
    return Path(environment["KVRAG_HOME"])


def test_documents_are_listed_in_their_order(kvrag, two):
    facts = kvrag("documents", "ls", "--json").json
    assert (facts["namespace"], facts["total"]) == ("default", len(facts["documents"]))
    with Catalog.open(two / "catalog.sqlite") as catalog:
        assert [row["id"] for row in facts["documents"]] == [
            document.id for document in catalog.documents("default")
        ]
    fields = {"id", "title", "source", "metadata", "added_at", "num_chunks"}
    assert all(set(row) == fields for row in facts["documents"])
    text = kvrag("documents", "ls").out
    assert all(row["id"] in text and row["title"] in text for row in facts["documents"])
    second = kvrag("documents", "ls", "--offset", 1, "--limit", 1, "--json").json
    assert second == facts | {"documents": facts["documents"][1:2]}
    other = kvrag("--set", "namespace=other", "documents", "ls", "--json").json
    assert (other["total"], other["documents"]) == (0, [])


def test_what_another_document_shares_is_kept(kvrag, two):
    rows = kvrag("documents", "ls", "--json").json["documents"]
    first, second, other = rows
    files = block_files(two)
    assert kvrag("--set", "namespace=other", "documents", "rm", first["id"]).code == 1
    assert block_files(two) == files
    deleted = kvrag("documents", "rm", first["id"], "--json")
    assert deleted.code == 0
    expected = {"namespace": "default", "deleted": [first["id"]], "unknown": [], "owed": 0}
    assert deleted.json == expected
    assert block_files(two) == files
    assert kvrag("store", "verify").code == 0
    assert "deleted 1 documents" in kvrag("documents", "rm", second["id"]).out
    assert len(block_files(two)) == other["num_chunks"]
    answer = kvrag("ask", "When does the ferry leave?", "--k", 1, "--json", "--max-tokens", 1)
    (source,) = answer.json["sources"]
    # No vector of theirs is left in the file, which later processes need not make again.
    (index,) = (two / "index").rglob("*.faiss")
    assert faiss.read_index(str(index)).ntotal == other["num_chunks"]
    written = index.stat().st_mtime_ns
    assert kvrag("ask", "Who?", "--k", 1, "--max-tokens", 1).code == 0
    assert index.stat().st_mtime_ns == written
    assert source["document"] == other["id"]


def test_unknown_ids_are_told_and_the_others_deleted(kvrag, two):
    rows = kvrag("documents", "ls", "--json").json["documents"]
    ids = [rows[0]["id"], "nothing", rows[2]["id"], "nothing"]
    result = kvrag("documents", "rm", *ids, "--json")
    assert result.code == 1
    assert result.json["deleted"] == [rows[0]["id"], rows[2]["id"]]
    assert result.json["unknown"] == ["nothing"]
    assert result.err == "warning: there is no document nothing in default\n"
    assert kvrag("documents", "ls", "--json").json["documents"] == rows[1:2]


def test_no_home_and_no_catalog_is_made(kvrag, environment):
    home = Path(environment["KVRAG_HOME"])
    for command in (("ls",), ("rm", "x")):
        result = kvrag("documents", *command)
        assert result.code == 2
        assert "does not exist" in result.error
    home.mkdir()
    assert kvrag("documents", "ls", "--json").json["total"] == 0
    assert kvrag("documents", "rm", "x", "--json").json["unknown"] == ["x"]
    assert not (home / "catalog.sqlite").exists()


def test_no_model_is_loaded(two):
    code = (
        "import sys\n"
        "from kvrag.cli.main import run\n"
        "assert run(['--model', '/nowhere', 'documents', 'ls']) == 0\n"
        "assert run(['--model', '/nowhere', 'documents', 'rm', 'x']) == 1\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.redis
def test_what_a_redis_that_is_away_owes_is_told_and_done_later(kvrag, two, server, monkeypatch):
    monkeypatch.setenv("KVRAG_REDIS_URL", server.url)
    assert kvrag("store", "copy", two, server.url).code == 0
    rows = kvrag("documents", "ls", "--json").json["documents"]
    blocks = len(block_files(two))
    server.kill()
    result = kvrag("documents", "rm", *(row["id"] for row in rows), "--json")
    assert (result.code, result.json["owed"]) == (0, blocks)
    assert f"warning: {blocks} blocks lie in a tier that cannot delete them now" in result.err
    assert block_files(two) == []
    server.start()
    assert kvrag("documents", "rm", "x", "--json").json["owed"] == 0
