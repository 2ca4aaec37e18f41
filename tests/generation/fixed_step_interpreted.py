"""`test_graph.py` runs this: fixed steps with Triton's kernels, interpreted, against the reference.

One row over all of the cache with its position on the device is what a CUDA graph replays: the
kernel must stop at the position, and leave alone what stands behind it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from kvrag.generation.graph import FixedStep
from kvrag.generation.kv_cache import KVCache
from kvrag.models.config import ModelConfig
from kvrag.models.decoder import Decoder
from kvrag.models.folder import read_json
from kvrag.models.forward import extend
from kvrag.models.weights import Weights
from tests.tiny import make_tiny_model


@torch.inference_mode()
def main(folder: Path) -> None:
    make_tiny_model(folder, "qwen3", num_hidden_layers=2)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    decoders = {
        name: Decoder(config, Weights(folder), dtype=torch.float32, kernels=name)
        for name in ("torch", "triton")
    }
    assert decoders["triton"].kernels.name == "triton"
    cache = KVCache(config, 1, dtype=torch.float32, device=torch.device("cpu"))
    extend(decoders["torch"], range(10, 40), cache)
    # Large enough that the kernel splits the keys, most of which are not there.
    step = FixedStep(decoders["triton"], 400)
    step.load(cache)
    for tensor in (*step.cache.k, *step.cache.v):
        tensor[:, cache.length :] = torch.nan
    for token_id in (7, 8, 9):
        step.put(token_id)
        expected = extend(decoders["torch"], [token_id], cache)
        torch.testing.assert_close(step.run(), expected, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "model")
