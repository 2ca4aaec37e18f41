"""`kvrag serve` as a process: its folder of blocks is removed, damaged, used for a long time."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serving.harness import TLS, Raw, ask, health, wait_until
from tests.serving.test_run import kvrag_serve
from tests.store.load import damage

QUERY = "/v1/rag/query"
SMALL = {"KVRAG_RAM_BYTES": str(2**17), "KVRAG_DISK_BYTES": str(2**19)}


def question(number: int) -> dict:
    passages = [f"Passage {number} of no account.", "The ferry leaves at night."]
    return {"question": f"Question {number}?", "passages": passages, "max_tokens": 3}


@pytest.mark.parametrize("removed", ["kv", "."])
def test_a_folder_removed_under_a_running_server(tmp_path, model_folder, removed):
    with kvrag_serve(tmp_path, model_folder) as (_, url):
        first = ask(url, **question(1)).json()
        shutil.rmtree(tmp_path / "home" / removed)
        for number in (1, 2, 1):
            response = ask(url, **question(number))
            assert response.status_code == 200
            if number == 1:
                assert response.json()["token_ids"] == first["token_ids"]
        assert list((tmp_path / "home" / "kv" / "blocks").rglob("*.kv"))


def _measure(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (resident,) = (line for line in status if line.startswith("VmRSS"))
    (threads,) = (line for line in status if line.startswith("Threads"))
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(threads.split()[1]),
        "resident_kb": int(resident.split()[1]),
    }


def _client(
    url: str, home: Path, seed: str, end: float, pause_s: float, expected: dict[int, list[int]]
) -> int:
    """Random requests until `end`: known, new, streamed and dropped ones, and damaged files."""
    rng, answered = random.Random(seed), 0
    with httpx.Client(base_url=url, timeout=120, verify=TLS) as client:
        while time.monotonic() < end:
            known = rng.random() < 0.5
            number = rng.randrange(8) if known else rng.randrange(8, 10**6)
            act = rng.random()
            if act < 0.1:
                dropped = Raw.post(url, QUERY, question(number) | {"stream": True})
                dropped.drop()
            elif act < 0.2:
                found = list((home / "kv" / "blocks").rglob("*.kv"))
                if found:
                    damage(rng.choice(found), rng)
            else:
                response = client.post(QUERY, json=question(number))
                assert response.status_code == 200, response.text
                token_ids = response.json()["token_ids"]
                if known:
                    assert token_ids == expected.setdefault(number, token_ids)
                answered += 1
            time.sleep(pause_s)
    return answered


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell")
@pytest.mark.parametrize(
    ("seconds", "pause_s"),
    [
        (45, 0.2),  # other tests run beside it
        pytest.param(300, 0.01, marks=pytest.mark.soak),
    ],
)
def test_memory_and_descriptors_stay_flat(tmp_path, model_folder, monkeypatch, seconds, pause_s):
    """Blocks are evicted, damaged and computed again all the time; answers stay as they were."""
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    home = tmp_path / "home"
    expected: dict[int, list[int]] = {}
    phases = []
    log = tmp_path / "log"  # no pipe, which is full after some damage
    with (
        log.open("w") as errors,
        kvrag_serve(tmp_path, model_folder, errors=errors) as (process, url),
        ThreadPoolExecutor(4) as pool,
    ):
        for phase in range(9):
            end = time.monotonic() + seconds / 9
            work = [
                pool.submit(_client, url, home, f"{phase} {index}", end, pause_s, expected)
                for index in range(4)
            ]
            answered = sum(future.result() for future in work)
            assert answered
            wait_until(lambda: _idle(url), "all requests end", 60)
            # Connections that were dropped are closed a moment later.
            wait_until(
                lambda: not phases or _measure(process.pid)["descriptors"] <= _most(phases),
                f"descriptors fall back to {phases}",
                60,
            )
            phases.append(_measure(process.pid) | {"answered": answered})
        process.terminate()
        assert process.wait(60) == 0
    assert "is damaged" in log.read_text()
    assert "Traceback" not in log.read_text()
    print(json.dumps(phases))
    early, late = phases[2], phases[-1]
    assert late["threads"] <= max(phase["threads"] for phase in phases[:3])
    assert late["resident_kb"] < early["resident_kb"] + 16 * 1024, phases


def _idle(url: str) -> bool:
    facts = health(url)
    return facts["running"] == facts["queue_depth"] == 0


def _most(phases: list[dict[str, int]]) -> int:
    return max(phase["descriptors"] for phase in phases[:3])
