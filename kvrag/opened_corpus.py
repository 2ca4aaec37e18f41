"""The corpus of a namespace, opened behind what its maker fixed; anew when somebody makes it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from kvrag.blocks import PlacedBlocks
from kvrag.config import Settings
from kvrag.corpus import Corpus
from kvrag.fixed import Fixed
from kvrag.retriever import KVRetriever
from kvrag.store.tiered import TieredStore

__all__ = ["Opened", "OpenedCorpus"]

_log = logging.getLogger(__name__)

Opened = tuple[Corpus, PlacedBlocks, KVRetriever]


class OpenedCorpus:
    """Opens when first asked. Thread-safe.

    `blocks`: those of chunks behind a prefix's ids and a context's text. What chunks are computed
    behind is the maker's; until a corpus is made, perhaps by another process, the settings'.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        fixed: Fixed,
        store: TieredStore,
        blocks: Callable[[Sequence[int], str], PlacedBlocks],
    ) -> None:
        self._settings, self._corpus, self._fixed = settings, corpus, fixed
        self._store, self._blocks = store, blocks
        self._lock = threading.Lock()
        self._opened: Opened | None = None
        self._made = False

    def get(self) -> Opened:
        with self._lock:
            if self._opened is None or not self._made:
                made_with = self._fixed.corpus_instruction
                if self._opened is None or made_with is not None:
                    self._opened = self._behind(made_with, self._opened)
                    self._made = made_with is not None
            return self._opened

    def close(self) -> None:
        """Release what retrieved chunks hold, and save. A second call does nothing."""
        with self._lock:
            if self._opened is not None:
                self._opened[2].close()
        self._corpus.close()

    def _behind(self, made_with: str | None, opened: Opened | None) -> Opened:
        """`opened`, if its blocks are those of a corpus that was made with this instruction."""
        settings, context = self._settings, self._fixed.corpus_context(made_with)
        if made_with is not None and context != self._fixed.context:
            _log.warning(
                "the corpus in %s keeps the corpus_context that it was made with, which is not the "
                "setting's; another home or namespace takes that",
                settings.home,
            )
        layout = self._fixed.layout(made_with or settings.instruction)
        blocks = self._blocks(layout.prefix_ids, context)
        if opened is not None:
            if opened[1].prefixes == blocks.prefixes:
                return opened
            opened[2].close()
        return self._corpus, blocks, KVRetriever(self._corpus, blocks, self._store.locate)
