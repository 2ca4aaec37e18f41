"""Invariant 1 on SmolLM2-135M-Instruct in float32: fusion where it must equal full prefill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvrag.fusion.cacheblend import CacheBlend
from kvrag.fusion.full import Full
from kvrag.fusion.reuse import Reuse
from kvrag.models.source import model_folder
from tests.fusion.rooms import Room

pytestmark = pytest.mark.models

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()


@pytest.fixture(scope="module")
def folder(models_dir):
    return model_folder("smollm2-135m", models_dir)


def test_exact_strategies_are_as_near_as_transformers_to_itself(folder):
    """No further from sdpa than three times the distance of sdpa and eager, on the same ids."""
    from transformers import AutoModelForCausalLM

    room = Room(folder, dtype=torch.float32)
    tokenizer = room.model.tokenizer
    prefix = tokenizer.encode_template("<|im_start|>user\nPassages:\n\n")
    room.blocks.prefix_ids = tuple(prefix)
    ids = tokenizer.encode(TEXT)
    chunks = [ids[i : i + 120] for i in range(0, 480, 120)]
    question = tokenizer.encode_template(
        "Question: May I sell it?<|im_end|>\n<|im_start|>assistant\n"
    )
    cases = [
        (chunks, CacheBlend(ratio=1.0)),
        (chunks, Full()),
        (chunks[:1], Reuse()),
        (chunks[:1], CacheBlend(ratio=0.15)),
    ]
    ours = [
        room.run(some, strategy, prefix=prefix, question=question).logits
        for some, strategy in cases
    ]
    theirs: dict[str, list[torch.Tensor]] = {"sdpa": [], "eager": []}
    for attention, rows in theirs.items():
        hf = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        for some, _ in cases:
            prompt = room.prompt(some, question, prefix).token_ids
            with torch.inference_mode():
                rows.append(hf(torch.tensor([prompt])).logits[0])
        del hf
    for (_, strategy), logits, sdpa, eager in zip(
        cases, ours, theirs["sdpa"], theirs["eager"], strict=True
    ):
        bound = 3 * (sdpa - eager).abs().max()
        distance = (logits - sdpa[-1:]).abs().max()
        assert distance <= bound, f"{strategy}: {distance:.2e}, allowed {bound:.2e}"
    # And reuse of several chunks is not exact, or the others would show nothing.
    reused = room.run(chunks, Reuse(), prefix=prefix, question=question).logits
    assert (reused - ours[1]).abs().max() > 0.1
