"""`kvrag corpus`: what each command shows, asks and refuses; what it does is in tests/corpora."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from kvrag.home import Home
from kvrag.precompute.lock import only_job
from tests.cli.homes import block_files, flip

pytest.importorskip("faiss", reason="documents need the extra kvrag[retrieval]")
pytest.importorskip("sentence_transformers", reason="documents need the extra kvrag[retrieval]")

QUESTION = ("ask", "Who keeps the lamp?", "--k", 2, "--max-tokens", 3, "--json")


def test_ls_and_show_tell_what_there_is(kvrag, home, tmp_path):
    listed = kvrag("corpus", "ls", "--json").json
    (corpus,) = listed["corpora"]
    blocks = block_files(home)
    expected = {"name": "default", "documents": 1, "missing": 0, "blocks": len(blocks)}
    assert corpus | expected == corpus
    assert corpus["nbytes"] == sum(path.stat().st_size for path in blocks)
    assert corpus["made_with"]["chunk_tokens"] == "64"
    assert [(kind["codec"], kind["dtype"]) for kind in corpus["kinds"]] == [("raw", "float32")]
    shown = kvrag("corpus", "show", "default", "--json").json
    assert shown == corpus | {"origins": [str(tmp_path / "karsk.txt")]}
    assert "raw of float32, chunks of 64 tokens" in kvrag("corpus", "ls").out
    table = kvrag("corpus", "show", "default").out
    assert "karsk.txt" in table
    assert table.count("blocks by kind") == 1
    assert f"{len(blocks)} raw of model" in table
    assert "…" in table  # the context is longer than its row
    blocks[0].unlink()
    assert kvrag("corpus", "show", "default", "--json").json["missing"] == 1


@pytest.mark.parametrize("command", ["show", "verify", "drop", "export"])
def test_a_corpus_that_is_not_there_is_named_and_none_is_made(kvrag, home, tmp_path, command):
    more = [tmp_path / "file"] if command == "export" else []
    result = kvrag("corpus", command, "other", *more)
    assert result.code == 2
    assert "no corpus 'other'" in result.error
    assert "'default'" in result.error
    assert [row["name"] for row in kvrag("corpus", "ls", "--json").json["corpora"]] == ["default"]
    assert not (tmp_path / "file").exists()


def test_what_is_nearly_the_same_is_listed(kvrag, home, tmp_path):
    text = "Bela built the cableway of Orrel in the year of the great snow"
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "two.txt").write_text(f"{text}, they say.")
    assert kvrag("precompute", tmp_path / "one.txt", tmp_path / "two.txt").code == 0
    shown = kvrag("corpus", "show", "default", "--near-duplicates", "--json").json
    titles = [[one["title"] for one in group] for group in shown["near_duplicates"]]
    assert ["one", "two"] in titles
    options = ("--near-duplicates", "--threshold", 1, "--json")
    exact = kvrag("corpus", "show", "default", *options).json["near_duplicates"]
    assert ["one", "two"] not in [[one["title"] for one in group] for group in exact]
    assert "groups of chunks" in kvrag("corpus", "show", "default", "--near-duplicates").out


def test_an_export_into_no_folder_is_refused(kvrag, home, tmp_path):
    refused = kvrag("corpus", "export", "default", tmp_path / "no" / "file")
    assert refused.code == 2
    assert "there is no folder" in refused.error


def test_a_home_without_corpora(kvrag, environment):
    assert kvrag("corpus", "ls").code == 2
    assert not Path(environment["KVRAG_HOME"]).exists()


def test_a_corpus_goes_into_a_file_and_another_home(kvrag, home, tmp_path):
    file, other = tmp_path / "karsk.corpus", tmp_path / "other"
    before = kvrag(*QUESTION).json
    exported = kvrag("corpus", "export", "default", file, "--json").json
    assert exported["blocks"] == len(block_files(home))
    assert exported["nbytes"] == file.stat().st_size
    assert file.stat().st_mode & 0o777 == 0o600
    imported = kvrag("corpus", "import", file, "--as", "karsk", "--home", other, "--json").json
    expected = {"name": "karsk", "documents": 1, "blocks": exported["blocks"], "codec": "raw"}
    assert imported | expected == imported
    after = kvrag(*QUESTION, "--home", other, "--set", "namespace=karsk").json
    assert after["answer"] == before["answer"]
    assert {source["tier"] for source in after["sources"]} == {"disk"}
    again = kvrag("corpus", "import", file, "--as", "karsk", "--home", other)
    assert again.code == 2
    assert "has a corpus 'karsk'" in again.error


def test_verify_tells_and_mends(kvrag, home):
    sound = kvrag("corpus", "verify", "default", "--json")
    assert (sound.code, sound.json["problems"]) == (0, [])
    flip(block_files(home)[0])
    found = kvrag("corpus", "verify", "default")
    assert found.code == 4
    assert "checksum" in found.out
    mended = kvrag("corpus", "verify", "default", "--repair", "--json")
    assert (mended.code, len(mended.json["problems"]), mended.json["left"]) == (0, 1, [])
    assert kvrag("corpus", "verify", "default").code == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_drop_asks_and_leaves_nothing(kvrag, home, monkeypatch):
    asked = kvrag("corpus", "drop", "default")
    assert asked.code == 2
    assert "--yes" in asked.error
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    declined = kvrag("corpus", "drop", "default")
    assert (declined.code, declined.out) == (1, "nothing was deleted\n")
    assert "Delete 1 documents and their KV of default?" in declined.err
    assert block_files(home)
    dropped = kvrag("corpus", "drop", "default", "--yes", "--json").json
    assert dropped["documents"] == 1
    assert block_files(home) == []
    assert not Home(home).corpus_index("default").exists()
    assert kvrag("corpus", "ls", "--json").json["corpora"] == []
    assert kvrag("corpus", "drop", "default", "--yes").code == 2


def test_drop_is_refused_while_a_job_works(kvrag, home):
    with only_job(Home(home).job_lock("default", "2/3"), lambda holder: None):
        result = kvrag("corpus", "drop", "default", "--yes")
    assert result.code == 1
    assert f"process {os.getpid()}" in result.error
    assert block_files(home)
