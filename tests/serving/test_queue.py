"""One after the other in order of arrival, none wrong, none lost; 429; clients that leave."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from kvrag.blocks import ChunkBlocks
from kvrag.errors import BusyError, ClosedError
from kvrag.serving.queue import JobCancelledError, ModelQueue
from tests.serving.harness import (
    Raw,
    ask,
    ask_events,
    busy,
    flood,
    health,
    serving,
    wait_until,
)

QUERY = "/v1/rag/query"


def _mixed(number: int) -> dict:
    body = {
        "question": f"Question {number}?",
        "passages": [f"Passage {number % 7} tells of lamps.", f"Passage {number % 5} of ferries."],
        "max_tokens": 3 + number % 9,
        "strategy": ("cacheblend", "full", "reuse")[number % 3],
    }
    if number % 4 == 1:
        body |= {"temperature": 1.0, "seed": number}
    return body | {"stream": number % 2 == 0}


def _answer(url: str, body: dict) -> tuple[str, list[int]]:
    if body["stream"]:
        events = ask_events(url, **body)
        assert events[-1] == ("message", "[DONE]")
        content = events[-2][1]
        assert "".join(d["text"] for n, d in events if n == "token") == content["answer"]
    else:
        content = ask(url, **body).json()
    return content["answer"], content["token_ids"]


def test_thirty_requests_at_once_are_answered_in_order_and_as_alone(url, engine):
    bodies = [_mixed(number) for number in range(30)]
    alone = [_answer(url, body) for body in bodies]
    engine.asked.clear()
    with ThreadPoolExecutor(30) as pool:
        with busy(url):
            waiting = []
            for number, body in enumerate(bodies, start=1):
                waiting.append(pool.submit(_answer, url, body))
                wait_until(lambda n=number: health(url)["queue_depth"] == n, f"{number} wait")
        together = [future.result() for future in waiting]
    assert together == alone
    assert engine.asked == ["busy", *(body["question"] for body in bodies)]


def test_requests_that_miss_the_same_chunk_at_once_compute_it_once(url, monkeypatch):
    """One runs at a time, so the next one finds what the first has stored."""
    compute, computed = ChunkBlocks.compute, []

    def counted(self, token_ids):
        computed.append(tuple(token_ids))
        return compute(self, token_ids)

    body = {"question": "Who?", "passages": ["Anna lit it.", "Olaf put it out."], "max_tokens": 2}
    orders = [body, body | {"passages": body["passages"][::-1]}] * 2
    ask(url, question="busy", passages=["x"], max_tokens=1)  # stored: `busy` computes none below
    with ThreadPoolExecutor(4) as pool, busy(url):
        monkeypatch.setattr(ChunkBlocks, "compute", counted)
        answers = [pool.submit(ask, url, strategy="reuse", **order) for order in orders]
        wait_until(lambda: health(url)["queue_depth"] == 4, "all wait")
    sources = [answer.result().json()["sources"] for answer in answers]
    assert len(computed) == len(set(computed))
    tiers = [source["tier"] for each in sources for source in each]
    assert tiers.count("computed") == len(computed) < len(tiers)
    assert set(tiers) == {"computed", "ram"}


def test_thirty_requests_without_any_order_are_all_answered(url):
    bodies = [_mixed(number) for number in range(30)]
    alone = [_answer(url, body) for body in bodies]

    async def one(client: httpx.AsyncClient, body: dict) -> list[int]:
        response = await client.post(f"{url}{QUERY}", json=body | {"stream": False}, timeout=60)
        return response.json()["token_ids"]

    async def together() -> list[list[int]]:
        async with httpx.AsyncClient() as client:
            return await asyncio.gather(*(one(client, body) for body in bodies))

    assert asyncio.run(together()) == [token_ids for _, token_ids in alone]


def test_one_more_than_may_wait_is_429(make_engine):
    body = {"question": "Who?", "passages": ["x"], "max_tokens": 1}
    with serving(make_engine(queue_size=2)) as url, ThreadPoolExecutor(2) as pool:
        with busy(url):
            waiting = [pool.submit(ask, url, **body) for _ in range(2)]
            wait_until(lambda: health(url)["queue_depth"] == 2, "two wait")
            for path, content in (
                (QUERY, body),
                (QUERY, body | {"stream": True}),
                ("/v1/documents", {"text": "x"}),
            ):
                refused = httpx.post(f"{url}{path}", json=content)
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["type"] == "rate_limit_error"
            assert health(url)["queue_depth"] == 2
        assert [future.result().status_code for future in waiting] == [200, 200]


LONG = {"question": "long", "passages": ["x"], "max_tokens": 30000}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_running_request(url, engine, stream):
    request = Raw.post(url, QUERY, LONG | {"stream": stream})
    wait_until(lambda: health(url)["running"] == 1, "it runs")
    if stream:
        assert b"event: sources" in _read_until(request, b"event: token")
    request.drop()
    wait_until(lambda: health(url)["running"] == 0, "it ended")
    assert engine.streams[-1].answer.finish_reason == "cancelled"
    assert ask(url, question="Who?", passages=["x"], max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_line_is_never_asked_for(url, engine, stream):
    with ThreadPoolExecutor(1) as pool:
        with busy(url):
            leaving = Raw.post(url, QUERY, LONG | {"stream": stream})
            wait_until(lambda: health(url)["queue_depth"] == 1, "it waits")
            staying = pool.submit(ask, url, question="staying", passages=["x"], max_tokens=1)
            wait_until(lambda: health(url)["queue_depth"] == 2, "both wait")
            leaving.drop()
            wait_until(lambda: health(url)["queue_depth"] == 1, "one left")
        assert staying.result().status_code == 200
    assert engine.asked == ["busy", "staying"]


def test_a_reader_that_does_not_read_holds_nobody_up(engine):
    """Neither those behind it, nor the end of the server."""
    engine.pieces = flood
    with serving(engine) as url:
        slow = Raw.post(url, QUERY, LONG | {"max_tokens": 20, "stream": True})
        _read_until(slow, b"event: token")
        engine.pieces = None
        assert ask(url, question="Who?", passages=["x"], max_tokens=1).status_code == 200
    slow.drop()


def _read_until(request: Raw, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        piece = request.read_first()
        assert piece, "the connection was closed"
        received += piece
    return received


# ---- the queue alone -----------------------------------------------------------------------------


def test_jobs_give_items_results_and_errors():
    def work(job):
        job.emit(1)
        job.emit(2)
        return "done"

    def fail(job):
        raise ValueError("no")

    async def scenario():
        queue = ModelQueue(4)
        job = queue.submit(work)
        assert [item async for item in job] == [1, 2]
        assert await job.result() == "done"
        assert await job.result() == "done"
        assert await queue.submit(work).result() == "done"
        with pytest.raises(ValueError, match="no"):
            await queue.submit(fail).result()
        assert queue.close(10)

    asyncio.run(scenario())


def test_a_full_queue_refuses_and_a_cancelled_job_makes_room():
    release = threading.Event()

    async def scenario():
        queue = ModelQueue(1)
        first = queue.submit(lambda job: release.wait(10))
        second = queue.submit(lambda job: "second")
        with pytest.raises(BusyError):
            queue.submit(lambda job: None)
        second.cancel()
        second.cancel()
        with pytest.raises(JobCancelledError):
            await second.result()
        third = queue.submit(lambda job: "third")
        release.set()
        assert await first.result()
        assert await third.result() == "third"
        assert queue.close(10)

    asyncio.run(scenario())


def test_stopping_ends_every_job_at_once_and_takes_no_more():
    ran = []

    def stubborn(job):
        while not job.cancelled():
            pass
        ran.append("stubborn")

    async def scenario():
        queue = ModelQueue(4)
        assert queue.close()
        queue = ModelQueue(4)
        jobs = [queue.submit(stubborn), queue.submit(lambda job: ran.append("never"))]
        await asyncio.sleep(0.05)
        queue.stop()
        for job in jobs:
            with pytest.raises(ClosedError):
                await job.result()
        with pytest.raises(ClosedError):
            queue.submit(stubborn)
        assert queue.close(10)
        assert queue.close(10)

    asyncio.run(scenario())
    assert ran == ["stubborn"]


def test_a_job_whose_event_loop_is_gone_harms_nobody():
    release = threading.Event()
    queue = ModelQueue(1)

    async def leave():
        queue.submit(lambda job: (release.wait(10), job.emit(1)))

    asyncio.run(leave())
    release.set()

    async def stay():
        assert await queue.submit(lambda job: 1).result() == 1

    asyncio.run(stay())
    assert queue.close(10)
