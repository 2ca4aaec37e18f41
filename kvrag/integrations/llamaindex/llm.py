"""`KVRagLLM`: an engine or a server as an LLM of LlamaIndex."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM
from pydantic import Field, PrivateAttr

from kvrag.client import Answer
from kvrag.errors import InputError
from kvrag.integrations.backend import Backend, backend_of

__all__ = ["KVRagLLM"]

_GENERATION = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "strategy", "ratio")


class KVRagLLM(LLM):
    """Answers the last message; system text and earlier messages are the prompt's prefix.

    The answer rests on `passages`, given with a call, on the `k` nearest chunks, if `k` is set, or
    on the conversation alone. `additional_kwargs` of a response count `prompt_tokens`,
    `completion_tokens`, `total_tokens` and `cached_tokens`, whose KV was reused; `raw` is kvrag's
    answer, at a stream's end.
    """

    source: Any = Field(exclude=True, repr=False)
    k: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] | None = None
    strategy: str | None = None
    ratio: float | None = None
    context_window: int = 8192
    """What the model's context holds: for LlamaIndex, which packs prompts by it."""
    client: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    """Options of `KVRagClient`, over a URL."""

    _backend: Backend = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        self._backend = backend_of(self.source, **self.client)

    @classmethod
    def class_name(cls) -> str:
        return "KVRagLLM"

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_tokens or 128,
            is_chat_model=True,
            model_name=self._backend.known_model_name or "kvrag",
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        *_, last = self._streamed(messages, kwargs)
        return last

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        async for response in self._astreamed(messages, kwargs):  # noqa: B007
            pass
        return response

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._streamed(messages, kwargs)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        return self._astreamed(messages, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        *_, last = self._streamed([ChatMessage(content=prompt)], kwargs)
        return _completed(last)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        async for response in self._astreamed([ChatMessage(content=prompt)], kwargs):  # noqa: B007
            pass
        return _completed(response)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        responses = self._streamed([ChatMessage(content=prompt)], kwargs)
        # LlamaIndex takes generators alone for streams.
        return (_completed(response) for response in responses)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        responses = self._astreamed([ChatMessage(content=prompt)], kwargs)
        return (_completed(response) async for response in responses)

    def _streamed(
        self, messages: Sequence[ChatMessage], given: dict[str, Any]
    ) -> Generator[ChatResponse, None, None]:
        text = ""
        options = self._options(given)
        with closing(self._backend.chat(_messages(messages), **options)) as pieces:
            for piece in pieces:
                text += piece if isinstance(piece, str) else ""
                yield _response(text, piece)

    async def _astreamed(
        self, messages: Sequence[ChatMessage], given: dict[str, Any]
    ) -> AsyncGenerator[ChatResponse, None]:
        text = ""
        options = self._options(given)
        async with aclosing(self._backend.achat(_messages(messages), **options)) as pieces:
            async for piece in pieces:
                text += piece if isinstance(piece, str) else ""
                yield _response(text, piece)

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        known = (*_GENERATION, "k", "passages")
        if unknown := given.keys() - set(known):
            raise InputError(f"unknown option {min(unknown)!r}; options are {', '.join(known)}")
        options = {name: getattr(self, name) for name in (*_GENERATION, "k")} | given
        if options.get("passages") is not None:
            options["k"] = None
        return {name: value for name, value in options.items() if value is not None}


def _messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    roles = {MessageRole.SYSTEM, MessageRole.USER, MessageRole.ASSISTANT}
    for message in messages:
        if message.role not in roles or not all(isinstance(b, TextBlock) for b in message.blocks):
            raise InputError(
                f"a message of role {message.role.value!r} cannot be answered: kvrag reads texts "
                "of system, user and assistant, and knows no tools"
            )
    return [{"role": m.role.value, "content": m.content or ""} for m in messages]


def _response(text: str, piece: str | Answer) -> ChatResponse:
    """The text so far, what came last, and at the end the accounts."""
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    if isinstance(piece, str):
        return ChatResponse(message=message, delta=piece)
    prompt, new = piece.report.tokens.prompt, len(piece.token_ids)
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "cached_tokens": piece.report.tokens.reused,
    }
    raw = piece.model_dump()
    return ChatResponse(message=message, delta="", raw=raw, additional_kwargs=usage)


def _completed(response: ChatResponse) -> CompletionResponse:
    return CompletionResponse(
        text=response.message.content or "",
        delta=response.delta,
        raw=response.raw,
        additional_kwargs=response.additional_kwargs,
    )
