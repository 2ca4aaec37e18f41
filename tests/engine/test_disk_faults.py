"""Whatever happens to the files of blocks, a question has the answer that it had before."""

from __future__ import annotations

import os
import shutil

import pytest

from kvrag.store.block import decode_header
from tests.mounts import mounted, remount

from .test_answers import ask, open_engine

OTHERS = ["Bela built the cableway.", "It is painted green."]


def tiers(answer):
    return tuple(source.tier for source in answer.sources)


def disk(engine):
    return engine.stats().tiers[1]


def files(home):
    return sorted((home / "kv" / "blocks").rglob("*.kv"))


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    """An engine that keeps blocks on disk alone, its home, and what it answers."""
    home = tmp_path_factory.mktemp("stored") / "home"
    with open_engine(tiny("llama"), home, ram_bytes=0) as engine:
        computed = ask(engine)
        answer = ask(engine)
        assert tiers(answer) == ("disk",) * 3
        assert answer.token_ids == computed.token_ids
        yield engine, home, answer.token_ids


# ---- damage --------------------------------------------------------------------------------------


def flip(at):
    def change(path, segments):
        content = bytearray(path.read_bytes())
        content[at(segments) % len(content)] ^= 0x20
        path.write_bytes(content)

    return change


def cut(at):
    return lambda path, segments: os.truncate(path, at(segments) % path.stat().st_size)


def zeros_behind(at):
    """What a power loss may leave of a file that was not synced: its length, without its bytes."""

    def change(path, segments):
        size = path.stat().st_size
        os.truncate(path, at(segments) % size)
        os.truncate(path, size)

    return change


def longer(path, segments):
    with path.open("ab") as file:
        file.write(b"\0" * 4096)


def another(path, segments):
    others = [other for other in path.parents[1].rglob("*.kv") if other != path]
    path.write_bytes(others[0].read_bytes())


PLACES = {
    "magic": lambda segments: 0,
    "version": lambda segments: 8,
    "header's length": lambda segments: 12,
    "header's checksum": lambda segments: 16,
    "header": lambda segments: 60,
    "header's end": lambda segments: segments[0].offset - 1,
    "first layer's K": lambda segments: segments[0].offset,
    "first layer's V": lambda segments: segments[0].offset + segments[0].length - 1,
    "last layer": lambda segments: segments[-1].offset + segments[-1].length // 2,
    "last byte": lambda segments: segments[-1].end - 1,
}
CHANGES = {
    **{f"flipped in {name}": flip(at) for name, at in PLACES.items()},
    **{f"cut at {name}": cut(at) for name, at in PLACES.items()},
    **{
        f"zeros behind {name}": zeros_behind(PLACES[name])
        for name in ("magic", "header", "first layer's K", "first layer's V", "last layer")
    },
    "longer": longer,
    "another block": another,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_file_is_computed_again(stored, name):
    engine, home, expected = stored
    before, damaged = {path: path.read_bytes() for path in files(home)}, disk(engine).damaged
    path = files(home)[1]
    CHANGES[name](path, decode_header(before[path]).segments)
    assert path.read_bytes() != before[path]
    answer = ask(engine)
    assert answer.token_ids == expected
    assert sorted(tiers(answer)) == ["computed", "disk", "disk"]
    assert disk(engine).damaged == damaged + 1
    assert disk(engine).errors == 0
    # And it is mended: the same bytes, in the same place.
    assert {path: path.read_bytes() for path in files(home)} == before
    assert tiers(ask(engine)) == ("disk",) * 3


# ---- a disk that is full, read-only or gone ------------------------------------------------------


def test_a_full_disk(tiny, tmp_path):
    folder = tiny("llama")
    with open_engine(folder, tmp_path / "roomy") as engine:
        expected, other = ask(engine).token_ids, ask(engine, passages=OTHERS).token_ids
        size = max(path.stat().st_size for path in files(tmp_path / "roomy"))
    with (
        mounted(tmp_path / "home" / "kv", f"size={2 * size + 4096}") as kv,
        open_engine(folder, tmp_path / "home", ram_bytes=0) as engine,
    ):
        first = ask(engine)
        assert first.token_ids == expected
        assert "No space left" in first.report.warnings[0]
        again = ask(engine)
        assert again.token_ids == expected
        assert sorted(tiers(again)) == ["computed", "disk", "disk"]
        assert ask(engine, passages=OTHERS).token_ids == other
        assert disk(engine).healthy
        for path in files(tmp_path / "home"):
            path.unlink()
        remount(kv, f"size={100 * size}")
        assert ask(engine).token_ids == expected
        assert tiers(ask(engine)) == ("disk",) * 3


def test_a_read_only_disk_is_read(tiny, tmp_path):
    """A new passage that could not be stored took the disk out of service for known ones too."""
    folder = tiny("llama")
    with mounted(tmp_path / "home" / "kv", "size=16m") as kv:
        with open_engine(folder, tmp_path / "home", ram_bytes=0) as engine:
            expected, other = ask(engine).token_ids, ask(engine, passages=OTHERS).token_ids
            for path in files(tmp_path / "home")[3:]:
                path.unlink()
        missing = {0: 0, 1: 0}
        remount(kv, "ro")
        with open_engine(folder, tmp_path / "home", ram_bytes=0) as engine:
            for turn in missing:
                known, new = ask(engine), ask(engine, passages=OTHERS)
                assert (known.token_ids, new.token_ids) == (expected, other)
                missing[turn] = [*tiers(known), *tiers(new)].count("computed")
                assert any("Read-only" in w for w in [*known.report.warnings, *new.report.warnings])
            assert missing == {0: 2, 1: 2}
            remount(kv, "rw")
            ask(engine), ask(engine, passages=OTHERS)
            assert {*tiers(ask(engine)), *tiers(ask(engine, passages=OTHERS))} == {"disk"}


@pytest.mark.parametrize("removed", ["kv", "."])
def test_a_folder_removed_under_an_open_engine(tiny, tmp_path, removed):
    home = tmp_path / "home"
    with open_engine(tiny("llama"), home, ram_bytes=0) as engine:
        expected = ask(engine).token_ids
        assert tiers(ask(engine)) == ("disk",) * 3
        shutil.rmtree(home / removed)
        answer = ask(engine)
        assert answer.token_ids == expected
        assert tiers(answer) == ("computed",) * 3
        again = ask(engine)
        assert again.token_ids == expected
        assert tiers(again) == ("disk",) * 3
        assert disk(engine).errors == 0
