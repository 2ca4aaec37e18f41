"""A TCP proxy that spoils what a server answers: late, never, or in other words."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """Listens on `port`, and passes on what comes to the `target` port.

    `delay_s`: how much later each piece of an answer is passed on. `budget`: how many more bytes of
    answers pass before everything hangs; None is no end. `largest`: pieces of more bytes hang, as
    on a path that drops large packets; `swallowed` counts them. `garbage`: what is answered
    instead. `deaf`: nothing that is asked is passed on. `round_trips` counts how often something
    was asked after an answer had begun, or first of all.
    """

    def __init__(self, target: int) -> None:
        self.delay_s, self.budget, self.garbage = 0.0, None, None
        self.swallowed = 0
        self.largest, self.deaf = None, False
        self.round_trips, self._answered = 0, True
        self._target = target
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._spawn(self._accept)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def close(self) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, None
        for one in (self._listener, *sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _spawn(self, work, *arguments) -> None:
        threading.Thread(target=self._quietly, args=(work, *arguments), daemon=True).start()

    def _quietly(self, work, *arguments) -> None:
        with contextlib.suppress(OSError):
            work(*arguments)

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                if self._sockets is None:
                    near.close()
                    far.close()
                    return
                self._sockets += [near, far]
            self._spawn(self._pass_on, near, far, False)
            self._spawn(self._pass_on, far, near, True)

    def _pass_on(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                with self._lock:
                    self.round_trips += not answers and self._answered
                    self._answered = answers
                if answers or not self.deaf:
                    sink.sendall(self._spoiled(data) if answers else data)
        finally:
            for one in (source, sink):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _spoiled(self, data: bytes) -> bytes:
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.largest is not None and len(data) > self.largest:
            self.swallowed += 1
            return b""
        if self.garbage is not None:
            return self.garbage
        if self.budget is None:
            return data
        with self._lock:
            passed = data[: self.budget]
            self.budget -= len(passed)
        return passed
