"""Run the application under uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from kvrag.config import Settings
from kvrag.engine import Engine
from kvrag.errors import KvragError, SettingsError
from kvrag.serving.app import create_app
from kvrag.serving.queue import ModelQueue
from kvrag.serving.startup import checked_blending, prepare

__all__ = ["PortError", "Server", "bind", "run"]

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: Seconds for responses to end once their work was cancelled, then for work that is not cancelled
#: before a chunk or document is done.
_RESPONSES_S = 5
_WORK_S = 10.0


class PortError(KvragError):
    """The port is in use, or this user may not have it."""


class Server(uvicorn.Server):
    """Cancels the model's work as soon as it stops. Whoever runs it handles signals."""

    def __init__(self, engine: Engine, *, ready: Callable[[], None] = lambda: None) -> None:
        """`ready` is called when requests are accepted."""
        app = create_app(engine)
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_RESPONSES_S,
            )
        )
        self.queue: ModelQueue = app.state.queue
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.stop()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            # Its client does not read; an orderly close would wait for that.
            connection.transport.abort()
        await asyncio.sleep(0)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal again after its end, which kills the process.
        yield


def run(settings: Settings, announce: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGINT or SIGTERM; in the main thread only.

    Args:
        announce: called with the URL when requests are accepted.

    Raises:
        SettingsError: the host is no loopback address.
        PortError: the port cannot be had.
        ModelError, StoreError: see `Engine.open`.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind(settings.host, settings.port))
        signals = stack.enter_context(_Signals())
        try:
            engine = stack.enter_context(Engine.open(settings))
            engine.blending = checked_blending(engine)
            prepare(engine)
            _listen(listener)
            server = Server(engine, ready=lambda: announce(_url(listener)))
            signals.to(server)
            asyncio.run(server.serve([listener]))
        except _Stopped:
            return
        if not server.queue.close(_WORK_S):
            # What is stored is whole at any instant, so leaving now is safe, and better than to
            # make whoever stops the server wait for minutes.
            _LOG.warning("work that cannot be interrupted was abandoned")
            os._exit(0)


def bind(host: str, port: int) -> socket.socket:
    """A socket on a loopback address; connections are refused until it listens.

    Raises:
        SettingsError: the host is no loopback address.
        PortError: the port cannot be had.
    """
    family, address = _loopback(host)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as exc:
        listener.close()
        raise PortError(_sentence(host, port, exc)) from exc
    return listener


def _listen(listener: socket.socket) -> None:
    # Between bind and here another process may have begun to listen on the same port.
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(128)
    except OSError as exc:
        raise PortError(_sentence(host, port, exc)) from exc


def _loopback(host: str) -> tuple[socket.AddressFamily, str]:
    address = "127.0.0.1" if host == "localhost" else host
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        parsed = None
    if parsed is None or not parsed.is_loopback:
        raise SettingsError(
            f"host is {host!r}; without API keys only this machine is served: give 127.0.0.1, "
            "localhost or ::1"
        )
    return (socket.AF_INET if parsed.version == 4 else socket.AF_INET6), address


def _sentence(host: str, port: int, exc: OSError) -> str:
    if exc.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; give another with --port, or 0 to pick one"
    return f"port {port} of {host} cannot be had: {exc.strerror}"


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Stopped(BaseException):
    """A signal came before the server ran. No error, so that nobody takes it for one."""


class _Signals:
    """SIGINT and SIGTERM end what runs, from the opening of the model to the end of the server."""

    def __init__(self) -> None:
        self._server: Server | None = None

    def to(self, server: Server) -> None:
        """From now on signals stop `server`."""
        self._server = server

    def __enter__(self) -> _Signals:
        self._before = {sig: signal.signal(sig, self._handle) for sig in _SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for sig, handler in self._before.items():
            signal.signal(sig, handler)

    def _handle(self, sig: int, frame: FrameType | None) -> None:
        if self._server is None:
            raise _Stopped
        self._server.handle_exit(sig, frame)
