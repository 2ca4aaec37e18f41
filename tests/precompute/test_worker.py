"""What a worker takes for granted, and what a job does not take from it."""

from __future__ import annotations

import os
import pickle
from contextlib import closing
from dataclasses import replace

import pytest

from kvrag import Engine, Settings
from kvrag.errors import SettingsError
from kvrag.home import Home
from kvrag.precompute.elsewhere import Handed, Report, WorkersError
from kvrag.precompute.job import StorageFullError
from kvrag.precompute.making import Effort
from kvrag.precompute.worker import Recipe, Worker
from kvrag.retrieval.documents import Document
from kvrag.store.keys import BlockKey, packed
from tests.precompute.workers import WorkerHere
from tests.tiny import make_tiny_model

DOCUMENTS = [Document(f"Lamp {n} burns {n * n} hours.") for n in range(6)]
KEY = "ab" * 32


@pytest.fixture
def opened(models, tmp_path):
    def open_(home="home", **options):
        values = models | {
            "home": tmp_path / home,
            "dtype": "float32",
            "threads": 1,
            "corpus_context": "",  # one block a chunk
        }
        return Engine.open(Settings(**(values | options)))

    return open_


def recipe(engine):
    return Recipe.of(engine.settings, engine._open_corpus()[1].all, engine._fine_channels())


def on_disk(home):
    return {path.name: path.read_bytes() for path in Home(home).kv.rglob("*.kv")}


@pytest.mark.parametrize("options", [{}, {"codec": "int4"}, {"encryption_key": KEY}])
def test_a_worker_makes_what_the_job_would(opened, tmp_path, options):
    with opened("alone", **options) as engine:
        expected = engine.add(DOCUMENTS)
    alone, home = tmp_path / "alone", tmp_path / "home"
    home.mkdir(mode=0o700)
    Home(home).secret.write_bytes(Home(alone).secret.read_bytes())
    Home(home).secret.chmod(0o600)
    if "encryption_key" in options:
        os.environ["KVRAG_ENCRYPTION_KEY"] = KEY  # `isolated` takes it out again
    with opened(**options) as engine:
        done = engine.add(DOCUMENTS, workers=WorkerHere())
        assert engine.complete(workers=WorkerHere()).tokens_computed == 0
    assert done.chunks_done == len(DOCUMENTS)
    assert done.tokens_computed == expected.tokens_computed
    assert done.bytes_written == expected.bytes_written
    made, wanted = on_disk(home), on_disk(alone)
    assert made.keys() == wanted.keys()
    if "encryption_key" not in options:  # sealed with another salt each time
        assert made == wanted


def test_equal_chunks_are_asked_for_once(opened):
    text = DOCUMENTS[0].text
    equal = [Document(text, id="a"), Document(text, id="b"), Document("The lamp is out.", id="c")]
    asked = []

    def noted(reports):
        asked.extend(report.key for report in reports)
        return reports

    with opened() as engine:
        done = engine.add(equal, workers=WorkerHere(change=noted))
    assert (done.chunks_done, len(asked)) == (3, 2)


def test_secrets_are_not_sent(opened):
    url = "redis://:hush@127.0.0.1:1/0"
    with opened(encryption_key=KEY, redis_url=url, redis_connect_timeout_s=0.1) as engine:
        sent = recipe(engine)
    data = pickle.dumps(sent)
    for secret in (KEY, "hush", bytes.fromhex(KEY), Home(engine.settings.home).secret.read_bytes()):
        assert (secret if isinstance(secret, bytes) else secret.encode()) not in data
    with pytest.raises(SettingsError, match=r"'redis_url' is set.*KVRAG_REDIS_URL"):
        Worker(sent)
    os.environ["KVRAG_REDIS_URL"] = url
    with pytest.raises(SettingsError, match=r"'encryption_key' is set.*KVRAG_ENCRYPTION_KEY"):
        Worker(sent)


def test_a_worker_that_would_make_other_blocks_is_refused(opened, tmp_path):
    other = str(make_tiny_model(tmp_path / "other", seed=1))
    with opened() as engine:
        sent = recipe(engine)
    with opened("another"):
        pass
    elsewhere = tmp_path / "nowhere"
    for values, match in (
        ({"model": other}, "other weights"),
        ({"home": tmp_path / "another"}, "other weights, or another tokenizer, home"),
        ({"home": elsewhere}, "has to be one folder"),
    ):
        with pytest.raises(SettingsError, match=match):
            Worker(replace(sent, values=sent.values | values))
    assert not elsewhere.exists()


def test_a_worker_evicts_nothing(opened, tmp_path):
    """It does not know which blocks a corpus refers to."""
    with opened() as engine:
        engine.add(DOCUMENTS[:3])
    before = on_disk(tmp_path / "home")
    room = sum(map(len, before.values())) + 1
    full = pytest.raises(StorageFullError, match=r"the KV of chunk \d+ could not be stored")
    with opened(disk_bytes=room) as engine, full:
        engine.add(DOCUMENTS, workers=WorkerHere())
    assert on_disk(tmp_path / "home") == before
    with opened(ttl_s=0.001) as engine, closing(Worker(recipe(engine))) as worker:
        assert recipe(engine).settings().ttl_s is None
        assert recipe(engine).settings().redis_ttl_s == 0.001
        assert worker.make([]) == []


def test_a_cancelled_job_keeps_what_is_stored(opened, tmp_path):
    with opened() as engine:
        given = []

        def cancelled():
            return len(on_disk(tmp_path / "home")) >= 2

        done = engine.add(DOCUMENTS, given.append, cancelled, workers=WorkerHere(at_once=2))
        assert done.cancelled
        assert 2 <= len(on_disk(tmp_path / "home")) < len(DOCUMENTS)
        done = engine.add(DOCUMENTS, workers=WorkerHere())
        assert done.chunks_done == len(on_disk(tmp_path / "home")) == len(DOCUMENTS)
        assert done.chunks_stored_before >= 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda reports: reports[1:], "left 1 of 6 blocks undone"),
        (lambda reports: [*reports, reports[0]], "which it was not asked for"),
    ],
)
def test_a_job_counts_what_workers_report(opened, change, match):
    with opened() as engine, pytest.raises(WorkersError, match=match):
        engine.add(DOCUMENTS, workers=WorkerHere(at_once=6, change=change))


def test_a_block_that_is_reported_and_not_there_is_missed(opened):
    """Its tier lies on another machine, say."""
    seen = iter([False, False, True])
    with opened() as engine:
        corpus, blocks, _ = engine._open_corpus()
        engine.add(DOCUMENTS[:1])
        (chunk,) = corpus.catalog.chunk_ids(corpus.namespace)
        key = blocks.first.key(corpus.token_ids(chunk))

    class Asked:
        def __init__(self):
            self.key, self.chunk_id = key, chunk

    late = Handed(lambda key: next(seen), hidden_s=60)
    never = Handed(lambda key: False, hidden_s=0)
    for handed in (late, never):
        assert handed.add(Asked())
        assert not handed.add(Asked())
        assert handed.take(Report(packed(key), Effort())) == chunk
    late.check()  # a folder of the network shows it at last
    assert next(seen, None) is None
    with pytest.raises(WorkersError, match=r"1 of 1 blocks .* not in the home"):
        never.check()
    assert BlockKey.parse(str(key)) == key


@pytest.mark.redis
def test_a_worker_writes_to_redis_beside_the_disk(opened, server, tmp_path):
    os.environ["KVRAG_REDIS_URL"] = server.url
    with opened() as engine:
        engine.add(DOCUMENTS, workers=WorkerHere())
        keys = list(engine.store.keys())
        redis = engine.store._placement.slots[-1]
        assert redis.name == "redis"
        assert redis.contains_many(keys) == [True] * len(DOCUMENTS)
    assert len(on_disk(tmp_path / "home")) == len(DOCUMENTS)
