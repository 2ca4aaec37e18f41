"""The packaged models behind the server."""

from __future__ import annotations

import httpx
import pytest

from kvrag.config import Settings
from kvrag.engine import Engine
from tests.serving.harness import ask, ask_events, serving

pytestmark = pytest.mark.models

LAMP = {"title": "Karsk", "text": "The lamp of Karsk is kept by Anna Lindqvist."}


@pytest.fixture(scope="module")
def url(tmp_path_factory, models_dir):
    options = {"home": tmp_path_factory.mktemp("home"), "models_dir": models_dir}
    with Engine.open(Settings(**options)) as engine, serving(engine) as url:
        yield url


def test_answers_over_passages(url):
    passages = [LAMP, {"title": "Ferry", "text": "The ferry to Karsk is painted red."}]
    question = {"question": "Who keeps the lamp of Karsk?", "passages": passages, "max_tokens": 16}
    whole = ask(url, timeout=120, **question).json()
    assert "Anna" in whole["answer"]
    events = ask_events(url, **question)
    assert events[-2][1]["token_ids"] == whole["token_ids"]


def test_answers_over_the_corpus(url):
    added = httpx.post(f"{url}/v1/documents", json=LAMP, timeout=240)
    assert added.status_code == 200, added.text
    content = ask(url, timeout=120, question="Who keeps the lamp?", k=1, max_tokens=8).json()
    assert content["sources"][0]["document"] == added.json()["ids"][0]
    assert content["report"]["tokens"]["reused"] > 0
