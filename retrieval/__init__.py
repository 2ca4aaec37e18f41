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
    FilterError,
    MissingExtraError,
    RerankerError,
    RetrievalError,
)
from .hybrid import Found, HybridSearch, Match, Rerank
from .index import IndexRule, VectorIndex
from .lexical import LexicalIndex
from .loaders import ReadWhole, Skipped, documents_from, load, read
from .reranker import CrossEncoderReranker, Reranker
from .where import Where

__all__ = [
    "Catalog",
    "CatalogError",
    "ChunkInput",
    "Chunker",
    "Counts",
    "CrossEncoderReranker",
    "DeletedDocument",
    "Document",
    "DocumentError",
    "Embedder",
    "EmbedderError",
    "FilterError",
    "Found",
    "HybridSearch",
    "IndexRule",
    "LexicalIndex",
    "Match",
    "MissingExtraError",
    "Piece",
    "ReadWhole",
    "Rerank",
    "Reranker",
    "RerankerError",
    "RetrievalError",
    "SentenceTransformerEmbedder",
    "Skipped",
    "StoredChunk",
    "StoredDocument",
    "VectorIndex",
    "Where",
    "documents_from",
    "load",
    "open_embedder",
    "packaged_minilm_path",
    "read",
    "render_chunk",
]
