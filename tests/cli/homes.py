"""Looking into a home past the program, and damaging it."""

from __future__ import annotations

from kvrag.store.disk import DiskTier
from tests.store.helpers import make_block, make_key

TEXT = "Anna keeps the lamp of Karsk. She lights it at dusk and tends it until the morning comes. "


def block_files(home):
    return sorted((home / "kv" / "blocks").rglob("*.kv"))


def put_orphan(home, name="orphan"):
    with DiskTier(home / "kv") as tier:
        tier.put(make_key(name), make_block(name))
    (path,) = (home / "kv").rglob(f"{make_key(name).digest}.kv")
    return path


def flip(path, position=-100):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
