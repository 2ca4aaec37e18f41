"""Without the optional libraries: light imports, and errors that name the extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvrag import retrieval
from kvrag.retrieval import (
    Catalog,
    Chunker,
    MissingExtraError,
    SentenceTransformerEmbedder,
    VectorIndex,
)


def test_import_loads_no_heavy_library():
    script = (
        "import sys; before = set(sys.modules); import kvrag.retrieval\n"
        "heavy = {'torch', 'faiss', 'sentence_transformers', 'transformers', "
        "'semantic_text_splitter'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_exported_names_exist():
    assert retrieval.__all__ == sorted(retrieval.__all__)
    for name in retrieval.__all__:
        assert getattr(retrieval, name) is not None


def test_absent_libraries_are_named_with_the_extra(tmp_path, monkeypatch):
    for library in ("faiss", "semantic_text_splitter", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "modules.json").write_text("[]")
    wanted = r"pip install 'kvrag\[retrieval\]'"
    with pytest.raises(MissingExtraError, match=wanted):
        Chunker(len)
    with pytest.raises(MissingExtraError, match=wanted):
        SentenceTransformerEmbedder(tmp_path)
    with Catalog.open(tmp_path / "c") as catalog, pytest.raises(ImportError, match=wanted):
        VectorIndex.open(tmp_path / "i", catalog, "n", "e", 4)
