"""`kvrag store ls`, `verify`, `gc` and `copy` over real homes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kvrag.store.disk import DiskTier
from tests.store.helpers import make_block, make_key

TEXT = "Anna keeps the lamp of Karsk. She lights it at dusk and tends it until the morning comes. "


@pytest.fixture
def home(kvrag, environment, tmp_path):
    """A home with a corpus of a few blocks."""
    (tmp_path / "karsk.txt").write_text(TEXT * 12)
    assert kvrag("precompute", tmp_path / "karsk.txt").code == 0
    return Path(environment["KVRAG_HOME"])


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


def test_ls(kvrag, home):
    put_orphan(home)  # of another namespace
    result = kvrag("store", "ls", "--json")
    assert result.code == 0
    facts = result.json
    assert facts["namespace"] == "default"
    assert facts["total"] == len(facts["blocks"]) == len(block_files(home)) - 1
    for row in facts["blocks"]:
        assert (row["kind"], row["codec"], row["corpus"]) == ("chunk", "raw", True)
        assert row["tokens"] > 0
        assert row["nbytes"] > 4096
    one = kvrag("store", "ls", "--limit", 1, "--json").json
    assert (len(one["blocks"]), one["total"]) == (1, facts["total"])
    text = kvrag("store", "ls").out
    assert facts["blocks"][0]["key"].split("/")[1][:16] in text
    other = kvrag("--set", "namespace=other", "store", "ls", "--json").json
    assert (other["total"], other["blocks"]) == (0, [])


def test_a_sound_store(kvrag, home):
    result = kvrag("store", "verify", "--json")
    assert result.code == 0
    assert result.json["blocks"] == len(block_files(home))
    assert result.json["nbytes"] == sum(path.stat().st_size for path in block_files(home))
    assert (result.json["damaged"], result.json["repaired"]) == ([], 0)


def test_damage_is_found_and_repaired(kvrag, home):
    first, orphan = block_files(home)[0], put_orphan(home)
    whole = first.read_bytes()
    flip(first)
    flip(orphan, 4096 + 3)
    found = kvrag("store", "verify", "--json")
    assert found.code == 4
    assert sorted(row["corpus"] for row in found.json["damaged"]) == [False, True]
    assert all("checksum" in row["damage"] for row in found.json["damaged"])
    assert first.exists()  # looking changes nothing
    repaired = kvrag("store", "verify", "--repair", "--json")
    assert repaired.code == 0
    assert (repaired.json["repaired"], repaired.json["lacking"]) == (2, [])
    assert first.read_bytes() == whole
    assert not orphan.exists()
    assert len(list((home / "kv" / "quarantine").iterdir())) == 2
    assert kvrag("store", "verify").code == 0


def test_what_this_namespace_does_not_give_stays_lacking(kvrag, home):
    flip(block_files(home)[0])
    result = kvrag("--set", "namespace=other", "store", "verify", "--repair")
    assert result.code == 4
    assert "1 belong to another model, codec or namespace" in result.out
    assert kvrag("precompute").code == 0
    assert kvrag("store", "verify").code == 0


def test_gc(kvrag, home):
    corpus, old, new = block_files(home), put_orphan(home, "old"), put_orphan(home, "new")
    then = time.time() - 3 * 86_400
    os.utime(old, (then, then))
    half = old.with_name(f".{'0' * 64}.dead.tmp")
    half.write_bytes(b"half")
    aside = home / "kv" / "quarantine" / f"{1:020d}.{'a' * 32}.{'0' * 64}.kv"
    aside.parent.mkdir()
    aside.write_bytes(b"damaged")
    told = kvrag("store", "gc", "--dry-run", "--json").json
    size = make_block("old").nbytes
    expected = {"orphans": 2, "leftovers": 1, "quarantined": 1, "nbytes": 2 * size + 7}
    assert told == expected | {"deleted": False}
    assert old.exists()
    assert aside.exists()
    assert kvrag("store", "gc", "--unused-days", 1, "--json").json["orphans"] == 1
    assert (old.exists(), new.exists(), half.exists(), aside.exists()) == (
        False,
        True,
        False,
        False,
    )
    assert "deleted 1 blocks" in kvrag("store", "gc").out
    assert block_files(home) == corpus
    assert kvrag("store", "verify").code == 0


def test_gc_without_a_catalog_is_refused(kvrag, home):
    (home / "catalog.sqlite").unlink()
    result = kvrag("store", "gc")
    assert result.code == 2
    assert "has no catalog" in result.error
    assert block_files(home)


def test_copy_is_whole_and_goes_on(kvrag, home, tmp_path):
    target = tmp_path / "copy"
    count = len(block_files(home))
    assert kvrag("store", "copy", home, target, "--json").json["copied"] == count
    names = [path.relative_to(home) for path in block_files(home)]
    assert [path.relative_to(target) for path in block_files(target)] == names
    assert all((home / name).read_bytes() == (target / name).read_bytes() for name in names)
    assert (target / "key.secret").read_bytes() == (home / "key.secret").read_bytes()
    (target / names[0]).unlink()
    flip(target / names[1], 40)
    again = kvrag("store", "copy", home, target, "--json").json
    assert (again["copied"], again["present"], again["damaged"]) == (2, count - 2, 0)
    assert (home / names[1]).read_bytes() == (target / names[1]).read_bytes()


def test_copy_leaves_damage_out(kvrag, home, tmp_path):
    flip(block_files(home)[0])
    result = kvrag("store", "copy", home / "kv", tmp_path / "tier", "--json")
    assert result.code == 4
    assert result.json["damaged"] == 1
    assert "is left out" in result.err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda home, other: (other, home), "is no folder"),
        (lambda home, other: (home, home), "to itself"),
        (lambda home, other: (home / "index", other), "neither a home nor"),
    ],
)
def test_copies_that_are_refused(kvrag, home, tmp_path, make, said):
    result = kvrag("store", "copy", *make(home, tmp_path / "none"))
    assert result.code == 2
    assert said in result.error


def test_a_home_of_another_secret_is_no_target(kvrag, home, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "key.secret").write_bytes(b"x" * 32)
    result = kvrag("store", "copy", home, tmp_path / "other")
    assert result.code == 2
    assert "key secret of its own" in result.error
    assert not (tmp_path / "other" / "kv").exists()


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_no_home_is_made(kvrag, environment, command):
    result = kvrag("store", command)
    assert result.code == 2
    assert "does not exist" in result.error
    assert not Path(environment["KVRAG_HOME"]).exists()


def test_policies_are_shown(kvrag, home):
    options = ["--set", "ram_policy=s3-fifo", "--set", "disk_policy=cost"]
    facts = kvrag(*options, "store", "stat", "--json").json
    assert [tier["policy"] for tier in facts["tiers"]] == ["s3-fifo", "cost"]
    assert kvrag("--set", "ram_policy=mru", "store", "stat").code == 2
