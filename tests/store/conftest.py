from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="module", params=["redis-server", "valkey-server"])
def program(request) -> str:
    """What answers as a Redis: each that is installed."""
    found = shutil.which(request.param)
    if found is None:
        pytest.skip(f"{request.param} is not installed")
    return found


@pytest.fixture
def server(tmp_path, program):
    """As everywhere, of each kind."""
    from .redis_server import RedisServer

    with RedisServer(tmp_path / "redis", program=program) as server:
        yield server
