"""The chunks of a corpus computed on a local Ray cluster: the same bytes, whatever is killed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvrag import Engine, Settings
from kvrag.cli.main import run
from kvrag.errors import InputError
from kvrag.home import Home
from kvrag.precompute.ray_workers import RayWorkers
from kvrag.retrieval.documents import Document
from kvrag.store.claims import Claims
from tests.precompute.processes import alive, descendants
from tests.tiny import make_tiny_embedder, make_tiny_model

# Ray's own, when its modules are loaded and its processes are left.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.timeout(600),
]

COUNT = 24
DOCUMENTS = [Document(f"Lamp {n} burns {n * n} hours.", title=f"Lamp {n}") for n in range(COUNT)]
#: More than a busy machine may take to start processes that load torch.
PATIENCE_S = 300


@pytest.fixture(scope="module")
def settings(tmp_path_factory, pytestconfig):
    root = tmp_path_factory.mktemp("ray-models")
    values = {
        "model": str(make_tiny_model(root / "model")),
        "embedder": str(make_tiny_embedder(root / "embedder")),
        "kernels_dir": Path(pytestconfig.cache.mkdir("kvrag-kernels")),
        "models_dir": root / "converted",
        "dtype": "float32",
        "threads": 1,
    }
    return lambda home, **other: Settings(**(values | {"home": home} | other))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two processors. Nothing of it is left behind, also where a test fails."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrag[ray]'")
    before = dict(os.environ)
    home = tmp_path_factory.mktemp("ray-user")
    os.environ.update(
        {
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # else others on this machine come first by far
        }
    )
    others = descendants()
    for name in [name for name in os.environ if name.startswith("KVRAG_")]:
        del os.environ[name]
    try:
        for attempt in range(3):
            try:
                ray.init(
                    address="local",
                    num_cpus=2,
                    include_dashboard=False,
                    object_store_memory=2**27,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
                break
            except Exception:  # it gives its own processes half a minute
                ray.shutdown()
                if attempt == 2:
                    raise
        yield ray
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)
        left = set(descendants()) - set(others)
        deadline = time.monotonic() + 60
        while (left := {process for process in left if alive(process)}) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert not left


def actors():
    return [process for process, command in descendants().items() if "_Actor" in command]


def stored(home):
    """The bytes of each block."""
    kv = Home(home).kv
    return {path.relative_to(kv): path.read_bytes() for path in kv.rglob("*.kv")}


def chunks(engine):
    """The token ids of each chunk, in the order in which they came."""
    corpus, _, _ = engine._open_corpus()
    return [corpus.token_ids(chunk) for chunk in corpus.catalog.chunk_ids(corpus.namespace)]


def kinds(engine, token_ids):
    return engine._open_corpus()[1].kinds(token_ids)


def copied_secret(source, home):
    """Keys are made with it."""
    home.mkdir(mode=0o700)
    Home(home).secret.write_bytes(Home(source).secret.read_bytes())
    Home(home).secret.chmod(0o600)


def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.soak  # a cluster's ten processes take over a minute to start and end
def test_a_killed_worker_loses_and_doubles_nothing(cluster, settings, tmp_path):
    """All blocks are those of a job without Ray, byte for byte; so is the manifest."""
    alone, home = tmp_path / "alone", tmp_path / "home"
    with Engine.open(settings(alone)) as engine:
        expected = engine.add(DOCUMENTS)
        engine.write_manifest(tmp_path / "alone.jsonl")
        keys = [blocks.key(ids) for ids in chunks(engine) for blocks in kinds(engine, ids)]
    wanted = stored(alone)
    assert len(wanted) == len(keys) == 2 * COUNT
    copied_secret(alone, home)

    # Of each eight blocks, which a worker is given together, one seems to be made by another
    # process: both workers wait for it when the others are stored.
    claims = Claims(Home(home).claims)
    held = keys[7::8]
    assert all(claims.claim(key) for key in held)

    done = []
    with Engine.open(settings(home)) as engine:
        job = threading.Thread(
            target=lambda: done.append(engine.add(DOCUMENTS, workers=RayWorkers(count=2)))
        )
        job.start()
        until(lambda: len(stored(home)) >= 2 * 7 or not job.is_alive())
        before = actors()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        until(lambda: not alive(before[0]))
        for key in held:
            claims.release(key)
        job.join(PATIENCE_S)
        assert not job.is_alive()
        claims.close()
        (progress,) = done
        engine.write_manifest(tmp_path / "ray.jsonl")
    assert stored(home) == wanted
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert progress.chunks_done == progress.total_chunks == COUNT
    assert progress.chunks_stored_before == 0
    # What a worker had stored and could not report any more is not counted.
    assert 0 < progress.tokens_computed <= expected.tokens_computed
    assert progress.seconds > 0

    with Engine.open(settings(home)) as engine:
        again = engine.complete(workers=RayWorkers(count=2))
    assert again.chunks_stored_before == again.chunks_done == COUNT
    assert (again.tokens_computed, again.bytes_written) == (0, 0)
    assert stored(home) == wanted


@pytest.mark.soak  # a cluster's ten processes take over a minute to start and end
def test_a_worker_that_cannot_be_opened_ends_the_job(cluster, settings, tmp_path, capfd):
    """From the command line to the worker and back; a secret does not travel with the settings."""
    (tmp_path / "a.txt").write_text("The lamp burns.")
    made = settings(tmp_path / "home")
    options = [
        f"--set={name}={value}"
        for name, value in made.model_dump(include=made.model_fields_set).items()
    ]
    secret = "ab" * 32
    line = ["precompute", str(tmp_path / "a.txt"), "--ray", "local", "--workers", "1"]
    assert run([*line, *options, f"--set=encryption_key={secret}"]) == 1
    out, error = capfd.readouterr()
    assert out == ""
    said = "error: a worker failed: SettingsError: setting 'encryption_key' is set for the job"
    assert said in error
    assert secret not in error
    assert cluster.is_initialized()  # it was there before


def test_counts_and_options_that_make_no_sense(tmp_path, capfd):
    with pytest.raises(InputError, match="at least 1"):
        RayWorkers(count=0)
    assert run(["precompute", str(tmp_path), "--workers", "2"]) == 2
    assert "--workers needs --ray" in capfd.readouterr().err


def test_nothing_imports_ray_before_workers_are_opened():
    code = (
        "import sys, kvrag, kvrag.engine, kvrag.precompute.job, kvrag.precompute.ray_workers\n"
        "import kvrag.cli.main, kvrag.cli.precompute\n"
        "sys.exit(any(name.partition('.')[0] == 'ray' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
