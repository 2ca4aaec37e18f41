"""LangChain's embeddings as the embedder of a corpus."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from langchain_core.embeddings import Embeddings

from kvrag.retrieval.errors import EmbedderError

__all__ = ["LangChainEmbedder"]

#: Where integrations keep the name of their model.
_MODEL_FIELDS = ("model", "model_name", "model_id", "deployment")


class LangChainEmbedder:
    """For `Engine.open(settings, embedder=LangChainEmbedder(embeddings))`.

    Embeddings do not say which model they are. `name` does: vectors of other names never mix with
    these. Without one, it is made of the class, its model's name if it has one, and the width;
    give a name where two models would look the same.

    White space around a text does not reach the embeddings.
    """

    def __init__(self, embeddings: Embeddings, *, name: str | None = None) -> None:
        self.embeddings = embeddings
        self._given = name
        self._lock = threading.Lock()
        self._dim: int | None = None

    @property
    def name(self) -> str:
        if self._given is not None:
            return self._given
        kind = type(self.embeddings)
        models = (getattr(self.embeddings, field, None) for field in _MODEL_FIELDS)
        model = next((model for model in models if isinstance(model, str)), "")
        return f"{kind.__module__}.{kind.__qualname__} {model}".strip()

    @property
    def fingerprint(self) -> str:
        """32 hex digits over name and width."""
        text = f"langchain\0{self.name}\0{self.dim}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def dim(self) -> int:
        """Components of a vector; embeds a word to learn it."""
        with self._lock:
            if self._dim is None:
                self._dim = len(self.embeddings.embed_query("dimension"))
            return self._dim

    def embed_documents(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """`(len(texts), dim)` float32, L2-normalised."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        return _unit(self.embeddings.embed_documents([text.strip() for text in texts]), self.name)

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        """`(dim,)` float32, L2-normalised."""
        vector: npt.NDArray[np.float32]
        (vector,) = _unit([self.embeddings.embed_query(text.strip())], self.name)
        return vector


def _unit(vectors: Sequence[Sequence[float]], name: str) -> npt.NDArray[np.float32]:
    matrix = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise EmbedderError(f"the embeddings {name} gave a vector that is zero or not finite")
    unit: npt.NDArray[np.float32] = (matrix / lengths).astype(np.float32)
    return unit
