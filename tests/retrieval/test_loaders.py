from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest

from kvrag.retrieval import Document, DocumentError, Skipped, load


def load_one(path, **options):
    (only,) = load([path], **options)
    return only


def reason_of(path, **options):
    skipped = load_one(path, **options)
    assert isinstance(skipped, Skipped)
    assert skipped.source == str(path)
    return skipped.reason


def test_folders_are_walked_in_sorted_order_and_hidden_entries_ignored(tmp_path):
    for name in ["b.txt", "a/z.md", "a/y.text", "c.markdown", ".hidden.txt", ".git/x.txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"content of {name}")
    loaded = list(load([tmp_path]))
    assert [os.path.relpath(item.source, tmp_path) for item in loaded] == [
        "a/y.text",
        "a/z.md",
        "b.txt",
        "c.markdown",
    ]
    assert loaded[0].title == "y"
    assert load_one(tmp_path / ".hidden.txt").text == "content of .hidden.txt"


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("---\ntitle: 'From front'\nx: y\n---\n# Heading\nbody", "From front"),
        ("---\nx: y\n---\n# Heading\nbody", "Heading"),
        ("intro\n\n# Heading ##\nbody", "Heading"),
        ("```sh\n# a comment\n```\n# Heading\n", "Heading"),
        ("## Only level two\n", "file"),
        ("---\ntitle: never closed\n", "never closed"),
    ],
)
def test_markdown_title(tmp_path, text, title):
    path = tmp_path / "file.md"
    path.write_text(text)
    document = load_one(path)
    assert document.title == title
    assert document.text == text


def test_text_is_kept_as_it_is_but_for_the_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf one\r\n\ttwo \n")
    assert load_one(path).text == " one\r\n\ttwo \n"


def test_bad_lines_of_jsonl_do_not_stop_the_others(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"title": "T", "text": "one", "metadata": {"k": 1}, "url": "u"}',
        b"",
        b'{"text": 3}',
        b'{"title": ["x"], "text": "y"}',
        b'{"text": "x", "metadata": 3}',
        b'["text"]',
        b"null",
        b"{not json}",
        b'{"title": "no text"}',
        b'{"text": "  "}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "x", "metadata": {"n": NaN}}',
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"text": "last", "title": null}',
    ]
    path.write_bytes(b"\n".join(lines))
    loaded = list(load([path]))
    documents = [item for item in loaded if isinstance(item, Document)]
    skipped = [item for item in loaded if isinstance(item, Skipped)]
    assert [document.text for document in documents] == ["one", "last"]
    assert documents[0].metadata == {"k": 1, "url": "u"}
    assert documents[0].source == f"{path}:1"
    assert [item.source for item in skipped] == [f"{path}:{n}" for n in range(3, 16)]
    assert skipped[0].reason == '"text" must be a string, got a number'


def test_huge_line_is_skipped_without_being_held(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "good"}).encode()
    path.write_bytes(good + b"\n" + b"x" * 5000 + b"\n" + good + b"\n" + b"y" * 5000)
    texts = [
        item.text if isinstance(item, Document) else item.source
        for item in load([path], max_bytes=100)
    ]
    assert texts == ["good", f"{path}:2", "good", f"{path}:4"]


def test_a_line_of_a_hundred_megabytes_takes_no_memory(tmp_path):
    path, good = tmp_path / "a.jsonl", b'{"text": "good"}\n'
    with path.open("wb") as file:
        file.write(good + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + good)
    tracemalloc.start()
    try:
        items = list(load([path], max_bytes=1_000_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [type(item) for item in items] == [Document, Skipped, Document]
    assert "more than 1000000 bytes" in items[1].reason
    assert peak < 16_000_000


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"\x00\x01binary", "NUL"),
        ("a.jsonl", b"\x00\x01binary", "NUL"),
        ("a.txt", "café".encode("latin-1"), "not UTF-8: byte 3 is 0xe9"),
        ("a.txt", b"", "empty"),
        ("a.md", b" \n ", "empty"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.txt", b"x" * 101, "more than 100 bytes"),
        ("a.pdf", b"%PDF", "named .pdf, but no PDF"),
        ("README", b"text", "unknown suffix ''"),
    ],
)
def test_unusable_files_are_skipped(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    assert reason in reason_of(path, max_bytes=100)


def test_broken_links_and_loops(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "up").symlink_to(tmp_path)
    loaded = list(load([tmp_path]))
    assert [type(item) for item in loaded] == [Document, Skipped, Skipped]
    assert loaded[1].reason == "No such file or directory"
    assert "symbolic links" in loaded[2].reason
    assert isinstance(load_one(tmp_path / "broken.txt"), Skipped)


@pytest.mark.timeout(20)
def test_pipes_sockets_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jsonl"))
        (tmp_path / "zero.md").symlink_to("/dev/zero")
        loaded = list(load([tmp_path]))
    assert {item.reason for item in loaded} == {"not a regular file"}
    assert len(loaded) == 3


def test_deep_folders(tmp_path):
    here = os.getcwd()
    depth = 1500  # more than Python has frames, and a path longer than Linux takes
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("deep")
            os.chdir("deep")
        (tmp_path / "z.txt").write_text("beside")
        os.chdir(here)
        loaded = list(load([tmp_path]))
    finally:
        remove_deep(tmp_path, here)
    assert isinstance(loaded[0], Skipped)
    assert "too long" in loaded[0].reason
    assert loaded[1].text == "beside"


def remove_deep(folder, back_to):
    """Removed here: pytest would recurse into it."""
    os.chdir(folder)
    depth = 0
    while os.path.isdir("deep"):
        os.chdir("deep")
        depth += 1
    for _ in range(depth):
        os.chdir("..")
        os.rmdir("deep")
    os.chdir(back_to)


def test_names_that_are_not_unicode(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"body")
    (document,) = load([tmp_path])
    assert document.title == "caf\ufffd"


@pytest.fixture
def public_folder():
    """A folder that every user may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become nobody")
def test_files_without_permission_are_skipped(public_folder):
    """In a child process that stops being root, because root may read everything."""
    (public_folder / "a.txt").write_text("open")
    (public_folder / "b.txt").write_text("closed")
    (public_folder / "b.txt").chmod(0)
    (public_folder / "closed").mkdir()
    (public_folder / "closed").chmod(0)
    script = (
        "import os, sys\n"
        "from kvrag.retrieval import load\n"
        "list(load([sys.argv[1]]))  # codecs are imported late, perhaps from root's folder\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "for item in load([sys.argv[1]]): print(getattr(item, 'reason', 'loaded'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(public_folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["loaded", "Permission denied", "Permission denied"]


def test_absent_paths_are_an_error_before_anything_is_loaded(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DocumentError, match="nowhere"):
        load([tmp_path / "a.txt", tmp_path / "nowhere"])
    with pytest.raises(DocumentError):
        load(["nul\0byte"])
    with pytest.raises(TypeError, match="several paths"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="max_bytes"):
        load([tmp_path], max_bytes=0)
