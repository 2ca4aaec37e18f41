"""A converted folder appears whole or not at all, once, whoever asks and whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from kvrag.errors import ModelError
from kvrag.models.gguf.convert import convert_gguf
from tests.models.gguf.files import tiny_gguf


def test_second_opening_converts_nothing(tiny, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path)
    folder = convert_gguf(path, tmp_path / "converted")
    monkeypatch.setattr("kvrag.models.gguf.convert.GGUFFile", None)
    assert convert_gguf(path, tmp_path / "converted") == folder
    copy = tmp_path / "other" / "tiny.gguf"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    assert convert_gguf(copy, tmp_path / "converted") == folder


def test_changed_file_is_another_model(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path)
    first = convert_gguf(path, tmp_path / "converted")
    tiny_gguf(tiny, path, "qwen2")
    assert convert_gguf(path, tmp_path / "converted") != first


def test_two_at_once_agree(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path)
    barrier, folders = threading.Barrier(4), []

    def convert():
        barrier.wait()
        folders.append(convert_gguf(path, tmp_path / "converted"))

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert list((tmp_path / "converted").iterdir()) == [folders[0]]


KILLED = """
import os, signal, sys
from pathlib import Path
import kvrag.models.gguf.convert as module
module._sync = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
module.convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """A file and a folder in which a conversion was killed just before it was complete."""
    root = tmp_path_factory.mktemp("killed")
    tiny_gguf(tiny, root / "tiny.gguf")
    command = [sys.executable, "-c", KILLED, str(root / "tiny.gguf"), str(root / "converted")]
    done = subprocess.run(command, check=False, timeout=120, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == -signal.SIGKILL
    return root


def test_killed_conversion_leaves_no_model(killed):
    assert not [p for p in (killed / "converted").iterdir() if not p.name.startswith(".")]
    folder = convert_gguf(killed / "tiny.gguf", killed / "converted")
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_killed_conversions_are_cleared_away(killed):
    """Each kill left a folder of the size of the model behind, for ever."""
    folder = convert_gguf(killed / "tiny.gguf", killed / "converted")
    assert list((killed / "converted").iterdir()) == [folder]


def test_failed_conversion_leaves_nothing(tiny, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path)

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvrag.models.gguf.convert._sync", fail)
    with pytest.raises((OSError, ModelError)):
        convert_gguf(path, tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())
