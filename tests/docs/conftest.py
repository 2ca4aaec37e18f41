from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import make_tiny_embedder, make_tiny_model

from .runner import Page, Zygote

_ADDRESS = "127.0.0.1:8321"


@pytest.fixture(scope="session")
def zygote(tmp_path_factory) -> Iterator[Zygote]:
    missing = [name for name in ("bash", "curl", "openssl", "tar") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"the pages' commands need {', '.join(missing)}")
    zygote = Zygote(tmp_path_factory.mktemp("docs"))
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model and a tiny embedder; do not write into them."""
    root = tmp_path_factory.mktemp("docs-models")
    return make_tiny_model(root / "model"), make_tiny_embedder(root / "embedder")


@pytest.fixture
def reader(isolated, zygote, tiny_folders, tmp_path) -> Iterator[Page]:
    """A page's reader, with tiny models instead of packaged ones, and a port of their own."""
    model, embedder = map(str, tiny_folders)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "KVRAG_MODEL": model,
        "KVRAG_EMBEDDER": embedder,
        "KVRAG_PORT": str(port),
        "KVRAG_DTYPE": "float32",
        "KVRAG_THREADS": "1",
        "KVRAG_RAM_BYTES": str(2**26),
        "KVRAG_DISK_FSYNC": "never",
        "KVRAG_VERIFY_ON_START": "false",
        # Half of the computing, and none for passages before a chunk: tried elsewhere.
        "KVRAG_FIRST_BLOCKS": "false",
        "KVRAG_CORPUS_CONTEXT": " ",
    }
    instead = {"smollm2-135m": model, "gemma3-270m": model, _ADDRESS: f"127.0.0.1:{port}"}
    folder = tmp_path / "kvrag"
    folder.mkdir()
    page = Page(zygote, folder, environment, instead)
    yield page
    page.close()
