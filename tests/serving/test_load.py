"""Many clients at once: no request lost, and how long they took."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serving.harness import TLS, health, read_events

QUERY = "/v1/rag/query"


def _percentile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def _load(url: str, *, clients: int, requests: int, seconds: float) -> dict[str, float]:
    """`clients` send up to `requests` in at most `seconds`; counts and latencies."""
    deadline = time.monotonic() + seconds
    latencies: list[float] = []
    outcomes = {"sent": 0, "answered": 0, "refused": 0}
    expected: dict[int, list[int]] = {}

    def body(number: int) -> dict:
        kind = number % 10
        return {"question": f"Question {kind}?", "passages": [f"p{kind}"], "max_tokens": 2 + kind}

    def run(client_number: int) -> None:
        with httpx.Client(base_url=url, timeout=120, verify=TLS) as client:
            for number in range(client_number, requests, clients):
                if time.monotonic() > deadline:
                    return
                begun = time.monotonic()
                outcomes["sent"] += 1
                if number % 2:
                    with client.stream("POST", QUERY, json=body(number) | {"stream": True}) as r:
                        status = r.status_code
                        events = list(read_events(r.iter_lines()))
                    token_ids = events[-2][1]["token_ids"] if status == 200 else []
                else:
                    response = client.post(QUERY, json=body(number))
                    status = response.status_code
                    token_ids = response.json()["token_ids"] if status == 200 else []
                if status == 429:
                    outcomes["refused"] += 1
                    continue
                assert status == 200
                latencies.append(time.monotonic() - begun)
                assert token_ids == expected.setdefault(number % 10, token_ids)
                outcomes["answered"] += 1

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(run, number) for number in range(clients)]:
            future.result()
    report = outcomes | {
        "p50_s": round(_percentile(latencies, 0.5), 3),
        "p95_s": round(_percentile(latencies, 0.95), 3),
    }
    print(report)
    return report


def test_load_short(url):
    report = _load(url, clients=8, requests=40, seconds=60)
    assert report["answered"] == report["sent"] == 40
    assert health(url)["queue_depth"] == health(url)["running"] == 0


@pytest.mark.soak
def test_load_long(url):
    """At most SOAK_REQUESTS (2000) requests in at most SOAK_SECONDS (120)."""
    requests = int(os.environ.get("SOAK_REQUESTS", "2000"))
    seconds = float(os.environ.get("SOAK_SECONDS", "120"))
    report = _load(url, clients=16, requests=requests, seconds=seconds)
    assert report["answered"] + report["refused"] == report["sent"] > 0
    assert report["refused"] == 0
    assert health(url)["queue_depth"] == health(url)["running"] == 0
