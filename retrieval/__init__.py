"""Loading, chunking, embedding, the catalog and the vector index; knows nothing of models or KV.

FAISS, sentence-transformers and semantic-text-splitter are imported when first used.
"""

from __future__ import annotations

from .catalog import (
    Catalog,
    ChunkInput,
    Counts,
    DeletedDocument,
    StoredChunk,
    StoredDocument,
)
from .chunking import Chunker, Piece, render_chunk
from .documents import Document
from .embedder import Embedder, SentenceTransformerEmbedder, open_embedder, packaged_minilm_path
from .errors import (
    CatalogError,
    DocumentError,
    EmbedderError,
    MissingExtraError,
    RetrievalError,
)
from .index import VectorIndex
from .loaders import Skipped, load

__all__ = [
    "Catalog",
    "CatalogError",
    "ChunkInput",
    "Chunker",
    "Counts",
    "DeletedDocument",
    "Document",
    "DocumentError",
    "Embedder",
    "EmbedderError",
    "MissingExtraError",
    "Piece",
    "RetrievalError",
    "SentenceTransformerEmbedder",
    "Skipped",
    "StoredChunk",
    "StoredDocument",
    "VectorIndex",
    "load",
    "open_embedder",
    "packaged_minilm_path",
    "render_chunk",
]
