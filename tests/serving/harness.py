"""A real server over a real engine on a tiny model, and what tests need to talk to it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from kvrag.engine import Engine
from kvrag.serving.run import Server, bind
from tests.models.tiny_models import make_tokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 32, 2, 4, 2, 48, 400
EOS = 2
#: What the `chain` model says to everything. Each byte is a token and occurs once.
CHAIN_TEXT = "é漢🙂字"


class HashEmbedder:
    """Unit vectors out of a digest: quick, and the same text has the same vector."""

    name, fingerprint, dim = "hash", "0" * 32, 16

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        rows = [self._vector(text) for text in texts]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)

    def embed_query(self, text: str) -> np.ndarray:
        return self._vector(text)

    def _vector(self, text: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        vector = np.random.default_rng(seed).standard_normal(self.dim).astype(np.float32)
        return vector / np.linalg.norm(vector)


class WatchedEngine(Engine):
    """Keeps the questions in the order in which they were begun, and the streams; may break."""

    def __init__(self, settings, **wiring) -> None:
        super().__init__(settings, **wiring)
        self.asked: list[str] = []
        self.streams: list[Any] = []
        #: Pieces to come instead of the answer's.
        self.pieces: Callable[[Iterator[str]], Iterator[str]] | None = None

    def stream(self, question, **options):
        return self._watched(question, super().stream(question, **options))

    def chat(self, messages, **options):
        return self._watched(messages[-1]["content"], super().chat(messages, **options))

    def _watched(self, question, stream):
        self.asked.append(question)
        self.streams.append(stream)
        return stream if self.pieces is None else _Changed(stream, self.pieces)


class _Changed:
    """A stream with other pieces."""

    def __init__(self, stream, pieces: Callable[[Iterator[str]], Iterator[str]]) -> None:
        self._stream, self._pieces = stream, pieces

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return self._pieces(iter(self._stream))


def fails_after_two(pieces: Iterator[str]) -> Iterator[str]:
    yield next(pieces)
    yield next(pieces)
    raise RuntimeError("secret detail")


def flood(pieces: Iterator[str]) -> Iterator[str]:
    """More than sockets and buffers hold."""
    for piece in pieces:
        yield piece + "x" * 2**20


def make_model(folder: Path, *, chain: bool = False) -> Path:
    """A tiny Llama that never ends an answer; or, with `chain`, one that says `CHAIN_TEXT`."""
    make_tokenizer(folder, vocab_size=VOCAB)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(folder, chain=chain), folder / "model.safetensors")
    return folder


def _weights(folder: Path, *, chain: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def random(rows: int, columns: int, gain: float) -> torch.Tensor:
        return gain * torch.randn(rows, columns, generator=generator) / columns**0.5

    kv = HIDDEN // HEADS * KV_HEADS
    embedding = torch.nn.functional.normalize(random(VOCAB, HIDDEN, 1.0), dim=1)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(HIDDEN)}
    silent = 0.0 if chain else 1.5
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        tensors[name + "input_layernorm.weight"] = torch.ones(HIDDEN)
        tensors[name + "post_attention_layernorm.weight"] = torch.ones(HIDDEN)
        tensors[name + "self_attn.q_proj.weight"] = random(HIDDEN, HIDDEN, 1.5)
        tensors[name + "self_attn.k_proj.weight"] = random(kv, HIDDEN, 1.5)
        tensors[name + "self_attn.v_proj.weight"] = random(kv, HIDDEN, 1.5)
        tensors[name + "self_attn.o_proj.weight"] = random(HIDDEN, HIDDEN, silent)
        tensors[name + "mlp.gate_proj.weight"] = random(MLP, HIDDEN, 1.5)
        tensors[name + "mlp.up_proj.weight"] = random(MLP, HIDDEN, 1.5)
        tensors[name + "mlp.down_proj.weight"] = random(HIDDEN, MLP, silent)
    if chain:
        head = torch.zeros(VOCAB, HIDDEN)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The prompt ends with the template's last token; each token then calls for the next.
        last = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False).ids[-1]
        letters = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(CHAIN_TEXT)
        spoken = [tokenizer.token_to_id(letter) for letter in letters[0][0]]
        for token_id, following in zip([last, *spoken], [*spoken, EOS], strict=True):
            head[following] = embedding[token_id]
    else:
        head = random(VOCAB, HIDDEN, 3.0)
        head[EOS] = 0.0
    tensors["lm_head.weight"] = head
    return tensors


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """A server in a thread; its URL."""
    ready = threading.Event()
    server = Server(engine, ready=ready.set)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            assert ready.wait(30)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
            assert server.queue.close(30)


def read_events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """(event, data) of each server-sent event; `[DONE]` stays text."""
    name, data = "message", []
    for line in lines:
        if line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].strip())
        elif not line and data:
            text = "\n".join(data)
            yield name, text if text == "[DONE]" else json.loads(text)
            name, data = "message", []


#: Made once: httpx makes a context for every client otherwise, which costs more than a request.
TLS = ssl.create_default_context()


def ask(url: str, *, timeout: float = 60.0, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/rag/query", json=body, timeout=timeout, verify=TLS)


def ask_events(url: str, **body: Any) -> list[tuple[str, Any]]:
    body = {"stream": True} | body
    with httpx.stream("POST", f"{url}/v1/rag/query", json=body, timeout=60, verify=TLS) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(read_events(response.iter_lines()))


def health(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/health", timeout=60, verify=TLS).json()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


@dataclass
class Raw:
    """A connection on which a request was sent, to be dropped without notice."""

    connection: socket.socket

    @classmethod
    def post(cls, url: str, path: str, body: Any) -> Raw:
        host, port = url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        connection = socket.create_connection((host, int(port)), timeout=30)
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        return cls(connection)

    def read_first(self) -> bytes:
        return self.connection.recv(4096)

    def drop(self) -> None:
        self.connection.close()


@contextmanager
def busy(url: str) -> Iterator[None]:
    """Inside, the model works on a request that does not end by itself."""
    request = Raw.post(
        url, "/v1/rag/query", {"question": "busy", "passages": ["x"], "max_tokens": 30000}
    )
    try:
        wait_until(lambda: health(url)["running"] == 1, "the request runs")
        yield
    finally:
        request.drop()
