"""Many threads, and many processes on one folder: one read a segment, whole blocks, sound books."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from kvrag.store.disk import DiskTier
from kvrag.store.ram import RamTier
from kvrag.store.tiered import TieredStore, TierSlot

from .doubles import SlowTier, in_threads
from .helpers import FINGERPRINT, make_block, make_key, token_ids


def test_thirty_two_threads_read_a_block_once():
    ram, slow = RamTier(), SlowTier()
    with TieredStore([TierSlot(ram), TierSlot(slow)]) as store:
        for name in range(3):
            slow.put(make_key(name), make_block(name))
        opened = []

        def read(index):
            name = index % 3
            reader = store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))
            opened.append(reader)  # all stay open, so that all share
            return name, reader.read(0, 1) + reader.read(1, 2)

        for name, segments in in_threads(32, read):
            assert segments == list(make_block(name).segments)
        for reader in opened:
            reader.close()
        assert sorted(slow.reads) == [(0, 1)] * 3 + [(1, 2)] * 3
        assert store.stats().open_blocks == 0
        assert store.stats().tiers[0].blocks == 3


WORKER = textwrap.dedent(
    """
    import sys
    from kvrag.store.disk import DiskTier
    from kvrag.store.errors import DamagedBlockError
    from kvrag.store.ram import RamTier
    from kvrag.store.tiered import TieredStore, TierSlot
    from tests.store.doubles import in_threads
    from tests.store.helpers import FINGERPRINT, make_block, make_key, token_ids

    root, number = sys.argv[1], int(sys.argv[2])
    blocks = [make_block(name, segment_nbytes=20_000) for name in range(8)]
    size = blocks[0].nbytes
    slots = [TierSlot(RamTier(), 3 * size), TierSlot(DiskTier(root), 6 * size)]
    with TieredStore(slots) as store:
        found = [0] * 32

        def work(index):
            for step in range(12):
                name = (index + number + step) % 8
                key = make_key(name)
                if (index + step) % 3 == 0:
                    store.put(key, blocks[name])
                    continue
                reader = store.open(key, fingerprint=FINGERPRINT, token_ids=token_ids(name))
                if reader is None:
                    continue
                with reader:
                    try:
                        segments = reader.read(0, 2)
                    except DamagedBlockError as exc:  # another process evicted it meanwhile
                        assert "gone" in str(exc), exc
                        continue
                    assert segments == list(blocks[name].segments)
                    found[index] += 1
            for tier in store.stats().tiers:
                assert tier.nbytes <= tier.limit_bytes

        in_threads(32, work)
        assert sum(found)
        assert all(tier.damaged == tier.errors == 0 for tier in store.stats().tiers)
    print("sound", flush=True)
    """
)


def test_four_processes_of_thirty_two_threads_share_a_folder(tmp_path):
    root = Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for number in range(4)
    ]
    for worker in workers:
        with worker:
            assert worker.stdout.read() == "sound\n"
    with DiskTier(tmp_path) as disk:
        for key in list(disk.keys()):
            assert disk.header(key).key == key
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "quarantine").exists()
