"""The redis tier by each kind of URL: socket, password, TLS, Sentinel, Cluster."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time

import pytest

from kvrag.store.errors import TierError

from .helpers import make_block, make_key

pytestmark = pytest.mark.redis

BLOCKS = {make_key(name): make_block(name, layers=3) for name in range(12)}


@pytest.fixture
def start(tmp_path):
    """Start a redis-server with these options."""
    from .redis_server import RedisServer

    with contextlib.ExitStack() as stack:

        def start(*options, **kinds):
            folder = tmp_path / f"redis-{time.monotonic_ns()}"
            for name, text in kinds.pop("files", {}).items():
                folder.mkdir(exist_ok=True)
                (folder / name).write_text(text)
            return stack.enter_context(RedisServer(folder, *options, **kinds))

        yield start


def open_tier(url, **options):
    from kvrag.store.redis import RedisTier

    return RedisTier(url, **({"timeout_s": 5, "connect_timeout_s": 5} | options))


def exercise(tier):
    """Every operation, over keys of many slots."""
    for key, block in BLOCKS.items():
        tier.put(key, block)
    keys = [*BLOCKS, make_key("none")]
    assert tier.contains_many(keys) == [True] * len(BLOCKS) + [False]
    assert [header and header.key for header in tier.headers(keys)] == [*BLOCKS, None]
    for key, block in BLOCKS.items():
        assert tier.segments(key, 0, 3) == list(block.segments)
    assert set(tier.keys()) == set(BLOCKS)
    assert {entry.key for entry in tier.entries()} == set(BLOCKS)
    assert tier.nbytes == sum(block.nbytes for block in BLOCKS.values())
    gone = next(iter(BLOCKS))
    assert tier.delete(gone)
    assert tier.header(gone) is None
    assert tier.segments(gone, 0, 1) is None


def test_a_unix_socket(start):
    server = start()
    with open_tier(f"unix://{server.socket}?db=1", ttl_s=100) as tier:
        exercise(tier)
    with server.client(db=1) as client:
        assert client.dbsize() == len(BLOCKS) - 1


def test_a_user_with_a_password_who_may_do_no_more_than_is_needed(start):
    rights = "+hmget +hget +hset +unlink +exists +scan +pexpire +object|idletime +multi +exec"
    server = start()
    with server.client() as client:
        client.execute_command(
            "ACL", "SETUSER", "kv", "on", ">s3cret", "~kvrag:*", "-@all", *rights.split()
        )
        client.execute_command("ACL", "SETUSER", "default", "off")
    with open_tier(f"redis://kv:s3cret@127.0.0.1:{server.port}", ttl_s=100) as tier:
        exercise(tier)
    with open_tier(f"redis://kv:s3cret@127.0.0.1:{server.port}", prefix="other:") as tier:
        with pytest.raises(TierError, match="permission") as caught:
            tier.put(*next(iter(BLOCKS.items())))
        assert "s3cret" not in str(caught.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(start, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    from .redis_server import free_port

    port = free_port()
    start(
        *("--tls-port", str(port), "--tls-cert-file", str(certificate)),
        *("--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate)),
    )
    place = f"rediss://localhost:{port}/0"
    with open_tier(f"{place}?ssl_ca_certs={certificate}") as tier, pytest.raises(TierError):
        tier.contains(make_key(1))  # it wants our certificate too
    signed = f"ssl_certfile={certificate}&ssl_keyfile={key}"
    with open_tier(f"{place}?ssl_ca_certs={certificate}&{signed}") as tier:
        exercise(tier)
    with open_tier(f"{place}?{signed}") as tier, pytest.raises(TierError, match="certificate"):
        tier.contains(make_key(1))  # signed by nobody that the system knows
    with open_tier(f"{place}?{signed}&ssl_cert_reqs=none&ssl_check_hostname=false") as tier:
        assert tier.contains(next(reversed(BLOCKS)))


def test_sentinel_follows_the_master(start):
    master = start()
    replica = start("--replicaof", "127.0.0.1", str(master.port))
    conf = (
        f"sentinel monitor main 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds main 500\n"
        "sentinel failover-timeout main 3000\n"
    )
    sentinel = start(sentinel=True, files={"conf": conf})
    with replica.client() as client:
        _until(lambda: client.info("replication").get("master_link_status") == "up")
    with sentinel.client() as client:
        _until(lambda: client.sentinel_master("main")["num-slaves"] == 1)
    url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main/0"
    with open_tier(url, timeout_s=1, connect_timeout_s=1) as tier:
        exercise(tier)
        with replica.client() as client:
            _until(lambda: client.dbsize() == len(BLOCKS) - 1)
        master.kill()
        kept = next(reversed(BLOCKS))
        _until(lambda: _quietly(tier, kept) == list(BLOCKS[kept].segments))
        tier.put(*next(iter(BLOCKS.items())))
        assert tier.contains(next(iter(BLOCKS)))
    other = url.replace("/main", "/other")
    with open_tier(other) as tier, pytest.raises(TierError, match="other"):
        tier.contains(kept)


def test_a_cluster(start):
    nodes = [start("--cluster-enabled", "yes") for _ in range(2)]
    clients = [node.client() for node in nodes]
    for client, slots in zip(clients, ((0, 8191), (8192, 16383)), strict=True):
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", *slots)
    clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[1].port)
    for client in clients:
        _until(lambda client=client: _is_whole(client.execute_command("CLUSTER INFO")))
    # It is enough to know a node, and one that is not there is passed over.
    url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{nodes[0].port}"
    with open_tier(url, ttl_s=100, timeout_s=1, connect_timeout_s=1) as tier:
        exercise(tier)
        sizes = [client.dbsize() for client in clients]
        assert all(sizes)
        assert sum(sizes) == len(BLOCKS) - 1
        nodes[1].pause()
        try:
            begun = time.monotonic()
            held = [_quietly(tier, key) for key in list(BLOCKS)[1:4]]
            assert time.monotonic() - begun < 3 * 4
            assert all(
                one in (None, list(BLOCKS[key].segments))
                for key, one in zip(list(BLOCKS)[1:4], held, strict=True)
            )
        finally:
            nodes[1].resume()
        _until(lambda: all(_quietly(tier, key) for key in list(BLOCKS)[1:]))
    for client in clients:
        client.close()


def _is_whole(cluster):
    return cluster["cluster_state"] == "ok" and cluster["cluster_known_nodes"] == "2"


def _quietly(tier, key):
    try:
        return tier.segments(key, 0, 3)
    except TierError:
        return None


def _until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
