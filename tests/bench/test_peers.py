"""Peers are real processes here; only what they compute is made up."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from kvrag.bench import peers
from kvrag.bench.peers import Load, Peer, PeerError, PeerOption, Timing, peer_option
from kvrag.errors import InputError, UnsupportedModelError
from tests.tiny import make_tiny_model

FAKE = Path(__file__).with_name("fake_adapter.py")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a fake peer that behaves in one way; all are ended with the test."""
    monkeypatch.setitem(peers.PEERS, "vllm", FAKE)
    started = []

    def start(behaviour, *, timeout_s=60.0, python=sys.executable):
        load = Load(str(tmp_path / behaviour), "float32", threads=2, max_tokens=40)
        option = PeerOption("vllm", "vllm", None, python)
        started.append(Peer.start(option, load, scratch=tmp_path, timeout_s=timeout_s))
        return started[-1]

    yield start
    for peer in started:
        peer.close()


def test_a_peer_answers_prompts_whatever_it_prints(start):
    peer = start("plain")
    assert peer.version == "float32, 2 threads"
    assert not peer.caches_prefixes
    for ids in ([3, 1, 4, 1, 5], list(range(50_000))):  # the second fills any pipe
        timing = peer.time(ids, 3)
        assert isinstance(timing, Timing)
        assert timing.ids == tuple(ids[:3])
        assert timing.ttft_s > 0
        assert timing.token_s >= 0
    peer.close()
    peer.close()
    with pytest.raises(PeerError):
        peer.time([1, 2, 3], 2)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("refuses", r"^ValueError: no \[weights\] of that kind$"),
        ("dies", r"exit code 7: out of luck$"),
    ],
)
def test_a_peer_that_cannot_load_says_why(start, behaviour, reason):
    with pytest.raises(PeerError, match=reason):
        start(behaviour)


def test_an_interpreter_that_is_none_is_named(start, tmp_path):
    with pytest.raises(PeerError, match=r"nowhere/python cannot be started: No such file"):
        start("plain", python="/nowhere/python")
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho no such thing here\n")
    script.chmod(0o700)
    with pytest.raises(PeerError, match="it answered 'no such thing here"):
        start("plain", python=str(script))


def test_a_peer_that_never_loads_is_killed(start):
    with pytest.raises(PeerError, match=r"no answer within 0\.5 s"):
        start("never loads", timeout_s=0.5)


def test_a_peer_that_hangs_is_killed_with_its_children(start, tmp_path):
    peer = start("tires")
    peer.time([1, 2, 3], 2)
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert alive(child)
    peer.timeout_s = 0.3
    with pytest.raises(PeerError, match=r"no answer within 0\.3 s"):
        peer.time([1, 2, 3], 2)
    deadline = time.monotonic() + 30
    while alive(child):
        assert time.monotonic() < deadline, "the peer's child outlived it"
        time.sleep(0.01)


def alive(stat: Path) -> bool:
    """Whether a process runs; one that is dead and has not been waited for does not."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_fewer_tokens_than_asked_for_are_an_error(start):
    with pytest.raises(PeerError, match="2 tokens came, not 3"):
        start("stops early").time([1, 2, 3, 4], 3)


@pytest.mark.parametrize("text", ["vllm", "vllm=", "sglang=python", "vllm:int8=python", "=python"])
def test_options_of_another_form_are_refused(text):
    with pytest.raises(InputError, match=r"NAME=PYTHON.*vllm, kvboost, llama\.cpp"):
        peer_option(text)


def test_an_option_may_name_a_dtype():
    assert peer_option("vllm=a=b") == PeerOption("vllm", "vllm", None, "a=b")
    option = peer_option("llama.cpp:bfloat16=/bin/python")
    assert option == PeerOption("llama.cpp:bfloat16", "llama.cpp", "bfloat16", "/bin/python")


def test_llama_cpp_gets_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "llama.cpp", FAKE)
    option = PeerOption("llama.cpp", "llama.cpp", None, sys.executable)
    model = make_tiny_model(tmp_path / "model")
    load = Load(str(model), "bfloat16", threads=1, max_tokens=40)
    with Peer.start(option, load, scratch=tmp_path, timeout_s=60) as peer:
        assert peer.time([1, 2], 2).ids == (1, 2)
    assert (tmp_path / "model-bfloat16.gguf").read_bytes()[:4] == b"GGUF"
    windows = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    windowed = make_tiny_model(tmp_path / "windowed", family="qwen2", **windows)
    load = Load(str(windowed), "float32", threads=1, max_tokens=40)
    with pytest.raises(UnsupportedModelError, match=r"'qwen2' model; .* full attention"):
        Peer.start(option, load, scratch=tmp_path, timeout_s=60)
