"""LlamaIndex: a retriever and an LLM over an engine or a server's URL.

Needs the `llamaindex` extra.
"""

from __future__ import annotations

from kvrag.errors import MissingExtraError

try:
    import llama_index.core as _llama_index  # noqa: F401
except ImportError as exc:
    raise MissingExtraError(
        f"LlamaIndex's adapters need {exc.name}; install it with: pip install 'kvrag[llamaindex]'"
    ) from exc

from kvrag.integrations.llamaindex.llm import KVRagLLM
from kvrag.integrations.llamaindex.retriever import KVRagRetriever

__all__ = ["KVRagLLM", "KVRagRetriever"]
