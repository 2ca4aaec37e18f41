"""A disk that is full at any stage of a job: what was full is said, nothing is lost, and a repeat
finishes. The files of exported corpora: tests/corpora/test_moving.py.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from kvrag import Engine, Settings
from kvrag.corpora.checking import check_corpus
from kvrag.errors import CorpusFileError
from kvrag.precompute.job import StorageFullError
from kvrag.retrieval import CatalogError, Document
from tests.mounts import mounted, remount

FEW = [Document("The lamp burns."), Document("The ferry leaves.")]
MANY = [Document(f"Lamp {number} burns. " * 12, title=f"Lamp {number}") for number in range(40)]


@pytest.fixture
def settings(models, tmp_path):
    return Settings(**models, home=tmp_path / "home", dtype="float32", threads=1)


def check(settings, count):
    """Everything of so many documents is there and agrees."""
    checked = check_corpus(
        settings, repair=False, waiting=lambda holder: None, report=lambda standing: None
    )
    assert (checked.problems, checked.index_current) == ([], True)
    with Engine.open(settings) as engine:
        assert engine.counts().documents == count
        assert engine.add([*FEW, *MANY]).tokens_computed == 0


@pytest.mark.parametrize(
    ("full", "size", "error", "what"),
    [
        ("", "800k", CatalogError, r"catalog\.sqlite cannot grow: the disk is full"),
        ("kv", "200k", StorageFullError, r"could not be stored \(disk: .*No space left"),
    ],
)
def test_a_job_ends_with_what_was_full(settings, full, size, error, what):
    with ExitStack() as stack:
        small = stack.enter_context(mounted(settings.home / full, f"size={size}"))
        for other in {"kv", "index"} - {full}:
            stack.enter_context(mounted(settings.home / other, "size=64m"))
        with Engine.open(settings) as engine:
            engine.add(FEW)
            before = engine.answer("Who?", k=1, max_tokens=3).token_ids
            with pytest.raises(error, match=what):
                engine.add(MANY)
            # What was stored answers as before, on the full disk, too.
            assert engine.answer("The lamp burns.", k=1, max_tokens=3).token_ids
            where = engine.documents(limit=2)
            assert {document.id for document in where} == {document.id for document in FEW}
        remount(small, "size=64m")
        with Engine.open(settings) as engine:
            assert engine.answer("Who?", k=1, max_tokens=3).token_ids
            engine.add(MANY)
        assert before
        check(settings, len(FEW) + len(MANY))


def test_an_index_that_has_no_room_costs_a_warning(settings, caplog):
    with mounted(settings.home / "index", "size=4k") as small:
        with Engine.open(settings) as engine:
            assert engine.add([*FEW, *MANY]).documents_added == len(FEW) + len(MANY)
            assert engine.retrieve("lamp", k=2)
        assert ".faiss was not saved" in caplog.text
        assert list(small.rglob("*.partial")) == []
        remount(small, "size=64m")
        with Engine.open(settings) as engine:
            engine.prepare()
        check(settings, len(FEW) + len(MANY))


def test_a_manifest_that_has_no_room_leaves_the_one_of_before(settings, tmp_path):
    with mounted(tmp_path / "small", "size=4k") as small, Engine.open(settings) as engine:
        path = small / "manifest"
        engine.add(FEW)
        path.write_text("that of before")
        engine.add(MANY)
        with pytest.raises(CorpusFileError, match="manifest cannot be written: No space left"):
            engine.write_manifest(path)
        assert [found.name for found in small.iterdir()] == ["manifest"]
        assert path.read_text() == "that of before"
        remount(small, "size=1m")
        engine.write_manifest(path)
        assert len(path.read_text().splitlines()) == 1 + len(FEW) + len(MANY)
