"""Files that are no plain text: what comes of them, and of those that only pretend."""

from __future__ import annotations

import datetime
import io
import json
import logging
import sys
import zipfile

import pytest

from kvrag.retrieval import Document, DocumentError, Skipped, documents_from, load, read
from kvrag.retrieval.loaders import ReadWhole
from tests.retrieval.files import make_pdf

GERMAN = (
    "Die Straße führt über die Brücke nach Köln. Der Wächter prüft täglich die Öllampen, schließt "
    "die Tür und grüßt die Gäste, die spät über den Fluss kommen."
)


def load_one(path, **options):
    (only,) = load([path], **options)
    return only


def reason_of(path, **options):
    skipped = load_one(path, **options)
    assert isinstance(skipped, Skipped)
    return skipped.reason


def written(folder, name, data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_html_is_the_text_that_a_reader_sees(tmp_path):
    page = """<!-- a comment --><!DOCTYPE html><html><head><title> The
    Lamp </title><style>p {color: red}</style></head><body><nav>Home | About</nav>
    <h1>Karsk</h1><p>Anna keeps&nbsp;the <b>lamp</b>.</p><script>alert(1)</script>
    <p>It burns &amp; glows.</p></body></html>"""
    document = load_one(written(tmp_path, "a.html", page))
    assert document.title == "The Lamp"
    assert [line for line in document.text.splitlines() if line] == [
        "Karsk",
        "Anna keeps the lamp.",
        "It burns & glows.",
    ]
    assert load_one(written(tmp_path, "b.htm", "<p>Only a part.")).text == "Only a part."
    declared = '<html><meta charset="iso-8859-1"><p>caf\xe9</html>'.encode("latin-1")
    assert load_one(written(tmp_path, "c.html", declared)).text == "café"
    deep = load_one(written(tmp_path, "d.html", "<html>" + "<div>" * 100_000 + "x"))
    assert isinstance(deep, Skipped)
    assert "no text" in reason_of(written(tmp_path, "e.html", "<html><script>x</script></html>"))
    assert "empty" in reason_of(written(tmp_path, "f.html", ""))


def test_pdf_pages_are_read_and_those_without_text_are_said(tmp_path):
    pdf = make_pdf(["Anna keeps the lamp.", None, "It burns."], title="The Lamp")
    document = load_one(written(tmp_path, "a.pdf", pdf))
    assert (document.title, document.text) == ("The Lamp", "Anna keeps the lamp.\n\nIt burns.")
    assert document.metadata == {"pages": 3}
    assert "no text in its 2 pages" in reason_of(written(tmp_path, "b.pdf", make_pdf([None, None])))
    damaged = reason_of(written(tmp_path, "c.pdf", b"%PDF-1.4\nnothing of it"))
    assert "not a PDF that can be read" in damaged
    assert "more than 100 bytes" in reason_of(tmp_path / "a.pdf", max_bytes=100)


def test_a_pdf_that_needs_a_password(tmp_path):
    pypdf = pytest.importorskip("pypdf", reason="needs the extra kvrag[documents]")
    for name, user in (("open.pdf", ""), ("closed.pdf", "secret")):
        writer = pypdf.PdfWriter(clone_from=io.BytesIO(make_pdf(["Anna."])))
        writer.encrypt(user, "owner", algorithm="RC4-128")
        writer.write(tmp_path / name)
    assert load_one(tmp_path / "open.pdf").text == "Anna."
    assert "password" in reason_of(tmp_path / "closed.pdf")


def test_a_page_that_cannot_be_read_costs_that_page(tmp_path, monkeypatch, caplog):
    from pypdf import PageObject

    extract = PageObject.extract_text

    def broken(page):
        text = extract(page)
        if "second" in text:
            raise ValueError("a bad font")
        return text

    monkeypatch.setattr(PageObject, "extract_text", broken)
    path = written(tmp_path, "a.pdf", make_pdf(["the first", "the second", "the third"]))
    with caplog.at_level(logging.WARNING):
        document = load_one(path)
    assert document.text == "the first\n\nthe third"
    assert document.metadata == {"pages": 3, "unreadable_pages": [2]}
    assert "page 2 cannot be read: a bad font" in caplog.text


def test_parquet_rows_are_documents(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra kvrag[parquet]")
    import pyarrow.parquet as pq

    day = datetime.date(2024, 2, 29)
    columns = {
        "text": ["one", None, "x" * 200, "four"],
        "title": ["T", None, None, None],
        "day": [day] * 4,
        "score": [0.5, float("nan"), 1.0, 2.0],
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    first, null, long, last = load([path], max_bytes=100)
    assert (first.text, first.title, first.source) == ("one", "T", f"{path}:1")
    assert first.metadata == {"day": "2024-02-29", "score": 0.5}
    assert (null.source, null.reason) == (f"{path}:2", '"text" must be a string, got null')
    assert "more than 100 bytes" in long.reason
    assert last.text == "four"
    pq.write_table(pa.table({"body": ["one"]}), path)
    assert 'no column "text" among body' in reason_of(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert reason_of(path) == "empty"
    whole = path.read_bytes()
    assert "not Parquet" in reason_of(written(tmp_path, "b.parquet", whole[: len(whole) // 2]))


def test_content_tells_the_kind_and_not_the_name_alone(tmp_path):
    pdf = make_pdf(["Anna keeps the lamp."])
    for name in ("a.txt", "b.jsonl", "c", "d.html"):
        assert load_one(written(tmp_path, name, pdf)).text == "Anna keeps the lamp."
    page = "\n<!doctype HTML><html><p>A page.</p></html>"
    assert load_one(written(tmp_path, "e.txt", page)).text == "A page."
    assert reason_of(written(tmp_path, "f.pdf", "only text")) == "named .pdf, but no PDF"
    assert reason_of(written(tmp_path, "g.parquet", "text")) == "named .parquet, but no Parquet"
    assert "a picture" in reason_of(written(tmp_path, "h.txt", b"\x89PNG\r\n\x1a\n"))
    assert "a ZIP archive" in reason_of(written(tmp_path, "i.md", b"PK\x03\x04rest"))
    assert "unknown suffix" in reason_of(written(tmp_path, "j.py", "print()"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_believed(tmp_path, encoding):
    assert load_one(written(tmp_path, "a.txt", GERMAN.encode(encoding))).text == GERMAN


def test_other_encodings_are_guessed_if_that_is_nearly_certain_and_named_else(tmp_path):
    path = written(tmp_path, "a.txt", GERMAN.encode("cp1252"))
    assert load_one(path).text == GERMAN
    assert load_one(path, encoding="latin-1").text == GERMAN
    mixed = written(tmp_path, "b.txt", "Straße Köln ".encode() * 9 + "Straße ".encode("latin-1"))
    assert "several encodings in one file" in reason_of(mixed)
    japanese = "灯台守は毎晩ランプに火をともす。"
    short = written(tmp_path, "c.txt", japanese.encode("shift_jis"))
    assert "no other encoding is certain" in reason_of(short)
    assert load_one(short, encoding="shift_jis").text == japanese
    assert "not ascii: byte 0" in reason_of(short, encoding="ascii")
    with pytest.raises(DocumentError, match="unknown encoding 'klingon'"):
        load([short], encoding="klingon")


def test_patterns_are_matched_unless_a_file_has_that_very_name(tmp_path):
    for name in ("a.md", "x/b.md", "x/c.txt", "x/.d.md", "odd[1].txt"):
        written(tmp_path, name, name)
    found = [d.text for d in load([str(tmp_path / "**" / "*.md")])]
    assert found == ["a.md", "x/b.md"]
    assert load_one(str(tmp_path / "odd[1].txt")).text == "odd[1].txt"
    with pytest.raises(DocumentError, match="nothing matches"):
        load([str(tmp_path / "*.pdf")])


def test_names_with_line_breaks(tmp_path):
    path = written(tmp_path, "two\nlines.txt", "body")
    document = load_one(tmp_path)
    assert (document.source, document.title) == (str(path), "two lines")


def test_urls_are_read_through_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="needs the extra kvrag[documents]")
    system = fsspec.filesystem("memory")
    for name in ("a.txt", "x/b.md", "x/.c.txt"):
        system.pipe(f"/kvrag-test/{name}", name.encode())
    try:
        loaded = list(read(["memory://kvrag-test"]))
        assert [item.text for item in loaded if isinstance(item, Document)] == ["a.txt", "x/b.md"]
        assert loaded[1] == ReadWhole("memory:///kvrag-test/a.txt")
        assert load_one("memory://kvrag-test/**/*.md").source == "memory:///kvrag-test/x/b.md"
        for url in ("memory://kvrag-test/gone.txt", "memory://kvrag-test/*.pdf"):
            with pytest.raises(DocumentError, match="there is no such file"):
                load([url])
    finally:
        system.rm("/kvrag-test", recursive=True)
    path = written(tmp_path, "a.txt", "local")
    assert load_one(f"file://{path}").source == str(path)
    with pytest.raises(DocumentError, match="cannot be loaded") as caught:
        load(["nonsense://me:secret@host/x"])
    assert "secret" not in str(caught.value)


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_archives_are_read_member_by_member(tmp_path):
    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(3))
    path = make_zip(tmp_path / "a.zip", {"x/a.txt": "one", "b.jsonl": lines, "c.png": b"\x89PNG"})
    items = list(load([f"zip://**::{path}"]))
    assert [item.text for item in items if isinstance(item, Document)] == [
        "line 0", "line 1", "line 2", "one",
    ]  # fmt: skip
    assert items[-1].source == f"zip://x/a.txt::{path}"
    assert [item.reason for item in items if isinstance(item, Skipped)] == [
        "not a document that is read: a picture"
    ]
    data = bytearray(path.read_bytes())
    data[data.index(b"x/a.txt") + len("x/a.txt")] ^= 0xFF
    path.write_bytes(data)
    assert "cannot be unpacked" in reason_of(f"zip://x/*::{path}")


def test_an_archive_that_expands_beyond_reason_is_left(tmp_path, monkeypatch):
    """One line of spaces, a thousand times the archive: never held, and not read to its end."""
    monkeypatch.setattr(sys.modules[load.__module__ + ".places"], "_LEAST_EXPANDED", 1 << 20)
    path = make_zip(tmp_path / "bomb.zip", {"a.jsonl": b" " * (16 << 20), "b.txt": "one"})
    reasons = [item.reason for item in load([f"zip://**::{path}"], max_bytes=1 << 16)]
    assert len(reasons) == 2
    assert all("expands to more than" in reason for reason in reasons)


def test_documents_of_other_libraries_are_known_by_what_they_have():
    class LangChain:
        page_content = "Anna keeps the lamp."
        metadata = {"source": "a.pdf", "page": 3, "when": datetime.date(2024, 2, 29)}  # noqa: RUF012

    class LlamaIndex:
        text = "It burns."
        metadata = {"file_path": "b.md", "title": "Lamp"}  # noqa: RUF012

    own = Document("own")
    items = [LangChain(), LlamaIndex(), {"text": "t", "title": "T", "n": 1}, "plain", own, 3, " "]
    chain, index, mapping, plain, same, no_text, empty = documents_from(items)
    assert (chain.text, chain.source) == ("Anna keeps the lamp.", "a.pdf")
    assert chain.metadata == {"source": "a.pdf", "page": 3, "when": "2024-02-29"}
    assert (index.title, index.source) == ("Lamp", "b.md")
    assert (mapping.title, mapping.metadata) == ("T", {"title": "T", "n": 1})
    assert (plain.text, same) == ("plain", own)
    assert (no_text.source, no_text.reason) == ("item 6", "no text in int")
    assert "empty" in empty.reason


@pytest.mark.parametrize(
    ("library", "name", "data", "extra"),
    [
        ("pypdf", "a.pdf", make_pdf(["x"]), "documents"),
        ("html_text", "a.html", b"<html>x", "documents"),
        ("pyarrow", "a.parquet", b"PAR1", "parquet"),
        ("charset_normalizer", "a.txt", b"caf\xe9", "documents"),
    ],
)
def test_a_kind_without_its_library_is_skipped_and_the_extra_named(
    tmp_path, monkeypatch, library, name, data, extra
):
    monkeypatch.setitem(sys.modules, library, None)
    assert f"pip install 'kvrag[{extra}]'" in reason_of(written(tmp_path, name, data))
