"""Models of a hub, against a small one on 127.0.0.1; the library reads its settings at import."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kvrag.models.folder import INDEX
from kvrag.models.hub import HubId, hub_id
from tests.models.hub_server import Hub, Repository, repository_of, serve
from tests.tiny import make_tiny_model

#: `hub_folder` on the first argument, in a process of its own, which knows no torch.
_ASK = """
import json, sys
from kvrag.errors import KvragError
from kvrag.models import hub
hub._TIMEOUT_S = 1.0
try:
    print(json.dumps({"folder": str(hub.hub_folder(hub.hub_id(sys.argv[1])))}))
except KvragError as exc:
    print(json.dumps({"error": type(exc).__name__, "text": str(exc)}))
assert "torch" not in sys.modules
"""
_OPEN = """
import json, sys, torch
from pathlib import Path
from kvrag.models.source import open_model
model = open_model(sys.argv[1], Path(sys.argv[2]), dtype=torch.float32)
print(json.dumps({"folder": str(model.folder), "fingerprint": model.fingerprint}))
"""


@dataclass
class Said:
    """What a process wrote; `folder` is empty when there was an error."""

    stderr: str
    seconds: float
    folder: str = ""
    fingerprint: str = ""
    error: str = ""
    text: str = ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def hub(folder):
    with serve(Hub({"org/tiny": repository_of(folder)})) as served:
        yield served


@pytest.fixture
def ask(hub, tmp_path):
    """`ask(id)` in a new process with a cache of this test's own."""

    def run(model: str, *, code: str = _ASK, **environment: str) -> Said:
        ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "secret"}
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, model, str(tmp_path / "models")],
            env={**os.environ, **ours, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        seconds = time.perf_counter() - begun
        return Said(stderr=done.stderr, seconds=seconds, **json.loads(done.stdout))

    return run


def unreachable() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("Qwen/Qwen2.5-0.5B-Instruct@v1.0", HubId("Qwen/Qwen2.5-0.5B-Instruct", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("name", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("~/name", None),
        ("a/b/c", None),
        ("org/na me", None),
        ("org/name@", None),
        ("org/", None),
    ],
)
def test_what_is_an_id(text, expected):
    assert hub_id(text) == expected
    if expected is not None:
        assert str(expected) == text


def test_a_model_opens_from_the_hub_and_then_from_the_cache(hub, ask, folder):
    """What is downloaded is what is read; what is there is not asked for again."""
    hub.repositories["org/tiny"].files |= {
        "pytorch_model.bin": b"never",
        "consolidated.safetensors": b"never",
        "README.md": b"never",
        "onnx/model.onnx": b"never",
    }
    first = ask("org/tiny", code=_OPEN)
    assert Path(first.folder).name == hub.repositories["org/tiny"].commit
    assert first.stderr == ""  # progress is for terminals
    assert hub.authorizations == {"Bearer secret"}
    expected = {path.name for path in folder.iterdir()}
    assert hub.downloaded() == {path.name for path in Path(first.folder).iterdir()} == expected
    hub.requests.clear()
    second = ask("org/tiny", code=_OPEN)
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert hub.downloaded() == set()
    asked = [path for _, path in hub.requests if "org/tiny" in path]
    assert asked == ["/api/models/org/tiny/revision/main"]


@pytest.mark.parametrize("way", ["offline", "refused", "503"])
def test_without_the_hub_the_cache_serves(hub, ask, way):
    first = ask("org/tiny")
    environment = {"HF_HUB_OFFLINE": "1"} if way == "offline" else {}
    if way == "503":
        hub.status = 503
    else:
        environment["HF_ENDPOINT"] = unreachable()
    hub.requests.clear()
    again = ask("org/tiny", **environment)
    assert again.folder == first.folder
    assert again.seconds < 10
    assert hub.downloaded() == set()
    # Who asked for no network need not be told of it.
    assert ("was not of use" in again.stderr) == (way != "offline")
    other = ask("org/other", **environment)
    assert other.error == "ModelNotFoundError"
    reason = {"offline": "HF_HUB_OFFLINE is set", "refused": "refused", "503": "503"}[way]
    assert reason in other.text
    assert "no such folder is here" in other.text
    assert "the cache" in other.text


def test_a_server_that_stays_silent_is_given_up(ask):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said = ask("org/tiny", HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert said.error == "ModelNotFoundError"
    assert "timed out" in said.text
    assert said.seconds < 30


def test_revisions(hub, ask):
    commit = "f" * 40
    hub.repositories["org/tiny"] = replace(
        hub.repositories["org/tiny"], commit=commit, branches=("main", "v2")
    )
    tagged = ask("org/tiny@v2")
    assert Path(tagged.folder).name == commit
    hub.requests.clear()
    assert ask(f"org/tiny@{commit}").folder == tagged.folder
    # A commit never changes.
    assert [path for _, path in hub.requests if "org/tiny" in path] == []
    unknown = ask("org/tiny@v3")
    assert unknown.error == "ModelNotFoundError"
    assert "has no revision 'v3'" in unknown.text


def test_a_newer_commit_is_downloaded(hub, ask):
    old = ask("org/tiny")
    files = hub.repositories["org/tiny"].files
    config = json.dumps(json.loads(files["config.json"]) | {"rms_norm_eps": 1e-5}).encode()
    hub.repositories["org/tiny"] = Repository(files | {"config.json": config}, commit="a" * 40)
    hub.requests.clear()
    new = ask("org/tiny")
    assert Path(new.folder).name == "a" * 40
    assert (Path(new.folder) / "config.json").read_bytes() == config
    assert hub.downloaded() == {"config.json"}  # the cache knows the rest by content
    assert new.folder != old.folder


@pytest.mark.parametrize(
    ("model", "refusal", "expected"),
    [
        ("org/none", None, ["shows no repository of that name", "no such folder", "HF_TOKEN"]),
        ("org/shy", (401, "RepoNotFound"), ["shows no repository of that name", "HF_TOKEN"]),
        ("org/shut", (401, "GatedRepo"), ["gated", "/org/shut", "ask for access", "HF_TOKEN"]),
        ("org/shut", (403, "GatedRepo"), ["gated", "/org/shut", "ask for access", "HF_TOKEN"]),
        ("org/shut", (401, ""), ["refuses 'org/shut' with HTTP 401", "HF_TOKEN"]),
        ("org/shut", (403, ""), ["refuses 'org/shut' with HTTP 403", "HF_TOKEN"]),
        ("or--g/none", None, ["no hub has such a name"]),
    ],
)
def test_what_the_hub_does_not_give(hub, ask, folder, model, refusal, expected):
    if refusal is not None:
        hub.repositories[model] = repository_of(folder, refusal=refusal)
    said = ask(model)
    assert said.error == "ModelNotFoundError"
    assert all(part in said.text for part in expected), said.text
    assert "secret" not in said.text + said.stderr
    assert said.seconds < 10


@pytest.mark.parametrize(
    ("names", "error", "expected"),
    [
        (["tiny-Q4_K_M.gguf", "README.md"], "UnsupportedModelError", "tiny-Q4_K_M.gguf"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "UnsupportedModelError", "pickle"),
        (["config.json", "model.safetensors"], "ModelNotFoundError", "lacks tokenizer.json"),
        (
            ["README.md"],
            "ModelNotFoundError",
            "lacks config.json, tokenizer.json, *.safetensors",
        ),
    ],
)
def test_repositories_that_cannot_be_opened(hub, ask, names, error, expected):
    hub.repositories["org/odd"] = Repository(dict.fromkeys(names, b"{}"))
    said = ask("org/odd")
    assert said.error == error
    assert expected in said.text
    assert hub.downloaded() == set()


def _in_shards(folder: Path, path: Path) -> Path:
    """The model in two shards with an index, and a file beside them that is none of it."""
    shutil.copytree(folder, path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        places |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (path / "consolidated.safetensors").write_bytes(b"never")
    return path


def test_a_download_that_breaks_off_goes_on(hub, ask, folder, tmp_path):
    """Whole files stay; an incomplete copy is not taken for a model when the network goes."""
    hub.repositories["org/big"] = repository_of(_in_shards(folder, tmp_path / "shards"))
    hub.broken = {"model-00002-of-00002.safetensors"}
    said = ask("org/big")
    assert said.error == "ModelNotFoundError"
    assert "was not of use" in said.text
    assert ask("org/big", HF_HUB_OFFLINE="1").error == "ModelNotFoundError"
    hub.broken = set()
    hub.requests.clear()
    done = ask("org/big")
    assert hub.downloaded() == {"model-00002-of-00002.safetensors"}
    assert "consolidated.safetensors" not in {path.name for path in Path(done.folder).iterdir()}
    assert ask("org/big", HF_HUB_OFFLINE="1").folder == done.folder
    lost = next(Path(done.folder).glob("model-00001*"))
    lost.unlink()
    said = ask("org/big", HF_HUB_OFFLINE="1")
    assert said.error == "ModelNotFoundError"
    assert f"an incomplete copy (it lacks {lost.name})" in said.text


def test_what_other_programs_left_in_the_cache_is_completed(hub, ask):
    """A cache with a pickle alone is no reason to refuse a repository that has safetensors too."""
    hub.repositories["org/tiny"].files["pytorch_model.bin"] = b"pickle"
    done = Path(ask("org/tiny").folder)
    for path in done.iterdir():
        if path.name != "config.json":
            path.unlink()
    (done / "pytorch_model.bin").write_bytes(b"pickle")
    assert ask("org/tiny", HF_HUB_OFFLINE="1").error == "ModelNotFoundError"
    assert ask("org/tiny").folder == str(done)
    assert (done / "model.safetensors").exists()


def test_a_cache_that_cannot_be_written(ask, tmp_path):
    (tmp_path / "hf").write_text("a file in the way")
    said = ask("org/tiny")
    assert said.error == "ModelError"
    assert "cannot be kept in" in said.text
