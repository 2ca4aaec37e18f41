"""The connection to a Redis: pipelines, time-outs, and foreign errors made ours.

redis-py keeps the connections; each operation takes one. It waits for none longer than the read
time-out, connects within the connect time-out, and waits that long for each piece of an answer.
Nothing is tried twice: a time-out is one time-out. Who comes again, and when, is not known here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import TierError, TierFullError
from .redis_answers import READ_NBYTES, parser_into

if TYPE_CHECKING:
    from .buffers import BufferPool
    from .redis_address import RedisAddress

__all__ = ["Command", "RedisLink"]

#: A command and its arguments: text, numbers, bytes or views of bytes.
Command = tuple[Any, ...]

#: Bytes asked of a cluster's sockets at a time. A layer is some hundred KiB: fewer calls.
_CLUSTER_READ_NBYTES = 2**18
#: Answers that say that nothing can be written, while reading goes on.
_READ_ONLY = ("OOM ", "READONLY ", "MISCONF ", "NOREPLICAS ")


class RedisLink:
    """Connections to one Redis, made when they are needed. Thread-safe.

    Raises `ImportError` where redis-py is not installed.
    """

    def __init__(
        self,
        address: RedisAddress,
        tier: str,
        *,
        connect_timeout_s: float,
        timeout_s: float,
        connections: int,
        buffers: BufferPool,
    ) -> None:
        """`tier` is the name in errors, `connections` how many there are at most.

        `buffers`: memory for large values of answers.
        """
        import redis  # an extra; what is missing is told here and not by the first query

        self._errors = redis.exceptions
        self._address, self._tier = address, tier
        self._connect_timeout_s, self._timeout_s = connect_timeout_s, timeout_s
        self._connections = connections
        self._buffers = buffers
        self._free = threading.BoundedSemaphore(connections)
        self._lock = threading.Lock()
        self._client: Any = None
        self._sentinels: list[Any] = []
        self._closed = False

    def run(self, *commands: Command, atomic: bool = False) -> list[Any]:
        """Send the commands together; their answers, in order, bytes where they are text.

        Large ones may be read-only views of bytes.

        An answer that is an error stands in its place as an exception, see `refused`. `atomic`: no
        other client's command comes between, and all are done or none; then any error is raised.

        Raises `TierError`, or `TierFullError` where Redis takes no writes at present, and
        `MemoryError` where there is no memory for an answer.
        """
        with self._outages(), self._connection():
            pipeline = self._opened().pipeline(transaction=atomic)
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = pipeline.execute(raise_on_error=atomic)
            if not isinstance(replies, list) or len(replies) != len(commands):
                raise ValueError(f"{len(commands)} commands have another number of answers")
            return replies

    def refused(self, reply: object) -> str | None:
        """The code of an answer that is Redis's refusal (`WRONGTYPE`), or None if it is none.

        Raises `TierError` for any other error in an answer's place.
        """
        if not isinstance(reply, Exception):
            return None
        with self._outages():
            code = _text_of(reply).partition(" ")[0]
            if isinstance(reply, self._errors.ResponseError) and code == "WRONGTYPE":
                return code
            raise reply

    def scan(self, pattern: bytes, count: int) -> Iterator[bytes]:
        """Keys that match, of all nodes; perhaps one twice. `count` keys are looked at a time.

        Raises as `run`.
        """
        with self._outages():
            keys = self._opened().scan_iter(match=pattern, count=count)
        while True:
            with self._outages(), self._connection():
                key = next(keys, None)
                if key is None:
                    return
                if not isinstance(key, bytes | memoryview):
                    raise TypeError("a key is no bytes")
            yield bytes(key)

    def close(self) -> None:
        """Drop the connections, also those in use. A second call does nothing."""
        with self._lock:
            clients = [self._client, *self._sentinels]
            self._client, self._sentinels, self._closed = None, [], True
        for client in filter(None, clients):
            with contextlib.suppress(Exception):  # what cannot say goodbye is gone all the same
                client.close()

    def malformed(self, what: str) -> TierError:
        """The error for an answer that no Redis gives."""
        return TierError(self._tier, f"{self._address} answers {what}: it seems to be no Redis")

    @contextlib.contextmanager
    def _connection(self) -> Iterator[None]:
        if not self._free.acquire(timeout=self._timeout_s):
            raise TierError(
                self._tier, f"none of its {self._connections} connections became free in time"
            )
        try:
            yield
        finally:
            self._free.release()

    def _opened(self) -> Any:
        with self._lock:
            self._check_open()
            if self._client is not None:
                return self._client
        # Without the lock: a cluster is asked for its nodes here.
        client = self._open()
        with self._lock:
            if self._client is None and not self._closed:
                self._client = client
            else:
                client.close()
            self._check_open()
            return self._client

    def _check_open(self) -> None:
        if self._closed:
            raise TierError(self._tier, "it is closed")

    @contextlib.contextmanager
    def _outages(self) -> Iterator[None]:
        """The one place where redis-py's errors become ours."""
        with self._lock:
            self._check_open()
        try:
            yield
        except (TierError, MemoryError):  # none for an answer is no fault of Redis
            raise
        except Exception as exc:  # what garbage does to a parser is not always a RedisError
            text = _text_of(exc)
            reason = self._address.masked(text)
            kind = TierFullError if self._is_read_only(exc) else TierError
            if isinstance(exc, self._errors.RedisError | OSError):
                error = kind(self._tier, reason or type(exc).__name__)
            else:
                error = self.malformed(f"what cannot be read ({type(exc).__name__})")
            # An answer may quote what was sent to it, passwords included.
            raise error from (exc if self._address.masked(str(exc)) == str(exc) else None)

    def _is_read_only(self, exc: Exception) -> bool:
        errors = self._errors
        if isinstance(exc, errors.OutOfMemoryError | errors.ReadOnlyError):
            return True
        return isinstance(exc, errors.ResponseError) and _text_of(exc).startswith(_READ_ONLY)

    def _open(self) -> Any:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        address = self._address
        once = Retry(NoBackoff(), 0)
        sockets: dict[str, Any] = {
            "socket_timeout": self._timeout_s,
            "socket_connect_timeout": self._connect_timeout_s,
        }
        common: dict[str, Any] = {
            **sockets,
            "socket_read_size": READ_NBYTES,
            "max_connections": self._connections,
            "protocol": 2,
            **address.login,
            **address.options,
        }
        tls: dict[str, Any] = {"ssl": True} if address.tls else {}
        if address.kind == "cluster":
            from redis.cluster import ClusterNode, RedisCluster

            nodes = [ClusterNode(host, port) for host, port in address.nodes]  # type: ignore[no-untyped-call]
            common["socket_read_size"] = _CLUSTER_READ_NBYTES
            return RedisCluster(startup_nodes=nodes, retry=once, **common, **tls)
        # Not hiredis, where that is installed: it takes as much memory as an answer announces, GBs
        # for a few bytes of garbage. (A cluster's connections cannot be told.)
        common |= {"retry": once, "db": address.db, "parser_class": parser_into(self._buffers)}
        if address.kind == "sentinel":
            from redis.sentinel import Sentinel

            own = {**sockets, **address.sentinel, "retry": once, **tls}
            own |= {name: value for name, value in address.options.items() if "ssl" in name}
            manager: Any = Sentinel(address.nodes, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
            self._sentinels = list(manager.sentinels)
            return manager.master_for(address.service, **common, **tls)
        if address.kind == "unix":
            pool = redis.ConnectionPool(
                connection_class=redis.UnixDomainSocketConnection, path=address.path, **common
            )
        else:
            ((host, port),) = address.nodes
            connection = redis.SSLConnection if address.tls else redis.Connection
            pool = redis.ConnectionPool(connection_class=connection, host=host, port=port, **common)
        return redis.Redis.from_pool(pool)


def _text_of(exc: Exception) -> str:
    """Redis's own words, without what redis-py and a transaction's end put in front of them.

    A Redis that became full while it queued a transaction tells its reason with the whole.
    """
    text = str(exc)
    for before in (" of pipeline caused error: ", "Transaction discarded because of: "):
        text = text.rpartition(before)[2]
    return text
