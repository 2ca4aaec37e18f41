"""What encrypting stored KV costs: blocks read and written plain and sealed, in turns.

Reading is all layers of a block from the disk's page cache, checked. The cipher alone, over memory
in the CPU's caches, bounds both. Times are the processor's, so that neither what else the machine
does nor waiting for the disk counts.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrag.bench.frame import median, show
from kvrag.errors import MissingExtraError
from kvrag.store.block import Block, encode_block, verify_segment
from kvrag.store.disk import DiskTier
from kvrag.store.keys import BlockKey
from kvrag.store.sealed_tier import SealedTier
from kvrag.store.sealing import MASTER_KEY_NBYTES, Sealer
from kvrag.store.tier import Tier

__all__ = ["SealingOptions", "run"]


@dataclass(frozen=True, slots=True)
class SealingOptions:
    """Layers of a block, bytes of a layer (SmolLM2's of 256 tokens), and repetitions."""

    layers: int = 30
    layer_nbytes: int = 196_608
    repetitions: int = 30


def run(options: SealingOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON).

    Raises MissingExtraError where `cryptography` is not installed.
    """
    try:
        sealer = Sealer(secrets.token_bytes(MASTER_KEY_NBYTES))
    except ImportError as exc:
        raise MissingExtraError(
            "bench sealing needs cryptography: pip install 'kvrag[encryption]'"
        ) from exc
    block = _block(options)
    with (
        tempfile.TemporaryDirectory(prefix="kvrag-bench-") as folder,
        DiskTier(Path(folder) / "plain") as plain,
        SealedTier(DiskTier(Path(folder) / "sealed"), sealer) as sealed,
    ):
        times = _in_turns(
            {
                "write, plain": lambda: plain.put(block.header.key, block),
                "write, sealed": lambda: sealed.put(block.header.key, block),
                "read, plain": lambda: _read(plain, block),
                "read, sealed": lambda: _read(sealed, block),
                "cipher alone": _cipher(options),
            },
            options.repetitions,
        )
    nbytes = options.layers * options.layer_nbytes
    rates = {
        name: median([nbytes / seconds / 1e9 for seconds in taken]) for name, taken in times.items()
    }
    slower = {
        name: median(
            [b / a for a, b in zip(times[f"{name}, plain"], times[f"{name}, sealed"], strict=True)]
        )
        for name in ("write", "read")
    }
    result = {
        "benchmark": "sealing",
        "layers": options.layers,
        "layer_nbytes": options.layer_nbytes,
        "repetitions": options.repetitions,
        "gb_per_cpu_s": rates,
        "sealed_times_plain": slower,
        "sealed_nbytes": sealer.footprint(block.header),
        "plain_nbytes": block.nbytes,
    }
    rows = [
        (name, rate, slower.get(name.removesuffix(", sealed"), "")) for name, rate in rates.items()
    ]
    show(
        f"Encryption at rest: blocks of {nbytes / 2**20:.1f} MiB",
        ("what", "GB a processor second", "times plain"),
        rows,
        result,
    )
    return result


def _in_turns(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            started = time.thread_time()
            call()
            if repetition:  # the first opens and makes what the others find
                times[name].append(time.thread_time() - started)
    return times


def _read(tier: Tier, block: Block) -> None:
    """As a request reads: the header, every layer, and all checks."""
    header = tier.header(block.header.key)
    views = tier.segments(block.header.key, 0, len(block.segments))
    if header is None or views is None:
        raise RuntimeError("the block that was just written is not there")
    for index, view in enumerate(views):
        verify_segment(header, index, view)


def _cipher(options: SealingOptions) -> Callable[[], object]:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher = AESGCM(secrets.token_bytes(32))
    plain = bytearray(options.layer_nbytes)
    sealed = cipher.encrypt(bytes(12), plain, b"")

    def decrypt() -> None:
        for _ in range(options.layers):
            cipher.decrypt_into(bytes(12), sealed, b"", plain)

    return decrypt


def _block(options: SealingOptions) -> Block:
    shape = (options.layers, 3, 256, 64)
    return encode_block(
        key=BlockKey("0" * 32, "0" * 64),
        kind="chunk",
        fingerprint="bench",
        token_ids=range(256),
        k_shape=shape,
        v_shape=shape,
        dtype="bfloat16",
        codec="raw",
        codec_version=1,
        codec_digest="",
        segments=[secrets.token_bytes(options.layer_nbytes) for _ in range(options.layers)],
    )
