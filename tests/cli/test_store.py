"""`kvrag store ls`, `verify` and `gc` over real homes; `copy`: test_store_copy.py."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kvrag.store.redis import RedisTier
from tests.store.helpers import make_block, make_key

from .homes import TEXT, block_files, flip, put_orphan


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


def test_encrypted_blocks_show_no_number_of_tokens(kvrag, environment, tmp_path, monkeypatch):
    """They showed 0."""
    pytest.importorskip("cryptography", reason="the extra encryption is not installed")
    monkeypatch.setenv("KVRAG_ENCRYPTION_KEY", "0123456789abcdef" * 4)
    (tmp_path / "karsk.txt").write_text(TEXT * 4)
    assert kvrag("precompute", tmp_path / "karsk.txt").code == 0
    monkeypatch.delenv("KVRAG_ENCRYPTION_KEY")
    rows = kvrag("store", "ls", "--json").json["blocks"]
    assert rows
    assert {(row["kind"], row["tokens"]) for row in rows} == {("chunk", None)}
    assert " 0 " not in kvrag("store", "ls").out.splitlines()[-1]


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


def test_what_is_missing_is_told_and_made_again(kvrag, home):
    """A folder in a block's place was invisible, and a store without blocks was called sound."""
    gone, strange, *_ = block_files(home)
    whole = gone.read_bytes()
    gone.unlink()
    strange.unlink()
    strange.mkdir()
    found = kvrag("store", "verify", "--json")
    assert found.code == 4
    assert [key.split("/")[1] for key in found.json["missing"]] == [gone.stem]
    assert [row["key"].split("/")[1] for row in found.json["damaged"]] == [strange.stem]
    text = kvrag("store", "verify").out
    assert "1 that documents refer to were not on disk" in text
    repaired = kvrag("store", "verify", "--repair", "--json")
    assert repaired.code == 0
    assert (repaired.json["repaired"], repaired.json["lacking"]) == (2, [])
    assert gone.read_bytes() == whole
    assert strange.is_file()
    again = kvrag("store", "verify", "--json")
    assert (again.code, again.json["missing"]) == (0, [])


def test_a_repair_without_the_homes_key_touches_nothing(kvrag, home, monkeypatch):
    (home / "encryption.id").write_text("0" * 32 + "\n")
    flip(block_files(home)[0])
    before = block_files(home)
    result = kvrag("store", "verify", "--repair")
    assert result.code == 2
    assert block_files(home) == before
    monkeypatch.setenv("KVRAG_ENCRYPTION_KEY_FILE", str(home / "none"))
    assert kvrag("store", "gc").code == 2
    assert block_files(home) == before


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
    expected["unreachable"] = {}
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


@pytest.mark.redis
def test_redis_is_looked_into(kvrag, home, server, monkeypatch):
    """`ls` and `verify` of a Redis that the corpus was copied to; `gc` leaves it alone."""
    count = len(block_files(home))
    assert kvrag("store", "ls", "--tier", "redis").code == 2  # none is named
    monkeypatch.setenv("KVRAG_REDIS_URL", server.url)
    assert kvrag("store", "copy", home, server.url).code == 0
    with RedisTier(server.url) as tier:
        tier.put(make_key("other"), make_block("other"))
    facts = kvrag("store", "ls", "--tier", "redis", "--json").json
    assert (facts["tier"], facts["total"]) == ("redis", count)
    assert all(row["corpus"] and row["codec"] == "raw" for row in facts["blocks"])
    sound = kvrag("store", "verify", "--json")
    assert (sound.code, sound.json["blocks"]) == (0, 2 * count + 1)
    assert kvrag("store", "gc", "--json").json["orphans"] == 0
    with server.client() as client:
        name = f"kvrag:{facts['blocks'][0]['key']}"
        segment = bytearray(client.hget(name, "0"))
        segment[5] ^= 1
        client.hset(name, "0", bytes(segment))
    found = kvrag("store", "verify", "--json")
    assert found.code == 4
    (row,) = found.json["damaged"]
    assert (row["tier"], row["key"], row["corpus"]) == ("redis", facts["blocks"][0]["key"], True)
    monkeypatch.setattr("kvrag.engine.Engine.open", lambda *_: pytest.fail("a model was opened"))
    assert kvrag("store", "verify", "--repair", "--json").json["repaired"] == 1
    assert kvrag("store", "verify", "--json").json["blocks"] == 2 * count


@pytest.mark.redis
@pytest.mark.parametrize("command", [("stat",), ("gc",), ("gc", "--dry-run"), ("verify",)])
def test_a_redis_that_hangs_is_told_of_and_is_a_failure(kvrag, home, proxy, monkeypatch, command):
    """`stat` and `gc` ended with 0, as if there were nothing in it."""
    monkeypatch.setenv("KVRAG_REDIS_URL", proxy.url)
    assert kvrag("store", *command).code == 0
    proxy.deaf = True
    result = kvrag("store", *command, "--json")
    assert result.code == 1
    assert "warning: tier redis was not" in result.err
    assert result.json
    proxy.deaf = False
    assert kvrag("store", *command).code == 0


@pytest.mark.redis
def test_a_redis_that_is_gone_is_told_of(kvrag, home, server, monkeypatch):
    monkeypatch.setenv("KVRAG_REDIS_URL", f"redis://:sesame@127.0.0.1:{server.port}/0")
    server.kill()
    result = kvrag("store", "verify", "--json")
    assert result.code == 1
    assert result.json["blocks"] == len(block_files(home))
    assert list(result.json["unreachable"]) == ["redis"]
    assert "was not read" in result.err
    assert "sesame" not in result.out + result.err
