"""The snippets of README and docs/langchain.md run over an engine, where they name a server.

Over a server, and with everything else of these pages, tests/docs runs them.
"""

from __future__ import annotations

import pytest

from tests.docs.pages import blocks
from tests.serving.harness import CHAIN_TEXT

ADDRESS = '"http://127.0.0.1:8321"'


def snippets(page: str) -> list[str]:
    return [b.text for b in blocks(page) if b.language == "python" and b.reason is None]


@pytest.mark.parametrize("number", range(3))
def test_snippets_run(number, engine, make_settings, capsys):
    snippet = snippets("docs/langchain.md")[number].replace(ADDRESS, "given")
    snippet = snippet.replace('Settings(home="~/kvrag-vectors")', "settings")
    names = {"given": engine, "settings": make_settings()}
    exec(compile(snippet, f"docs/langchain.md, snippet {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert CHAIN_TEXT in printed or "Anna keeps the lamp." in printed


def test_the_chain_of_the_readme_runs(engine, capsys):
    (snippet,) = [text for text in snippets("README.md") if "integrations.langchain" in text]
    assert len(snippet.splitlines()) <= 10
    exec(compile(snippet.replace(ADDRESS, "given"), "README.md", "exec"), {"given": engine})
    assert CHAIN_TEXT in capsys.readouterr().out
