"""What is refused, and how it is said: always the error object, never a stack trace."""

from __future__ import annotations

import json
import string

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrag.serving.schemas import ErrorBody
from tests.serving.harness import serving

QUERY, DOCUMENTS = "/v1/rag/query", "/v1/documents"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(tmp_path_factory, model_folder):
    from kvrag.config import Settings
    from kvrag.engine import Engine

    home = tmp_path_factory.mktemp("home")
    with (
        Engine.open(Settings(model=str(model_folder), home=home, threads=1)) as engine,
        serving(engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def refused(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert "Traceback" not in response.text
    ErrorBody.model_validate(response.json())
    error = response.json()["error"]
    assert error["message"]
    return error


OK = {"question": "Who?", "passages": ["x"], "max_tokens": 1}
QUERY_REFUSALS = [
    # changes to a good body, status, param
    ({"question": ""}, 422, "question"),
    ({"question": " \n"}, 422, "question"),
    ({"question": 3}, 422, "question"),
    ({"question": None}, 422, "question"),
    ({"question": "\ud800"}, 422, "question"),
    ({"strategy": "\ud800"}, 422, "strategy"),
    ({"stop": "\ud800"}, 422, "stop.0"),
    ({"passages": ["\ud800"]}, 422, "passages.0.text"),
    ({"colour": "red"}, 422, "colour"),
    ({"\ud800": 1}, 422, "\\ud800"),
    ({"strategy": "nonsense"}, 400, "strategy"),
    ({"strategy": "epic:"}, 400, "strategy"),
    ({"strategy": "epic:tokens=2,tokens=4"}, 400, "strategy"),
    ({"strategy": "cacheblend:deviation=q"}, 400, "strategy"),
    ({"strategy": "fast:ratio=7"}, 400, "strategy"),
    ({"strategy": "fast:ratio=7", "ratio": 0.5}, 400, "strategy"),
    ({"strategy": 1}, 422, "strategy"),
    ({"passages": None, "k": 0}, 422, "k"),
    ({"passages": None, "k": -1}, 422, "k"),
    ({"passages": None, "k": 10**30}, 422, "k"),
    ({"passages": None, "k": "3"}, 422, "k"),
    ({"passages": None, "k": 1.5}, 422, "k"),
    ({"passages": None, "k": True}, 422, "k"),
    ({"k": 2}, 422, "k"),
    ({"passages": None}, 400, "passages"),
    ({"passages": None, "search": "words"}, 422, "search"),
    ({"passages": None, "where": {}}, 422, "where"),
    ({"passages": None, "where": {"a": {"like": 1}}}, 422, "where"),
    ({"passages": None, "where": [1]}, 422, "where"),
    ({"passages": None, "mmr": 2}, 422, "mmr"),
    ({"passages": None, "mmr": True}, 422, "mmr"),
    ({"passages": None, "distinct": 1.5}, 422, "distinct"),
    ({"distinct": 0.5}, 422, "distinct"),
    ({"passages": None, "rerank": "bert"}, 422, "rerank"),
    ({"rerank": "cross_encoder"}, 422, "rerank"),
    ({"search": "dense"}, 422, "search"),
    ({"where": {"a": 1}}, 422, "where"),
    ({"passages": []}, 422, "passages"),
    ({"passages": "x"}, 422, "passages"),
    ({"passages": ["x", 3]}, 422, "passages.1"),
    ({"passages": ["x", " "]}, 422, "passages.1.text"),
    ({"passages": [{"title": "t"}]}, 422, "passages.0.text"),
    ({"passages": [{"text": 3}]}, 422, "passages.0.text"),
    ({"passages": [{"text": "x", "titel": "t"}]}, 422, "passages.0.titel"),
    ({"passages": ["lamp " * 9000]}, 400, None),
    ({"ratio": 1.5}, 422, "ratio"),
    ({"ratio": "1"}, 422, "ratio"),
    ({"ratio": 1.5, "strategy": "epic:tokens=4"}, 422, "ratio"),
    ({"max_tokens": 0}, 422, "max_tokens"),
    ({"max_tokens": 10**30}, 400, None),
    ({"temperature": -1}, 422, "temperature"),
    ({"temperature": 10**400}, 422, "temperature"),
    ({"top_p": 0}, 422, "top_p"),
    ({"top_k": -1}, 422, "top_k"),
    ({"seed": -1}, 422, "seed"),
    ({"seed": 2**63}, 422, "seed"),
    ({"stop": ""}, 422, "stop.0"),
    ({"stop": ["a", ""]}, 422, "stop.1"),
    ({"stop": [3]}, 422, "stop.0"),
    ({"stop": ["a"] * 1000}, 422, "stop"),
    ({"stream": "yes"}, 422, "stream"),
    ({"stream": None}, 422, "stream"),
]


@pytest.mark.parametrize(("change", "status", "param"), QUERY_REFUSALS, ids=str)
def test_bad_questions(client, change, status, param):
    body = json.dumps(OK | change)
    error = refused(client.post(QUERY, content=body, headers=JSON), status)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


DOCUMENT_REFUSALS = [
    ({}, 422, "text"),
    ({"text": ""}, 422, "text"),
    ({"text": 3}, 422, "text"),
    ({"text": "x", "titel": "t"}, 422, "titel"),
    ({"text": "x", "metadata": []}, 422, "metadata"),
    ({"text": "x", "metadata": {"a": float("nan")}}, 400, None),
    ({"text": "x", "metadata": {"a": "\ud800"}}, 400, None),
    ({"text": "x\ud800"}, 422, "text"),
    ({"documents": []}, 422, "documents"),
    ({"documents": {}}, 422, "documents"),
    ({"documents": [3]}, 422, "documents.0"),
    ({"documents": [{"text": "x"}, {"text": " "}]}, 422, "documents.1.text"),
    ({"documents": [{"text": "x", "more": 1}]}, 422, "documents.0.more"),
    ({"documents": [{"text": "x"}], "text": "x"}, 422, "text"),
    ({"documents": [{"text": "x", "metadata": {"a": float("inf")}}]}, 400, "documents.0"),
]


@pytest.mark.parametrize(("body", "status", "param"), DOCUMENT_REFUSALS, ids=str)
def test_bad_documents(client, body, status, param):
    error = refused(client.post(DOCUMENTS, content=json.dumps(body), headers=JSON), status)
    assert error["param"] == param
    assert client.get(DOCUMENTS).json()["documents"] == []


BODIES = [
    (b"", 422),
    (b"{", 400),
    (b"nonsense", 400),
    (b"\xff\xfe", 400),
    (b'{"question": "\xff"}', 400),
    (b"[]", 422),
    (b"3", 422),
    (b'"text"', 422),
    (b"null", 422),
    (b'{"k": ' + b"9" * 10000 + b"}", 400),
    (b"[" * 100_000, 400),
    (b'{"a":' * 100_000, 400),
    (b"[" + b"[]," * 100_000 + b"[]]", 422),
]


@pytest.mark.parametrize("path", [QUERY, DOCUMENTS])
@pytest.mark.parametrize(("body", "status"), BODIES, ids=lambda value: str(value)[:20])
def test_bodies_that_are_no_json_object(client, path, body, status):
    refused(client.post(path, content=body, headers=JSON), status)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_json_must_be_declared(client, content_type):
    response = client.post(
        QUERY,
        content=json.dumps(OK),
        headers={"content-type": content_type} if content_type else {},
    )
    assert "application/json" in refused(response, 422)["message"]


def test_a_body_that_is_too_large(client):
    error = refused(client.post(QUERY, json=OK | {"question": "x" * 2**24}), 413)
    assert error["code"] == "too_large"

    def pieces():
        for _ in range(64):
            yield b" " * 2**20

    refused(client.post(QUERY, content=pieces(), headers=JSON), 413)
    assert client.post(QUERY, json=OK).status_code == 200


def test_a_body_just_below_the_bound_is_read(client):
    content = json.dumps(OK).encode()
    content += b" " * (16 * 2**20 - len(content))
    assert client.post(QUERY, content=content, headers=JSON).status_code == 200
    refused(client.post(QUERY, content=content + b" ", headers=JSON), 413)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({f"field{i}": 0 for i in range(500_000)}),
        json.dumps({"question": "x", "passages": [0] * 3_000_000}),
        json.dumps({"documents": [0] * 3_000_000}),
        json.dumps({"question": "x", "stop": [""] * 3_000_000}),
    ],
    ids=["fields", "passages", "documents", "stops"],
)
def test_many_errors_in_one_body_cost_little(client, body):
    """Regression: every unknown field was a complaint of its own, a gigabyte for 16 MiB of body."""
    path = DOCUMENTS if "documents" in body else QUERY
    response = client.post(path, content=body, headers=JSON)
    assert len(refused(response, 422)["message"]) < 1000
    assert response.elapsed.total_seconds() < 60


def test_metadata_nested_too_deep(client):
    deep: dict = {}
    for _ in range(100):
        deep = {"a": deep}
    error = refused(client.post(DOCUMENTS, json={"text": "x", "metadata": deep}), 422)
    assert error["param"] == "metadata"
    assert client.get(DOCUMENTS).status_code == 200


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 10**6}, "limit"),
        ({"offset": -1}, "offset"),
        ({"offset": 2**70}, "offset"),
        ({"limit": "x"}, "limit"),
        ({"page": 1}, "page"),
    ],
)
def test_bad_pages(client, params, param):
    assert refused(client.get(DOCUMENTS, params=params), 422)["param"] == param


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/documents/", "/v1/rag/query/x", "/nonsense"])
def test_unknown_routes(client, path):
    assert refused(client.get(path), 404)["code"] == "unknown_route"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", QUERY, "POST"),
        ("PUT", DOCUMENTS, "POST"),
        ("POST", "/health", "GET"),
        ("PATCH", "/v1/documents/x", "GET"),
    ],
)
def test_wrong_methods(client, method, path, allowed):
    response = client.request(method, path)
    assert refused(response, 405)["code"] == "unknown_method"
    assert allowed in response.headers["allow"]


@pytest.mark.parametrize(
    "host",
    [
        "example.org",
        "example.org:{port}",
        "localhost.example.org",
        "127.0.0.1.example.org:{port}",
        "192.168.1.7",
        "0.0.0.0",
        "[::]",
        "[::1",
        "::1",
        "[127.0.0.1]",
        "[localhost]",
        "localhost:x",
        "user@localhost",
        "",
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("POST", QUERY), ("GET", "/docs"), ("GET", "/x")]
)
def test_foreign_hosts(client, host, method, path):
    """A page may give its own name our address (DNS rebinding); its name is then the host."""
    host = host.format(port=client.base_url.port)
    response = client.request(method, path, headers=JSON | {"host": host})
    error = refused(response, 400)
    assert (error["code"], error["type"]) == ("foreign_host", "invalid_request_error")
    assert repr(host) in error["message"]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost", "[::1]", "127.0.0.2"])
@pytest.mark.parametrize("port", ["", ":{port}", ":1"])
def test_hosts_of_this_machine(client, name, port):
    host = name + port.format(port=client.base_url.port)
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("document_id", ["x", "0" * 32, "%00", "%ff", "'; DROP", "x" * 5000])
def test_absent_documents(client, document_id):
    for method in (client.get, client.delete):
        assert refused(method(f"/v1/documents/{document_id}"), 404)["param"] == "id"


# ---- hostile bodies ------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.text(alphabet=st.characters(categories=["Cs"]), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(string.printable, max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
QUERY_FIELDS = [
    "question",
    "passages",
    "k",
    "strategy",
    "ratio",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stream",
]
DOCUMENT_FIELDS = ["title", "text", "metadata", "source", "documents"]
LIGHT = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@LIGHT
@given(st.dictionaries(st.sampled_from(QUERY_FIELDS), JSON_VALUES, max_size=4), st.booleans())
def test_hostile_questions(client, body, complete):
    if complete:
        body = OK | body | {"max_tokens": 1}
    response = client.post(QUERY, content=json.dumps(body), headers=JSON)
    if response.status_code != 200:
        assert response.status_code in (400, 422)
        refused(response, response.status_code)


@LIGHT
@given(st.dictionaries(st.sampled_from(DOCUMENT_FIELDS), JSON_VALUES, max_size=4))
def test_hostile_documents(client, body):
    response = client.post(DOCUMENTS, content=json.dumps(body), headers=JSON)
    if response.status_code == 200:
        for document_id in response.json()["ids"]:
            assert client.get(f"{DOCUMENTS}/{document_id}").status_code == 200
            assert client.delete(f"{DOCUMENTS}/{document_id}").status_code == 200
    else:
        assert response.status_code in (400, 422)
        refused(response, response.status_code)


@LIGHT
@given(st.binary(max_size=200))
def test_hostile_bytes(client, body):
    response = client.post(QUERY, content=body, headers=JSON)
    assert response.status_code in (400, 422)
    refused(response, response.status_code)
