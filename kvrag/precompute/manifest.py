"""What a corpus holds, as JSON lines: one of how it was made, then one a document, sorted by id.

The same documents and settings give the same bytes, on every machine and in every order of adding,
so that `diff` compares corpora. Digests are of token ids, which name a chunk without a key secret.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from kvrag.corpus import Corpus
from kvrag.whole_file import whole_file

__all__ = ["digest", "write_manifest"]

_DIGEST_BYTES = 16


def write_manifest(path: Path, corpus: Corpus, made_with: Mapping[str, Any]) -> None:
    """Write the manifest, whole or not at all. Raises CorpusFileError."""
    with whole_file(path) as file:
        for entry in chain([made_with], _documents(corpus)):
            line = json.dumps(entry, ensure_ascii=False, sort_keys=True)
            file.write(f"{line}\n".encode())


def _documents(corpus: Corpus) -> Iterator[dict[str, Any]]:
    documents = corpus.catalog.iter_documents(corpus.namespace)
    for document_id in sorted(document.id for document in documents):
        document = corpus.catalog.document(corpus.namespace, document_id)
        if document is None:  # deleted meanwhile
            continue
        chunk_ids = corpus.catalog.document_chunks(corpus.namespace, document_id)
        chunks = [ids for ids in map(corpus.token_ids, chunk_ids) if ids is not None]
        yield {
            "document": document.id,
            "title": document.title,
            "source": document.source,
            "chunks": [{"tokens": len(ids), "digest": digest(ids)} for ids in chunks],
        }


def digest(token_ids: Sequence[int]) -> str:
    """Names a chunk by what it is to the model: 32 hex digits."""
    joined = b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)
    return blake2b(joined, digest_size=_DIGEST_BYTES).hexdigest()
