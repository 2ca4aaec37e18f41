"""Triton's kernels in Triton's interpreter; `test_triton.py` runs this in a process of its own.

The interpreter rounds to bfloat16 towards zero where a GPU rounds to the nearest.
"""

from __future__ import annotations

import pytest
import torch

from kvrag.generation.kv_cache import KVCache
from kvrag.kernels import choose
from kvrag.kernels.triton.unpack import unpack
from kvrag.models.config import ModelConfig
from kvrag.models.decoder import Decoder
from kvrag.models.folder import read_json
from kvrag.models.forward import extend
from kvrag.models.weights import Weights
from kvrag.store.codecs import GroupedCodec
from kvrag.store.codecs.hadamard import parts
from kvrag.store.codecs.torch_unpack import torch_unpack
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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("heads", "tokens", "k_dim", "v_dim"),
    [(2, 7, 64, 64), (1, 1, 5, 80), (3, 260, 13, 24), (1, 3, 128, 128), (2, 0, 8, 8)],
)
def test_unpacking_is_torchs(bits, heads, tokens, k_dim, v_dim):
    random = torch.Generator().manual_seed(0)
    k = torch.randn(heads, tokens, k_dim, generator=random)
    v = torch.randn(heads, tokens, v_dim, generator=random)
    fine = [[list(range(head, k_dim, 3)) for head in range(heads)]] if bits == 4 else ()
    encoded = GroupedCodec(bits, fine=fine).encode(k, v, layer=0)
    layer = torch.frombuffer(bytearray(bytes(encoded) + b"\0"), dtype=torch.uint8)
    sizes = {"bits": bits, "groups": min(tokens, max(1, tokens // 128)), "parts": parts(v_dim)}
    expected, got = ([torch.full_like(x, 7) for x in (k, v)] for _ in range(2))
    assert torch_unpack(layer, *expected, **sizes) == len(encoded)
    assert unpack(layer, *got, **sizes) == len(encoded)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
    if tokens:
        assert unpack(layer[: len(encoded) - 1], *got, **sizes) == len(encoded)
