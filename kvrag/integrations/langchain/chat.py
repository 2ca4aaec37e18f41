"""`ChatKVRag`: an engine or a server as a chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import PromptValue
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

from kvrag.client import Answer
from kvrag.errors import InputError
from kvrag.integrations.backend import Backend, backend_of
from kvrag.integrations.langchain.messages import messages_of, passages_of

__all__ = ["ChatKVRag"]

#: What LangChain itself passes along.
_FRAMEWORK = frozenset({"stream", "stream_usage"})
_GENERATION = ("max_tokens", "temperature", "top_p", "top_k", "seed", "strategy", "ratio")
_SEARCH = ("k", "search", "where", "mmr", "distinct", "rerank")


class ChatKVRag(BaseChatModel):
    """Answers the last message; system text and earlier messages are the prompt's prefix.

    The answer rests on `documents`, given with a call (`model.invoke(messages, documents=[…])`,
    or bound); else on the `k` nearest chunks of the corpus, if `k` is set; else on the
    conversation alone. `usage_metadata` counts as `cache_read` the tokens whose KV was reused.
    `response_metadata` has `finish_reason`, `sources` and kvrag's `report`.

    It knows no tools and reads only text.
    """

    model_config = ConfigDict(populate_by_name=True)

    source: Any = Field(exclude=True, repr=False)
    """An `Engine`, or the URL of a server."""
    model: str | None = None
    """What the model is called in traces; None is what the source calls it."""
    k: int | None = None
    """Chunks to retrieve for the last message; None is none, unless a search is chosen below."""
    search: str | None = None
    where: dict[str, Any] | None = None
    mmr: float | None = None
    distinct: float | None = None
    rerank: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] | None = None
    strategy: str | None = None
    """Fusion strategy; None is the engine's setting."""
    ratio: float | None = None
    streaming: bool = False
    timeout: float | None = None
    """Longest wait for the next token, in seconds, over a URL."""
    max_retries: int = 3
    """Repetitions of a request that was not begun, over a URL."""
    api_key: SecretStr | None = None
    """Sent as a bearer token, over a URL."""

    _backend: Backend = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        options: dict[str, Any] = {"retries": self.max_retries}
        if self.timeout is not None:
            options["timeout_s"] = self.timeout
        if self.api_key is not None:
            options["headers"] = {"Authorization": f"Bearer {self.api_key.get_secret_value()}"}
        self._backend = backend_of(self.source, **options)

    @property
    def _llm_type(self) -> str:
        return "kvrag"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = (*_GENERATION, *_SEARCH, "stop")
        return {"source": str(self.source)} | {name: getattr(self, name) for name in names}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        # A call that asks for another model is refused; its trace says what was asked for.
        name = kwargs.get("model") or self.model or self._backend.known_model_name
        params["ls_model_name"] = name or "kvrag"
        return params

    def over(self, retriever: BaseRetriever) -> Runnable[Any, Any]:
        """This model over the documents that a retriever finds for the last message."""

        def answered(prompt: PromptValue) -> Runnable[Any, Any]:
            return self.bind(documents=retriever.invoke(_question(prompt)))

        async def aanswered(prompt: PromptValue) -> Runnable[Any, Any]:
            return self.bind(documents=await retriever.ainvoke(_question(prompt)))

        return RunnableLambda(answered, afunc=aanswered, name="over")

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options = self._options(stop, kwargs)
        with closing(self._backend.chat(messages_of(messages), **options)) as pieces:
            for piece in pieces:
                if isinstance(piece, Answer):
                    yield _last(piece, self.model or self._backend.model_name())
                    continue
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager is not None:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        options = self._options(stop, kwargs)
        async with aclosing(self._backend.achat(messages_of(messages), **options)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answer):
                    yield _last(piece, self.model or await self._backend.amodel_name())
                    continue
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager is not None:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk

    def _options(self, stop: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `Engine.chat` and `POST /v1/rag/chat`."""
        known = (*_GENERATION, *_SEARCH, "documents")
        if unknown := given.keys() - set(known) - _FRAMEWORK:
            raise InputError(f"unknown option {min(unknown)!r}; options are {', '.join(known)}")
        options = {name: getattr(self, name) for name in _GENERATION} | {
            name: value for name, value in given.items() if name in _GENERATION
        }
        documents = given.get("documents")
        if documents:
            options["passages"] = passages_of(documents)
        elif documents is None:
            options |= {name: given.get(name, getattr(self, name)) for name in _SEARCH}
        options["stop"] = stop or self.stop or None
        return {name: value for name, value in options.items() if value is not None}


def _question(prompt: Any) -> str:
    """The last message's text: what a retriever is asked."""
    if isinstance(prompt, str):
        return prompt
    messages = prompt.to_messages() if isinstance(prompt, PromptValue) else list(prompt)
    return messages_of(messages[-1:])[0]["content"]


def _last(answer: Answer, model_name: str) -> ChatGenerationChunk:
    """The end of a message, with the accounts of the whole."""
    tokens = answer.report.tokens
    usage = UsageMetadata(
        input_tokens=tokens.prompt,
        output_tokens=len(answer.token_ids),
        total_tokens=tokens.prompt + len(answer.token_ids),
        input_token_details=InputTokenDetails(cache_read=tokens.reused),
    )
    accounts = {
        "model_name": model_name,
        "finish_reason": answer.finish_reason,
        "sources": [source.model_dump() for source in answer.sources],
        "report": answer.report.model_dump(),
    }
    message = AIMessageChunk(
        content="", usage_metadata=usage, response_metadata=accounts, chunk_position="last"
    )
    return ChatGenerationChunk(message=message)
