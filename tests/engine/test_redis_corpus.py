"""What a corpus leaves in a Redis: after deletions, in a slow one, in one that was away."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from kvrag import Engine, Settings
from kvrag.errors import SettingsError
from kvrag.retrieval.documents import Document
from kvrag.upkeep.orphans import collect_orphans
from tests.store.proxy import Proxy
from tests.tiny import make_tiny_embedder, make_tiny_model

KEY = "0123456789abcdef" * 4

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return make_tiny_model(root / "model"), make_tiny_embedder(root / "embedder")


def settings_of(folders, home, **settings):
    model, embedder = folders
    return Settings(
        model=str(model),
        embedder=str(embedder),
        home=home,
        models_dir=home.parent / "models",
        dtype="float32",
        threads=1,
        chunk_tokens=32,
        kernels="torch",
        **settings,
    )


def open_engine(folders, home, **settings):
    return Engine.open(settings_of(folders, home, **settings))


def document(words=60, name="a"):
    return Document(" ".join(f"lamp {name} {i}" for i in range(words)), name)


def in_redis(server):
    with server.client() as client:
        return set(client.keys(b"kvrag:*"))


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# -- deleting ------------------------------------------------------------------------------------


def test_no_query_waits_for_a_deletion_in_a_slow_redis(folders, server, tmp_path):
    """It held the lock that every query takes, over one round trip a block: 22 blocks, 7 s."""
    with (
        Proxy(server.port) as proxy,
        open_engine(folders, tmp_path / "home", redis_url=proxy.url, redis_timeout_s=5) as engine,
    ):
        engine.add([document()])
        (stored,) = engine.documents()
        assert engine.counts().blocks > 10
        proxy.delay_s = 1.5
        thread = threading.Thread(target=engine.delete, args=(stored.id,))
        begun = time.perf_counter()
        thread.start()
        wait_for(lambda: not engine.documents())
        engine._references.refresh()
        waited = time.perf_counter() - begun
        thread.join()
        took = time.perf_counter() - begun
        assert waited < 1.4
        assert took < 5, "one round trip for all blocks, not one each"
    assert not in_redis(server)


def delete_while_away(engine, proxy):
    """Not while the server is paused: what it was asked it would do when it goes on."""
    engine.add([document()])
    (stored,) = engine.documents()
    proxy.deaf = True
    assert engine.delete(stored.id) is True
    proxy.deaf = False


def test_what_was_deleted_while_redis_was_away_goes_when_it_is_back(
    folders, server, proxy, tmp_path, caplog
):
    """It stayed there for good, with a warning a block."""
    with open_engine(folders, tmp_path / "home", redis_url=proxy.url, redis_timeout_s=1) as engine:
        with caplog.at_level(logging.WARNING):
            delete_while_away(engine, proxy)
        assert len(in_redis(server)) == engine.owed_deletions > 10
        told = [record.name for record in caplog.records]
        assert told == ["kvrag.store.slot", "kvrag.references"]

        def gone():
            engine._references.refresh()  # as each query does
            return not in_redis(server)

        wait_for(gone)
        wait_for(lambda: not list(engine._catalog.owed_deletions()))
        wait_for(lambda: engine.owed_deletions == 0)


def test_or_after_a_restart(folders, server, proxy, tmp_path):
    home = tmp_path / "home"
    with open_engine(folders, home, redis_url=proxy.url, redis_timeout_s=1) as engine:
        delete_while_away(engine, proxy)
    assert len(in_redis(server)) > 10
    with open_engine(folders, home, redis_url=server.url):
        wait_for(lambda: not in_redis(server))


def test_a_document_that_came_back_meanwhile_keeps_its_blocks(folders, server, proxy, tmp_path):
    home = tmp_path / "home"
    with open_engine(folders, home, redis_url=proxy.url, redis_timeout_s=1) as engine:
        delete_while_away(engine, proxy)
        assert len(list(engine._catalog.owed_deletions())) == engine.owed_deletions > 10
        engine.add([document()])
        assert not list(engine._catalog.owed_deletions())
        assert engine.owed_deletions == 0
        blocks = engine.counts().blocks
    before = in_redis(server)
    with open_engine(folders, home, redis_url=server.url) as engine:
        engine._references.refresh()
        assert engine.complete().tokens_computed == 0
        assert {tier.name: tier.blocks for tier in engine.stats().tiers}["disk"] == blocks
    assert in_redis(server) == before


def test_nothing_is_owed_that_was_deleted(folders, server, tmp_path):
    with open_engine(folders, tmp_path / "home", redis_url=server.url) as engine:
        engine.add([document()])
        (stored,) = engine.documents()
        engine.delete(stored.id)
        assert not list(engine._catalog.owed_deletions())
    assert not in_redis(server)


# -- collecting what nobody needs ----------------------------------------------------------------


def fill(folders, home, **settings):
    with open_engine(folders, home, **settings) as engine:
        engine.add([document(30)])
        engine.logprobs("what?", continuation="x", passages=["a passage", "another one"])
        return engine.counts().blocks


def test_orphans_are_collected_in_every_tier(folders, server, tmp_path):
    """`kvrag store gc` never looked into Redis."""
    home = tmp_path / "home"
    fill(folders, tmp_path / "strange", redis_url=server.url)
    strange = in_redis(server)
    blocks = fill(folders, home, redis_url=server.url)
    settings = settings_of(folders, home, redis_url=server.url)
    before = in_redis(server)
    told = collect_orphans(settings, delete=False)
    assert in_redis(server) == before
    assert {name: len(found) for name, found in told.tiers.items()} == {"disk": 2, "redis": 2}
    assert told.blocks == 2
    assert told.nbytes == 2 * sum(entry.nbytes for entry in told.tiers["disk"])
    assert collect_orphans(settings, unused_s=3600, delete=True).blocks == 0
    assert collect_orphans(settings, delete=True) == told
    assert strange < in_redis(server)
    assert len(in_redis(server) - strange) == blocks
    assert collect_orphans(settings, delete=True).blocks == 0
    assert len(list((home / "kv").rglob("*.kv"))) == blocks


def test_a_redis_that_cannot_be_asked_is_told(folders, server, tmp_path):
    home = tmp_path / "home"
    fill(folders, home, redis_url=server.url)
    server.kill()
    told = collect_orphans(settings_of(folders, home, redis_url=server.url), delete=True)
    assert list(told.tiers) == ["disk"]
    assert told.blocks == 2
    assert list(told.failed) == ["redis"]


def test_without_a_catalog_nobody_knows(folders, tmp_path):
    with pytest.raises(SettingsError, match="no catalog"):
        collect_orphans(settings_of(folders, tmp_path), delete=True)


def test_nothing_stays_in_clear_after_encryption_began(folders, server, tmp_path):
    """The catalog still refers to blocks in clear, whose names nobody asks for any more."""
    pytest.importorskip("cryptography", reason="the extra encryption is not installed")
    home = tmp_path / "home"
    clear = fill(folders, home, redis_url=server.url)
    settings = settings_of(folders, home, redis_url=server.url, encryption_key=KEY)
    with Engine.open(settings) as engine:
        engine.complete()
    told = collect_orphans(settings_of(folders, home, redis_url=server.url), delete=True)
    assert told.blocks == clear + 2
    left = in_redis(server)
    assert len(left) == clear
    with server.client() as client:
        assert all(b"aes-256-gcm" in client.hget(key, "h") for key in left)
    files = list((home / "kv").rglob("*.kv"))
    assert len(files) == clear
    assert all(b"aes-256-gcm" in file.read_bytes()[:4096] for file in files)
    with Engine.open(settings) as engine:
        assert engine.complete().tokens_computed == 0
