"""The snippets of README and docs/langchain.md run, over an engine and over a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.serving.harness import CHAIN_TEXT

ROOT = Path(__file__).parents[2]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(snippets("docs/langchain.md"))))
def test_snippets_run(number, source, url, make_settings, capsys):
    snippet = snippets("docs/langchain.md")[number]
    names = {"source": source, "url": url, "settings": make_settings()}
    exec(compile(snippet, f"docs/langchain.md, snippet {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert CHAIN_TEXT in printed or "Anna keeps the lamp." in printed


def test_the_chain_of_the_readme_runs(source, capsys):
    (snippet,) = [text for text in snippets("README.md") if "integrations.langchain" in text]
    assert len(snippet.splitlines()) <= 10
    snippet = snippet.replace('"http://127.0.0.1:8321"', "given")
    exec(compile(snippet, "README.md", "exec"), {"given": source})
    assert CHAIN_TEXT in capsys.readouterr().out
