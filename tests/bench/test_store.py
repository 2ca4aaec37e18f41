"""`kvrag bench store` over real files, a real redis-server, and peers that are real processes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from kvrag.bench.peers import PeerOption
from kvrag.bench.store import StoreOptions, disk, peers, run
from kvrag.bench.store.disk import drop_pages
from kvrag.bench.store.options import Row, Section, Skipped, Target, check, make_blocks
from kvrag.bench.store.redis import _groups
from kvrag.bench.store.turns import in_turns, ratio
from kvrag.cli.main import run as kvrag
from kvrag.config import Settings

FAKE = Path(__file__).with_name("fake_store.py")


@pytest.fixture
def options(tmp_path):
    return StoreOptions(
        layers=11, layer_nbytes=16384, blocks=2, repetitions=2, tokens=16, folder=tmp_path
    )


@pytest.fixture
def no_redis(monkeypatch):
    """No section of Redis: what it needs is not found."""
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if "redis" in name else found(name))


def last_line(capsys):
    *_, last = capsys.readouterr().out.splitlines()
    return json.loads(last)


def test_memory_and_disk(options, no_redis, capsys, tmp_path):
    result = run(Settings(redis_url=None), options)
    assert last_line(capsys) | {"environment": 0} == result | {"environment": 0}
    memory = result["memory"]
    assert set(memory["ms"]) == set(memory["gb_s"]) == {"memcpy", "get"}
    assert min(memory["ms"]["get"], memory["of_memcpy"], memory["python_us"]) > 0
    assert result["targets"]["memory.python_us"]["at_most"] == 100
    assert "redis-server is not installed" in result["skipped"]["redis"]
    assert list(tmp_path.iterdir()) == []
    if "disk" in result["skipped"]:
        pytest.skip(result["skipped"]["disk"])
    found = result["disk"]
    own = {"direct", "get", "direct_4", "get_4", "get_cached", "write", "put", "write_fsync"}
    assert found["cached_of_read"] > 0
    assert own | {"read_cached", "put_fsync"} <= set(found["ms"]) == set(found["gb_s"])
    assert ("fio" in found["ms"]) == ("fio_skipped" not in found)
    assert result["targets"]["disk.of_direct"] == {
        "measured": found["of_direct"],
        "at_least": 0.8,
        "met": found["of_direct"] >= 0.8,
    }


def test_a_folder_in_memory_is_no_disk(options, no_redis):
    if not Path("/dev/shm").is_dir():
        pytest.skip("this machine has no /dev/shm")
    result = run(
        Settings(redis_url=None),
        StoreOptions(2, 16384, 1, 1, tokens=16, folder=Path("/dev/shm")),
    )
    assert "disk" not in result
    assert "/dev/shm" in result["skipped"]["disk"]
    assert "memory" in result


def test_pages_are_dropped_or_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(10_000))
    (tmp_path / "empty").write_bytes(b"")
    drop_pages(tmp_path / "folder" / "nothing")
    monkeypatch.setattr(disk, "cached_share", lambda *_: 0.25)
    with pytest.raises(Skipped, match=f"{tmp_path}.*cannot be dropped"):
        drop_pages(tmp_path)
    monkeypatch.setattr(disk, "cached_share", lambda *_: None)
    with pytest.raises(Skipped, match="does not tell"):
        drop_pages(tmp_path)


@pytest.mark.redis
def test_the_redis_section(options, tmp_path, capsys):
    from tests.store.redis_server import RedisServer

    with RedisServer(tmp_path / "redis") as server:
        result = run(Settings(redis_url=f"redis://:@127.0.0.1:{server.port}"), options)
        with server.client() as client:
            assert client.dbsize() == 0
    redis = result["redis"]
    assert last_line(capsys)["redis"] == redis
    assert redis["of_bare"]["bare"] == 1
    assert ("redis_benchmark" in redis["ms"]) == ("benchmark_skipped" not in redis)
    assert redis["ms"]["tier"] > 0


@pytest.mark.redis
def test_a_redis_of_its_own(options):
    result = run(Settings(redis_url=None), options)
    assert "redis" not in result["skipped"]
    assert result["targets"]["redis.of_bare"]["measured"] > 0


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://host",
        "redis+sentinel://:s3cret@host/a",
        "redis://:s3cret@127.0.0.1:1",
    ],
)
def test_a_redis_that_cannot_be_measured_is_told(url, options):
    result = run(Settings(redis_url=url), options)
    assert "redis" not in result
    assert "redis" in result["skipped"]["redis"] or "127.0.0.1" in result["skipped"]["redis"]
    assert "s3cret" not in json.dumps(result)


def test_a_peer_beside_us(options, no_redis, monkeypatch, tmp_path):
    monkeypatch.setitem(peers.STORE_PEERS, "lmcache", FAKE)
    peer = PeerOption("lmcache", "lmcache", None, sys.executable)
    result = run(
        Settings(redis_url=None),
        StoreOptions(2, 16384, 2, 2, tokens=16, folder=tmp_path, peers=(peer,)),
    )
    if "lmcache" in result["skipped"]:
        pytest.skip(result["skipped"]["lmcache"])
    found = result["lmcache"]
    assert found["version"] == "fake"
    assert set(found["times"]) == {
        "disk_put",
        "disk_put_direct",
        "disk_get_cold",
        "disk_get_cold_direct",
        "disk_get_cached",
    }
    # The fake says that it takes two seconds for two blocks.
    assert found["ms"]["disk_get_cold_peer"] == 1000
    assert found["bound"] > 0
    assert "disk_read_cached" not in found["times"]
    assert found["times"]["disk_get_cold"] > 1.5
    assert result["targets"]["lmcache.disk_get_cold"]["met"]
    assert "redis-server is not installed" in found["skipped"]["redis"]


def test_a_peer_that_is_not_there(options, no_redis):
    peer = PeerOption("lmcache", "lmcache", None, "/nowhere/python")
    result = run(
        Settings(redis_url=None),
        StoreOptions(2, 16384, 1, 1, tokens=16, folder=options.folder, peers=(peer,)),
    )
    assert "/nowhere/python cannot be started" in result["skipped"]["lmcache"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer-bytes", "5000"], "multiple of 4096"),
        (["--folder", "/nowhere"], "no folder"),
        (["--peer", "vllm=python"], "names are lmcache"),
        (["--peer", "lmcache:float32=python"], "NAME=PYTHON"),
    ],
)
def test_options_that_make_no_sense(arguments, message, capsys):
    assert kvrag(["bench", "store", *arguments]) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_everybody_has_a_turn_and_the_first_is_not_counted():
    order = []
    seconds = iter(range(100))

    def contestant(name):
        def measure():
            order.append(name)
            return float(next(seconds))

        return measure

    taken = in_turns({name: contestant(name) for name in "abc"}, 2)
    assert "".join(order) == "cbaabccba"
    assert taken == {"a": [3, 8], "b": [4, 7], "c": [5, 6]}
    assert ratio(taken["c"], taken["a"]) == pytest.approx((5 / 3 + 6 / 8) / 2, 1e-3)


def test_other_bytes_are_found():
    (block,) = make_blocks(StoreOptions(layers=2, layer_nbytes=4096, blocks=1))
    check([bytes(view) for view in block.segments], block)
    for wrong in (list(block.segments[:1]), [bytes(4096), block.segments[1]]):
        with pytest.raises(RuntimeError, match="other bytes"):
            check(wrong, block)


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("a", 0.5, 0.5), True),
        (Target("a", 0.4, 0.5), False),
        (Target("a", 100, 100, at_most=True), True),
        (Target("a", 101, 100, at_most=True), False),
    ],
)
def test_targets(target, met):
    assert target.met is met
    assert Section({}, (Row("a"),), (target,)).targets == (target,)


def test_groups_are_those_of_a_stream():
    assert list(_groups(30)) == [(0, 1), (1, 3), (3, 7), (7, 15), (15, 23), (23, 30)]
