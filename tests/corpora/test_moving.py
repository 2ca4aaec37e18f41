"""A corpus that was exported and imported is the corpus that it was; or there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile

import pytest

from kvrag import Engine
from kvrag.corpora.listing import list_corpora
from kvrag.errors import (
    CorpusBusyError,
    CorpusFileError,
    CorpusSettingsError,
    InputError,
)
from kvrag.home import Home
from kvrag.precompute.job import StorageFullError
from kvrag.precompute.lock import only_job
from kvrag.retrieval import Document
from kvrag.retrieval.catalog import Catalog
from kvrag.store.errors import EncryptionKeyError
from kvrag.upkeep.collecting import collect
from tests.mounts import mounted
from tests.tiny import make_tiny_model

from .conftest import DOCUMENTS, exported, imported, nobody


def contents(settings):
    """Everything of a corpus that does not depend on its home."""
    with Catalog.open(settings.home / "catalog.sqlite") as catalog:
        name = settings.namespace
        rows = []
        for document in catalog.iter_documents(name):
            ids = catalog.document_chunks(name, document.id)
            fields = (document.id, document.title, document.source, document.metadata)
            text = catalog.document_text(name, document.id)
            chunks = [(c.ordinal, c.title, c.text) for c in catalog.chunk(ids)]
            refs = [len(refs) for refs in catalog.block_refs_of(ids)]
            origins = catalog.origins_of(name, document.id)
            rows.append((fields, document.added_at, text, chunks, refs, origins))
        return rows, catalog.settings(name)


def block_files(settings):
    return sorted((settings.home / "kv" / "blocks").rglob("*.kv"))


def answer(settings):
    with Engine.open(settings) as engine:
        found = engine.answer("Who keeps the lamp?", k=3, max_tokens=4)
        return found.token_ids, {source.tier for source in found.sources}, engine.complete()


@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_everything_comes_back_and_nothing_is_computed(made, settings, tmp_path, codec):
    source, file = made(codec=codec), tmp_path / "file"
    done = exported(source, file)
    assert (done.documents, done.blocks, done.missing) == (3, len(block_files(source)), [])
    target = settings("other", codec=codec, namespace="copy")
    result = imported(target, file, "copy")
    assert (result.documents, result.chunks, result.blocks) == (3, done.chunks, done.blocks)
    assert contents(target) == contents(source)
    before, after = answer(source), answer(target)
    assert after[:2] == (before[0], {"disk"})
    assert after[2].tokens_computed == 0
    # Another secret: not one key is the same, and every layer is.
    names = [{path.name for path in block_files(one)} for one in (source, target)]
    assert not names[0] & names[1]
    again = tmp_path / "again"
    exported(target, again)
    assert len(again.read_bytes()) == file.stat().st_size


def test_the_file_is_a_tar_that_others_read(made, tmp_path):
    source, file = made(), tmp_path / "file"
    exported(source, file)
    with tarfile.open(file) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "out", filter="data")
    assert (names[0], names[-1]) == ("manifest.json", "SHA256SUMS")
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
        cwd=tmp_path / "out",
        check=True,
    )


def test_a_corpus_may_be_imported_beside_itself_and_under_its_own_name_again(
    made, settings, tmp_path
):
    source, file = made(), tmp_path / "file"
    exported(source, file)
    with pytest.raises(InputError, match="has a corpus 'default'"):
        imported(source, file)
    imported(source, file, "copy")
    assert contents(settings(namespace="copy")) == contents(source)
    assert [facts.missing for facts in list_corpora(source)] == [0, 0]
    with Engine.open(settings(namespace="copy")) as engine:
        assert engine.add(DOCUMENTS).tokens_computed == 0


def test_other_models_versions_and_dtypes_are_refused_by_name(made, settings, tmp_path):
    source, file = made(), tmp_path / "file"
    exported(source, file)
    with pytest.raises(CorpusSettingsError, match="dtype"):
        imported(settings("other", dtype="float64"), file)
    other = make_tiny_model(tmp_path / "model", seed=1)
    with pytest.raises(CorpusSettingsError, match="another model"):
        imported(settings("other", model=str(other)), file)
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(CorpusSettingsError, match="another tokenizer"):
        imported(settings("other", model=str(other)), file)
    assert list_corpora(settings("other")) == []
    # Nothing of a corpus under another codec is in its file, unless there is some.
    with pytest.raises(CorpusSettingsError, match="none is of the"):
        exported(settings(codec="int8"), tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_blocks_of_an_encrypted_home_leave_it_opened_and_are_sealed_again(made, settings, tmp_path):
    pytest.importorskip("cryptography", reason="needs the extra kvrag[encryption]")
    one, other = {"encryption_key": "00" * 32}, {"encryption_key": "11" * 32}
    source, file = made(**one), tmp_path / "file"
    assert exported(source, file).was_encrypted
    plain, sealed = settings("plain"), settings("sealed", **other)
    for target in (plain, sealed):
        imported(target, file)
        assert answer(target)[1] == {"disk"}
    assert b"aes-256-gcm" in block_files(sealed)[0].read_bytes()
    assert b"aes-256-gcm" not in block_files(plain)[0].read_bytes()
    with pytest.raises(EncryptionKeyError):
        exported(settings(), tmp_path / "none")


def test_missing_and_damaged_blocks_are_told_and_computed_where_they_are_wanted(
    made, settings, tmp_path
):
    source, file = made(), tmp_path / "file"
    lost, damaged = block_files(source)[:2]
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = exported(source, file)
    assert len(done.missing) == 2
    target = settings("other")
    assert imported(target, file).blocks == done.blocks
    with Engine.open(target) as engine:
        assert engine.complete().tokens_computed > 0
    assert len(block_files(target)) == done.blocks + 2


def test_a_corpus_that_changes_meanwhile_is_not_exported(made, settings, tmp_path, monkeypatch):
    from kvrag.corpora import exporting

    source, file = made(), tmp_path / "file"
    write = exporting._write_blocks

    def changed(*arguments):
        with Catalog.open(source.home / "catalog.sqlite") as catalog:
            catalog.delete_document("default", "ferry/1")
        write(*arguments)

    monkeypatch.setattr(exporting, "_write_blocks", changed)
    with pytest.raises(CorpusBusyError, match="was changed"):
        exported(source, file)
    assert list(tmp_path.glob("*file*")) == []


# ---- interruptions and full disks ----------------------------------------------------------------

_KILLED = """
import os, sys
from pathlib import Path
from kvrag import Settings
from kvrag.blocks import ChunkBlocks
from kvrag.corpora.importing import import_corpus

put, left = ChunkBlocks.put, int(sys.argv[2])
def killed(self, block, **options):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return put(self, block, **options)
ChunkBlocks.put = killed
settings = Settings.model_validate_json(sys.stdin.read())
import_corpus(settings, Path(sys.argv[1]), None, waiting=print, report=lambda at: None)
"""


def test_a_killed_import_leaves_no_corpus_and_goes_on(made, settings, tmp_path):
    source, file = made(), tmp_path / "file"
    exported(source, file)
    target = settings("other")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, file, "3"],
        input=target.model_dump_json(),
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 9
    assert list_corpora(target) == []
    left = block_files(target)
    assert len(left) == 3
    swept = collect(target, unused_s=0, dry_run=True, waiting=nobody)
    assert swept.orphans == 3
    before = {path: path.stat().st_mtime_ns for path in left}
    imported(target, file)
    assert contents(target) == contents(source)
    assert {path: path.stat().st_mtime_ns for path in left} == before
    assert collect(target, unused_s=0, dry_run=False, waiting=nobody).orphans == 0


def test_collecting_waits_for_an_import(made):
    settings = made()
    with (
        only_job(Home(settings.home).import_lock, nobody),
        pytest.raises(AssertionError, match="waits for process"),
    ):
        collect(settings, unused_s=0, dry_run=False, waiting=nobody)


def test_what_an_import_stored_before_it_failed_is_deleted(made, settings, tmp_path, monkeypatch):
    source, file = made(), tmp_path / "file"
    exported(source, file)
    target = settings("other")

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Catalog, "restore", full)
    with pytest.raises(OSError, match="No space"):
        imported(target, file)
    assert block_files(target) == []
    assert list_corpora(target) == []


def test_a_full_disk_of_the_home_ends_an_import_with_nothing(made, settings, tmp_path):
    # Some 12 blocks of 16 kB, and a catalog of 200 kB.
    source, file = made(documents=many(40)), tmp_path / "file"
    exported(source, file)
    with mounted(tmp_path / "small", "size=700k"):
        target = settings("small/home")
        with pytest.raises(StorageFullError, match="disk"):
            imported(target, file)
        assert list_corpora(target) == []
        assert block_files(target) == []


def test_a_full_disk_of_the_file_leaves_the_file_that_was_there(made, tmp_path):
    source = made(documents=many(40))
    with mounted(tmp_path / "small", "size=256k") as folder:
        (folder / "file").write_text("the file of yesterday")
        with pytest.raises(CorpusFileError, match=r"file cannot be written: No space"):
            exported(source, folder / "file")
        assert [path.name for path in folder.iterdir()] == ["file"]
        assert (folder / "file").read_text() == "the file of yesterday"
    exported(source, tmp_path / "small" / "file")


def many(count):
    return [Document(f"Lamp {number} burns {number * 7} hours.") for number in range(count)]


def test_an_import_that_is_too_late_takes_no_block_from_who_was_faster(
    made, settings, tmp_path, monkeypatch
):
    exported(made(), tmp_path / "file")
    target = settings("target")
    restore = Catalog.restore

    def restored(catalog, *args, **options):
        with Engine.open(target) as engine:
            engine.add(DOCUMENTS[:1])
        return restore(catalog, *args, **options)

    monkeypatch.setattr(Catalog, "restore", restored)
    with pytest.raises(InputError, match="meanwhile"):
        imported(target, tmp_path / "file")
    with Engine.open(target) as engine:
        assert engine.complete().tokens_computed == 0
        (facts,) = list_corpora(target)
        assert facts.missing == 0
        assert len(block_files(target)) == facts.blocks
