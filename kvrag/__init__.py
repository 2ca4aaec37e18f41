"""kvrag: retrieval that returns chunks together with their precomputed KV caches.

    from kvrag import Engine, Settings

    with Engine.open(Settings(model="smollm2-135m", home="~/kvrag-home")) as engine:
        print(engine.answer("Who keeps the lamp?", passages=["Anna keeps the lamp."]).text)

The names of `__all__` are the public face; everything else may move between releases. They are
resolved on first use, so that `import kvrag` (and `import kvrag.store`) does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvrag.config import Settings
    from kvrag.engine import Engine
    from kvrag.errors import KvragError

__all__ = ["Engine", "KvragError", "Settings", "__version__"]
__version__ = "0.1.0"

_HOMES = {"Engine": "kvrag.engine", "KvragError": "kvrag.errors", "Settings": "kvrag.config"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvrag' has no attribute {name!r}; it has {__all__}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
