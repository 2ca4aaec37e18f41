"""LangChain's messages and documents as kvrag's messages and passages."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage

from kvrag.errors import InputError

__all__ = ["messages_of", "passages_of"]


def messages_of(messages: Sequence[BaseMessage]) -> list[dict[str, str]]:
    """Roles and texts.

    Raises:
        InputError: a message of a tool, or one with more than text.
    """
    return [{"role": _role(message), "content": _text(message)} for message in messages]


def passages_of(documents: Sequence[Document | str]) -> list[dict[str, str]]:
    """Passages, with the documents' `title`, if their metadata has one."""
    return [
        {"text": document}
        if isinstance(document, str)
        else {"title": str(document.metadata.get("title") or ""), "text": document.page_content}
        for document in documents
    ]


def _role(message: BaseMessage) -> str:
    match message:
        case SystemMessage():
            return "system"
        case HumanMessage():
            return "user"
        case AIMessage():
            return "assistant"
        case ChatMessage():
            return message.role
    raise InputError(f"a {type(message).__name__} cannot be answered: kvrag knows no tools")


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text":
            texts.append(str(part["text"]))
        else:
            raise InputError(f"a part of a message is {part.get('type')!r}; only text is answered")
    return "".join(texts)
