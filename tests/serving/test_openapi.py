"""The OpenAPI document says what the server does."""

from __future__ import annotations

import pytest

from kvrag import __version__
from kvrag.serving.app import create_app
from kvrag.serving.schemas import QueryBody


@pytest.fixture
def api(engine) -> dict:
    return create_app(engine).openapi()


def test_routes(api):
    routes = {(method, path) for path, item in api["paths"].items() for method in item}
    assert routes == {
        ("post", "/v1/rag/query"),
        ("post", "/v1/rag/chat"),
        ("post", "/v1/rag/retrieve"),
        ("post", "/v1/documents"),
        ("get", "/v1/documents"),
        ("get", "/v1/documents/{id}"),
        ("delete", "/v1/documents/{id}"),
        ("get", "/health"),
    }
    assert api["info"]["version"] == __version__


def test_every_error_is_described_by_the_error_object(api):
    for path, item in api["paths"].items():
        for method, operation in item.items():
            responses = operation["responses"]
            if path.startswith("/v1"):
                assert {"500", "503"} <= set(responses), (method, path)
            for status, response in responses.items():
                if int(status) >= 400:
                    schema = response["content"]["application/json"]["schema"]
                    assert schema["$ref"].endswith("/ErrorBody"), (method, path, status)
    assert "HTTPValidationError" not in api["components"]["schemas"]


def test_a_question_may_be_answered_as_a_stream(api):
    content = api["paths"]["/v1/rag/query"]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}


def test_examples_are_valid(api):
    for example in api["components"]["schemas"]["QueryBody"]["examples"]:
        QueryBody.model_validate(example)


def test_alternatives_are_shown(api):
    fields = api["components"]["schemas"]["QueryBody"]["properties"]
    kinds = {option.get("type") for option in fields["stop"]["anyOf"]}
    assert kinds == {"string", "array", "null"}
