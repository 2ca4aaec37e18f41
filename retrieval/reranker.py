"""Question and text read together, into a score: slower than vectors, and finer.

Nothing here reaches for the network: a model is a folder on this machine.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ._loading import first_pickle, loading
from .errors import RerankerError, needs_extra

__all__ = ["CrossEncoderReranker", "Reranker"]

_BATCH_TEXTS = 16


class Reranker(Protocol):
    """What a search needs of a model that reads question and text together. Thread-safe."""

    def scores(self, question: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """`(len(texts),)` float32, finite; larger is better, and only comparable in one call."""
        ...


class CrossEncoderReranker:
    """A `Reranker` over a folder of a cross-encoder, computed in float32.

    One of sentence-transformers or, what is the same files, a sequence classifier of transformers
    with one label (Nogueira and Cho 2019, "Passage Re-ranking with BERT", section 3). Scores pass
    through what the folder names as its activation, a sigmoid where it names none. What is beyond
    the model's own maximum of tokens is not read.

    Raises RerankerError for a folder that is no such model, MissingExtraError without
    sentence-transformers.
    """

    def __init__(self, path: Path | str, *, device: str = "cpu") -> None:
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise RerankerError(f"{folder} is no cross-encoder: it holds no config.json")
        if pickled := first_pickle(folder):
            raise RerankerError(
                f"{folder} holds weights as pickle ({pickled}); only safetensors are read"
            )
        with needs_extra("sentence-transformers", "reranking by a cross-encoder"):
            from sentence_transformers import CrossEncoder
        from ._bert import speed_up  # not before it is needed: it imports torch

        try:
            with loading():
                model: Any = CrossEncoder(
                    str(folder),
                    device=device,
                    local_files_only=True,
                    model_kwargs={"use_safetensors": True},
                )
            labels = model.config.num_labels
            model.model.float().eval()
            speed_up(model.model.base_model)
        except Exception as exc:  # the library raises whatever its parts raise
            raise RerankerError(f"{folder} cannot be opened as a cross-encoder: {exc}") from exc
        if labels != 1:
            raise RerankerError(f"{folder} gives {labels} labels; a cross-encoder that ranks has 1")
        self._model, self._folder = model, folder
        self._lock = threading.Lock()  # the fast tokenizers refuse to be borrowed twice

    def scores(self, question: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """See `Reranker`. The work is that of `len(texts)` passages of the model's size."""
        if not texts:
            return np.empty(0, dtype=np.float32)
        with self._lock:
            scores = self._model.predict(
                [(question, text) for text in texts],
                batch_size=_BATCH_TEXTS,
                show_progress_bar=False,
            )
        result = np.asarray(scores, dtype=np.float32).reshape(len(texts))
        if not np.isfinite(result).all():
            raise RerankerError(f"the model in {self._folder} gave scores that are not finite")
        return result
