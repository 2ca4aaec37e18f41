"""What a running `lmcache server` does with a block. LMCache's own Python runs this file.

    python lmcache_probe.py REQUEST_URL HTTP_URL MEMORY_NBYTES FIRST SECOND

MEMORY_NBYTES is what the server has, FIRST and SECOND are files of the same length: two versions of
one encoded block. Prints one JSON object of observations.

Needs no engine, no GPU and no pickle: the blocks go through the server's shared memory, which is
why the server must run on this machine.
"""

from __future__ import annotations

import json
import sys
import uuid
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import zmq
from lmcache import sdk
from lmcache.v1.multiprocess.custom_types import (
    IPCCacheServerKey,
    RegisterEngineDrivenContextPayload,
)
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

_TIMEOUT_S = 60.0


class Blocks:
    """Blocks of `nbytes` on the server, one object each, by LMCache's internal request client."""

    def __init__(self, url: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self._model = f"kvrag-{nbytes}"
        self._client = RequestClientFactory.create(url, context=zmq.Context())
        self._instance = uuid.uuid4().int >> 65
        self._tokens = self._client.get_chunk_size().result(timeout=_TIMEOUT_S)
        # A model of one layer whose chunk has one slot, `nbytes` wide: an object of `nbytes` bytes.
        layout = RegisterEngineDrivenContextPayload(
            instance_id=self._instance,
            model_name=self._model,
            world_size=1,
            block_size=self._tokens,
            num_layers=1,
            hidden_dim_size=nbytes,
            dtype_str="uint8",
            use_mla=True,
            num_physical_slots=1,
        )
        pool = self._ask("register_kv_cache_engine_driven_context", layout)
        self._pool = SharedMemory(name=pool.shm_name.lstrip("/"), create=False)
        # The server owns it; else it would be removed when this process ends.
        resource_tracker.unregister(f"/{self._pool.name}", "shared_memory")

    def put(self, name: int, data: bytes) -> dict[str, object]:
        """What the server answers: the slots that it gives for writing, and to the commit."""
        key = self._key(name)
        slots = self._ask("prepare_store", key, self._instance).context["slots"]
        for slot in slots:
            self._pool.buf[slot["offset"] : slot["offset"] + slot["length"]] = data
        committed = self._ask("commit_store", key, self._instance, b"") if slots else None
        self._ask("end_session", key.request_id)
        return {"slots": len(slots), "committed": committed}

    def get(self, name: int) -> bytes | None:
        key = self._key(name)
        self._ask("lookup", replace(key, worker_id=None), 1)
        found = self._ask("wait_prefetch_status", key.request_id, _TIMEOUT_S / 2)
        data = None
        if found:
            (slot,) = self._ask("prepare_retrieve", key, self._instance).context["slots"]
            data = bytes(self._pool.buf[slot["offset"] : slot["offset"] + slot["length"]])
            self._ask("commit_retrieve", key, self._instance)
        self._ask("end_session", key.request_id)
        return data

    def close(self) -> None:
        self._ask("unregister_kv_cache_engine_driven_context", self._instance)
        self._client.close()
        self._pool.close()

    def _key(self, name: int) -> IPCCacheServerKey:
        # A key is token ids, as many as a chunk has: the server hashes them and keeps the hash.
        return IPCCacheServerKey(
            model_name=self._model,
            world_size=1,
            worker_id=0,
            token_ids=(name, *[0] * (self._tokens - 1)),
            start=0,
            end=self._tokens,
            request_id=uuid.uuid4().hex,
            num_kv_readers=1,
        )

    def _ask(self, operation: str, *arguments: object):
        return getattr(self._client, operation)(*arguments).result(timeout=_TIMEOUT_S)


def main(
    url: str, http_url: str, memory_nbytes: int, first: bytes, second: bytes
) -> dict[str, object]:
    seen: dict[str, object] = {"public_client": _public_client(url, http_url)}
    blocks = Blocks(url, len(first))
    seen["absent"] = blocks.get(1) is None
    seen["put"] = blocks.put(1, first)
    seen["carried"] = blocks.get(1) == first
    seen["put_again"] = blocks.put(1, second)
    found = blocks.get(1)
    seen["after_put_again"] = {first: "first", second: "second"}.get(found or b"", "neither")
    seen["listed"] = {
        tier: _status(f"{http_url}/cache/objects?tier={tier}") for tier in ("l1", "l2")
    }
    large = Blocks(url, 2 * memory_nbytes)
    seen["put_too_large"] = large.put(2, b"")
    seen["too_large_absent"] = large.get(2) is None
    large.close()
    blocks.close()
    return seen


def _public_client(url: str, http_url: str) -> str:
    try:
        sdk.connect(sdk.LMCacheSDKCacheKind.KV, url, http_url, "any-model", timeout=_TIMEOUT_S)
    except Exception as exc:  # whatever it is, it is what is looked for
        return str(exc)
    return ""


def _status(url: str) -> int:
    try:
        with urlopen(url, timeout=_TIMEOUT_S) as answer:
            return answer.status
    except HTTPError as exc:
        return exc.code


if __name__ == "__main__":
    request_url, http_url, memory_nbytes, *files = sys.argv[1:]
    observed = main(
        request_url, http_url, int(memory_nbytes), *(Path(file).read_bytes() for file in files)
    )
    print(json.dumps(observed))
