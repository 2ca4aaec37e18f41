"""A server checks blending before it accepts requests; if that fails, all is full prefill."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from kvrag.blending import Blending
from kvrag.fusion import create, strategy_names
from kvrag.serving.schemas import AnswerBody, Health
from kvrag.verify.check import Check
from tests.serving.harness import ask, ask_events, health, serving

PASSAGES = ["Anna keeps the lamp of Karsk.", "The ferry is red.", "It leaves at nine."]
REASON = "position, reuse: K stands elsewhere"
REFUSED = Blending(
    allowed=False,
    reason=REASON,
    checks=(Check.of("position", "reuse", 1.5, 0.01, "K stands elsewhere"),),
)


@pytest.fixture
def refusing(engine):
    """A server whose engine was told not to blend."""
    engine.blending = REFUSED
    with serving(engine) as url:
        yield url


# ---- what a refusal does -------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [None, *strategy_names()])
def test_what_would_blend_is_computed_in_full(refusing, engine, strategy):
    default = engine.default_strategy.name
    content = ask(refusing, question="Who?", passages=PASSAGES, strategy=strategy, max_tokens=4)
    answer = AnswerBody.model_validate(content.json())
    assert answer.report.strategy == "full"
    assert answer.report.tokens.reused == 0
    assert {source.tier for source in answer.sources} == {"none"}
    full = ask(refusing, question="Who?", passages=PASSAGES, strategy="full", max_tokens=4).json()
    assert answer.token_ids == full["token_ids"]
    if strategy is None or create(strategy).uses_blocks:
        (warning,) = answer.report.warnings
        assert warning.startswith(f"full prefill instead of {strategy or default}: ")
        assert REASON in warning
    else:
        assert answer.report.warnings == []


def test_streams_say_it_too(refusing):
    events = ask_events(refusing, question="Who?", passages=PASSAGES, max_tokens=4)
    report = next(data for name, data in events if name == "report")["report"]
    assert report["strategy"] == "full"
    assert REASON in report["warnings"][0]


def test_health_says_it_and_stays_ok(refusing):
    content = health(refusing)
    Health.model_validate(content)
    assert content["status"] == "ok"
    assert content["blending"] == {
        "allowed": False,
        "reason": REASON,
        "checks": [
            {
                "name": "position",
                "subject": "reuse",
                "value": 1.5,
                "bound": 0.01,
                "passed": False,
                "sentence": "K stands elsewhere",
            }
        ],
    }


def test_the_corpus_is_computed_and_asked_all_the_same(refusing):
    added = httpx.post(f"{refusing}/v1/documents", json={"text": PASSAGES[0]}).json()
    assert added["report"]["chunks_computed"] == 1
    report = ask(refusing, question="Who?", k=1, max_tokens=2).json()["report"]
    assert report["strategy"] == "full"
    assert REASON in report["warnings"][0]


def test_bad_input_is_refused_as_ever(refusing):
    response = ask(refusing, question="Who?", passages=PASSAGES, strategy="nope")
    assert response.json()["error"]["code"] == "unknown_strategy"


def test_scores_and_prefills_are_of_full_prefill(engine):
    options = {"question": "Who?", "passages": PASSAGES}
    full = engine.logprobs(**options, continuation="Anna", strategy="full")
    engine.blending = REFUSED
    refused = engine.logprobs(**options, continuation="Anna", strategy="reuse")
    assert refused.equal(full)
    prefilled = engine.prefill(**options, strategy="reuse", new_tokens=1)
    assert REASON in prefilled.warnings[0]


# ---- what a process does at its start ------------------------------------------------------------

SERVE = "import sys; from kvrag.cli.main import run; sys.exit(run(['serve', '--port', '0']))"
BROKEN = (
    "import pytest\n"
    "from tests.verify.broken import ROPE_BREAKS, break_rope\n"
    "break_rope(pytest.MonkeyPatch(), ROPE_BREAKS['not rotated'])\n"
)
SLOW = (
    "import time\n"
    "from kvrag.verify import gate\n"
    "def check_nothing(engine, *_):\n"
    "    print('checking in', engine.settings.home, flush=True)\n"
    "    time.sleep(60)\n"
    "    yield\n"
    "gate.check_ratio_one = check_nothing\n"
)


@contextmanager
def process(tmp_path, model_folder, code=SERVE, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ
        | {
            "KVRAG_MODEL": str(model_folder),
            "KVRAG_HOME": str(tmp_path / "home"),
            "KVRAG_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.communicate()


def test_a_sound_server_says_so(tmp_path, model_folder):
    with process(tmp_path, model_folder) as (server, url):
        blending = health(url)["blending"]
        assert blending["allowed"] is True
        assert blending["reason"] is None
        assert all(check["passed"] for check in blending["checks"])
        assert {"ratio 1", "position"} <= {check["name"] for check in blending["checks"]}
        assert ask(url, question="Who?", passages=PASSAGES).json()["report"]["warnings"] == []
        server.terminate()
        output, errors = server.communicate(timeout=20)
    assert output == ""
    first, second = errors.splitlines()
    assert first == "info: checking blending …"
    assert re.fullmatch(r"info: blending is allowed: \d+ checks in \d+\.\d s", second)


def test_a_server_with_broken_rope_answers_by_full_prefill(tmp_path, model_folder):
    with process(tmp_path, model_folder, BROKEN + SERVE) as (server, url):
        blending = health(url)["blending"]
        assert blending["allowed"] is False
        assert "position, reuse" in blending["reason"]
        assert not all(check["passed"] for check in blending["checks"])
        report = ask(url, question="Who?", passages=PASSAGES, max_tokens=2).json()["report"]
        assert report["strategy"] == "full"
        assert "position, reuse" in report["warnings"][0]
        server.terminate()
        _, errors = server.communicate(timeout=20)
    first, line = errors.splitlines()
    assert first == "info: checking blending …"
    assert line.startswith("error: full prefill instead of blending")
    assert " s)" in line, "how long it took"
    assert "position, reuse" in line


def test_the_check_can_be_left_out(tmp_path, model_folder):
    with process(tmp_path, model_folder, KVRAG_VERIFY_ON_START="false") as (server, url):
        assert health(url)["blending"] == {
            "allowed": True,
            "reason": "not checked: the setting verify_on_start is off",
            "checks": [],
        }
        server.terminate()
        assert server.communicate(timeout=20) == ("", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_ends_the_check_and_leaves_nothing(tmp_path, model_folder, number):
    """The exit code is 0 under either: a process manager that stops a server saw no failure."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with process(tmp_path, model_folder, SLOW + SERVE, TMPDIR=str(temporary)) as (server, home):
        assert [str(path) for path in temporary.iterdir()] == [home]
        server.send_signal(number)
        assert server.wait(20) == 0
        assert list(temporary.iterdir()) == []
