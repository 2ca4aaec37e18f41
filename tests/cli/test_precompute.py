"""`kvrag precompute`: what it counts, what it skips, and that a kill costs one chunk at most."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.conftest import start

pytest.importorskip("faiss", reason="documents need the extra kvrag[retrieval]")
pytest.importorskip("sentence_transformers", reason="documents need the extra kvrag[retrieval]")

FIELDS = {
    "documents_added", "documents_known", "documents_elsewhere", "documents_replaced",
    "documents_vanished", "chunks", "chunks_stored_before", "tokens_computed", "bytes_written",
    "tokens_per_s", "seconds", "busy", "skipped",
}  # fmt: skip


def write_documents(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04}.txt").write_text(f"Lamp {number} burns {number * 7} hours.")
    return folder


def stored_blocks(home: Path) -> dict[Path, tuple[int, int]]:
    """Every whole block with what changes when it is written again."""
    found = {}
    for path in (home / "kv" / "blocks").rglob("*.kv"):
        status = path.stat()
        found[path] = (status.st_ino, status.st_mtime_ns)
    return found


def test_documents_are_added_once(kvrag, tmp_path, environment):
    folder = write_documents(tmp_path / "docs", 3)
    first = kvrag("precompute", folder, "--json")
    assert (first.code, first.err) == (0, "")
    assert set(first.json) == FIELDS
    expected = {"documents_added": 3, "documents_known": 0, "chunks": 3, "chunks_stored_before": 0}
    assert first.json | expected == first.json
    assert first.json["tokens_computed"] > 0
    assert first.json["seconds"] > 0
    blocks = stored_blocks(Path(environment["KVRAG_HOME"]))
    assert len(blocks) == 3
    assert first.json["bytes_written"] == sum(path.stat().st_size for path in blocks)

    again = kvrag("precompute", folder, "--json").json
    assert (again["documents_added"], again["documents_known"]) == (0, 3)
    assert (again["chunks_stored_before"], again["tokens_computed"]) == (3, 0)
    assert "nothing to do" in kvrag("precompute", folder).out
    assert stored_blocks(Path(environment["KVRAG_HOME"])) == blocks

    answer = kvrag("ask", "Which lamp?", "--k", 2, "--max-tokens", 2, "--json").json
    assert [source["tier"] for source in answer["sources"]] == ["disk", "disk"]
    shown = kvrag("store", "stat", "--json").json
    assert shown["catalog"] == {"documents": 3, "chunks": 3, "vectors": 3, "blocks": 3}


def test_without_paths_lost_blocks_are_computed_again(kvrag, tmp_path, environment):
    kvrag("precompute", write_documents(tmp_path / "docs", 3))
    lost = next(iter(stored_blocks(Path(environment["KVRAG_HOME"]))))
    lost.unlink()
    result = kvrag("precompute", "--json").json
    assert (result["documents_known"], result["chunks_stored_before"]) == (0, 2)
    assert result["tokens_computed"] > 0
    assert lost.exists()
    assert "nothing to do" in kvrag("precompute").out


def test_what_is_skipped_is_listed_and_3(kvrag, tmp_path, monkeypatch):
    folder = write_documents(tmp_path / "docs", 1)
    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "huge.md").write_text("word " * 100)
    (folder / "image.png").write_bytes(b"png")
    (folder / "lines.jsonl").write_text('{"text": "A good line."}\nnope\n')
    (folder / "unreadable.txt").symlink_to(folder / "nowhere")
    monkeypatch.setenv("KVRAG_MAX_DOCUMENT_BYTES", "200")
    result = kvrag("precompute", folder, "--json")
    assert result.code == 3
    assert result.json["documents_added"] == 2
    reasons = {Path(s["source"]).name: s["reason"] for s in result.json["skipped"]}
    assert reasons.keys() == {
        "binary.txt", "latin.txt", "huge.md", "image.png", "lines.jsonl:2", "unreadable.txt",
    }  # fmt: skip
    assert "binary" in reasons["binary.txt"]
    assert "more than 200 bytes" in reasons["huge.md"]
    lines = result.err.splitlines()
    assert len(lines) == 7
    assert lines[-1] == "6 skipped, so the exit code is 3"
    assert any(line.startswith("skipped: ") and "huge.md: more than" in line for line in lines)
    bigger = kvrag("precompute", folder, "--max-document-bytes", 1000, "--json").json
    assert (bigger["documents_added"], len(bigger["skipped"])) == (1, 5)


def test_nothing_to_add(kvrag, tmp_path):
    result = kvrag("precompute", tmp_path / "gone")
    assert result.code == 2
    assert "cannot be loaded: No such file" in result.error
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    result = kvrag("precompute", tmp_path / "binary.txt")
    assert (result.code, result.out) == (3, "nothing was added\n")
    (tmp_path / "empty").mkdir()
    result = kvrag("precompute", tmp_path / "empty")
    assert result.code == 2
    assert "no documents in" in result.error
    result = kvrag("precompute")
    assert result.code == 2
    assert "the corpus is empty" in result.error


def test_a_full_store_is_a_failure(kvrag, tmp_path, monkeypatch):
    monkeypatch.setenv("KVRAG_DISK_BYTES", "100")
    result = kvrag("precompute", write_documents(tmp_path / "docs", 1))
    assert result.code == 1
    assert "could not be stored" in result.err.splitlines()[-1]  # the store warned before


def test_a_damaged_catalog_is_a_failure(kvrag, tmp_path, environment):
    home = Path(environment["KVRAG_HOME"])
    home.mkdir()
    (home / "catalog.sqlite").write_bytes(b"no database" * 1000)
    for command in (["precompute"], ["store", "stat"], ["ask", "x"]):
        result = kvrag(*command)
        assert result.code == 1
        assert "catalog.sqlite" in result.error


def test_a_home_that_cannot_be_made(kvrag, tmp_path):
    (tmp_path / "file").write_text("x")
    result = kvrag("--home", tmp_path / "file" / "home", "precompute")
    assert result.code == 2
    assert "cannot be made" in result.error


def test_progress_without_a_terminal_is_a_line_now_and_then(kvrag, tmp_path, monkeypatch):
    monkeypatch.setattr("kvrag.cli.bar._LINE_EVERY_S", 0.0)
    result = kvrag("precompute", write_documents(tmp_path / "docs", 2))
    assert result.code == 0
    assert "0 chunks, 2 documents so far, 0 skipped" in result.err
    assert "2 of 2 chunks, " in result.err
    assert "tokens/s" in result.err


def test_the_bar_draws(capsys, monkeypatch):
    """The terminal's form, into a string; that it moves on a real one is for the eye."""
    from kvrag.cli.bar import shown
    from kvrag.cli.precompute import _standing
    from kvrag.precompute.job import Progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(documents_added=2)
    with shown() as report:
        report(_standing(progress))
        progress.total_chunks, progress.chunks_done, progress.tokens_computed = 4, 1, 50
        progress.seconds = 2.0
        report(_standing(progress))
    drawn = capsys.readouterr().err
    assert "1/4" in drawn
    assert "25 tokens/s" in drawn
    assert "6.0 s left" in drawn


def test_a_kill_costs_no_stored_block(kvrag, tmp_path, environment):
    """The job is killed while it computes; the next run computes what is missing and no more."""
    count = 120
    home = Path(environment["KVRAG_HOME"])
    documents = tmp_path / "docs.jsonl"
    texts = (f"Lamp {number} burns {number * 7} hours." for number in range(count))
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    process = start("precompute", documents)
    deadline_s = time.monotonic() + 200
    while len(stored_blocks(home)) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    before = stored_blocks(home)
    assert 5 <= len(before) < count

    result = kvrag("precompute", documents, "--json")
    assert result.code == 0
    summary = result.json
    assert summary["documents_added"] + summary["documents_known"] == count
    assert summary["documents_known"] >= len(before)
    assert (summary["chunks"], summary["chunks_stored_before"]) == (count, len(before))
    after = stored_blocks(home)
    assert len(after) == count
    assert {path: after[path] for path in before} == before
    new = [path for path in after if path not in before]
    assert summary["bytes_written"] == sum(path.stat().st_size for path in new)
    assert not list((home / "kv").rglob("*.tmp"))
    assert kvrag("precompute", documents, "--json").json["tokens_computed"] == 0


def test_an_interrupt_is_quiet_and_resumes(kvrag, tmp_path, environment, monkeypatch):
    from kvrag.blocks import ChunkBlocks

    compute, computed = ChunkBlocks.compute, []

    def interrupted(self, token_ids):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(token_ids)
        return compute(self, token_ids)

    folder = write_documents(tmp_path / "docs", 5)
    monkeypatch.setattr(ChunkBlocks, "compute", interrupted)
    result = kvrag("precompute", folder)
    assert (result.code, result.out, result.err) == (130, "", "")
    monkeypatch.setattr(ChunkBlocks, "compute", compute)
    assert kvrag("precompute", folder, "--json").json["chunks_stored_before"] == 2
    assert os.listdir(environment["KVRAG_HOME"])


def test_a_dry_run_makes_no_home(kvrag, tmp_path, environment):
    folder = write_documents(tmp_path / "docs", 3)
    plan = kvrag("precompute", folder, "--dry-run", "--json").json
    assert (plan["documents"], plan["chunks"], plan["blocks"]) == (3, 3, 3)
    assert set(plan["nbytes"]) == {"raw", "int8", "int4"}
    assert plan["tiers"][0]["name"] == "disk"
    assert plan["tiers"][0]["fits"]
    assert plan["seconds"] > 0
    assert not Path(environment["KVRAG_HOME"]).exists()
    shown = kvrag("--set", "disk_bytes=1", "precompute", folder, "--dry-run").out
    assert "3 documents to add, 0 known" in shown
    assert "NOT enough" in shown


def test_corpora_shards_pruning_and_the_manifest(kvrag, tmp_path):
    folder = write_documents(tmp_path / "docs", 4)
    manifest = tmp_path / "manifest.jsonl"
    options = ("--corpus", "lamps", "--manifest", manifest, "--json")
    parts = [kvrag("precompute", folder, "--shard", f"{n}/2", *options).json for n in (1, 2)]
    assert sum(part["documents_added"] for part in parts) == 4
    assert parts[0]["documents_elsewhere"] == 4 - parts[0]["documents_added"]
    assert len(manifest.read_text().splitlines()) == 5
    assert (
        kvrag("--set", "namespace=lamps", "store", "stat", "--json").json["catalog"]["chunks"] == 4
    )
    assert kvrag("store", "stat", "--json").json["catalog"]["chunks"] == 0
    (folder / "0000.txt").unlink()
    gone = kvrag("precompute", folder, "--prune", *options).json
    assert (gone["documents_vanished"], gone["documents_known"]) == (1, 3)
    assert len(manifest.read_text().splitlines()) == 4
    for bad in (["--prune"], [folder, "--shard", "3/2"], ["--dry-run"]):
        assert kvrag("precompute", *bad).code == 2


def test_a_manifest_that_cannot_be_is_refused_before_the_work(kvrag, environment, tmp_path):
    folder = write_documents(tmp_path / "docs", 1)
    for manifest, why in ((tmp_path / "no" / "m", "there is no folder"), (tmp_path, "a folder")):
        refused = kvrag("precompute", folder, "--manifest", manifest)
        assert refused.code == 2
        assert f"{manifest} cannot be written" in refused.error
        assert why in refused.error
    assert not Path(environment["KVRAG_HOME"]).exists()


def test_a_second_job_on_one_corpus_waits_and_says_so(kvrag, tmp_path, environment):
    from kvrag.home import Home
    from kvrag.precompute.lock import only_job

    folder = write_documents(tmp_path / "docs", 1)
    lock = Home(Path(environment["KVRAG_HOME"])).job_lock("default", "1/1")
    with ThreadPoolExecutor(1) as pool:
        with only_job(lock, lambda holder: None):
            job = pool.submit(kvrag, "precompute", folder, "--json")
            with pytest.raises(TimeoutError):
                job.result(timeout=3)
        result = job.result(timeout=240)
    assert (result.code, result.json["documents_added"]) == (0, 1)
    assert (
        f"another job (process {os.getpid()}) works on the corpus 'default'; waiting" in result.err
    )
