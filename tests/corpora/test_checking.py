"""Whatever part of a corpus is wrong is told, and made anew from what is right."""

from __future__ import annotations

import sqlite3

import pytest

from kvrag import Engine, Settings
from kvrag.corpora.checking import check_corpus
from kvrag.corpora.dropping import drop_corpus
from kvrag.corpora.listing import describe, list_corpora
from kvrag.errors import CorpusBusyError, CorpusSettingsError
from kvrag.home import Home
from kvrag.precompute.lock import only_job
from kvrag.retrieval.catalog import Catalog
from kvrag.store.tiered import TieredStore
from kvrag.upkeep.documents import remove_documents
from tests.store.helpers import make_key
from tests.tiny import make_tiny_embedder

from .conftest import DOCUMENTS, nobody
from .test_moving import answer, block_files


def checked(settings, *, repair=False):
    return check_corpus(settings, repair=repair, waiting=nobody, report=lambda standing: None)


def written(settings, sql, *values):
    """Change the catalog past the program."""
    db = sqlite3.connect(settings.home / "catalog.sqlite")
    with db:
        changed = db.execute(sql, values).rowcount
    db.close()
    return changed


def flipped(settings):
    path = block_files(settings)[0]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def lost(settings):
    block_files(settings)[0].unlink()


_REFER_ELSEWHERE = "UPDATE block_refs SET block_key = ? WHERE id = (SELECT max(id) FROM block_refs)"
FAULTS = {
    "token_ids": lambda s: written(s, "UPDATE chunk_tokens SET token_ids = x'05000000'"),
    "token_ids of no whole number": lambda s: written(
        s, "UPDATE chunk_tokens SET token_ids = x'0500000006000000' WHERE chunk_id = 2"
    ),
    "vector": lambda s: written(s, "UPDATE vectors SET vector = zeroblob(64) WHERE chunk_id = 1"),
    "vector of another dim": lambda s: written(
        s, "UPDATE vectors SET vector = zeroblob(60) WHERE chunk_id = 1"
    ),
    "vector that is gone": lambda s: written(s, "DELETE FROM vectors WHERE chunk_id = 2"),
    "words": lambda s: written(s, "UPDATE lexical_1 SET text = 'other' WHERE rowid = 1"),
    "words that are gone": lambda s: written(s, "DELETE FROM lexical_1 WHERE rowid = 2"),
    "words of no chunk": lambda s: written(
        s, "INSERT INTO lexical_1 (rowid, title, text) VALUES (99, 'a', 'b')"
    ),
    "reference": lambda s: written(s, "DELETE FROM block_refs WHERE chunk_id = 1"),
    "reference to another block": lambda s: written(s, _REFER_ELSEWHERE, str(make_key("other"))),
    "block": flipped,
    "block that is gone": lost,
}


@pytest.fixture(scope="module")
def mended(models, tmp_path_factory):
    """A home that each test damages and has mended."""
    home = tmp_path_factory.mktemp("mended") / "home"
    settings = Settings(**models, home=home, dtype="float32", threads=1, chunk_tokens=64)
    with Engine.open(settings) as engine:
        engine.add(DOCUMENTS)
    return settings, answer(settings)[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_told_and_mended(mended, fault):
    FAULTS[fault](mended[0])
    found = checked(mended[0], repair=True)
    assert fault.split(" ")[0] in {problem.part for problem in found.problems}
    assert found.left == []


def test_all_at_once_and_the_answers_are_what_they_were(mended):
    settings, before = mended
    assert checked(settings).problems == []
    for fault in FAULTS.values():
        fault(settings)
    found = checked(settings)
    assert {fault.split(" ")[0] for fault in FAULTS} <= {one.part for one in found.problems}
    assert found.left == found.problems
    assert checked(settings, repair=True).left == []
    assert answer(settings)[0] == before


def test_a_damaged_index_is_made_anew(made):
    settings = made()
    (path,) = settings.home.rglob("*.faiss")
    path.write_bytes(path.read_bytes()[:-1])
    found = checked(settings)
    assert (found.problems, found.index_current) == ([], False)
    assert checked(settings, repair=True).index_current
    assert checked(settings).index_current


def test_a_damaged_catalog_is_told(made):
    settings = made()
    db = sqlite3.connect(settings.home / "catalog.sqlite")
    db.execute("PRAGMA foreign_keys = OFF")
    with db:
        db.execute("DELETE FROM documents WHERE id = 'ferry/1'")
    db.close()
    found = checked(settings, repair=True)
    assert {problem.part for problem in found.left} == {"catalog"}
    assert "belongs to no row" in found.left[0].what


def test_another_codec_and_another_embedder(made, settings, tmp_path):
    made()
    other = checked(settings(codec="int8"))
    assert {problem.part for problem in other.problems} == {"reference"}
    embedder = make_tiny_embedder(tmp_path / "other")
    config = embedder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(CorpusSettingsError, match="another embedder"):
        checked(settings(embedder=str(embedder)))


# ---- dropping ------------------------------------------------------------------------------------


def test_what_another_corpus_has_stays(made, settings):
    source, other = made(), made(namespace="other")
    in_both = len(block_files(source))
    dropped = drop_corpus(other)
    assert (dropped.documents, dropped.owed) == (3, 0)
    assert len(block_files(source)) == in_both - dropped.blocks
    assert [facts.name for facts in list_corpora(source)] == ["default"]
    assert describe(source)[0].missing == 0
    with Catalog.open(source.home / "catalog.sqlite") as catalog:
        assert catalog.settings("other") == {}
        assert catalog.num_owed_deletions() == 0
        numbers = catalog._rows("SELECT namespace FROM lexical_tables", ())
    assert numbers == [("default",)]
    assert b"cableway" in (source.home / "catalog.sqlite").read_bytes()
    drop_corpus(source)
    for path in source.home.glob("catalog.sqlite*"):
        assert b"cableway" not in path.read_bytes()


def test_a_dropped_corpus_may_be_made_anew_with_other_settings(made, settings):
    drop_corpus(made())
    anew = settings(chunk_tokens=32, corpus_context="")
    with Engine.open(anew) as engine:
        engine.add(DOCUMENTS)
    assert describe(anew)[0].made_with["chunk_tokens"] == "32"
    assert checked(anew).problems == []


def test_a_kill_behind_the_catalog_leaves_blocks_that_are_owed(made, monkeypatch):
    settings = made()

    def killed(self, keys):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TieredStore, "delete_unprotected", killed)
        with pytest.raises(KeyboardInterrupt):
            drop_corpus(settings)
    assert list_corpora(settings) == []
    assert block_files(settings)
    remove_documents(settings, ["none"])
    assert block_files(settings) == []


def test_a_job_is_waited_for_or_refuses(made):
    settings = made()
    with only_job(Home(settings.home).job_lock("default", "1/1"), nobody):
        with pytest.raises(CorpusBusyError, match="another job"):
            drop_corpus(settings)
        with pytest.raises(AssertionError, match="waits for process"):
            checked(settings)
    assert checked(settings).problems == []
