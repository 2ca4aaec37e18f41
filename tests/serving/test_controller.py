"""What the controller decided and measured, as clients see it."""

from __future__ import annotations

import pytest

from kvrag.serving.schemas import AnswerBody, Health
from tests.serving.harness import ask, health

PASSAGES = [f"The lamp of Karsk was lit in the year {year}." for year in range(1800, 1806)]


def test_reports_foresee_and_health_shows_how_well(url):
    before = health(url)["controller"]["forecasts"]
    contents = [
        ask(url, question="When?", passages=PASSAGES, strategy="cacheblend", max_tokens=1).json()
        for _ in range(4)
    ]
    for content in contents:
        AnswerBody.model_validate(content)
    control = contents[-1]["report"]["control"]
    assert (control["ratio"], control["reason"]) == (0.15, "quality")
    ttft_s = contents[-1]["report"]["ttft_s"]
    assert control["error"] == pytest.approx(abs(control["predicted_ttft_s"] - ttft_s) / ttft_s)
    assert control["predicted_stall_s"] >= 0
    content = health(url)
    Health.model_validate(content)
    measured = content["controller"]
    assert measured["forecasts"] >= before + 2
    assert measured["ttft_error"] >= 0
    assert measured["tiers"]["ram"]["bytes_per_s"] > 0
    assert measured["full_flops_per_s"] > 0
    assert measured["blend_flops_per_s"] > 0
    ram, disk = content["tiers"]
    assert (ram["name"], disk["name"]) == ("ram", "disk")
    assert ram["hits"] > 0
    assert sum(disk["write_latency"]["counts"]) > 0
    assert (ram["listed_s"], disk["listed_s"] > 0) == (0, True)
    assert content["owed_deletions"] == 0


@pytest.mark.parametrize("options", [{"ratio": 0.4}, {"strategy": "reuse"}, {"strategy": "full"}])
def test_what_a_request_fixes(url, options):
    content = ask(url, question="When?", passages=PASSAGES, max_tokens=1, **options).json()
    assert content["report"]["control"]["reason"] == "fixed"
