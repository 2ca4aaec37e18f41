"""LMCache's storage without an engine: JSON lines on standard input and output.

    PYTHON lmcache_store.py

The first line in says what to open, `{"backend", "place", "layers", "tokens", "layer_nbytes",
"blocks"}`: `backend` is `disk`, `disk_direct` (with its option for `O_DIRECT`) or `redis`, `place`
a folder or a URL. The answer is `{"ready": {"version"}}`. Every further line is `{"do": "put"}` or
`{"do": "get"}`, of all blocks; the answer is `{"seconds"}`. A put ends when the backend has all
blocks; a get brings each into LMCache's own memory, and is compared with what was put when the
clock has stopped. A failure is `{"error": sentence}` and the end.

This runs under the peer's own interpreter, so it imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_POLL_S = 0.0005
_STORED_S = 120.0


def main() -> None:
    """Serve until standard input ends."""
    # What the peer prints must not come between the lines: from here on, that is standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        storage = Storage(**json.loads(sys.stdin.readline()))
        send({"ready": {"version": storage.version}})
        for line in sys.stdin:
            send({"seconds": getattr(storage, json.loads(line)["do"])()})
    except BaseException as exc:
        send({"error": f"{type(exc).__name__}: {exc}"})
        raise
    finally:
        # Its threads do not end by themselves.
        answers.close()
        os._exit(0)


class Storage:
    """LMCache's storage manager with one backend, and the blocks that it is asked for."""

    def __init__(
        self, backend: str, place: str, layers: int, tokens: int, layer_nbytes: int, blocks: int
    ) -> None:
        os.environ["LMCACHE_TRACK_USAGE"] = "false"
        os.environ["LMCACHE_LOG_LEVEL"] = "WARNING"
        from importlib.metadata import version

        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.event_manager import EventManager
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.storage_manager import StorageManager

        torch.set_num_threads(1)
        self.version = version("lmcache")
        self._torch, self._format = torch, MemoryFormat.KV_2LTD
        width = layer_nbytes // (2 * tokens * torch.bfloat16.itemsize)
        self._shape = torch.Size([2, layers, tokens, width])
        nbytes = blocks * layers * layer_nbytes
        if backend == "redis":
            where: dict[str, Any] = {"remote_url": place, "remote_serde": "naive"}
            self._where = "RemoteBackend"
        else:
            where = {
                "local_disk": os.path.join(place, ""),
                "max_local_disk_size": 4 + nbytes / 2**29,
            }
            if backend == "disk_direct":
                where["extra_config"] = {"use_odirect": True}
            self._where = "LocalDiskBackend"
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=tokens,
            local_cpu=False,
            max_local_cpu_size=max(0.5, 3 * nbytes / 2**30),
            **where,
        )
        metadata = LMCacheMetadata(
            model_name="benchmark",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            kv_dtype=torch.bfloat16,
            local_worker_id=0,
            kv_shape=(layers, 2, tokens, 1, width),
            chunk_size=tokens,
        )
        self._manager = StorageManager(
            config=config, metadata=metadata, event_manager=EventManager()
        )
        self._blocks = [torch.randn(self._shape, dtype=torch.bfloat16) for _ in range(blocks)]
        self._keys = [
            CacheEngineKey(
                model_name="benchmark",
                world_size=1,
                worker_id=0,
                chunk_hash=os.getpid() * 100_000 + number,
                dtype=torch.bfloat16,
            )
            for number in range(blocks)
        ]

    def put(self) -> float:
        """Seconds until the backend has all blocks, which it had not before."""
        self._manager.batched_remove(self._keys)
        objects = []
        for block in self._blocks:
            held = self._manager.allocate(
                self._shape,
                self._torch.bfloat16,
                fmt=self._format,
                eviction=True,
                busy_loop=True,
            )
            held.tensor.view(self._shape).copy_(block)
            objects.append(held)
        begun = time.perf_counter()
        self._manager.batched_put(self._keys, objects)
        while not all(self._manager.contains(key, [self._where]) for key in self._keys):
            if time.perf_counter() - begun > _STORED_S:
                raise RuntimeError(f"{self._where} has not stored the blocks in {_STORED_S:g} s")
            time.sleep(_POLL_S)
        return time.perf_counter() - begun

    def get(self) -> float:
        """Seconds until all blocks are in memory, one after the other."""
        begun = time.perf_counter()
        brought = [self._manager.get(key, location=self._where) for key in self._keys]
        seconds = time.perf_counter() - begun
        for held, block in zip(brought, self._blocks, strict=True):
            if held is None or not self._torch.equal(held.tensor.view(self._shape), block):
                raise RuntimeError("a block that was put came back missing or different")
            held.ref_count_down()
        return seconds

    def clear(self) -> float:
        """Remove the blocks."""
        self._manager.batched_remove(self._keys)
        return 0.0


if __name__ == "__main__":
    main()
