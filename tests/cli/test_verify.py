"""`kvrag verify`: what it shows, and its exit codes."""

from __future__ import annotations

from pathlib import Path

from tests.verify.broken import ROPE_BREAKS, break_rope


def test_a_sound_model_is_0(kvrag, environment):
    result = kvrag("verify")
    assert result.code == 0, result.out
    assert "all checks passed" in result.out.splitlines()[-1]
    assert "FAILED" not in result.out
    for name in ("ratio 1", "one chunk", "mask", "position", "fidelity"):
        assert f" {name} " in result.out
    assert all(line.startswith("checking: ") for line in result.err.splitlines())
    assert not Path(environment["KVRAG_HOME"]).exists()


def test_a_failed_check_is_4(kvrag, monkeypatch):
    break_rope(monkeypatch, ROPE_BREAKS["not rotated"])
    result = kvrag("verify", "--short")
    assert result.code == 4
    assert "FAILED" in result.out
    assert "checks failed in" in result.out.splitlines()[-1]


def test_json(kvrag, environment, monkeypatch):
    result = kvrag("verify", "--short", "--json")
    assert result.code == 0
    content = result.json
    assert list(content) == [
        "model", "dtype", "codec", "strategy", "ratio", "passed", "short", "seconds", "checks",
    ]  # fmt: skip
    assert content["model"] == environment["KVRAG_MODEL"]
    assert content["passed"] is True
    assert content["short"] is True
    fields = {"name", "subject", "value", "bound", "passed", "sentence"}
    assert all(set(check) == fields for check in content["checks"])
    break_rope(monkeypatch, ROPE_BREAKS["rotated twice"])
    result = kvrag("verify", "--short", "--json")
    assert result.code == 4
    assert result.json["passed"] is False


def test_what_cannot_be_checked_is_2(kvrag):
    result = kvrag("--set", "context_length=200", "verify")
    assert result.code == 2
    assert "error: the context of 200 tokens leaves" in result.err.splitlines()[-1]
