"""Documents and chunks of an exported corpus as lines of JSON.

A document's line, then one for each of its chunks:

    {"id": …, "title": …, "source": …, "metadata": …, "added_at": …, "text": …, "origins": […],
     "chunks": 2}
    {"title": …, "text": …, "token_ids": […], "vector": "base64 of little-endian float32"}

`text` is null for a document whose id is a digest of its content.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kvrag.corpus import Corpus
from kvrag.errors import CorpusFileError, DamagedCorpusError
from kvrag.models.tokenizer import Tokenizer
from kvrag.retrieval.catalog import ChunkInput, StoredDocument
from kvrag.retrieval.chunking import render_chunk
from kvrag.retrieval.documents import Document
from kvrag.retrieval.errors import DocumentError
from kvrag.retrieval.records import DocumentCopy

__all__ = ["read_documents", "written_rows"]

_DOCUMENT = {"id", "title", "source", "metadata", "added_at", "text", "origins", "chunks"}
_CHUNK = {"title", "text", "token_ids", "vector"}
_VECTOR_DTYPE = np.dtype("<f4")
_MOST_ORIGINS = 1_000_000
_UNIT = 1e-3

#: For each chunk's token ids, what it refers to.
Blocks = Callable[[Sequence[int]], Sequence[tuple[str, str]]]


def written_rows(corpus: Corpus, embedder: str) -> Iterator[bytes]:
    """The lines of all documents, in the order in which they were added.

    Raises DamagedCorpusError for a chunk that lacks something.
    """
    for document in corpus.catalog.iter_documents(corpus.namespace):
        yield from _rows_of(corpus, document, embedder)


def _rows_of(corpus: Corpus, document: StoredDocument, embedder: str) -> Iterator[bytes]:
    catalog, namespace = corpus.catalog, corpus.namespace
    ids = catalog.document_chunks(namespace, document.id)
    yield _line(
        {
            "id": document.id,
            "title": document.title,
            "source": document.source,
            "metadata": document.metadata,
            "added_at": document.added_at,
            "text": catalog.document_text(namespace, document.id),
            "origins": catalog.origins_of(namespace, document.id),
            "chunks": len(ids),
        }
    )
    chunks, vectors = catalog.chunk(ids), catalog.vectors(ids, embedder)
    for chunk_id, chunk, vector in zip(ids, chunks, vectors, strict=True):
        token_ids = corpus.token_ids(chunk_id)
        if chunk is None or vector is None or token_ids is None:
            raise DamagedCorpusError(
                f"chunk {chunk_id} of the corpus {namespace!r} lacks its text, ids or vector: "
                "`kvrag corpus verify --repair` mends that"
            )
        packed = base64.b64encode(vector.astype(_VECTOR_DTYPE).tobytes()).decode()
        yield _line(
            {
                "title": chunk.title,
                "text": chunk.text,
                "token_ids": list(token_ids),
                "vector": packed,
            }
        )


def _line(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode()


def read_documents(
    lines: Iterator[bytes], tokenizer: Tokenizer, blocks: Blocks, *, dim: int | None = None
) -> Iterator[DocumentCopy]:
    """The documents of the lines, everything about them checked.

    dim: of all vectors; None is that of the first.

    Raises CorpusFileError for anything that `written_rows` cannot have written.
    """
    for number, line in enumerate(lines, start=1):
        try:
            fields = _fields(line, _DOCUMENT)
            chunks, vectors = _chunks(fields["chunks"], lines, tokenizer)
            dim = vectors.shape[1] if dim is None else dim
            _check_dim(vectors, dim)
            copy = _document(fields, chunks, vectors, blocks)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as exc:
            raise CorpusFileError(f"document {number} cannot be taken: {exc!s:.200}") from exc
        yield copy


def _chunks(
    count: object, lines: Iterator[bytes], tokenizer: Tokenizer
) -> tuple[list[ChunkInput], npt.NDArray[np.float32]]:
    if type(count) is not int or count < 1:
        raise ValueError("a document has at least one chunk")
    found = [_chunk(_fields(next(lines, b""), _CHUNK), tokenizer) for _ in range(count)]
    return [chunk for chunk, _ in found], np.stack([vector for _, vector in found])


def _check_dim(vectors: npt.NDArray[np.float32], dim: int) -> None:
    if vectors.shape[1] != dim:
        raise ValueError(f"vectors have {dim} components, and {vectors.shape[1]} here")


def _fields(line: bytes, names: set[str]) -> dict[str, Any]:
    if not line:
        raise ValueError("it is cut short")
    fields = json.loads(line, parse_constant=_no_number)
    if not isinstance(fields, dict) or set(fields) != names:
        raise ValueError(f"it must have the fields {', '.join(sorted(names))}, and no others")
    return fields


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _chunk(
    fields: dict[str, Any], tokenizer: Tokenizer
) -> tuple[ChunkInput, npt.NDArray[np.float32]]:
    title, text, token_ids = _text(fields["title"]), _text(fields["text"]), fields["token_ids"]
    # Who answers from the one shows the other.
    if tokenizer.encode(render_chunk(title, text)) != token_ids:
        raise ValueError("the token ids of a chunk are not those of its text")
    packed = base64.b64decode(_text(fields["vector"]), validate=True)
    vector = np.frombuffer(packed, dtype=_VECTOR_DTYPE)
    if not vector.size or not abs(float(np.linalg.norm(vector.astype(np.float64))) - 1) < _UNIT:
        raise ValueError("a vector must have the length 1")
    return ChunkInput(title, text, token_ids), vector


def _document(
    fields: dict[str, Any],
    chunks: Sequence[ChunkInput],
    vectors: npt.NDArray[np.float32],
    blocks: Blocks,
) -> DocumentCopy:
    text, added_at, origins = fields["text"], fields["added_at"], fields["origins"]
    if type(added_at) not in (int, float) or not math.isfinite(added_at):
        raise ValueError("added_at is no time")
    if not isinstance(origins, list) or len(origins) > _MOST_ORIGINS:
        raise ValueError("origins are a list of files")
    try:
        # What a document checks of itself; its content stands in for a text that is not kept.
        checked = Document(
            chunks[0].text if text is None else text,
            title=fields["title"],
            source=fields["source"],
            metadata=fields["metadata"],
            id=fields["id"],
        )
    except DocumentError as exc:
        raise ValueError(str(exc)) from exc
    return DocumentCopy(
        checked.id,
        checked.title,
        checked.source,
        checked.metadata,
        float(added_at),
        text,
        [_text(origin) for origin in origins],
        chunks,
        vectors,
        [blocks(chunk.token_ids) for chunk in chunks],
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is no text")  # noqa: TRY004 - of what a file holds
    value.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return value
