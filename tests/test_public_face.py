"""The names and shapes that users build on, and that importing them is cheap."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import kvrag


def test_exported_names():
    assert kvrag.__all__ == ["Engine", "KvragError", "Settings", "__version__"]
    for name in kvrag.__all__:
        assert getattr(kvrag, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        kvrag.Engin  # noqa: B018


#: Positional parameters, and keyword-only ones.
METHODS = {
    "open": (["settings"], []),
    "answer": (["question"], ["passages", "k", "strategy", "ratio", "cancelled"]),
    "stream": (["question"], ["passages", "k", "strategy", "ratio", "cancelled"]),
    "chat": (["messages"], ["passages", "k", "strategy", "ratio", "cancelled"]),
    "retrieve": (["question"], ["k", "prefetch"]),
    "logprobs": (["question"], ["continuation", "passages", "k", "strategy", "ratio"]),
    "add": (["documents", "report", "cancelled"], []),
    "complete": (["report", "cancelled"], []),
    "documents": ([], ["limit", "offset"]),
    "document": (["document_id"], []),
    "document_text": (["document_id"], []),
    "delete": (["document_id"], []),
    "stats": ([], []),
    "close": ([], []),
}


@pytest.mark.parametrize("name", METHODS)
def test_options_of_the_engine_are_keywords(name):
    parameters = list(inspect.signature(getattr(kvrag.Engine, name)).parameters.values())
    kinds = inspect.Parameter
    positional = [p.name for p in parameters if p.kind is kinds.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in parameters if p.kind is kinds.KEYWORD_ONLY]
    expected_positional, expected_keywords = METHODS[name]
    assert [p for p in positional if p != "self"] == expected_positional
    assert keywords[: len(expected_keywords)] == expected_keywords
    assert not any(p.kind is kinds.VAR_POSITIONAL for p in parameters)


@pytest.mark.parametrize(
    "statement",
    ["import kvrag", "import kvrag.store", "import kvrag.store.tiered, kvrag.store.disk",
     "import kvrag.retrieval", "import kvrag.client", "import kvrag.integrations.langchain",
     "import kvrag.integrations.llamaindex", "import kvrag.errors",
     "from kvrag import Settings, KvragError"],
)  # fmt: skip
def test_importing_loads_no_torch(statement):
    code = (
        f"{statement}\nimport sys\n"
        "assert not {'torch', 'transformers', 'faiss', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_error_is_ours():
    from kvrag import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), kvrag.KvragError)
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.MissingExtraError, ImportError)


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(kvrag.KvragError, match="unknown setting 'modle'"):
        kvrag.Settings(modle="x")
    settings = kvrag.Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.k = 3
