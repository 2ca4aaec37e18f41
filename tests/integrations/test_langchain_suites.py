"""LangChain's own tests of integrations, over an engine of this process and over a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests

from kvrag.engine import Engine
from kvrag.integrations.langchain import (
    ChatKVRag,
    KVRagRetriever,
    KVRagVectorStore,
    LangChainEmbedder,
)
from tests.serving.harness import serving

# Skipped tests of the suite do not use theirs.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


class OfSource:
    """The suites build what they test out of properties, which know no fixtures."""

    source: object

    @pytest.fixture(autouse=True)
    def _source(self, source):
        self.source = source


class TestRetriever(OfSource, RetrieversIntegrationTests):
    @property
    def retriever_constructor(self):
        return KVRagRetriever

    @property
    def retriever_constructor_params(self):
        return {"source": self.source}

    @property
    def retriever_query_example(self):
        return "Who keeps the lamp?"


class OfChat(OfSource):
    @property
    def chat_model_class(self):
        return ChatKVRag

    @property
    def chat_model_params(self):
        return {"source": self.source}

    #: An engine, and so a server, has one model.
    supports_model_override = False


class TestChatUnits(OfChat, ChatModelUnitTests):
    has_tool_calling = False  # kvrag knows no tools
    has_structured_output = False


class TestChat(OfChat, ChatModelIntegrationTests):
    has_tool_calling = False
    has_structured_output = False

    @property
    def supported_usage_metadata_details(self):
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatKVRag(source=self.source, k=2, max_tokens=4)
        question = "Who keeps the lamp?"
        if not stream:
            return model.invoke(question)
        whole = None
        for chunk in model.stream(question):
            whole = chunk if whole is None else whole + chunk
        assert whole is not None
        return whole


class TestVectorStore(VectorStoreIntegrationTests):
    """Over settings, which is an engine of the store's own."""

    @pytest.fixture
    def vectorstore(self, make_settings) -> Iterator[KVRagVectorStore]:
        store = KVRagVectorStore(make_settings(), self.get_embeddings())
        yield store
        store.close()


@pytest.fixture(scope="module")
def stored(make_settings) -> Iterator[tuple[Engine, str]]:
    """An engine with the suite's embeddings, and its server."""
    embedder = LangChainEmbedder(DeterministicFakeEmbedding(size=6))
    with Engine.open(make_settings(), embedder=embedder) as engine, serving(engine) as url:
        yield engine, url


class TestVectorStoreOfServer(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, stored) -> Iterator[KVRagVectorStore]:
        engine, url = stored
        store = KVRagVectorStore(url)
        yield store
        for document in engine.documents():
            engine.delete(document.id)
        store.close()
