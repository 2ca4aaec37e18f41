"""Requests that miss the same chunks at once: each chunk is computed once."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from kvrag import Engine, Settings
from kvrag.blocks import ChunkBlocks
from kvrag.retrieval.documents import Document
from tests.tiny import make_tiny_embedder

PASSAGES = [f"Keeper {name} lit lamp {name * name} of the tower." for name in range(4)]
QUESTION = "Who keeps the lamp?"


def open_engine(folder, home, **options):
    options = {"dtype": "float32", "threads": 1, "corpus_context": ""} | options
    return Engine.open(
        Settings(model=str(folder), home=home, models_dir=home.parent / "models", **options)
    )


def ask(engine, passages=PASSAGES, **options):
    return engine.prefill(QUESTION, passages=passages, strategy="reuse", new_tokens=1, **options)


@pytest.fixture
def computed(monkeypatch):
    """The chunks that were computed. The first waits until another request has begun to wait."""
    calls, waiting = [], threading.Event()
    compute, make = ChunkBlocks.compute, ChunkBlocks.make
    asked = []

    def counted(self, token_ids):
        calls.append(tuple(token_ids))
        assert waiting.wait(20)
        return compute(self, token_ids)

    def watched(self, token_ids, *rest, **options):
        asked.append(tuple(token_ids))
        if len(asked) >= 2:
            waiting.set()
        return make(self, token_ids, *rest, **options)

    monkeypatch.setattr(ChunkBlocks, "compute", counted)
    monkeypatch.setattr(ChunkBlocks, "make", watched)
    return calls


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("ram_bytes", [2**30, 0])
def test_threads(tiny, tmp_path, computed, order, ram_bytes):
    """Of the same passages, and of the same in another order; also where no memory is kept."""
    folder = tiny("llama")
    with open_engine(folder, tmp_path / "home", ram_bytes=ram_bytes) as engine:
        found = [None, None]
        passages = [PASSAGES, PASSAGES[::order]]

        def run(index):
            found[index] = ask(engine, passages[index])

        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(computed) == len(set(computed)) == len(PASSAGES)
        tiers = [tier for prefilled in found for tier in prefilled.tiers]
        assert tiers.count("computed") == len(PASSAGES)
        assert tiers.count("awaited") == len(PASSAGES)
        for index in range(2):
            again = ask(engine, passages[index])
            assert not {"computed", "awaited"} & set(again.tiers)
            assert torch.equal(found[index].logits, again.logits)
        # What was awaited was not computed here, and says so.
        work = [sum(prefilled.tokens.computed for prefilled in found), ask(engine).tokens]
        assert work[0] < 2 * work[1].prompt


OTHER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from kvrag.blocks import ChunkBlocks
    from tests.engine.test_shared_misses import PASSAGES, ask, open_engine

    compute = ChunkBlocks.compute

    def slow(self, token_ids):
        print("computing", flush=True)
        time.sleep(0.7)
        return compute(self, token_ids)

    ChunkBlocks.compute = slow
    with open_engine(sys.argv[1], Path(sys.argv[2])) as engine:
        print(set(ask(engine, PASSAGES[:1]).tiers), flush=True)
    """
)


def test_processes(tiny, tmp_path, monkeypatch):
    """The second process on a home takes from its disk what the first was computing."""
    folder, home = tiny("llama"), tmp_path / "home"
    with open_engine(folder, home) as engine:
        command = [sys.executable, "-c", OTHER, str(folder), str(home)]
        root = Path(__file__).parents[2]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as other:
            assert other.stdout.readline() == "computing\n"
            monkeypatch.setattr(ChunkBlocks, "compute", lambda *_: pytest.fail("computed twice"))
            prefilled = ask(engine, PASSAGES[:1])
            assert other.stdout.read() == "{'computed'}\n"
    assert prefilled.tiers == ("awaited",)
    assert prefilled.stall_s > 0.1


@pytest.mark.parametrize("disk_write", ["through", "back"])
def test_a_corpus_job_takes_what_a_request_computes(tiny, tmp_path, computed, disk_write):
    """While a request is about a chunk, a job comes to it: computed once, then durable."""
    options = {"disk_write": disk_write, "first_blocks": False}
    embedder = make_tiny_embedder(tmp_path / "embedder")
    with open_engine(tiny("llama"), tmp_path / "home", embedder=str(embedder), **options) as engine:
        document = Document("Anna keeps the lamp of Karsk.", title="Karsk")
        passage = {"title": document.title, "text": document.text}
        request = threading.Thread(target=ask, args=(engine, [passage]))
        request.start()
        while not computed:
            time.sleep(0.005)
        progress = engine.add([document])
        assert progress.tokens_computed == 0
        (key,) = engine.store.keys()
        assert engine.store.holds_durably(key)
        request.join(30)
        assert len(computed) == 1
        assert engine.complete().chunks_stored_before == 1
