"""Other engines beside kvrag's strategies, each in a process of its own interpreter.

    with Peer.start(peer_option("vllm=/venvs/vllm/bin/python"), load, timeout_s=600) as peer:
        timing = peer.time(token_ids, new_tokens=16)

What a peer runs is a file of `peer_workers/`, where the protocol is described. Nothing here knows
strategies, prompts or tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from kvrag.bench.gguf_export import export_gguf
from kvrag.bench.peer_process import PeerError, PeerProcess, short
from kvrag.errors import InputError

__all__ = ["PEERS", "Load", "Peer", "PeerError", "PeerOption", "Timing", "peer_option"]

_WORKERS = Path(__file__).with_name("peer_workers")
_DTYPES = ("float32", "bfloat16", "float16")
#: The adapter of each peer.
PEERS: Mapping[str, Path] = {
    "vllm": _WORKERS / "vllm_adapter.py",
    "kvboost": _WORKERS / "kvboost_adapter.py",
    "llama.cpp": _WORKERS / "llama_cpp_adapter.py",
}


@dataclass(frozen=True, slots=True)
class PeerOption:
    """A peer as it was asked for. label: its name in tables. dtype: None for everybody's."""

    label: str
    kind: str
    dtype: str | None
    python: str


@dataclass(frozen=True, slots=True)
class Load:
    """What a peer loads.

    model: a folder of the Hugging Face format. max_tokens: of the longest prompt and its answer.
    """

    model: str
    dtype: str
    threads: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """ttft_s: from the call to the first token. token_s: a further token. ids: the tokens."""

    ttft_s: float
    token_s: float
    ids: tuple[int, ...]


def peer_option(
    text: str, names: Collection[str] = PEERS, dtypes: Collection[str] = _DTYPES
) -> PeerOption:
    """`NAME=PYTHON`, or `NAME:DTYPE=PYTHON` where peers have dtypes.

    Raises:
        InputError: the text has another form, or no such peer or dtype is known.
    """
    label, equals, python = text.partition("=")
    kind, colon, dtype = label.partition(":")
    if not equals or not python or kind not in names or (colon and dtype not in dtypes):
        form = "NAME=PYTHON or NAME:DTYPE=PYTHON" if dtypes else "NAME=PYTHON"
        allowed = f"{', '.join(names)}, dtypes {', '.join(dtypes)}" if dtypes else ", ".join(names)
        raise InputError(
            f"peer {text!r} is not of the form {form}; names are {allowed}, and PYTHON is the "
            "interpreter of the environment that the peer is installed in"
        )
    return PeerOption(label, kind, dtype or None, python)


class Peer(PeerProcess):
    """A running engine: `time` prompts, then `close`."""

    @property
    def caches_prefixes(self) -> bool:
        return self.facts.get("prefix_cache") is True

    @classmethod
    def start(cls, option: PeerOption, load: Load, *, scratch: Path, timeout_s: float) -> Self:
        """Start the peer in its interpreter; files that only it reads are made in `scratch`.

        Raises:
            PeerError: it cannot start or load, or not within `timeout_s`.
        """
        if option.kind == "llama.cpp":
            file = scratch / f"model-{load.dtype}.gguf"
            if not file.exists():
                export_gguf(Path(load.model), file, load.dtype)
            load = Load(str(file), load.dtype, load.threads, load.max_tokens)
        command = [option.python, str(_WORKERS / "worker.py"), str(PEERS[option.kind])]
        return cls(command, asdict(load), timeout_s=timeout_s)

    def time(self, ids: Sequence[int], new_tokens: int) -> Timing:
        """Answer a prompt greedily with `new_tokens` tokens, ends of text ignored.

        Raises:
            PeerError: it failed or did not answer in time, and has ended.
        """
        answer = self.ask({"ids": list(ids), "new_tokens": new_tokens})
        try:
            return Timing(
                float(answer["ttft_s"]), float(answer["token_s"]), tuple(map(int, answer["ids"]))
            )
        except (KeyError, TypeError, ValueError) as exc:
            self.close()
            raise PeerError(f"it answered {short(str(answer))}") from exc
