"""The redis tier against a bare redis-py loop that fetches the same fields of the same key.

Both fetch groups of layers, as a query reads them. Above the loop the tier looks up what it knows
of the block, fetches 16 bytes that tell whether that still holds, and checks each layer's length.
Checksums are the reader's, for any tier. Where it is installed, redis-benchmark says what the
server and its socket do without Python: a layer's bytes as a string, eight in a pipeline.

The server is that of `redis_url`, or one of its own on a unix socket.
"""

from __future__ import annotations

import csv
import io
import math
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from kvrag.bench.frame import median
from kvrag.bench.store.options import (
    Row,
    Section,
    Skipped,
    StoreOptions,
    Target,
    check,
    make_blocks,
)
from kvrag.bench.store.turns import in_turns, ratio, timed
from kvrag.config import Settings
from kvrag.store.block import Block
from kvrag.store.errors import TierError
from kvrag.store.keys import BlockKey
from kvrag.store.redis import RedisTier
from kvrag.store.redis_address import RedisAddress

__all__ = ["redis_section", "redis_url"]

#: Layers of a stream's largest read.
_LARGEST = 8
_START_S = 10.0
_BENCHMARK_TIMEOUT_S = 120
_REQUESTS = 1000  # its clock has milliseconds


def redis_section(url: str, settings: Settings, options: StoreOptions) -> Section:
    """Measure it. Keys are written under a prefix of this run alone, and deleted at its end.

    Raises:
        Skipped: no redis-py, a Redis that does not answer, one of Sentinel or a cluster.
    """
    address = RedisAddress.parse(url)
    if address.kind not in ("single", "unix"):
        raise Skipped(f"{address} is not one server; measure redis://, rediss:// or unix://")
    try:
        import redis
    except ImportError as exc:
        raise Skipped("redis-py is not installed: pip install 'kvrag[redis]'") from exc
    prefix = f"kvrag-bench-{secrets.token_hex(8)}:"
    blocks = make_blocks(options)
    tier = RedisTier(
        url,
        prefix=prefix,
        ttl_s=3600,
        connect_timeout_s=settings.redis_connect_timeout_s,
        timeout_s=settings.redis_timeout_s,
    )
    with tier, redis.Redis.from_url(url) as client:
        try:
            for block in blocks:
                tier.put(block.header.key, block)
            contestants: dict[str, Callable[[], float]] = {
                "bare": partial(_pass, partial(_bare, client, prefix, options.layers), blocks),
                "tier": partial(_pass, partial(_tier, tier, options.layers), blocks),
            }
            beside = _RedisBenchmark(address, client, f"{prefix}value", options)
            taken = in_turns(contestants | beside.contestants, options.repetitions)
        except (TierError, redis.RedisError) as exc:
            # The address masks its password; the tier's message does, too.
            reason = str(exc) if isinstance(exc, TierError) else type(exc).__name__
            raise Skipped(f"{address}: {reason}") from None
        finally:
            with suppress(TierError, redis.RedisError):
                for block in blocks:
                    tier.delete(block.header.key)
                client.delete(f"{prefix}value")
    ms = {name: median([1e3 * s / len(blocks) for s in of]) for name, of in taken.items()}
    gb_s = {name: median([options.nbytes / of / 1e6]) for name, of in ms.items()}
    of_bare = {name: ratio(taken["bare"], of) for name, of in taken.items()}
    figures: dict[str, Any] = {"redis_py": redis.__version__, "ms": ms, "gb_s": gb_s}
    figures["of_bare"] = of_bare
    rows = [
        Row("bare redis-py loop", ms["bare"], gb_s["bare"]),
        Row("redis tier", ms["tier"], gb_s["tier"], f"{of_bare['tier']:.0%} of the bare loop"),
    ]
    if beside.reason is None:
        figures["of_benchmark"] = share = ratio(taken["redis_benchmark"], taken["tier"])
        rows.append(
            Row(
                "redis-benchmark",
                ms["redis_benchmark"],
                gb_s["redis_benchmark"],
                f"the tier reaches {share:.0%} of it",
            )
        )
    else:
        figures["benchmark_skipped"] = beside.reason
        rows.append(Row("redis-benchmark", relation=f"skipped: {beside.reason}"))
    return Section(figures, tuple(rows), (Target("redis.of_bare", of_bare["tier"], 0.9),))


@contextmanager
def redis_url(settings: Settings) -> Iterator[str]:
    """The URL of the settings' Redis, or of one of our own that ends with the block.

    Raises:
        Skipped: there is neither, or it does not start.
    """
    if settings.redis_url is not None:
        yield settings.redis_url.get_secret_value()
        return
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise Skipped("no redis_url (KVRAG_REDIS_URL) is set and redis-server is not installed")
    # A short path: that of a socket has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="kvrag-") as folder:
        socket = Path(folder) / "s"
        command = [program, "--port", "0", "--unixsocket", str(socket), "--dir", folder]
        command += ["--save", "", "--appendonly", "no"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end_s = time.monotonic() + _START_S
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > end_s:
                    raise Skipped(f"{program} does not start")
                time.sleep(0.02)
            yield f"unix://{socket}"
        finally:
            process.kill()
            process.wait()


class _RedisBenchmark:
    """redis-benchmark against the same server, or the `reason` why not."""

    def __init__(self, address: RedisAddress, client: Any, key: str, options: StoreOptions) -> None:
        self._key, self._options = key, options
        self._depth = min(_LARGEST, options.layers)
        program = shutil.which("redis-benchmark") or shutil.which("valkey-benchmark")
        self.reason: str | None = None
        if program is None:
            self.reason = "redis-benchmark is not installed"
        elif address.tls or any(address.login.values()):
            # Its command line, which everybody may read, would hold the password.
            self.reason = "it is asked neither over TLS nor with a password"
        if self.reason is not None:
            return
        client.set(key, secrets.token_bytes(options.layer_nbytes))
        if address.path:
            where = ["-s", address.path]
        else:
            ((host, port),) = address.nodes
            where = ["-h", host, "-p", str(port)]
        self._command = [str(program), *where, "--dbnum", str(address.db)]

    @property
    def contestants(self) -> dict[str, Callable[[], float]]:
        return {} if self.reason is not None else {"redis_benchmark": self._seconds}

    def _seconds(self) -> float:
        """Seconds for the layers of all blocks."""
        layers = self._options.layers * self._options.blocks
        requests = max(layers, _REQUESTS)
        command = [*self._command, "-c", "1", "-P", str(self._depth), "-n", str(requests), "--csv"]
        run = subprocess.run(
            [*command, "GET", self._key],
            capture_output=True,
            text=True,
            timeout=_BENCHMARK_TIMEOUT_S,
            check=False,
        )
        try:
            *_, row = csv.reader(io.StringIO(run.stdout.strip()))
            rate = float(row[1])
        except (ValueError, IndexError) as exc:
            raise Skipped("redis-benchmark gave no figures") from exc
        if not 0 < rate < math.inf:
            raise Skipped(f"redis-benchmark says {rate} requests a second")
        return layers / rate


def _pass(bring: Callable[[BlockKey], list[Any]], blocks: Sequence[Block]) -> float:
    """Seconds to bring all blocks, each compared with what was put when the clock has stopped."""
    brought: list[list[Any]] = []
    seconds = timed(lambda: brought.extend(bring(block.header.key) for block in blocks))
    for block, segments in zip(blocks, brought, strict=True):
        check(segments, block)
    return seconds


def _tier(tier: RedisTier, layers: int, key: BlockKey) -> list[Any]:
    brought: list[Any] = []
    for first, last in _groups(layers):
        brought += tier.segments(key, first, last) or ()
    return brought


def _bare(client: Any, prefix: str, layers: int, key: BlockKey) -> list[Any]:
    brought: list[Any] = []
    for first, last in _groups(layers):
        brought += client.hmget(f"{prefix}{key}", range(first, last))
    return brought


def _groups(layers: int) -> Iterator[tuple[int, int]]:
    """The reads of a stream: 1, 2, 4, 8, 8, … layers."""
    first = 0
    while first < layers:
        last = min(layers, first + min(first + 1, _LARGEST))
        yield first, last
        first = last
