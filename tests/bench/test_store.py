"""`kvrag bench store` against a real redis-server."""

from __future__ import annotations

import json

import pytest

from kvrag.bench import store
from kvrag.config import Settings
from kvrag.errors import InputError


@pytest.mark.redis
def test_the_redis_section(tmp_path, capsys):
    from tests.store.redis_server import RedisServer

    with RedisServer(tmp_path) as server:
        options = store.StoreOptions(layers=11, layer_nbytes=4096, blocks=2, repetitions=3)
        result = store.run(Settings(redis_url=f"redis://:@127.0.0.1:{server.port}"), options)
        with server.client() as client:
            assert client.dbsize() == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["redis"] == result["redis"]
    redis = result["redis"]
    assert redis["of_bare"]["bare"] == 1
    assert redis["of_bare"]["tier"] == pytest.approx(
        redis["ms"]["bare"] / redis["ms"]["tier"], 0.01
    )


def test_groups_are_those_of_a_stream():
    assert list(store._groups(30)) == [(0, 1), (1, 3), (3, 7), (7, 15), (15, 23), (23, 30)]


@pytest.mark.parametrize("url", [None, "redis+cluster://host", "redis+sentinel://:s3cret@host/a"])
def test_what_cannot_be_measured_is_told(url):
    with pytest.raises(InputError, match="redis") as caught:
        store.run(Settings(redis_url=url), store.StoreOptions())
    assert "s3cret" not in str(caught.value)
