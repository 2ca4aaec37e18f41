"""A process that has everything imported, and forks itself for each command of a page.

    python -m tests.docs.zygote SOCKET

A command or a snippet takes seconds to import what it needs, and milliseconds to run on a tiny
model. Who connects to the socket (`tests/docs/shim.py`, `tests/docs/runner.py`) sends one JSON
object, with stdin, stdout and stderr as descriptors: `argv`, `cwd`, `env`, and `session`. A command
answers with its exit code. A session runs each snippet that is sent, in one namespace, and
answers with its traceback, or null, and with what it printed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any

MESSAGE = 2**20
_IMPORTS = (
    "faiss",
    "kvrag.cli.main",
    "kvrag.cli.serve",
    "kvrag.client",
    "kvrag.engine",
    "kvrag.precompute",
    "kvrag.serving.run",
    "semantic_text_splitter",
    "sentence_transformers",
    "transformers.models.bert.modeling_bert",
)


def main(path: str) -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Do what is asked for, and end the process."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        data, descriptors, _, _ = socket.recv_fds(connection, MESSAGE, 3)
        request = json.loads(data)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        _move(request)
        if request["session"]:
            _session(connection)
            code = 0
        else:
            connection.send(json.dumps({"pid": os.getpid()}).encode())
            from kvrag.cli.main import run

            sys.argv = ["kvrag", *request["argv"]]
            code = run(request["argv"])
            sys.stdout.flush()
            connection.send(json.dumps({"code": code}).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _move(request: dict[str, Any]) -> None:
    """Stand where the command was called, with its environment."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])


def _session(connection: socket.socket) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    while data := connection.recv(MESSAGE):
        request = json.loads(data)
        _move(request)
        printed, error = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(request["code"], request["name"], "exec"), names)
        except BaseException:
            error = traceback.format_exc()
        answer = {"error": error, "out": printed.getvalue()[-10_000:]}
        connection.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main(sys.argv[1])
