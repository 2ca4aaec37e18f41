"""The redis tier against a real redis-server that the test starts."""

from __future__ import annotations

import logging
import struct
import threading
import time
import tracemalloc

import numpy as np
import pytest

from kvrag.store.block import verify_segment
from kvrag.store.errors import BlockFormatError, TierError, TierFullError

from .contract import TierContract
from .helpers import make_block, make_key, whole_bytes
from .proxy import Proxy

pytestmark = pytest.mark.redis

PAGE = 4096
SIZE = make_block(0).nbytes


@pytest.fixture(scope="module")
def server(tmp_path_factory, program):
    """One for all tests of the file."""
    from .redis_server import RedisServer

    with RedisServer(tmp_path_factory.mktemp("redis"), program=program) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def tier(server, client):
    with make_tier(server.url) as tier:
        yield tier


def make_tier(url, **options):
    from kvrag.store.redis import RedisTier

    return RedisTier(url, **options)


def address(view):
    return np.frombuffer(view, dtype=np.uint8).ctypes.data


def name_of(key, prefix="kvrag:"):
    return f"{prefix}{key}"


def lay(client, key, data, prefix="kvrag:"):
    """Bytes whose header and segments take a page each, as the field names say."""
    pages = [data[start : start + PAGE] for start in range(PAGE, len(data), PAGE)]
    stamp = struct.pack("<Q8s", len(data), data[16:24])
    fields = {"h": data[:PAGE], "s": stamp, **{str(i): page for i, page in enumerate(pages)}}
    client.delete(name_of(key, prefix))
    client.hset(name_of(key, prefix), mapping=fields)


class TestRedisTier(TierContract):
    @pytest.fixture(autouse=True)
    def _empty(self, server, client):
        self.url, self.client = server.url, client

    def make(self, folder):
        return make_tier(self.url)

    def raw_write(self, tier, key, data):
        lay(self.client, key, data)

    def raw_read(self, tier, key):
        fields = self.client.hgetall(name_of(key))
        if not fields:
            return None
        return fields[b"h"] + b"".join(fields[str(i).encode()] for i in range(len(fields) - 2))


# -- how a block lies there ----------------------------------------------------------------------


def test_a_block_is_one_key_of_header_stamp_and_segments(tier, client):
    block = make_block(1, layers=3, segment_nbytes=5000)
    tier.put(make_key(1), block)
    assert client.keys() == [name_of(make_key(1)).encode()]
    fields = client.hgetall(name_of(make_key(1)))
    assert set(fields) == {b"h", b"s", b"0", b"1", b"2"}
    assert fields[b"h"] == block.header_bytes
    assert fields[b"s"] == struct.pack("<Q8s", block.nbytes, block.header_bytes[16:24])
    assert [fields[str(i).encode()] for i in range(3)] == list(block.segments)


def test_layers_are_read_by_one_hmget_that_fetches_no_other(tier, client):
    tier.put(make_key(1), make_block(1, layers=8))
    tier.header(make_key(1))
    before = client.info("stats")["total_net_output_bytes"]
    commands = client.info("commandstats")["cmdstat_hmget"]["calls"]
    tier.segments(make_key(1), 2, 4)
    stats = client.info("stats")["total_net_output_bytes"] - before
    assert client.info("commandstats")["cmdstat_hmget"]["calls"] - commands == 1
    replies = len(str(client.info("commandstats"))) + len(str(client.info("stats")))
    assert 2 * PAGE < stats < 3 * PAGE + 2 * replies


def test_layers_are_received_where_they_stay(tier):
    """Aligned, and in memory that was used before."""
    block = make_block(1, layers=3, segment_nbytes=200_000)
    tier.put(make_key(1), block)
    found = tier.segments(make_key(1), 0, 3)
    assert found == list(block.segments)
    places = {address(view) for view in found}
    assert all(place % PAGE == 0 for place in places)
    del found
    again = tier.segments(make_key(1), 0, 3)
    assert again == list(block.segments)
    assert {address(view) for view in again} == places


@pytest.mark.parametrize("nbytes", [2**16 - PAGE, 2**16, 2**16 + PAGE, 2**20, 2**24 + PAGE])
def test_values_of_every_size_come_whole_one_after_the_other(tier, nbytes):
    block = make_block(1, layers=3, segment_nbytes=nbytes)
    tier.put(make_key(1), block)
    assert tier.segments(make_key(1), 0, 3) == list(block.segments)
    assert tier.segments(make_key(1), 1, 2) == [block.segments[1]]
    assert tier.header(make_key(1)) == block.header


def test_a_whole_block_is_one_request_once_one_was_seen(tier, client):
    def requests():
        stats = client.info("commandstats")
        return stats.get("cmdstat_hmget", {}).get("calls", 0)

    def whole(name):
        before = requests()
        found = tier.whole(make_key(name), lambda *_: None)
        return found, requests() - before

    sizes = {1: 3, 2: 40, 3: 40, 4: 2}
    blocks = {name: make_block(name, layers=layers) for name, layers in sizes.items()}
    for name, block in blocks.items():
        tier.put(make_key(name), block)
    for name, wanted in ((1, 1), (2, 2), (3, 1), (4, 1)):
        found, asked = whole(name)
        assert found == (blocks[name].header, list(blocks[name].segments))
        assert asked == wanted
    assert whole(9) == (None, 1)


def test_an_answer_that_announces_more_than_comes_takes_no_memory(server):
    """hiredis asks the system for GBs after a few bytes of garbage."""
    with Proxy(server.port) as proxy, make_tier(proxy.url, timeout_s=0.3) as tier:
        tier.contains(make_key(1))  # it is connected
        proxy.garbage = b"*2\r\n$%d\r\nabc" % 2**30
        tracemalloc.start()
        try:
            with pytest.raises(TierError):
                tier.header(make_key(1))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 2**22


def test_a_connection_that_ends_within_a_layer_is_an_outage(server, tier):
    tier.put(make_key(1), make_block(1, segment_nbytes=200_000))
    with Proxy(server.port) as proxy, make_tier(proxy.url, timeout_s=0.3) as behind:
        behind.header(make_key(1))
        proxy.budget = 250_000
        with pytest.raises(TierError):
            behind.segments(make_key(1), 0, 2)
        proxy.budget = None
        # Nothing of the answer that was cut short is taken for the next one.
        found = behind.segments(make_key(1), 0, 2)
        assert found == list(make_block(1, segment_nbytes=200_000).segments)


def test_no_memory_for_a_layer_is_no_outage(server, monkeypatch):
    """It was told that the server seems to be no Redis, and the tier was bypassed."""
    block = make_block(1, segment_nbytes=200_000)

    def none(nbytes):
        raise MemoryError(f"no {nbytes} bytes")

    with make_tier(server.url) as tier:
        tier.put(make_key(1), block)
        with monkeypatch.context() as patched:
            patched.setattr(tier._buffers, "take", none)
            with pytest.raises(MemoryError):
                tier.segments(make_key(1), 0, 2)
        # Nothing of the answer that was not received is taken for the next one.
        assert tier.segments(make_key(1), 0, 2) == list(block.segments)
        assert tier.delete(make_key(1))


def test_a_strangers_key_may_be_of_any_size(tier, client):
    tier.put(make_key(1), make_block(1))
    client.set("kvrag:" + "x" * 100_000, "value")
    client.hset(name_of(make_key(2)), mapping={"h": b"h" * 100_000, "s": b"s" * 100_000})
    assert set(tier.keys()) == {make_key(1), make_key(2)}
    assert [entry.key for entry in tier.entries()] == [make_key(1)]
    with pytest.raises(BlockFormatError):
        tier.header(make_key(2))


def test_a_block_that_another_writes_over_a_known_one(server, tier):
    first, second = make_block(1), make_block(1, version=1, layers=4)
    tier.put(make_key(1), first)
    assert tier.header(make_key(1)) == first.header
    with make_tier(server.url) as other:
        other.put(make_key(1), second)
    assert tier.segments(make_key(1), 1, 3) == list(second.segments[1:3])
    assert tier.header(make_key(1)) == second.header


@pytest.mark.parametrize("field", ["h", "s", "0", "1"])
def test_a_field_that_is_gone_is_damage(tier, client, field):
    block = make_block(1)
    tier.put(make_key(1), block)
    tier.header(make_key(1))
    client.hdel(name_of(make_key(1)), field)
    with pytest.raises(BlockFormatError):
        [*tier.segments(make_key(1), 0, 2), tier.header(make_key(1))]


def test_a_segment_cut_short_is_damage(tier, client):
    tier.put(make_key(1), make_block(1))
    client.hset(name_of(make_key(1)), "1", b"x" * 4095)
    with pytest.raises(BlockFormatError, match="segment 1 must be 4096 bytes, it is 4095"):
        tier.segments(make_key(1), 0, 2)


def test_another_type_in_a_blocks_place_is_damage_and_is_replaced(tier, client):
    client.set(name_of(make_key(1)), b"text")
    for look in (
        lambda: tier.header(make_key(1)),
        lambda: tier.segments(make_key(1), 0, 1),
    ):
        with pytest.raises(BlockFormatError, match="no hash"):
            look()
    assert isinstance(tier.headers([make_key(1)])[0], BlockFormatError)
    assert tier.contains(make_key(1))
    assert tier.entries() == []
    tier.put(make_key(1), make_block(1))
    assert tier.header(make_key(1)) == make_block(1).header


def test_strangers_under_the_prefix_are_no_blocks(tier, client):
    tier.put(make_key(1), make_block(1))
    for stranger in ("kvrag:config", "kvrag:" + "a" * 32, b"kvrag:\xff", f"kvrag:x{make_key(2)}"):
        client.set(stranger, b"")
    assert list(tier.keys()) == [make_key(1)]
    assert [entry.key for entry in tier.entries()] == [make_key(1)]


def test_tiers_of_different_prefixes_do_not_see_each_other(server, client):
    """Also where a prefix holds what SCAN takes for a pattern."""
    prefixes = ["a:", "b:", "[ab]:", "?:", "*", "a\\:"]
    tiers = [make_tier(server.url, prefix=prefix) for prefix in prefixes]
    for name, tier in enumerate(tiers):
        tier.put(make_key(name), make_block(name))
    for name, tier in enumerate(tiers):
        assert list(tier.keys()) == list(tier.keys("a" * 32)) == [make_key(name)]
        assert tier.nbytes == SIZE
        tier.close()


def test_more_blocks_than_a_page_of_scan_or_a_batch(tier):
    keys = [make_key(name) for name in range(300)]
    for name, key in enumerate(keys):
        tier.put(key, make_block(name, layers=1, segment_nbytes=1))
    assert set(tier.keys()) == set(keys)
    assert len(tier.entries()) == 300
    assert tier.contains_many([*keys, make_key("x")]) == [True] * 300 + [False]
    assert [header.key for header in tier.headers(keys)] == keys


def test_entries_come_in_the_order_of_use(tier, client):
    for name in range(3):
        tier.put(make_key(name), make_block(name))
    time.sleep(1.1)  # what Redis's clock of use can tell apart
    tier.segments(make_key(1), 0, 1)
    assert tier.entries()[-1].key == make_key(1)


# -- time to live --------------------------------------------------------------------------------


def test_a_block_goes_when_its_time_is_over(server, client):
    with make_tier(server.url, ttl_s=0.15) as tier:
        tier.put(make_key(1), make_block(1))
        assert tier.header(make_key(1)) is not None
        time.sleep(0.25)
        assert tier.header(make_key(1)) is None
        assert tier.segments(make_key(1), 0, 2) is None
        assert not tier.contains(make_key(1))
        assert tier.nbytes == 0


def test_reading_a_block_renews_its_time(server, client):
    with make_tier(server.url, ttl_s=100) as tier:
        tier.put(make_key(1), make_block(1))
        assert 99 < client.pttl(name_of(make_key(1))) / 1000 <= 100
        client.expire(name_of(make_key(1)), 5)
        tier.segments(make_key(1), 1, 2)
        assert client.ttl(name_of(make_key(1))) <= 5
        tier.segments(make_key(1), 0, 1)
        assert client.ttl(name_of(make_key(1))) > 90


def test_without_a_time_a_block_stays(tier, client):
    tier.put(make_key(1), make_block(1))
    assert client.ttl(name_of(make_key(1))) == -1


# -- full ----------------------------------------------------------------------------------------


@pytest.fixture
def small(server, client):
    """A Redis with room for a few blocks of 400 KB."""
    used = client.info("memory")["used_memory"]
    client.config_set("maxmemory", used + 4_000_000)
    yield client
    client.config_set("maxmemory", 0)
    client.config_set("maxmemory-policy", "noeviction")


def big(name, version=0):
    return make_block(name, version=version, layers=4, segment_nbytes=100_000)


def test_a_full_redis_that_evicts_nothing_still_answers(tier, small):
    small.config_set("maxmemory-policy", "noeviction")
    taken = []

    def fill():
        for name in range(40):
            tier.put(make_key(name), big(name))
            taken.append(name)

    with pytest.raises(TierFullError, match="maxmemory") as caught:
        fill()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert taken
    assert set(tier.keys()) == {make_key(name) for name in taken}
    assert tier.segments(make_key(taken[-1]), 0, 4) == list(big(taken[-1]).segments)
    with pytest.raises(TierFullError):  # the block that was to be replaced is still whole
        tier.put(make_key(taken[0]), big(taken[0], version=1))
    assert tier.segments(make_key(taken[0]), 0, 4) == list(big(taken[0]).segments)
    tier.delete(make_key(taken[0]))
    tier.delete(make_key(taken[1]))
    tier.put(make_key(99), big(99))


def test_a_redis_that_becomes_full_within_a_transaction_is_full(server):
    """Each command was queued, and then the whole is refused, with the reason in the refusal."""
    with Proxy(server.port) as proxy, make_tier(proxy.url) as tier:
        tier.contains(make_key(1))  # it is connected
        proxy.garbage = (
            b"+OK\r\n+QUEUED\r\n+QUEUED\r\n-EXECABORT Transaction discarded because of: "
            b"OOM command not allowed when used memory > 'maxmemory'.\r\n"
        )
        with pytest.raises(TierFullError, match="maxmemory"):
            tier.put(make_key(1), make_block(1))


def test_what_redis_evicts_is_a_miss(tier, small):
    small.config_set("maxmemory-policy", "allkeys-lru")
    for name in range(40):
        tier.put(make_key(name), big(name))
    held = set(tier.keys())
    assert 0 < len(held) < 40
    for name in range(40):
        segments = tier.segments(make_key(name), 0, 4)
        if segments is not None:
            assert segments == list(big(name).segments)
        else:
            assert tier.header(make_key(name)) is None
            assert make_key(name) not in held


def test_a_redis_that_takes_no_writes_is_read(server, client, tier):
    tier.put(make_key(1), make_block(1))
    client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(TierFullError, match="NOREPLICAS"):
            tier.put(make_key(2), make_block(2))
        assert tier.segments(make_key(1), 0, 2) == list(make_block(1).segments)
    finally:
        client.config_set("min-replicas-to-write", 0)


# -- settings and secrets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"ttl_s": 0},
        {"ttl_s": 1e17},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"connect_timeout_s": -1},
        {"connections": 0},
        {"prefix": "x" * 65},
        {"prefix": "a\nb"},
    ],
)
def test_what_is_no_limit_is_refused(server, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_tier(server.url, **options)


def test_connections_are_bounded_and_shared(server, client):
    with make_tier(server.url, connections=2, timeout_s=60) as tier:
        for name in range(4):
            tier.put(make_key(name), big(name))
        failures = []

        def read():
            try:
                for step in range(20):
                    name = step % 4
                    assert tier.segments(make_key(name), 0, 4) == list(big(name).segments)
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        ours = [one for one in client.client_list() if one["cmd"] != "client|list"]
        assert len(ours) <= 2


def test_secrets_are_shown_nowhere(tmp_path, caplog):
    from .redis_server import RedisServer

    secret = "s3cr:t/p@ss"
    quoted = "s3cr%3At%2Fp%40ss"
    with RedisServer(tmp_path / "auth", "--requirepass", secret) as server:
        right = f"redis://:{quoted}@127.0.0.1:{server.port}/0"
        with make_tier(right) as tier:
            tier.put(make_key(1), make_block(1))
            assert tier.contains(make_key(1))
            assert "***@127.0.0.1" in repr(tier)
            shown = [repr(tier), str(tier), repr(vars(tier))]
        with make_tier(right.replace("s3cr", "wr0ng")) as tier:
            with pytest.raises(TierError) as caught, caplog.at_level(logging.DEBUG):
                tier.contains(make_key(1))
            shown += [repr(tier), repr(caught.value), str(caught.value.__cause__), caplog.text]
    for text in shown:
        for part in (secret, quoted, "wr0ng", "s3cr", "p@ss", "p%40ss"):
            assert part not in text


def test_a_block_laid_by_others_is_verified_as_any(tier, client):
    block = make_block(1)
    data = bytearray(whole_bytes(block))
    data[-1] ^= 1
    lay(client, make_key(1), bytes(data))
    _, view = tier.segments(make_key(1), 0, 2)
    with pytest.raises(BlockFormatError):
        verify_segment(block.header, 1, view)


def test_any_process_that_reads_a_block_uses_it(server, client, tier):
    tier.put(make_key(1), make_block(1))
    time.sleep(2.1)
    assert tier.idle_s(make_key(1)) >= 1
    with make_tier(server.url) as other:
        other.segments(make_key(1), 0, 2)
    assert tier.idle_s(make_key(1)) == 0
    client.config_set("maxmemory-policy", "allkeys-lfu")
    try:
        assert tier.idle_s(make_key(1)) is None  # it counts uses, and keeps no times
    finally:
        client.config_set("maxmemory-policy", "noeviction")
