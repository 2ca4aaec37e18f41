"""Files that are damaged, cut short, or lie: each is refused, and nothing of it is taken."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import tarfile
from pathlib import Path

import pytest

from kvrag import Engine, Settings
from kvrag.corpora import archive
from kvrag.corpora.archive import Archive, ArchiveWriter
from kvrag.corpora.listing import list_corpora
from kvrag.corpora.rows import read_documents
from kvrag.errors import CorpusFileError, InputError
from kvrag.models.tokenizer import Tokenizer
from kvrag.store.block import decode_header, encode_header

from .conftest import DOCUMENTS, exported, imported
from .test_moving import block_files


@pytest.fixture(scope="module")
def original(tmp_path_factory, models):
    """An exported corpus."""
    root = tmp_path_factory.mktemp("original")
    chosen = Settings(**models, home=root / "home", dtype="float32", threads=1, chunk_tokens=64)
    with Engine.open(chosen) as engine:
        engine.add(DOCUMENTS)
    exported(chosen, root / "file")
    return root / "file"


def members(path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar.getmembers()][:-1]


def written(path, parts) -> Path:
    """A file with checksums as they should be: what it says is all that is wrong with it."""
    with path.open("wb") as file:
        writer = ArchiveWriter(file)
        for name, data in parts:
            writer.add(name, [data])
        writer.finish()
    return path


def check(path):
    with Archive.open(path) as opened:
        opened.check()
        return opened


def refused(settings, path, error=CorpusFileError, match=None):
    target = settings("target")
    with pytest.raises(error, match=match):
        imported(target, path)
    assert not target.home.exists() or list_corpora(target) == []
    assert block_files(target) == []


def test_the_same_members_give_the_same_file(original, tmp_path):
    again = written(tmp_path / "again", members(original))
    assert again.read_bytes() == original.read_bytes()
    assert len(check(again).blocks) == len(members(original)) - 2


def test_one_flipped_bit_anywhere_is_found(original, tmp_path):
    data, path = original.read_bytes(), tmp_path / "flipped"
    drawn = random.Random(0)
    # Many bytes of the first header and of the end, and some of all that lies between.
    places = [*range(0, 512, 3), *range(len(data) - 2100, len(data), 7)]
    for place in places + [drawn.randrange(len(data)) for _ in range(100)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << drawn.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CorpusFileError):
            check(path)


def test_a_file_cut_short_or_longer_is_found(original, tmp_path):
    data, path = original.read_bytes(), tmp_path / "cut"
    drawn = random.Random(1)
    for length in [0, 1, 511, 512, len(data) - 1, *(drawn.randrange(len(data)) for _ in range(30))]:
        path.write_bytes(data[:length])
        with pytest.raises(CorpusFileError):
            check(path)
    for more in (b"\0", bytes(512), data):
        path.write_bytes(data + more)
        with pytest.raises(CorpusFileError, match="does not end"):
            check(path)


def test_damage_is_refused_by_an_import(original, settings, tmp_path):
    data = bytearray(original.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "damaged"
    path.write_bytes(data)
    refused(settings, path, match="checksum of 'blocks/")
    path.write_bytes(original.read_bytes()[:-2000])
    refused(settings, path, match="cut short")


def test_no_more_memory_is_asked_for_than_the_file_has(original, tmp_path):
    """A member of 8 GiB in a file of some kilobytes."""
    path = tmp_path / "bomb"
    for name in ("manifest.json", "rows/000001.jsonl"):
        parts = original.read_bytes()
        at = 0 if name == "manifest.json" else parts.index(name.encode())
        path.write_bytes(parts[:at] + archive._header(name, 8 << 30) + parts[at + 512 :])
        with pytest.raises(CorpusFileError):
            check(path)


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/passwd", "rows/000002.jsonl", "blocks/2/00000001.kv", "x", "a\nb"]
)
def test_no_member_stands_where_it_should_not(original, tmp_path, name):
    parts = members(original)
    parts[1] = (name, parts[1][1])
    with pytest.raises(CorpusFileError):
        check(written(tmp_path / "file", parts))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_links_and_other_kinds_of_members_are_refused(original, tmp_path):
    path = tmp_path / "file"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE):
        info = tarfile.TarInfo("manifest.json")
        info.type, info.linkname = kind, "/etc/passwd"
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + original.read_bytes())
        with pytest.raises(CorpusFileError):
            check(path)


@pytest.mark.timeout(20)
def test_what_is_no_file_or_no_corpus(settings, tmp_path):
    refused(settings, tmp_path / "nowhere", InputError, "cannot be read")
    refused(settings, tmp_path, InputError, "no file")
    os.mkfifo(tmp_path / "pipe")
    refused(settings, tmp_path / "pipe", InputError, "no file")
    (tmp_path / "text").write_text("a corpus, honestly\n" * 100)
    refused(settings, tmp_path / "text", match="no exported corpus")


def changed(original, path, index, change):
    parts = members(original)
    name, data = parts[index]
    parts[index] = (name, change(data))
    return written(path, parts)


def manifest(change):
    def apply(data):
        fields = json.loads(data)
        change(fields)
        return json.dumps(fields).encode()

    return apply


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda m: m.update(version=2), InputError, "format version 2.*reads version 1"),
        (lambda m: m.update(format="x"), CorpusFileError, "not that of an exported corpus"),
        (lambda m: m.update(extra=1), CorpusFileError, "fields"),
        (lambda m: m.update(documents=-1), CorpusFileError, "documents"),
        (lambda m: m.update(documents=4), CorpusFileError, "announces"),
        (lambda m: m.update(prefixes=[]), CorpusFileError, "one or two prefixes"),
        (lambda m: m["prefixes"][0].update(token_ids=[10**6]), CorpusFileError, "prefix"),
        (lambda m: m["settings"].update(catalog_id="x"), CorpusFileError, "catalog_id"),
        (lambda m: m["settings"].pop("corpus_instruction"), CorpusFileError, "made with"),
        (lambda m: m["settings"].update(corpus_context="a " * 10**5), CorpusFileError, "context"),
        (lambda m: m["settings"].update(corpus_chunk_tokens="-1"), CorpusFileError, "no number"),
        (
            lambda m: m["settings"].update(
                {name: '[[1], ["x"]]' for name in m["settings"] if name.startswith("layout")}
            ),
            CorpusFileError,
            "layout",
        ),
        (lambda m: m.update(codec="zip"), InputError, "codec"),
        (lambda m: m.update(name="\ud800"), CorpusFileError, "cannot be read"),
    ],
)
def test_manifests_that_lie(original, settings, tmp_path, change, error, match):
    path = changed(original, tmp_path / "file", 0, manifest(change))
    refused(settings, path, error, match)


def row(number, **fields):
    def apply(data):
        lines = data.splitlines()
        lines[number] = json.dumps(json.loads(lines[number]) | fields).encode()
        return b"\n".join(lines) + b"\n"

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-20],
        lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
        lambda data: b"[" * 100_000 + b"\n",
        lambda data: b'{"id": NaN}\n',
        row(0, id="a" * 1000),
        row(0, id="."),
        row(0, title=5),
        row(0, added_at=1e400),
        row(0, added_at="now"),
        row(0, metadata=[1]),
        row(0, chunks=0),
        row(0, chunks=10**12),
        row(0, origins=[5]),
        row(1, text="Another text."),
        row(1, token_ids=[1, 2, 3]),
        row(1, token_ids="abc"),
        row(1, vector=""),
        row(1, vector="AAAAAA=="),
        row(1, vector="no base64"),
        row(1, vector="AACAPw=="),
    ],
)
def test_rows_that_lie(original, models, change):
    lines = change(members(original)[1][1]).splitlines(keepends=True)
    tokenizer = Tokenizer(Path(models["model"]))
    with pytest.raises(CorpusFileError, match=r"document [1-4] cannot be taken"):
        list(read_documents(iter(lines), tokenizer, lambda token_ids: ()))


def test_documents_that_come_twice(original, settings, tmp_path):
    twice = changed(original, tmp_path / "file", 1, lambda data: data + data)
    counts = manifest(lambda m: m.update(documents=2 * m["documents"], chunks=2 * m["chunks"]))
    refused(settings, changed(twice, tmp_path / "twice", 0, counts), match="comes twice")


def test_blocks_that_lie(original, settings, tmp_path):
    path, parts = tmp_path / "file", members(original)
    data = parts[2][1]
    header = decode_header(data)

    def with_header(**fields):
        return lambda data: encode_header(dataclasses.replace(header, **fields)) + data[4096:]

    ids = (*header.token_ids[:-1], header.token_ids[-1] ^ 1)
    first = header.segments[0]
    short = (first._replace(length=first.length - 1), *header.segments[1:])
    for change, match in (
        (with_header(token_ids=ids), "chunk that it does not hold"),
        (with_header(fingerprint="another"), "another model"),
        (with_header(codec="int8"), "another model or codec"),
        (with_header(dtype="bfloat16"), "another model"),
        (with_header(kind="fragment"), "another model"),
        (with_header(segments=short), "damaged block|no block"),
        (lambda data: data[:-4096], "size"),
        (lambda data: data + bytes(4096), "size"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "damaged block"),
        (lambda data: b"", "no block"),
        (lambda data: bytes(9000), "no block"),
    ):
        refused(settings, changed(original, path, 2, change), match=match)
    # One whose prefix is not named.
    block = parts[-1]
    renamed = [*parts[:-1], (block[0].replace("blocks/0", "blocks/1"), block[1])]
    renamed[0] = (
        "manifest.json",
        manifest(lambda m: m.update(prefixes=m["prefixes"][:1]))(parts[0][1]),
    )
    refused(settings, written(path, renamed), match="prefix")


def test_vectors_that_the_embedder_cannot_have_made_are_refused(original, settings, tmp_path):
    parts = []
    for name, data in members(original):
        if name.startswith("rows/"):
            lines = [json.loads(line) for line in data.splitlines()]
            for fields in lines:
                if "vector" in fields:
                    fields["vector"] = "AACAPwAAAAA="  # 1 and 0
            data = "".join(f"{json.dumps(fields)}\n" for fields in lines).encode()
        parts.append((name, data))
    refused(settings, written(tmp_path / "short", parts), match="components")
