"""A home whose stored KV is encrypted, through the engine."""

from __future__ import annotations

import builtins
import os
import struct

import pytest

pytest.importorskip("cryptography", reason="the extra encryption is not installed")

from kvrag import Settings
from kvrag.errors import MissingExtraError, SettingsError
from kvrag.store.errors import EncryptionKeyError

from .test_answers import ask, open_engine

KEY = "0123456789abcdef" * 4
OTHER = "f" * 64


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def tiers(answer):
    return {source.tier for source in answer.sources}


def stored(home):
    return {path: path.read_bytes() for path in (home / "kv").rglob("*.kv")}


def test_answers_are_the_same_and_nothing_of_them_lies_on_disk(tiny, tmp_path, home):
    folder = tiny("llama")
    with open_engine(folder, tmp_path / "plain") as engine:
        expected = ask(engine).token_ids
        plain = stored(tmp_path / "plain")
    with open_engine(folder, home, encryption_key=KEY) as engine:
        assert ask(engine).token_ids == expected
        assert tiers(ask(engine)) == {"ram"}
    with open_engine(folder, home, encryption_key=KEY) as engine:
        answer = ask(engine)
        assert tiers(answer) == {"disk"}
        assert answer.token_ids == expected
        assert tiers(ask(engine)) == {"ram"}
        assert engine.stats().tiers[1].damaged == 0
    sealed = stored(home)
    assert len(sealed) == len(plain) == 3
    for data in plain.values():
        # Sixteen bytes of K and V from every page: the tiny model's are all there in clear.
        pages = [data[at : at + 16] for at in range(4096, len(data), 4096)]
        assert pages
        assert not any(page in other for page in pages for other in sealed.values())
    tokenizer_ids = engine.model.tokenizer.encode("Anna keeps the lamp of Karsk.")
    needle = struct.pack("<3I", *tokenizer_ids[:3])
    assert any(needle in data for data in plain.values())
    assert not any(needle in data for data in sealed.values())


def test_another_key_or_none_is_refused_at_the_start(tiny, home):
    folder = tiny("llama")
    with open_engine(folder, home, encryption_key=KEY) as engine:
        ask(engine)
    before = stored(home)
    for options, says in (({"encryption_key": OTHER}, "the one given is"), ({}, "none is given")):
        with pytest.raises(EncryptionKeyError, match=says) as caught:
            open_engine(folder, home, **options)
        assert KEY not in str(caught.value)
        assert OTHER not in str(caught.value)
    assert stored(home) == before
    with open_engine(folder, home, encryption_key=KEY) as engine:
        assert tiers(ask(engine)) == {"disk"}


def test_a_new_key_is_begun_by_removing_the_old_ones_id(tiny, home):
    """What lies there under the old key is neither used nor touched, and comes back with it."""
    folder = tiny("llama")
    for key in (None, KEY, OTHER):
        (home / "encryption.id").unlink(missing_ok=True)
        before = stored(home)
        with open_engine(folder, home, encryption_key=key) as engine:
            assert tiers(ask(engine)) == {"computed"}
            stats = engine.stats().tiers[1]
            assert stats.damaged == stats.errors == 0
        assert stored(home).items() >= before.items()
    assert not (home / "kv" / "quarantine").exists()
    (home / "encryption.id").unlink()
    with open_engine(folder, home, encryption_key=KEY) as engine:
        assert tiers(ask(engine)) == {"disk"}


def test_the_key_may_lie_in_a_file(tiny, tmp_path, home, caplog):
    path = tmp_path / "key"
    path.write_text(KEY.upper() + "\n")
    path.chmod(0o600)
    with open_engine(tiny("llama"), home, encryption_key_file=path) as engine:
        ask(engine)
    assert not [record for record in caplog.records if "encryption" in record.getMessage()]
    path.chmod(0o640)
    with open_engine(tiny("llama"), home, encryption_key=KEY) as engine:
        assert tiers(ask(engine)) == {"disk"}
    with open_engine(tiny("llama"), home, encryption_key_file=path) as engine:
        assert "chmod 600" in caplog.text
    assert (home / "encryption.id").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "got 0 characters"),
        (KEY[:-1], "got 63 characters"),
        (KEY + "00", "got 66 characters"),
        ("g" * 64, "of other kinds"),
        ("\xff" * 32, "holds no key"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_key(tmp_path, content, says):
    from kvrag.store.encryption_key import read_key_file

    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(EncryptionKeyError, match=says) as caught:
        read_key_file(path)
    assert not content or content not in str(caught.value)


@pytest.mark.parametrize("key", ["swordfish", "z" * 64, KEY + "0"])
def test_a_malformed_key_is_never_shown(key, monkeypatch):
    monkeypatch.setenv("KVRAG_ENCRYPTION_KEY", key)
    with pytest.raises(SettingsError, match="64 hexadecimal digits") as caught:
        Settings()
    seen = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert not any(key in text for error in seen for text in (str(error), repr(error)))


def test_the_key_is_never_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("KVRAG_ENCRYPTION_KEY", KEY)
    settings = Settings()
    dumped = settings.model_dump()
    assert KEY not in repr(settings) + str(settings) + settings.model_dump_json() + str(dumped)
    assert Settings(**dumped).encryption_key.get_secret_value() == KEY
    with pytest.raises(SettingsError, match="not both") as caught:
        Settings(encryption_key_file=tmp_path / "key")
    assert KEY not in str(caught.value) + str(caught.value.__cause__)
    with pytest.raises(SettingsError, match="must not lie under home") as caught:
        Settings(home=tmp_path, models_dir=tmp_path / "models")
    assert KEY not in str(caught.value) + str(caught.value.__cause__)


def test_without_the_library_the_extra_is_named(tiny, home, monkeypatch):
    found = builtins.__import__

    def absent(name, *args, **options):
        if name.startswith("cryptography"):
            raise ImportError(name)
        return found(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtraError, match=r"kvrag\[encryption\]"):
        open_engine(tiny("llama"), home, encryption_key=KEY)
    with open_engine(tiny("llama"), home) as engine:  # nobody else needs it
        ask(engine)
    assert not os.path.exists(home / "encryption.id")
