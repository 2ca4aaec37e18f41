"""A hub on 127.0.0.1 that speaks as much of the protocol as downloading a model needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files by name, under one commit; `refusal` is (HTTP status, error code) for its files."""

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    branches: tuple[str, ...] = ("main",)
    refusal: tuple[int, str] | None = None


@dataclass
class Hub:
    """What is served, what was asked for, and what goes wrong."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    #: What the requests for models carried as their right to them.
    authorizations: set[str | None] = field(default_factory=set)
    #: Status of every answer, when it is not None.
    status: int | None = None
    #: Files that end the connection after half their bytes.
    broken: set[str] = field(default_factory=set)
    url: str = ""

    def downloaded(self) -> set[str]:
        """Names of the files whose content was asked for."""
        asked = (path for method, path in self.requests if method == "GET" and "/resolve/" in path)
        return {path.rpartition("/")[2] for path in asked}


def repository_of(folder: Path, **options) -> Repository:
    return Repository({path.name: path.read_bytes() for path in folder.iterdir()}, **options)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """`hub.url` answers until the end of the block."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append((self.command, path))
        if "agent" not in path:
            self.served.authorizations.add(self.headers.get("Authorization"))
        if self.served.status is not None:
            self._answer(self.served.status, b"")
        elif path.startswith("/api/models/"):
            self._listing(path.removeprefix("/api/models/"))
        else:
            self._file(path.strip("/"))

    def _listing(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        repository = self.served.repositories.get(name)
        if repository is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif (revision or "main") not in (*repository.branches, repository.commit):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif repository.refusal is not None and repository.refusal[1] != "GatedRepo":
            self._refuse(repository)
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            listing = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings}
            self._answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _file(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        _, _, file = rest.partition("/")
        repository = self.served.repositories.get(name)
        if repository is not None and repository.refusal is not None:
            self._refuse(repository)
            return
        content = None if repository is None else repository.files.get(file)
        if repository is None or content is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
        }
        self._answer(200, content, headers, broken=file in self.served.broken)

    def _refuse(self, repository: Repository) -> None:
        status, code = repository.refusal or (500, "")
        self._answer(status, b"", {"X-Error-Code": code} if code else {})

    def _answer(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        *,
        broken: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if broken else content)
        self.close_connection = broken
