"""LangChain: a retriever, a chat model and a vector store over an engine or a server's URL.

Needs the `langchain` extra.
"""

from __future__ import annotations

from kvrag.errors import MissingExtraError

try:
    import langchain_core as _langchain_core  # noqa: F401
except ImportError as exc:
    raise MissingExtraError(
        f"LangChain's adapters need {exc.name}; install it with: pip install 'kvrag[langchain]'"
    ) from exc

from kvrag.integrations.langchain.chat import ChatKVRag
from kvrag.integrations.langchain.embedder import LangChainEmbedder
from kvrag.integrations.langchain.retriever import KVRagRetriever
from kvrag.integrations.langchain.vectors import KVRagEmbeddings
from kvrag.integrations.langchain.vectorstore import KVRagVectorStore

__all__ = [
    "ChatKVRag",
    "KVRagEmbeddings",
    "KVRagRetriever",
    "KVRagVectorStore",
    "LangChainEmbedder",
]
