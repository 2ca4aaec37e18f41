"""Everything kvrag raises on purpose.

    KvragError
    ├── SettingsError            an unknown or malformed setting
    ├── InputError (ValueError)  a question, passage or option that cannot be served
    │   ├── PromptTooLongError   the question alone does not fit, or a passage is too long
    │   ├── CorpusSettingsError  a corpus was made with other settings
    │   ├── EmptyCorpusError     there are no documents to retrieve from
    │   ├── NothingFoundError    no chunk of the corpus is found by the search
    │   └── UnknownStrategyError names the registered strategies
    ├── ModelError               a model that cannot be found, read or trusted
    │   ├── ModelNotFoundError
    │   └── UnsupportedModelError  a family, RoPE variant or option that is refused by name
    ├── MissingExtraError        an optional dependency is not installed; names the extra
    ├── CorpusFileError          an exported corpus that cannot be written, read or trusted
    ├── CorpusBusyError          another process works on the corpus
    ├── DamagedCorpusError       what a corpus consists of does not agree
    ├── ClosedError              the engine was closed
    └── BusyError                the queue of requests is full

The rooms that import nothing of ours keep trees of their own: `kvrag.store.errors.StoreError` and
`kvrag.retrieval.errors.RetrievalError`.
"""

from __future__ import annotations

__all__ = [
    "BusyError",
    "ClosedError",
    "CorpusBusyError",
    "CorpusFileError",
    "CorpusSettingsError",
    "DamagedCorpusError",
    "EmptyCorpusError",
    "InputError",
    "KvragError",
    "MissingExtraError",
    "ModelError",
    "ModelNotFoundError",
    "NothingFoundError",
    "PromptTooLongError",
    "SettingsError",
    "UnknownStrategyError",
    "UnsupportedModelError",
]


class KvragError(Exception):
    """Root of the errors of the engine and its faces."""


class SettingsError(KvragError):
    """A setting is unknown or has a value that is not allowed."""


class InputError(KvragError, ValueError):
    """What the caller asked for cannot be served as asked."""


class PromptTooLongError(InputError):
    """A passage, or the question with nothing else, exceeds what the model can hold."""


class CorpusSettingsError(InputError):
    """A corpus was made with other settings than those in force; it can be rebuilt."""


class EmptyCorpusError(InputError):
    """Nothing to retrieve from: no documents, and no passages given."""


class NothingFoundError(InputError):
    """No chunk passes the filter, or, in a search by words, shares a word with the question."""


class UnknownStrategyError(InputError):
    """No fusion strategy of that name is registered."""


class ModelError(KvragError):
    """A model's files cannot be used."""


class ModelNotFoundError(ModelError):
    """No model of that name, or no model files at that place."""


class UnsupportedModelError(ModelError):
    """The model needs something this release does not implement; the message names it."""


class MissingExtraError(KvragError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""


class CorpusFileError(KvragError):
    """The file of an exported corpus cannot be written, or is damaged, cut short or made up."""


class CorpusBusyError(KvragError):
    """Another process works on the corpus; try again when it has finished."""


class DamagedCorpusError(KvragError):
    """Parts of a corpus lack or contradict one another; `kvrag corpus verify --repair` mends it."""


class ClosedError(KvragError):
    """The engine was used after `close()`."""


class BusyError(KvragError):
    """More requests wait than the queue holds; try again later."""
