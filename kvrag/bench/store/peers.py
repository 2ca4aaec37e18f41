"""kvrag's disk and redis tiers beside those of another store, in a process of its interpreter.

Both store blocks of the same bytes in the same folder and on the same Redis, and take turns. A get
of ours is opened, read and verified; the peer's is what its own interface brings into its memory.
Cold: the pages of the files were dropped from the page cache before. A put of ours is without
fsync, as the peer's; it ends when the file or the server has the block.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from kvrag.bench.frame import median
from kvrag.bench.peer_process import PeerError, PeerProcess
from kvrag.bench.peers import PeerOption
from kvrag.bench.store.disk import (
    drop_pages,
    get_from_disk,
    lay_out,
    put_to_disk,
    read_verified,
    write_plain,
)
from kvrag.bench.store.options import (
    Row,
    Section,
    Skipped,
    StoreOptions,
    Target,
    check,
    get,
    make_blocks,
)
from kvrag.bench.store.redis import redis_url
from kvrag.bench.store.turns import in_turns, ratio, timed
from kvrag.config import Settings
from kvrag.store.block import Block
from kvrag.store.errors import TierError
from kvrag.store.redis import RedisTier
from kvrag.store.tiered import TieredStore, TierSlot

__all__ = ["STORE_PEERS", "peer_section"]

#: The worker of each peer.
STORE_PEERS: Mapping[str, Path] = {
    "lmcache": Path(__file__).parents[1] / "peer_workers" / "lmcache_store.py"
}
_WANTED = 1.5
_BOUND = "disk_read_cached"

Contestants = dict[str, Callable[[], float]]


def peer_section(peer: PeerOption, settings: Settings, options: StoreOptions) -> Section:
    """Measure it.

    Raises:
        Skipped: the peer cannot start, or neither of its backends can be measured.
    """
    blocks = make_blocks(options)
    taken: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    version = ""
    for name, measure in (("disk", _disk), ("redis", _redis)):
        try:
            version, found = measure(peer, settings, options, blocks)
        except (Skipped, PeerError, TierError, ImportError) as exc:
            skipped[name] = str(exc)
        else:
            taken |= {f"{name}_{who}": of for who, of in found.items()}
    if not taken:
        raise Skipped("; ".join(dict.fromkeys(skipped.values())))
    ms = {name: median([1e3 * s / options.blocks for s in of]) for name, of in taken.items()}
    gb_s = {name: median([options.nbytes / of / 1e6]) for name, of in ms.items()}
    pairs = {name.removesuffix("_peer"): name for name in taken if name.endswith("_peer")}
    # Its option for direct I/O is another way to read the same blocks.
    ours = {name: name.replace("_direct", "") for name in pairs}
    times = {name: ratio(taken[theirs], taken[ours[name]]) for name, theirs in pairs.items()}
    figures: dict[str, Any] = {"version": version, "ms": ms, "gb_s": gb_s, "times": times}
    if _BOUND in taken:
        # What no get from the page cache that verifies exceeds.
        figures["bound"] = bound = ratio(taken["disk_get_cached_peer"], taken[_BOUND])
    figures["skipped"] = skipped
    rows = []
    for name in ms:
        if name == _BOUND:
            least = f"{bound:.2f} times as fast as {peer.label}: the bound of disk_get_cached"
            rows.append(Row("plain read and xxh3, page cache", ms[name], gb_s[name], least))
            continue
        mine = not name.endswith("_peer")
        who = f"{name} (kvrag)" if mine else f"{name.removesuffix('_peer')} ({peer.label})"
        pair = "" if mine else f"kvrag is {times[name.removesuffix('_peer')]:.2f} times as fast"
        rows.append(Row(who, ms[name], gb_s[name], pair))
    rows += [Row(name, relation=f"skipped: {reason}") for name, reason in skipped.items()]
    targets = [
        Target(f"{peer.label}.{name}", times[name], _WANTED) for name in times if "_get" in name
    ]
    return Section(figures, tuple(rows), tuple(targets))


def _disk(
    peer: PeerOption, settings: Settings, options: StoreOptions, blocks: list[Block]
) -> tuple[str, dict[str, list[float]]]:
    with (
        tempfile.TemporaryDirectory(prefix="kvrag-bench-", dir=options.folder) as name,
        ExitStack() as stack,
    ):
        mine, theirs, direct = (Path(name) / place for place in ("kvrag", "peer", "direct"))
        lay_out(mine, blocks)
        write_plain(Path(name) / "plain", blocks)
        contestants: Contestants = {
            "put": partial(put_to_disk, Path(name) / "put", blocks, fsync=False),
            "get_cold": partial(get_from_disk, mine, blocks, 1),
            "get_cached": partial(get_from_disk, mine, blocks, 1, cold=False),
            "read_cached": partial(read_verified, Path(name) / "plain", options),
        }
        for backend, folder in (("disk", theirs), ("disk_direct", direct)):
            folder.mkdir()
            process = stack.enter_context(_start(peer, backend, str(folder), options))
            suffix = "_direct_peer" if backend == "disk_direct" else "_peer"
            contestants[f"put{suffix}"] = partial(_stored, folder, process)
            contestants[f"get_cold{suffix}"] = partial(_cold, folder, process)
            if backend == "disk":
                contestants[f"get_cached{suffix}"] = partial(_cached, process)
            contestants[f"put{suffix}"]()  # turns go backwards, too
        return process.version, in_turns(contestants, options.repetitions)


def _redis(
    peer: PeerOption, settings: Settings, options: StoreOptions, blocks: list[Block]
) -> tuple[str, dict[str, list[float]]]:
    with redis_url(settings) as url, ExitStack() as stack:
        tier = RedisTier(url, prefix=f"kvrag-bench-{secrets.token_hex(8)}:", ttl_s=3600)
        store = stack.enter_context(TieredStore([TierSlot(tier)]))
        stack.callback(lambda: [store.delete(block.header.key) for block in blocks])
        process = stack.enter_context(_start(peer, "redis", url, options))
        stack.callback(_asked, process, "clear")
        contestants: Contestants = {
            "put": lambda: _put(store, blocks),
            "get": lambda: _get(store, blocks),
            "put_peer": partial(_asked, process, "put"),
            "get_peer": partial(_asked, process, "get"),
        }
        _put(store, blocks)
        _asked(process, "put")
        return process.version, in_turns(contestants, options.repetitions)


def _start(peer: PeerOption, backend: str, place: str, options: StoreOptions) -> PeerProcess:
    load = {
        "backend": backend,
        "place": place,
        "layers": options.layers,
        "tokens": options.tokens,
        "layer_nbytes": options.layer_nbytes,
        "blocks": options.blocks,
    }
    command = [peer.python, str(STORE_PEERS[peer.kind])]
    return PeerProcess(command, load, timeout_s=options.peer_timeout_s)


def _asked(process: PeerProcess, what: str) -> float:
    return float(process.ask({"do": what})["seconds"])


def _stored(folder: Path, process: PeerProcess) -> float:
    seconds = _asked(process, "put")
    drop_pages(folder)  # or the next one's reads wait for what is still being written
    return seconds


def _cold(folder: Path, process: PeerProcess) -> float:
    drop_pages(folder)
    return _asked(process, "get")


def _cached(process: PeerProcess) -> float:
    _asked(process, "get")
    return _asked(process, "get")


def _put(store: TieredStore, blocks: list[Block]) -> float:
    for block in blocks:
        store.delete(block.header.key)
    return timed(lambda: [store.put(block.header.key, block) for block in blocks])


def _get(store: TieredStore, blocks: list[Block]) -> float:
    brought: list[list[memoryview]] = []
    seconds = timed(lambda: brought.extend(get(store, block) for block in blocks))
    for block, segments in zip(blocks, brought, strict=True):
        check(segments, block)
    return seconds
