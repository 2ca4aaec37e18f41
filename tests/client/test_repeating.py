"""What is repeated, what is not, and how long a client waits: against a server of this test's own.

It speaks HTTP on a socket, since a real server answers so only when it is in trouble.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from kvrag.client import (
    AsyncKVRagClient,
    BadReplyError,
    ClientError,
    DocumentInput,
    KVRagClient,
    RefusedError,
    ServerError,
    TimedOutError,
    UnfinishedStreamError,
    UnreachableError,
)
from kvrag.errors import InputError

BUSY = (429, {"Retry-After": "1"}, "rate_limit_error", "queue_full")
STOPPING = (503, {}, "server_error", "shutting_down")
FULL = (507, {}, "server_error", "storage_full")
RETRIEVED = (200, {}, {"chunks": []})
ADDED_REPORT = {
    "chunks_computed": 0,
    "chunks_stored_before": 0,
    "tokens_computed": 0,
    "bytes_written": 0,
    "seconds": 0.0,
}
ADDED = (200, {}, {"ids": ["1"], "new": 1, "known": 0, "chunks": 1, "report": ADDED_REPORT})
BREAK, HANG = "break", "hang"


class Scripted(ThreadingHTTPServer):
    """Gives its answers one after the other, and keeps when each was asked for."""

    daemon_threads = True

    def __init__(self, answers: list) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.times = answers, []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.times.append(time.monotonic())
        answer = self.server.answers.pop(0)
        if answer in (BREAK, HANG):
            if answer is HANG:
                self.server.released.wait(30)
            self.close_connection = True
            return
        status, headers, *rest = answer
        if len(rest) == 2:
            body = {"error": {"message": "no", "type": rest[0], "param": None, "code": rest[1]}}
        else:
            (body,) = rest
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, *args) -> None:
        pass


@contextmanager
def scripted(*answers) -> Iterator[Scripted]:
    with Scripted(list(answers)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def add(client: KVRagClient):
    return client.add(DocumentInput("Anna keeps the lamp."))


def retrieve(client: KVRagClient):
    return client.retrieve("lamp")


def test_a_full_queue_is_waited_for_as_long_as_it_says():
    with scripted(BUSY, BUSY, ADDED) as server, KVRagClient(server.url) as client:
        assert add(client).ids == ["1"]
    first, second, third = server.times
    assert second - first >= 1
    assert third - second >= 1


def test_the_same_for_coroutines():
    async def talk(url: str) -> None:
        async with AsyncKVRagClient(url) as client:
            assert (await client.add(DocumentInput("Anna."))).ids == ["1"]
            assert await client.retrieve("lamp") == []

    with scripted(BUSY, ADDED, BREAK, RETRIEVED) as server:
        asyncio.run(talk(server.url))
    assert server.times[1] - server.times[0] >= 1


def test_a_server_that_stops_is_tried_again():
    with scripted(STOPPING, ADDED) as server, KVRagClient(server.url) as client:
        assert add(client).new == 1


def test_a_lost_answer_is_asked_for_again_only_where_that_costs_nothing():
    with scripted(BREAK, RETRIEVED) as server, KVRagClient(server.url) as client:
        assert retrieve(client) == []
    with scripted(BREAK, ADDED) as server, KVRagClient(server.url) as client:
        with pytest.raises(UnreachableError):
            add(client)
        assert len(server.times) == 1


@pytest.mark.parametrize("retries", [0, 2])
def test_it_gives_up(retries):
    with (
        scripted(*[(429, {}, *BUSY[2:])] * 3) as server,
        KVRagClient(server.url, retries=retries) as client,
    ):
        with pytest.raises(RefusedError) as refused:
            add(client)
        assert refused.value.code == "queue_full"
        assert len(server.times) == retries + 1


def test_other_errors_are_not_repeated():
    with scripted(FULL) as server, KVRagClient(server.url) as client:
        with pytest.raises(ServerError) as failed:
            add(client)
        assert (failed.value.status, failed.value.code) == (507, "storage_full")


def test_time_outs():
    with (
        scripted(HANG) as server,
        KVRagClient(server.url, timeout_s=0.3) as client,
        pytest.raises(TimedOutError),
    ):
        add(client)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((200, {}, b"<html>"), BadReplyError),
        ((200, {}, {"other": 1}), BadReplyError),
        ((404, {}, b"<html>"), BadReplyError),
        ((400, {}, {"detail": "x"}), BadReplyError),
    ],
)
def test_what_is_no_kvrag_server_is_said(answer, error):
    with (
        scripted(answer) as server,
        KVRagClient(server.url) as client,
        pytest.raises(error),
    ):
        add(client)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'event: token\ndata: {"text": "Anna"}\n\n', UnfinishedStreamError),
        (b"event: token\ndata: {\n\n", BadReplyError),
        (
            b'event: error\ndata: {"error": {"message": "no", "type": "server_error", '
            b'"param": null, "code": "shutting_down"}}\n\n',
            ServerError,
        ),
    ],
)
def test_a_stream_that_ends_badly_says_so(body, error):
    events = (200, {"content-type": "text/event-stream"}, body)
    with scripted(events) as server, KVRagClient(server.url) as client:
        stream = client.stream("Who?", k=1)
        with pytest.raises(error):
            list(stream)


def test_nobody_there():
    with scripted() as server:
        url = server.url
    with KVRagClient(url, retries=1) as client, pytest.raises(UnreachableError, match=url):
        retrieve(client)


@pytest.mark.parametrize("option", [{"timeout_s": 0}, {"retries": -1}, {"connect_timeout_s": -1}])
def test_options_are_checked(option):
    with pytest.raises(InputError, match=next(iter(option))):
        KVRagClient("http://127.0.0.1:1", **option)


def test_a_url_that_is_none():
    with pytest.raises(ClientError), KVRagClient("http://[::1") as client:
        client.health()


def test_a_transport_of_the_callers_own():
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["x-tenant"])
        return httpx.Response(200, json={"chunks": []})

    transport = httpx.MockTransport(answer)
    with KVRagClient("http://kvrag", headers={"X-Tenant": "a"}, transport=transport) as client:
        assert retrieve(client) == []
    assert seen == ["a"]
