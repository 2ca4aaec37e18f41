"""`kvrag store copy` between homes, folders of disk tiers and Redis, as it lies and re-encoded."""

from __future__ import annotations

import json
import signal
import sys
import time

import pytest

from kvrag.store.disk import DiskTier
from kvrag.store.redis import RedisTier

from .conftest import start
from .homes import TEXT, block_files, flip, put_orphan

QUESTION = "Who keeps the lamp?"
KEY, OTHER_KEY = "0123456789abcdef" * 4, "f" * 64


def whole(home):
    """What lies on disk, by the place in the home."""
    return {path.relative_to(home): path.read_bytes() for path in block_files(home)}


def ask(kvrag, home, codec, *options):
    """The tiers that an answer's chunks came from, and its text."""
    settings = ["--home", home, "--set", f"codec={codec}", *options]
    result = kvrag(*settings, "ask", QUESTION, "--json", "--strategy", "reuse", "--max-tokens", 8)
    assert result.code == 0, result.err
    return {source["tier"] for source in result.json["sources"]}, result.json["answer"]


def test_copy_is_whole_and_goes_on(kvrag, home, tmp_path):
    target = tmp_path / "copy"
    count = len(block_files(home))
    assert kvrag("store", "copy", home, target, "--json").json["copied"] == count
    assert whole(target) == whole(home)
    assert (target / "key.secret").read_bytes() == (home / "key.secret").read_bytes()
    first, second, *_ = block_files(target)
    first.unlink()
    flip(second, 40)
    again = kvrag("store", "copy", home, target, "--json").json
    assert (again["copied"], again["present"], again["damaged"]) == (2, count - 2, 0)
    assert whole(target) == whole(home)


def test_a_place_that_fails_is_named_as_it_was_given(kvrag, home, tmp_path):
    """It was "tier target", whatever it was."""
    (tmp_path / "file").write_text("no folder")
    result = kvrag("store", "copy", home / "kv", tmp_path / "file" / "tier")
    assert result.code == 2
    assert f"tier {tmp_path / 'file' / 'tier'}: " in result.error


def test_what_is_not_copied_is_said(kvrag, home, tmp_path):
    """A home without documents looked like a whole one, until the first question."""
    said = "documents, chunks and the vector index are not copied"
    assert said in kvrag("store", "copy", home, tmp_path / "plain").out
    assert not (tmp_path / "plain" / "catalog.sqlite").exists()
    assert said not in kvrag("store", "copy", home / "kv", tmp_path / "tier").out
    whole_home = kvrag("store", "copy", home, tmp_path / "whole", "--codec", "raw")
    assert whole_home.code == 0
    assert said not in whole_home.out
    assert ask(kvrag, tmp_path / "whole", "raw")[0] == {"disk"}


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
        (lambda home, other: (home, home / "kv"), "to itself"),
        (lambda home, other: (home / "index", other), "neither a home nor"),
        (lambda home, other: (home, "redis://:sesame@"), "no host"),
        (lambda home, other: (home, "ftp://u:sesame@host"), "begins with one of"),
        (lambda home, other: (home / "kv", other, "--codec", "int8"), "must be a home"),
        (lambda home, other: (home, other, "--codec", "int3"), "'codec'"),
    ],
)
def test_copies_that_are_refused(kvrag, home, tmp_path, make, said):
    result = kvrag("store", "copy", *make(home, tmp_path / "none"))
    assert result.code == 2
    assert said in result.error
    assert "sesame" not in result.error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("options", [(), ("--codec", "int8")])
def test_a_home_of_another_secret_is_no_target(kvrag, home, tmp_path, options):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "key.secret").write_bytes(b"x" * 32)
    result = kvrag("store", "copy", home, tmp_path / "other", *options)
    assert result.code == 2
    assert "key secret of its own" in result.error
    assert not (tmp_path / "other" / "kv").exists()


def test_a_bar_on_a_terminal(kvrag, home, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = kvrag("store", "copy", home, tmp_path / "copy")
    count = len(block_files(home))
    assert f"{count}/{count}" in result.err
    assert f"{count} copied" in result.err


# ---- Redis ---------------------------------------------------------------------------------------


@pytest.mark.redis
def test_to_redis_and_back(kvrag, home, server, tmp_path):
    """Through a home, a Redis, another Redis's prefix, and a folder: the same bytes."""
    count, url = len(block_files(home)), f"redis://:sesame@127.0.0.1:{server.port}/0"
    with server.client() as client:
        client.config_set("requirepass", "sesame")
    first = kvrag("store", "copy", home, url, "--json")
    assert (first.code, first.json["copied"]) == (0, count)
    flip_in_redis(server)
    again = kvrag("store", "copy", home, url, "--json").json
    assert (again["copied"], again["present"]) == (0, count)  # its header is that of the source
    back = kvrag("store", "copy", url, tmp_path / "tier")
    assert back.code == 4
    assert "1 are damaged" in back.out
    assert len(list((tmp_path / "tier").rglob("*.kv"))) == count - 1
    with RedisTier(url) as tier:
        for key in list(tier.keys()):
            tier.delete(key)
    prefixed = ("--set", "redis_prefix=other:")
    assert kvrag(*prefixed, "store", "copy", home, url).code == 0
    assert kvrag("store", "copy", url, home, "--json").json["copied"] == 0
    assert kvrag(*prefixed, "store", "copy", url, tmp_path / "tier", "--json").json["copied"] == 1
    assert whole_tier(tmp_path / "tier") == whole_tier(home / "kv")
    assert kvrag("store", "copy", url, url).error == (
        f"error: redis://***@127.0.0.1:{server.port}/0 cannot be copied to itself"
    )


def whole_tier(folder):
    return {path.name: path.read_bytes() for path in (folder / "blocks").rglob("*.kv")}


def flip_in_redis(server):
    with server.client(password="sesame") as client:
        name = client.keys("kvrag:*")[0]
        segment = bytearray(client.hget(name, "0"))
        segment[5] ^= 1
        client.hset(name, "0", bytes(segment))


@pytest.mark.redis
def test_a_redis_that_is_gone_fails_without_its_password(kvrag, home, server):
    server.kill()
    url = f"redis://:sesame@127.0.0.1:{server.port}/0"
    for options in ((), ("--codec", "int8")):
        result = kvrag("store", "copy", home, url, *options)
        assert result.code == 1
        assert f"tier redis://***@127.0.0.1:{server.port}/0: " in result.err
        assert "sesame" not in result.err


@pytest.mark.redis
def test_a_corpus_encoded_anew_by_way_of_redis(kvrag, home, server, tmp_path, monkeypatch):
    """Into a Redis beside the home, and out of one into a home that knows the corpus."""
    count = len(block_files(home))
    coded = kvrag("store", "copy", home, server.url, "--codec", "int8", "--json")
    assert (coded.code, coded.json["copied"]) == (0, count)
    monkeypatch.setenv("KVRAG_REDIS_URL", server.url)
    assert ask(kvrag, home, "int8", "--set", "ram_bytes=0")[0] == {"redis"}
    monkeypatch.delenv("KVRAG_REDIS_URL")
    with server.client() as client:
        client.flushall()
    assert kvrag("store", "copy", home, server.url).code == 0
    assert kvrag("store", "copy", server.url, home, "--codec", "int8", "--json").code == 0
    assert {row["codec"] for row in listed(kvrag, home)} == {"raw", "int8"}
    assert ask(kvrag, home, "int8")[0] == {"disk"}


# ---- another codec -------------------------------------------------------------------------------


def listed(kvrag, home):
    return kvrag("--home", home, "store", "ls", "--json").json["blocks"]


@pytest.mark.parametrize("first_blocks", ["true", "false"])
@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_a_corpus_encoded_anew_is_the_one_that_would_be_computed(
    kvrag, home, tmp_path, codec, first_blocks, monkeypatch
):
    monkeypatch.setenv("KVRAG_FIRST_BLOCKS", first_blocks)
    assert kvrag("precompute").code == 0
    before, count = whole(home), len(block_files(home))
    target = tmp_path / "new"
    result = kvrag("store", "copy", home, target, "--codec", codec, "--json")
    assert result.code == 0, result.err
    assert (result.json["copied"], result.json["left_out"]) == (count, 0)
    assert result.json["nbytes"] == sum(path.stat().st_size for path in block_files(target))
    assert whole(home) == before
    rows = listed(kvrag, target)
    assert len(rows) == count
    assert {(row["codec"], row["corpus"], row["kind"]) for row in rows} == {(codec, True, "chunk")}
    # Byte for byte what this codec makes of the computation itself.
    computed = whole(target)
    assert kvrag("--home", home, "precompute", "--codec", codec).code == 0
    assert {name: data for name, data in whole(home).items() if name in computed} == computed
    # The index went along, and nothing is computed: neither now nor by a corpus job.
    assert list((target / "index").rglob("*.faiss"))
    monkeypatch.setattr("kvrag.blocks.ChunkBlocks.compute", lambda *_: pytest.fail("computed"))
    tiers, text = ask(kvrag, target, codec)
    assert tiers == {"disk"}
    assert text == ask(kvrag, home, codec)[1]
    assert kvrag("--home", target, "precompute", "--codec", codec).code == 0
    assert kvrag("--home", target, "store", "gc", "--json").json["orphans"] == 0


def test_what_was_rounded_is_not_encoded_anew(kvrag, home, environment, tmp_path):
    eight, other = tmp_path / "eight", tmp_path / "other"
    assert kvrag("store", "copy", home, eight, "--codec", "int8").code == 0
    for codec in ("raw", "int4"):
        result = kvrag("store", "copy", eight, other, "--codec", codec)
        assert result.code == 2
        assert "of int8 and no raw blocks" in result.error
        assert not other.exists()
    assert kvrag("store", "copy", eight, other, "--codec", "int8").code == 0
    assert whole(other) == whole(eight)


def test_what_has_no_raw_block_is_left_out(kvrag, home, tmp_path):
    """Of a home with both, chunks are encoded from raw; one whose raw block is gone is told of."""
    count = len(block_files(home))
    lost = block_files(home)[0]
    assert kvrag("precompute", "--codec", "int8").code == 0
    full = kvrag("store", "copy", home, tmp_path / "full", "--codec", "int4", "--json")
    assert (full.code, full.json["copied"], full.json["present"]) == (0, count, count)
    lost.unlink()
    result = kvrag("store", "copy", home, tmp_path / "less", "--codec", "int4", "--json")
    assert (result.code, result.json["copied"], result.json["left_out"]) == (3, count - 1, 1)
    assert "int8 has rounded it" in result.err


def test_other_blocks_and_damage_are_left_out(kvrag, home, tmp_path):
    flip(block_files(home)[0])
    put_orphan(home)
    result = kvrag("store", "copy", home, tmp_path / "new", "--codec", "int8", "--json")
    assert (result.code, result.json["damaged"], result.json["left_out"]) == (4, 1, 1)
    assert "of another model, namespace" in result.err
    assert "checksum" in result.err


def test_all_namespaces_are_encoded(kvrag, home, tmp_path):
    (tmp_path / "two.txt").write_text(TEXT * 3)
    inside = ("--set", "namespace=two")
    assert kvrag(*inside, "precompute", tmp_path / "two.txt").code == 0
    target = tmp_path / "new"
    result = kvrag("store", "copy", home, target, "--codec", "int4", "--json")
    assert (result.code, result.json["copied"]) == (0, len(block_files(home)))
    assert ask(kvrag, target, "int4")[0] == {"disk"}
    assert ask(kvrag, target, "int4", *inside)[0] == {"disk"}


def test_a_home_whose_catalog_went_on_is_no_target(kvrag, home, tmp_path):
    target = tmp_path / "new"
    assert kvrag("store", "copy", home, target, "--codec", "int8").code == 0
    again = kvrag("store", "copy", home, target, "--codec", "int8", "--json").json
    assert (again["copied"], again["present"]) == (0, len(block_files(home)))
    (tmp_path / "two.txt").write_text(TEXT * 3 + "Two.")
    assert kvrag("--home", target, "precompute", "--codec", "int8", tmp_path / "two.txt").code == 0
    result = kvrag("store", "copy", home, target, "--codec", "int8")
    assert result.code == 2
    assert "no longer, that of" in result.error


def test_a_copy_that_is_killed_goes_on(kvrag, environment, tmp_path):
    """Killed while it encodes; what runs again encodes what is missing and no more."""
    count, home, target = 120, tmp_path / "home", tmp_path / "new"
    texts = (f"Lamp {number} burns {number * 7} hours." for number in range(count))
    documents = tmp_path / "docs.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert kvrag("precompute", documents).code == 0
    process = start("store", "copy", home, target, "--codec", "int4")
    deadline_s = time.monotonic() + 200
    while len(block_files(target)) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat() for path in block_files(target)}
    assert 5 <= len(before) < count
    flip(next(iter(before)), 40)  # in its header: found without reading the rest
    again = kvrag("store", "copy", home, target, "--codec", "int4", "--json").json
    assert (again["copied"], again["present"]) == (count - len(before) + 1, len(before) - 1)
    untouched = list(before)[1:]
    assert all(path.stat().st_mtime_ns == before[path].st_mtime_ns for path in untouched)
    assert kvrag("--home", target, "store", "verify", "--json").json["blocks"] == count
    assert ask(kvrag, target, "int4")[0] == {"disk"}


# ---- encryption ----------------------------------------------------------------------------------


def test_sealed_blocks(kvrag, environment, tmp_path, monkeypatch):
    """As they lie without a key; opened and sealed again with it; sealed, if they were not."""
    pytest.importorskip("cryptography", reason="the extra encryption is not installed")
    home, clear = tmp_path / "home", tmp_path / "clear"
    (tmp_path / "karsk.txt").write_text(TEXT * 6)
    assert kvrag("--home", clear, "precompute", tmp_path / "karsk.txt").code == 0
    monkeypatch.setenv("KVRAG_ENCRYPTION_KEY", KEY)
    assert kvrag("precompute", tmp_path / "karsk.txt").code == 0
    text = ask(kvrag, home, "raw")[1]
    sealed = tmp_path / "sealed"
    assert kvrag("store", "copy", home, tmp_path / "again", "--codec", "int8").code == 0
    assert ask(kvrag, tmp_path / "again", "int8")[0] == {"disk"}
    assert kvrag("store", "copy", clear, sealed, "--codec", "raw").code == 0
    assert ask(kvrag, sealed, "raw") == ({"disk"}, text)
    for made in (sealed, tmp_path / "again"):
        with DiskTier(made / "kv") as tier:
            assert {tier.header(entry.key).codec for entry in tier.entries()} == {"aes-256-gcm"}
    refused = kvrag("store", "copy", clear, "redis://127.0.0.1:1", "--codec", "raw")
    assert (refused.code, "is not encrypted" in refused.error) == (2, True)
    monkeypatch.setenv("KVRAG_ENCRYPTION_KEY", OTHER_KEY)
    assert kvrag("store", "copy", home, tmp_path / "wrong", "--codec", "int8").code != 0
    monkeypatch.delenv("KVRAG_ENCRYPTION_KEY")
    assert kvrag("store", "copy", home, tmp_path / "none", "--codec", "int8").code != 0
    assert not (tmp_path / "none").exists()
    assert kvrag("store", "copy", home, tmp_path / "as-it-lies").code == 0
    assert whole(tmp_path / "as-it-lies") == whole(home)
    assert not (clear / "encryption.id").exists()
