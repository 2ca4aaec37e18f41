"""What every tier must do. A tier's test subclasses `TierContract` and says how to reach its bytes
without the tier's own methods."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

import pytest

from kvrag.store.block import Block, verify_segment
from kvrag.store.errors import BlockFormatError, TierError
from kvrag.store.keys import BlockKey
from kvrag.store.tier import StoredBlock, Tier

from .helpers import make_block, make_key, whole_bytes


class TierContract(ABC):
    @pytest.fixture
    def tier(self, tmp_path):
        with self.make(tmp_path) as tier:
            yield tier

    @abstractmethod
    def make(self, folder) -> Tier:
        """A new tier."""

    @abstractmethod
    def raw_write(self, tier: Tier, key: BlockKey, data: bytes) -> None:
        """Lay bytes under the key, behind the tier's back."""

    @abstractmethod
    def raw_read(self, tier: Tier, key: BlockKey) -> bytes | None:
        """The bytes under the key, behind the tier's back."""

    def test_a_block_comes_back_as_it_was_put(self, tier):
        block = make_block(1, layers=3)
        tier.put(make_key(1), block)
        assert tier.header(make_key(1)) == block.header
        assert tier.segments(make_key(1), 0, 3) == list(block.segments)
        assert self.raw_read(tier, make_key(1)) == whole_bytes(block)

    @pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (2, 4), (3, 4), (0, 4)])
    def test_any_range_of_segments(self, tier, first, last):
        block = make_block(1, layers=4, segment_nbytes=5000)
        tier.put(make_key(1), block)
        found = tier.segments(make_key(1), first, last)
        assert found == list(block.segments[first:last])
        for index, view in enumerate(found, start=first):
            verify_segment(block.header, index, view)

    def test_bytes_laid_by_others_are_found(self, tier):
        block = make_block(1)
        self.raw_write(tier, make_key(1), whole_bytes(block))
        assert tier.contains(make_key(1))
        assert tier.header(make_key(1)) == block.header
        assert tier.segments(make_key(1), 1, 2) == [block.segments[1]]

    def test_a_miss_is_none(self, tier):
        assert tier.header(make_key(1)) is None
        assert tier.segments(make_key(1), 0, 1) is None
        assert not tier.contains(make_key(1))
        assert not tier.delete(make_key(1))
        tier.quarantine(make_key(1))
        tier.touch(make_key(1))
        assert list(tier.keys()) == []
        assert tier.nbytes == 0

    def test_deleting_many_lines_up(self, tier):
        for name in (1, 2, 3):
            tier.put(make_key(name), make_block(name))
            tier.header(make_key(name))
        asked = [make_key(name) for name in (3, 9, 1)]
        assert tier.delete_many(asked) == [True, False, True]
        assert list(tier.keys()) == [make_key(2)]
        assert tier.header(make_key(1)) is None
        assert tier.delete_many([]) == []

    def test_put_keeps_none_of_the_callers_memory(self, tier):
        content = bytearray(b"k" * 4096)  # no padding needed: the block aliases it
        block = make_block(1, layers=1, segments=[content])
        tier.put(make_key(1), block)
        content[:] = b"x" * 4096
        (found,) = tier.segments(make_key(1), 0, 1)
        assert found == b"k" * 4096

    def test_returned_memory_is_read_only_and_aligned_views_of_bytes(self, tier):
        tier.put(make_key(1), make_block(1))
        for view in tier.segments(make_key(1), 0, 2):
            assert isinstance(view, memoryview)
            assert view.readonly
            assert view.format == "B"
            with pytest.raises(TypeError):
                view[0] = 1

    def test_returned_memory_outlives_the_block(self, tier):
        block = make_block(1)
        tier.put(make_key(1), block)
        found = tier.segments(make_key(1), 0, 2)
        tier.put(make_key(1), make_block(1, version=1))
        tier.delete(make_key(1))
        tier.close()
        assert found == list(block.segments)

    def test_put_replaces(self, tier):
        tier.put(make_key(1), make_block(1))
        other = make_block(1, version=1, segment_nbytes=9000)
        tier.put(make_key(1), other)
        assert tier.header(make_key(1)) == other.header
        assert tier.segments(make_key(1), 0, 2) == list(other.segments)
        assert tier.nbytes == other.nbytes
        assert list(tier.keys()) == [make_key(1)]

    def test_put_under_another_key_is_refused(self, tier):
        with pytest.raises(ValueError, match="cannot be put as"):
            tier.put(make_key(2), make_block(1))
        assert not tier.contains(make_key(2))

    def test_delete(self, tier):
        tier.put(make_key(1), make_block(1))
        tier.put(make_key(2), make_block(2))
        assert tier.delete(make_key(1))
        assert not tier.delete(make_key(1))
        assert tier.header(make_key(1)) is None
        assert self.raw_read(tier, make_key(1)) is None
        assert tier.nbytes == make_block(2).nbytes

    def test_quarantine_takes_out_of_sight(self, tier):
        tier.put(make_key(1), make_block(1))
        tier.quarantine(make_key(1))
        assert not tier.contains(make_key(1))
        assert tier.header(make_key(1)) is None
        assert tier.nbytes == 0
        tier.put(make_key(1), make_block(1))
        assert tier.header(make_key(1)) is not None

    def test_keys_by_tag(self, tier):
        for name, tag in ((1, "a" * 32), (2, "b" * 32), (3, "b" * 32)):
            tier.put(make_key(name, tag), make_block(name, tag=tag))
        assert set(tier.keys("a" * 32)) == {make_key(1)}
        assert set(tier.keys("b" * 32)) == {make_key(name, "b" * 32) for name in (2, 3)}
        assert set(tier.keys("c" * 32)) == set()
        assert len(list(tier.keys())) == 3

    def test_keys_may_be_deleted_while_they_are_listed(self, tier):
        for name in range(3):
            tier.put(make_key(name), make_block(name))
        listed = tier.keys()
        for key in listed:
            assert tier.delete(key)
        assert tier.nbytes == 0

    def test_batches_line_up_with_their_keys(self, tier):
        for name in (1, 3):
            tier.put(make_key(name), make_block(name))
        data = bytearray(whole_bytes(make_block(4)))
        data[30] ^= 1
        self.raw_write(tier, make_key(4), bytes(data))
        keys = [make_key(name) for name in (0, 1, 2, 3, 4, 1)]
        headers = tier.headers(keys)
        names = [getattr(header, "key", type(header)) for header in headers]
        missing = type(None)
        assert names == [
            missing,
            make_key(1),
            missing,
            make_key(3),
            BlockFormatError,
            make_key(1),
        ]
        assert tier.contains_many(keys) == [False, True, False, True, True, True]
        assert tier.headers([]) == []
        assert tier.contains_many([]) == []

    def test_entries_tell_sizes(self, tier):
        blocks = [make_block(name, segment_nbytes=1 + 5000 * name) for name in range(3)]
        for block in blocks:
            tier.put(block.header.key, block)
        expected = {StoredBlock(block.header.key, block.nbytes) for block in blocks}
        assert set(tier.entries()) == expected
        assert tier.nbytes == sum(block.nbytes for block in blocks)

    def test_how_long_a_block_was_not_used(self, tier):
        assert tier.idle_s(make_key(1)) is None
        tier.put(make_key(1), make_block(1))
        idle_s = tier.idle_s(make_key(1))
        assert idle_s is None or 0 <= idle_s < 30

    @pytest.mark.parametrize(("first", "last"), [(-1, 1), (1, 1), (2, 1), (0, 0)])
    def test_a_range_that_is_none_is_refused(self, tier, first, last):
        tier.put(make_key(1), make_block(1))
        with pytest.raises(ValueError, match="0 <= first < last"):
            tier.segments(make_key(1), first, last)

    def test_a_range_beyond_the_block_is_damage(self, tier):
        tier.put(make_key(1), make_block(1))
        with pytest.raises(BlockFormatError):
            tier.segments(make_key(1), 0, 3)

    @pytest.mark.parametrize("size", [0, 1, 15, 16, 23, 24, 4095, 4096, 4097, 8191, 8192, 12287])
    def test_a_truncated_block_is_damage(self, tier, size):
        self.raw_write(tier, make_key(1), whole_bytes(make_block(1))[:size])
        with pytest.raises(BlockFormatError):
            tier.header(make_key(1))

    def test_bytes_behind_the_block_are_damage(self, tier):
        self.raw_write(tier, make_key(1), whole_bytes(make_block(1)) + b"\0")
        with pytest.raises(BlockFormatError):
            tier.header(make_key(1))

    def test_the_block_of_another_key_is_damage(self, tier):
        self.raw_write(tier, make_key(1), whole_bytes(make_block(2)))
        with pytest.raises(BlockFormatError, match="expected"):
            tier.header(make_key(1))
        with pytest.raises(BlockFormatError):
            tier.segments(make_key(1), 0, 1)

    def test_a_flipped_bit_of_a_segment_is_left_to_the_reader(self, tier):
        block = make_block(1)
        data = bytearray(whole_bytes(block))
        data[block.header.segments[1].offset + 5] ^= 4
        self.raw_write(tier, make_key(1), bytes(data))
        assert tier.header(make_key(1)) == block.header
        _, view = tier.segments(make_key(1), 0, 2)
        with pytest.raises(BlockFormatError, match="segment 1"):
            verify_segment(block.header, 1, view)

    @pytest.mark.parametrize(("layers", "segment_nbytes"), [(1, 100), (4, 5000), (40, 50_000)])
    def test_a_whole_block(self, tier, layers, segment_nbytes):
        block = make_block(1, layers=layers, segment_nbytes=segment_nbytes)
        tier.put(make_key(1), block)
        for _ in range(2):  # what was read before may be read in another way
            arrived = []

            def note(header, first, views, arrived=arrived):
                arrived.append((header, first, list(views)))

            header, segments = tier.whole(make_key(1), note)
            assert header == block.header
            assert segments == list(block.segments)
            assert all(view.readonly and view.format == "B" for view in segments)
            assert [part for *_, part in arrived for part in part] == segments
            counts = [0, *(len(part) for *_, part in arrived)]
            assert [first for _, first, _ in arrived] == [
                sum(counts[: at + 1]) for at in range(len(arrived))
            ]
            assert {header.key for header, *_ in arrived} == {make_key(1)}

    def test_a_whole_block_that_is_damaged(self, tier):
        def never(*_):
            raise AssertionError("damage was handed on")

        assert tier.whole(make_key(1), never) is None
        data = whole_bytes(make_block(1))
        flipped = bytearray(data)
        flipped[40] ^= 1
        for damaged in (data[:4095], data[:4097], data[:8192], data + b"\0", bytes(flipped)):
            self.raw_write(tier, make_key(1), damaged)
            with pytest.raises(BlockFormatError):
                tier.whole(make_key(1), never)
        self.raw_write(tier, make_key(1), whole_bytes(make_block(2)))
        with pytest.raises(BlockFormatError):
            tier.whole(make_key(1), never)

    def test_what_a_look_at_a_whole_block_raises_passes_through(self, tier):
        """The bytes are for the reader to judge, as always."""

        def judge(header, first, views):
            for index, view in enumerate(views, start=first):
                verify_segment(header, index, view)

        block = make_block(1)
        data = bytearray(whole_bytes(block))
        data[block.header.segments[1].offset + 5] ^= 4
        self.raw_write(tier, make_key(1), bytes(data))
        with pytest.raises(BlockFormatError, match="segment 1"):
            tier.whole(make_key(1), judge)
        header, segments = tier.whole(make_key(1), lambda *_: None)
        assert segments[0] == block.segments[0]
        assert segments[1] != block.segments[1]
        tier.put(make_key(1), block)
        assert tier.whole(make_key(1), judge) == (header, list(block.segments))

    def test_many_threads(self, tier):
        """Whatever is found is one whole version, and the size is right in the end."""
        failures: list[BaseException] = []
        versions = {
            name: [make_block(name, version=version, segment_nbytes=300) for version in range(2)]
            for name in range(3)
        }

        def hammer(seed: int) -> None:
            try:
                for step in range(40):
                    name = (seed + step) % 3
                    key = make_key(name)
                    act = (seed * 7 + step) % 4
                    if act == 0:
                        tier.delete(key)
                    elif act == 1:
                        _check_whole(tier, key, versions[name])
                    else:
                        tier.put(key, versions[name][step % 2])
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        for key in list(tier.keys()):
            tier.delete(key)
        assert tier.nbytes == 0
        assert tier.entries() == []

    def test_close_is_final_and_may_be_repeated(self, tier):
        tier.put(make_key(1), make_block(1))
        tier.close()
        tier.close()
        for use in (
            lambda: tier.header(make_key(1)),
            lambda: tier.segments(make_key(1), 0, 1),
            lambda: tier.put(make_key(2), make_block(2)),
            lambda: tier.delete(make_key(1)),
            lambda: tier.contains(make_key(1)),
            lambda: tier.keys(),
            lambda: tier.entries(),
            lambda: tier.nbytes,
            lambda: tier.quarantine(make_key(1)),
            lambda: tier.contains_many([make_key(1)]),
        ):
            with pytest.raises(TierError, match=tier.name):
                use()


def _check_whole(tier: Tier, key: BlockKey, versions: list[Block]) -> None:
    segments = tier.segments(key, 0, 2)
    assert segments is None or segments in [list(block.segments) for block in versions]
    header = tier.header(key)
    assert header is None or header in [block.header for block in versions]
