"""The container: the same as the `gguf` package reads, and every damage named."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantisation

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.models.gguf.file import GGUFFile
from tests.models.gguf.files import write_gguf
from tests.models.tiny_models import reference_model


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    """A file with every kind of value in its metadata."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    folder = tiny("phi3", "longrope", intermediate_size=64)
    hf = reference_model(folder, torch.float32)
    extra = {"x.bool": True, "x.floats": [1.5, -2.0], "x.bools": [True, False], "x.text": "é\n"}
    write_gguf(path, hf, folder, quantisation=Quantisation.Q4_1, extra=extra)
    return path


def test_equals_the_gguf_package(tiny_file):
    theirs, ours = gguf.GGUFReader(tiny_file), GGUFFile(tiny_file)
    fields = {
        name: field.contents()
        for name, field in theirs.fields.items()
        if not name.startswith("GGUF.")
    }
    assert ours.fields == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(tensor.shape.tolist()[::-1])
        assert mine.quantisation == tensor.tensor_type
        np.testing.assert_array_equal(
            ours.rows(mine).reshape(-1), tensor.data.view(np.uint8).reshape(-1)
        )


@pytest.mark.parametrize(
    ("number", "code", "value"),
    [
        *((0, "B", 7), (1, "b", -7), (2, "H", 700), (3, "h", -700), (4, "I", 70000)),
        *((5, "i", -70000), (6, "f", 0.5), (7, "?", True)),
        *((10, "Q", 1 << 40), (11, "q", -(1 << 40)), (12, "d", 0.1)),
    ],
)
def test_every_type_of_number(tmp_path, number, code, value):
    entry = struct.pack("<Q", 3) + b"a.b" + struct.pack("<I" + code, number, value)
    path = tmp_path / "one.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    assert GGUFFile(path).fields == {"a.b": value}


@pytest.mark.parametrize("kind", [struct.pack("<I", 13), struct.pack("<IIQ", 9, 9, 1)])
def test_unknown_type_of_value(tmp_path, kind):
    """A number that no version has, and an array of arrays."""
    path = tmp_path / "one.gguf"
    entry = struct.pack("<Q", 3) + b"a.b" + kind
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(64))
    with pytest.raises(ModelError, match=r"one\.gguf: key a\.b .*unknown"):
        GGUFFile(path)


def test_every_cut_is_named(tiny_file, tmp_path):
    """Every length of the beginning, and some within the weights: no other error, no success."""
    content = tiny_file.read_bytes()
    start = min(tensor.start for tensor in GGUFFile(tiny_file).tensors.values())
    rng = np.random.default_rng(0)
    lengths = {*range(60), start - 1, start, start + 1, len(content) - 1}
    lengths |= set(rng.integers(60, len(content) - 1, 300).tolist())
    path = tmp_path / "cut.gguf"
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf (is cut short|is no GGUF file)") as caught:
            GGUFFile(path)
        if length > start:
            assert "tensor '" in str(caught.value)
            assert f"the file at {length}" in str(caught.value)


def test_flipped_bytes_raise_nothing_else(tiny_file, tmp_path):
    """Whatever a byte of the header becomes: it is read, or refused in a sentence."""
    content = tiny_file.read_bytes()
    start = min(tensor.start for tensor in GGUFFile(tiny_file).tensors.values())
    rng = np.random.default_rng(1)
    path = tmp_path / "flipped.gguf"
    refused = 0
    for at in rng.integers(0, start, 400).tolist():
        damaged = bytearray(content)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            GGUFFile(path)
        except ModelError as exc:
            assert "flipped.gguf" in str(exc)  # noqa: PT017
            refused += 1
    assert refused > 50


def test_no_gguf_at_all(tmp_path):
    path = tmp_path / "text.gguf"
    for content in ("", "no model\n" * 1000, "version https://git-lfs.github.com/spec/v1\n"):
        path.write_text(content)
        with pytest.raises(ModelError, match=r"text\.gguf is no GGUF file"):
            GGUFFile(path)


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_version_is_refused(tiny_file, tmp_path, version):
    """Big-endian files have their version's bytes the other way round."""
    content = bytearray(tiny_file.read_bytes())
    content[4:8] = struct.pack("<I", version)
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=rf"other\.gguf: GGUF version {version}"):
        GGUFFile(path)


def test_unknown_quantisation(tiny_file, tmp_path):
    content = bytearray(tiny_file.read_bytes())
    name = b"blk.1.attn_qkv.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", 99)
    path = tmp_path / "new.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=r"new\.gguf.*blk\.1\.attn_qkv\.weight.*99"):
        GGUFFile(path)
