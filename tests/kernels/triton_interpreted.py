"""Triton's kernels in Triton's interpreter; `test_triton.py` runs this in a process of its own.

The interpreter rounds to bfloat16 towards zero where a GPU rounds to the nearest.
"""

from __future__ import annotations

import pytest
import torch

from kvrag.generation.kv_cache import KVCache
from kvrag.kernels import choose
from kvrag.models.config import ModelConfig
from kvrag.models.decoder import Decoder
from kvrag.models.folder import read_json
from kvrag.models.forward import extend
from kvrag.models.weights import Weights
from tests.kernels.contract import KernelsContract
from tests.tiny import make_tiny_model

# A GPU computes 1 / (1 + inf) without a word.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


class TestTriton(KernelsContract):
    kernels = choose("triton", torch.device("cpu"), torch.float32)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)


def test_a_model_calculates_with_them(tmp_path):
    """Prefill, then a token at a time, as the torch reference does."""
    folder = make_tiny_model(tmp_path, "qwen3", num_hidden_layers=1)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    logits = {}
    for name in ("torch", "triton"):
        decoder = Decoder(config, Weights(folder), dtype=torch.float32, kernels=name)
        assert decoder.kernels.name == name
        cache = KVCache(config, 1, dtype=torch.float32, device=decoder.device)
        rows = [extend(decoder, range(10, 30), cache, every=True)]
        rows += [extend(decoder, [token_id], cache) for token_id in (7, 8)]
        logits[name] = torch.cat(rows)
    torch.testing.assert_close(logits["triton"], logits["torch"], atol=1e-4, rtol=1e-4)
