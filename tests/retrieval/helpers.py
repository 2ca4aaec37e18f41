"""What several test files need: catalog rows made from small numbers, without any model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvrag.retrieval import Catalog, ChunkInput, Document

DIM = 8
EMBEDDER = "test-embedder"
TOKENIZER = "test-tokenizer"


def make_document(number: int) -> Document:
    return Document(text=f"text of {number}", title=f"title {number}", source=f"{number}.txt")


def unit_vectors(seed: int, count: int, dim: int = DIM) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def add(catalog: Catalog, number: int, *, namespace: str = "default", chunks: int = 2) -> bool:
    """Add document `number` with `chunks` chunks; everything about it follows from the number."""
    return catalog.add_document(
        namespace,
        make_document(number),
        [
            ChunkInput(f"title {number}", f"part {i} of {number}", [number, i, 2**32 - 1])
            for i in range(chunks)
        ],
        tokenizer=TOKENIZER,
        vectors=unit_vectors(number, chunks),
        embedder=EMBEDDER,
    )


def add_vectors(catalog: Catalog, name: str, vectors: np.ndarray) -> list[int]:
    """Add one document of that id with a chunk for each vector; the chunks' ids."""
    catalog.add_document(
        "default",
        Document(text=name, id=name),
        [ChunkInput(name, "a part", [1]) for _ in vectors],
        tokenizer=TOKENIZER,
        vectors=vectors,
        embedder=EMBEDDER,
    )
    return catalog.document_chunks("default", name)


def open_catalog(folder: Path) -> Catalog:
    return Catalog.open(folder / "catalog.sqlite")
