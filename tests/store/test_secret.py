from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from kvrag.store.errors import SecretError
from kvrag.store.secret import load_or_create_secret


def test_it_is_made_once(tmp_path):
    path = tmp_path / "home" / "secret"
    secret = load_or_create_secret(path)
    assert len(secret) == 32
    assert path.read_bytes() == secret
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_secret(str(path)) == secret
    assert os.listdir(path.parent) == ["secret"]


@pytest.mark.parametrize("content", [b"", b"short", bytes(31), bytes(33), bytes(100_000)])
def test_a_malformed_file_is_never_replaced(tmp_path, content):
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(SecretError, match="Restore it from a backup"):
        load_or_create_secret(path)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "secret", tmp_path / "folder"):
        with pytest.raises(SecretError, match="neither read nor made"):
            load_or_create_secret(path)


def test_a_file_open_to_others_is_warned_of(tmp_path, caplog):
    path = tmp_path / "secret"
    load_or_create_secret(path)
    assert not caplog.records
    path.chmod(0o644)
    load_or_create_secret(path)
    assert "chmod 600" in caplog.text


def test_threads_agree(tmp_path):
    found = []
    barrier = threading.Barrier(8)

    def load():
        barrier.wait()
        found.append(load_or_create_secret(tmp_path / "new" / "secret"))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_processes_agree(tmp_path):
    path = tmp_path / "new" / "secret"
    code = (
        "import sys; from kvrag.store.secret import load_or_create_secret; sys.stdin.read();"
        "print(load_or_create_secret(sys.argv[1]).hex())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.close()  # all at once
        process.stdin = None
    found = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert found == {path.read_bytes().hex()}
    assert os.listdir(path.parent) == ["secret"]
