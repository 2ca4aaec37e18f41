"""`kvrag serve` as a process: start, stop, refusals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from kvrag.errors import SettingsError
from kvrag.serving.run import bind
from tests.serving.harness import Raw, ask

COMMAND = [sys.executable, "-W", "error", "-c", "from kvrag.cli.main import main; main()", "serve"]
LONG = {"question": "long", "passages": ["x"], "max_tokens": 30000}


def _environment(tmp_path, model_folder) -> dict[str, str]:
    return os.environ | {
        "KVRAG_MODEL": str(model_folder),
        "KVRAG_HOME": str(tmp_path / "home"),
        "KVRAG_THREADS": "1",
    }


@contextmanager
def kvrag_serve(tmp_path, model_folder, *, errors=subprocess.PIPE):
    """The process and its URL."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0"],
        env=_environment(tmp_path, model_folder),
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, process.communicate()[1]
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_in_the_middle_of_a_stream_ends_it_cleanly(tmp_path, model_folder, number):
    with kvrag_serve(tmp_path, model_folder) as (process, url):
        running = Raw.post(url, "/v1/rag/query", LONG | {"stream": True})
        waiting = Raw.post(url, "/v1/rag/query", LONG)
        received = b""
        while b"event: token" not in received:
            received += running.read_first()
        process.send_signal(number)
        while piece := running.read_first():
            received += piece
        assert b"event: error" in received
        assert b'"code": "shutting_down"' in received
        assert b"[DONE]" not in received
        assert b" 503 " in waiting.read_first().splitlines()[0]
        running.drop()
        waiting.drop()
        output, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert output == ""
        assert all(line.startswith("info: ") for line in errors.splitlines()), errors


def test_port_in_use_is_one_sentence(tmp_path, model_folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--port", port],
            env=_environment(tmp_path, model_folder),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_missing_extra_is_named(tmp_path, model_folder):
    script = (
        "import sys; sys.modules['uvicorn'] = None; "
        "from kvrag.cli.main import run; sys.exit(run(['serve', '--port', '0']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=_environment(tmp_path, model_folder),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'kvrag[serve]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", ""])
def test_only_this_machine_is_served(host):
    with pytest.raises(SettingsError, match="only this machine is served"):
        bind(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_loopback_addresses(host):
    with bind(host, 0) as listener:
        assert listener.getsockname()[1] > 0


def test_a_process_answers(tmp_path, model_folder):
    with kvrag_serve(tmp_path, model_folder) as (process, url):
        assert ask(url, question="Who?", passages=["x"], max_tokens=2).status_code == 200
        assert httpx.get(f"{url}/health").json()["model"] == model_folder.name
        assert httpx.get(f"{url}/docs").status_code == 200
        process.terminate()
        assert process.wait(20) == 0
