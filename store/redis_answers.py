"""redis-py's parser, for answers that are layers of hundreds of KiB: received where they stay.

Its own buffer copies each byte four times, into memory that the system clears first. Here a large
value goes from the socket into memory that was used before; everything else is redis-py's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .buffers import BufferPool

__all__ = ["READ_NBYTES", "parser_into"]

#: Bytes asked of the socket at a time, of what is no large value. What it brings of one is copied
#: once more.
READ_NBYTES = 2**14
#: Larger values are received in place: layers, and no header.
_SMALLEST = 2**16
#: Larger ones are not: no more memory than this is taken because an answer announces it.
_LARGEST = 2**24


def parser_into(buffers: BufferPool) -> type[Any]:
    """A parser class of redis-py, RESP 2, that gives large values as read-only views of `buffers`.

    Raises `ImportError` where redis-py is not installed.
    """
    from redis._parsers import _RESP2Parser
    from redis._parsers.socket import SERVER_CLOSED_CONNECTION_ERROR, SocketBuffer
    from redis.exceptions import ConnectionError as ClosedError

    class Received(SocketBuffer):
        # Of its further options, which only some versions have, nothing is used here.
        def read(self, length: int, **options: Any) -> Any:  # type: ignore[override]
            if not _SMALLEST < length <= _LARGEST:
                return super().read(length, **options)
            data = buffers.take(length)
            head = self._buffer.read(length)  # what came along with the line before
            done = len(head)
            data[:done] = head
            while done < length:
                got = self._sock.recv_into(data[done:])
                if not got:
                    raise ClosedError(SERVER_CLOSED_CONNECTION_ERROR)
                done += got
            super().read(0, **options)  # the end of its line
            return data.toreadonly()

    class Parser(_RESP2Parser):
        def on_connect(self, connection: Any) -> None:
            super().on_connect(connection)  # type: ignore[no-untyped-call]
            socket = connection._sock
            self._buffer = Received(socket, self.socket_read_size, connection.socket_timeout)

    return Parser
