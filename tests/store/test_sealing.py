from __future__ import annotations

import hashlib
import hmac
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography", reason="the extra encryption is not installed")

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvrag.store.block import Block, decode_header, encode_block, encode_header, verify_segment
from kvrag.store.disk import DiskTier
from kvrag.store.errors import (
    BlockFormatError,
    EncryptionKeyError,
    StoreError,
    TierFullError,
)
from kvrag.store.header_bytes import used_nbytes
from kvrag.store.ram import RamTier
from kvrag.store.sealed_tier import SealedTier
from kvrag.store.sealing import Sealer, is_sealed
from kvrag.store.tier import Tier
from kvrag.store.tiered import TieredStore, TierSlot

from .contract import TierContract
from .helpers import FINGERPRINT, make_block, make_key, token_ids, whole_bytes
from .test_disk import file_of, lay

MASTER = bytes(range(32))
SEALER = Sealer(MASTER)
OTHER = Sealer(bytes(32))


def block_of(data):
    """The block of these bytes, unchecked but for its header."""
    header = decode_header(data)
    segments = [memoryview(data)[part.offset : part.end] for part in header.segments]
    return Block(header, bytes(data[: header.header_nbytes]), tuple(segments))


def opened(sealed, sealer=SEALER):
    """The block inside, opened and checked, or None."""
    found = sealer.open(sealed.header)
    if found is None:
        return None
    segments = found.segments(0, sealed.segments)
    if segments is None:
        raise BlockFormatError("a segment is not authentic")
    for index, view in enumerate(segments):
        verify_segment(found.header, index, view)
    return Block(found.header, encode_header(found.header), tuple(segments))


def forged(sealed, *, segments=None, **changes):
    """A sealed block with other parts and checksums that fit: who can write a tier can make one."""
    header = sealed.header
    contents = segments or [
        view[: part.length] for part, view in zip(header.segments, sealed.segments, strict=True)
    ]
    fields = ("key", "kind", "fingerprint", "token_ids", "k_shape", "v_shape", "dtype")
    parts = {name: getattr(header, name) for name in (*fields, "codec", "codec_version")}
    parts["codec_digest"] = header.codec_digest
    parts["extra"] = dict(header.extra) | changes.pop("extra", {})
    return encode_block(segments=contents, **(parts | changes))


class TestSealedTier(TierContract):
    def make(self, folder):
        self.root = folder / "kv"
        return SealedTier(DiskTier(self.root), SEALER)

    def raw_write(self, tier, key, data):
        try:
            block = block_of(data)
        except BlockFormatError:
            lay(self.root, key, data)
            return
        whole = len(data) >= block.nbytes
        lay(
            self.root,
            key,
            whole_bytes(SEALER.seal(block)) + data[block.nbytes :] if whole else data,
        )

    def raw_read(self, tier, key):
        path = file_of(self.root, key)
        return whole_bytes(opened(block_of(path.read_bytes()))) if path.exists() else None

    def test_a_flipped_bit_of_a_segment_is_left_to_the_reader(self, tier):
        """Not here: what cannot be authenticated is not decrypted."""
        block = make_block(1)
        tier.put(make_key(1), block)
        path = file_of(self.root, make_key(1))
        data = bytearray(path.read_bytes())
        data[decode_header(data).segments[1].offset + 5] ^= 4
        path.write_bytes(data)
        assert tier.header(make_key(1)) == block.header
        assert tier.segments(make_key(1), 0, 1) == [block.segments[0]]
        with pytest.raises(BlockFormatError, match="segments 0 to 1"):
            tier.segments(make_key(1), 0, 2)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    tokens=st.integers(0, 1200),
    kind=st.sampled_from(["chunk", "fragment", "swap", "vectors"]),
)
def test_round_trip(lengths, tokens, kind):
    shape = (len(lengths), 1, tokens, 4)
    block = make_block(
        1,
        kind=kind,
        tokens=tokens,
        k_shape=shape,
        v_shape=shape,
        segments=[bytes([7]) * length for length in lengths],
        extra={"a": 1},
    )
    sealed = SEALER.seal(block)
    assert whole_bytes(opened(sealed)) == whole_bytes(block)
    assert sealed.nbytes == SEALER.footprint(block.header)
    assert [part.length for part in sealed.header.segments] == lengths
    check = block_of(whole_bytes(sealed))  # any tier takes it for a block
    assert check.header == sealed.header
    for index, view in enumerate(check.segments):
        verify_segment(check.header, index, view)


def test_the_layout_is_frozen():
    """Opened by hand, with HMAC and AES-GCM alone: a change would make sealed blocks unreadable."""
    block = make_block(1, layers=2, segment_nbytes=5000)
    sealed = SEALER.seal(block)
    header = sealed.header
    assert header.codec == "aes-256-gcm"
    assert header.codec_version == 1
    salt, text, tags = (header.extra[name] for name in ("salt", "header", "tags"))

    def hkdf(secret, salt, info):  # RFC 5869, one block of output
        extracted = hmac.digest(salt or bytes(32), secret, "sha256")
        return hmac.digest(extracted, info + b"\x01", "sha256")

    assert header.codec_digest == hkdf(MASTER, b"", b"kvrag key id")[:16].hex()
    namespace = hkdf(MASTER, b"", b"kvrag namespace " + header.key.tag.encode())
    cipher = AESGCM(hkdf(namespace, salt, b"kvrag sealing"))
    key = str(header.key).encode()
    plain = cipher.decrypt(bytes(12), text, b"kvrag header " + key + tags)
    assert plain == block.header_bytes[: used_nbytes(block.header_bytes)]
    for index in range(2):
        nonce = bytes(4) + struct.pack("<Q", 1 + index)
        place = b"kvrag segment " + key + struct.pack("<QQ", index, 2)
        content = bytes(sealed.segments[index][:5000]) + tags[16 * index : 16 * index + 16]
        assert cipher.decrypt(nonce, content, place) == block.segments[index][:5000]


def test_nothing_of_the_text_lies_in_clear():
    ids = tuple(range(1_000_000, 1_000_300))
    shape = (2, 1, 300, 4)
    secret = hashlib.sha256(b"kv").digest() * 300
    block = make_block(
        1, token_ids=ids, k_shape=shape, v_shape=shape, segments=[secret, secret], extra={"t": "me"}
    )
    data = whole_bytes(SEALER.seal(block))
    assert struct.pack("<2I", *ids[:2]) in whole_bytes(block)
    for token in ids:
        assert struct.pack("<I", token) not in data
    assert secret[:16] not in data
    assert FINGERPRINT.encode() not in data
    sealed = block_of(data).header
    assert (sealed.token_ids, sealed.k_shape) == ((), (2, 0, 0, 0))


def test_the_same_block_sealed_twice_has_no_bytes_in_common():
    block = make_block(1, layers=3, segments=[bytes(8192)] * 3)
    sealed = [SEALER.seal(block) for _ in range(20)]
    assert len({one.header.extra["salt"] for one in sealed}) == 20
    # Equal segments under one key would show equal bytes if a nonce were used twice.
    pages = [bytes(view[:4096]) for one in sealed for view in one.segments]
    assert len(set(pages)) == len(pages)


def test_every_changed_byte_is_found():
    """Also where the checksums were made to fit: those are no secret."""
    block = make_block(1, layers=2, segment_nbytes=40)
    sealed = SEALER.seal(block)
    for name in ("salt", "header", "tags"):
        value = sealed.header.extra[name]
        for position in range(len(value)):
            changed = bytearray(value)
            changed[position] ^= 1 << position % 8
            with pytest.raises(BlockFormatError):
                opened(forged(sealed, extra={name: bytes(changed)}))
        with pytest.raises(BlockFormatError):
            opened(forged(sealed, extra={name: value[:-1]}))
        with pytest.raises(BlockFormatError):
            opened(forged(sealed, extra={name: 7}))
    for position in range(40):
        content = bytearray(sealed.segments[0][:40])
        content[position] ^= 1 << position % 8
        with pytest.raises(BlockFormatError):
            opened(forged(sealed, segments=[content, sealed.segments[1][:40]]))
    assert whole_bytes(opened(forged(sealed))) == whole_bytes(block)


def test_what_is_moved_is_found():
    one, again = (SEALER.seal(make_block(1, layers=2, segment_nbytes=40)) for _ in range(2))
    other = SEALER.seal(make_block(2, layers=2, segment_nbytes=40))
    first, second = (view[:40] for view in one.segments)
    tags = one.header.extra["tags"]
    for moved in (
        forged(one, segments=[second, first]),  # to another place
        forged(one, segments=[second, first], extra={"tags": tags[16:] + tags[:16]}),
        forged(one, segments=[first, again.segments[1][:40]]),  # of another sealing
        forged(one, segments=[first, other.segments[1][:40]]),  # of another block
        forged(one, segments=[first], k_shape=(1, 0, 0, 0), v_shape=(1, 0, 0, 0)),
        forged(one, segments=[first[:39], second]),
        forged(one, extra={"salt": again.header.extra["salt"]}),
        forged(one, extra=dict(other.header.extra)),
        forged(one, key=make_key(2)),  # under another name
        forged(one, key=make_key(1, "b" * 32)),  # in another namespace
    ):
        with pytest.raises(BlockFormatError):
            opened(moved)


def test_other_keys_other_versions_and_no_seal_are_none():
    block = make_block(1)
    sealed = SEALER.seal(block)
    assert opened(sealed, OTHER) is None
    assert opened(forged(sealed, codec_version=2)) is None
    assert opened(block) is None
    assert is_sealed(sealed.header)
    assert not is_sealed(block.header)


def test_a_namespaces_key_opens_no_other():
    mine, theirs = make_key(1), make_key(1, "b" * 32)
    assert SEALER._key(mine, bytes(32)) != SEALER._key(theirs, bytes(32))
    assert SEALER._key(mine, bytes(32)) != OTHER._key(mine, bytes(32))
    # A block's name takes part by the bound data, not by the key.
    assert SEALER._key(mine, bytes(32)) == SEALER._key(make_key(2), bytes(32))


def test_keys_are_not_shown():
    sealer = Sealer(b"\xabsecret master key 32 bytes long"[:32])
    found = sealer.open(sealer.seal(make_block(1)).header)
    for text in (repr(sealer), str(sealer), repr(found)):
        assert "secret" not in text
        assert repr(found._key) not in text
    with pytest.raises(EncryptionKeyError, match="32 bytes, got 5"):
        Sealer(b"short")


def test_a_block_too_large_to_be_sealed_is_refused_and_nothing_else(tmp_path):
    shape = (2, 1, 15_900, 4)
    block = make_block(1, tokens=15_900, k_shape=shape, v_shape=shape, extra={"x": bytes(1500)})
    with (
        SealedTier(DiskTier(tmp_path), SEALER) as tier,
        pytest.raises(TierFullError, match="cannot be sealed: the header takes"),
    ):
        tier.put(make_key(1), block)
    with TieredStore([TierSlot(SealedTier(DiskTier(tmp_path), SEALER))]) as store:
        outcome = store.put(make_key(1), block)
        assert outcome.tiers == ()
        assert "cannot be sealed" in outcome.refused[0][1]
        assert store.stats().tiers[0].refused == 1
        assert store.put(make_key(2), make_block(2)).durable


def test_a_block_too_large_to_be_sealed_pushes_none_out(tmp_path):
    """Room was made for it first, at every try, and then it was refused."""
    tier = SealedTier(DiskTier(tmp_path), SEALER)
    block = make_block("large", tokens=16_250)
    others = [make_block(name, segment_nbytes=block.nbytes) for name in range(3)]
    with TieredStore([TierSlot(tier, sum(tier.footprint(b.header) for b in others))]) as store:
        for other in others:
            assert store.put(other.header.key, other).durable
        for _ in range(2):
            assert "cannot be sealed" in store.put(make_key("large"), block).refused[0][1]
        stats = store.stats().tiers[0]
        assert (stats.blocks, stats.evictions, stats.refused) == (3, 0, 2)


def test_a_replaced_block_is_read_by_its_new_header(tmp_path):
    """A header that was remembered belongs to a sealing, not to a key."""
    with (
        SealedTier(DiskTier(tmp_path), SEALER) as one,
        SealedTier(DiskTier(tmp_path), SEALER) as two,
    ):
        one.put(make_key(1), make_block(1))
        assert one.segments(make_key(1), 0, 1) == [make_block(1).segments[0]]
        for version in (1, 0):
            other = make_block(1, version=version, segment_nbytes=9000)
            two.put(make_key(1), other)
            assert one.segments(make_key(1), 1, 2) == [other.segments[1]]
        with SealedTier(DiskTier(tmp_path), OTHER) as foreign:
            foreign.put(make_key(1), make_block(1))
            assert one.segments(make_key(1), 1, 2) is None
        two.delete(make_key(1))
        assert one.segments(make_key(1), 0, 1) is None


# -- in a store ---------------------------------------------------------------------------------


def open_block(store, name):
    return store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))


def test_memory_has_it_plain_and_disk_sealed(tmp_path):
    ram, disk = RamTier(), DiskTier(tmp_path)
    block = make_block(1)
    with TieredStore([TierSlot(ram), TierSlot(SealedTier(disk, SEALER))]) as store:
        store.put(make_key(1), block, durable_only=True)
        assert not ram.contains(make_key(1))
        assert is_sealed(disk.header(make_key(1)))
        with open_block(store, 1) as reader:
            assert reader.tier == "disk"
            assert reader.read(0, 2) == list(block.segments)
        assert ram.header(make_key(1)) == block.header  # promoted
        assert [tier.nbytes for tier in store.stats().tiers] == [ram.nbytes, disk.nbytes]


@pytest.mark.parametrize("tokens", [3, 500, 960, 1015, 2048])
def test_the_books_have_what_lies_on_disk(tmp_path, tokens):
    """Also where the sealed header takes a page more than the plain one."""
    shape = (30, 1, tokens, 4)
    block = make_block(1, layers=30, tokens=tokens, k_shape=shape, v_shape=shape)
    key = make_key(1)
    with TieredStore([TierSlot(SealedTier(DiskTier(tmp_path), SEALER))]) as store:
        store.put(key, block)
        (stats,) = store.stats().tiers
        assert stats.nbytes == file_of(tmp_path, key).stat().st_size
        assert stats.nbytes - block.nbytes in (0, 4096)


@pytest.mark.parametrize("sealer", [OTHER, None], ids=["other key", "no key"])
def test_a_block_under_another_key_is_a_miss_and_stays(tmp_path, sealer):
    with SealedTier(DiskTier(tmp_path), SEALER) as tier:
        tier.put(make_key(1), make_block(1))
    before = file_of(tmp_path, make_key(1)).read_bytes()
    disk = DiskTier(tmp_path)
    with TieredStore([TierSlot(SealedTier(disk, sealer) if sealer else disk)]) as store:
        assert open_block(store, 1) is None
        (stats,) = store.stats().tiers
        assert (stats.damaged, stats.misses, stats.blocks) == (0, 1, 1)
        assert not (tmp_path / "quarantine").exists()
        assert file_of(tmp_path, make_key(1)).read_bytes() == before
        store.put(make_key(1), make_block(1))
        with open_block(store, 1) as reader:
            assert reader.read(0, 2) == list(make_block(1).segments)
        assert store.stats().tiers[0].nbytes == disk.nbytes


def test_a_plain_block_laid_in_a_sealed_tier_is_never_used(tmp_path):
    with DiskTier(tmp_path) as tier:
        tier.put(make_key(1), make_block(1))
    with TieredStore([TierSlot(SealedTier(DiskTier(tmp_path), SEALER))]) as store:
        assert open_block(store, 1) is None
        assert store.stats().tiers[0].damaged == 0


@pytest.mark.parametrize("part", ["header", "segment"])
def test_what_was_changed_is_damage(tmp_path, part):
    with SealedTier(DiskTier(tmp_path), SEALER) as tier:
        tier.put(make_key(1), make_block(1))
    path = file_of(tmp_path, make_key(1))
    sealed = block_of(path.read_bytes())
    text = bytearray(sealed.header.extra["header"])
    text[9] ^= 1
    content = bytes(100)
    changed = (
        forged(sealed, extra={"header": bytes(text)})
        if part == "header"
        else forged(sealed, segments=[content, content])
    )
    path.write_bytes(whole_bytes(changed))
    with TieredStore([TierSlot(SealedTier(DiskTier(tmp_path), SEALER))]) as store:
        reader = open_block(store, 1)
        if part == "header":
            assert reader is None
        else:
            with reader, pytest.raises(StoreError, match="not what was sealed"):
                reader.read(0, 1)
        assert store.stats().tiers[0].damaged == 1
        assert len(list((tmp_path / "quarantine").iterdir())) == 1
        store.put(make_key(1), make_block(1))
        with open_block(store, 1) as reader:
            assert reader.read(0, 2) == list(make_block(1).segments)


def test_segments_of_other_lengths_than_were_sealed_are_damage():
    longer = make_block(1, layers=2, segment_nbytes=41)
    sealed = SEALER.seal(longer)
    with pytest.raises(BlockFormatError, match="as long as"):
        opened(forged(sealed, segments=[view[:40] for view in sealed.segments]))


def test_every_method_of_a_tier_is_passed_on():
    """One with a default would otherwise answer for a tier that knows better."""
    methods = {name for name, value in vars(Tier).items() if callable(value) and name[0] != "_"}
    assert "cached_share" in methods
    assert methods <= set(vars(SealedTier))
