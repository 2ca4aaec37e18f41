"""Invariant 1 on the packaged models in float32: fusion where it must equal full prefill."""

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


@pytest.mark.parametrize(
    ("name", "before", "behind"),
    [
        ("smollm2-135m", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        # Its windows are longer than a chunk and shorter than the prompt.
        ("gemma3-270m", "<bos>", "\nAnswer:"),
    ],
    ids=["smollm2", "gemma3"],
)
def test_exact_strategies_are_as_near_as_transformers_to_itself(models_dir, name, before, behind):
    """No further from sdpa than three times the distance of sdpa and eager, on the same ids."""
    from transformers import AutoModelForCausalLM

    folder = model_folder(name, models_dir)
    room = Room(folder, dtype=torch.float32)
    tokenizer = room.model.tokenizer
    prefix = tokenizer.encode_template(f"{before}Passages:\n\n")
    room.blocks.prefix_ids = tuple(prefix)
    ids = tokenizer.encode(TEXT)
    chunks = [ids[i : i + 150] for i in range(0, 600, 150)]
    question = tokenizer.encode_template(f"Question: May I sell it?{behind}")
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
                rows.append(hf(torch.tensor([prompt]), logits_to_keep=1).logits[0])
        del hf
    for (_, strategy), logits, sdpa, eager in zip(
        cases, ours, theirs["sdpa"], theirs["eager"], strict=True
    ):
        bound = 3 * (sdpa - eager).abs().max()
        distance = (logits - sdpa).abs().max()
        assert distance <= bound, f"{strategy}: {distance:.2e}, allowed {bound:.2e}"
    # And reuse of several chunks is not exact, or the others would show nothing.
    reused = room.run(chunks, Reuse(), prefix=prefix, question=question).logits
    assert (reused - ours[1]).abs().max() > 0.1
