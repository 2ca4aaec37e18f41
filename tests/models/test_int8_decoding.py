"""int8 weights in the steps of decoding, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from kvrag import Engine, Settings
from kvrag.errors import UnsupportedModelError
from kvrag.generation.kv_cache import KVCache
from kvrag.models.config import ModelConfig
from kvrag.models.decoder import Decoder
from kvrag.models.folder import read_json
from kvrag.models.forward import append, extend
from kvrag.models.weights import Weights
from tests.models.tiny_models import token_ids
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines,
    reason="this CPU or this build of torch has no FBGEMM",
)
#: Wide enough that each product is worth int8.
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 16, "head_dim": 64}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("wide"), "qwen3", **WIDE)


def decoder_of(folder, **options):
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    return Decoder(config, Weights(folder), dtype=torch.float32, **options)


def cache_of(decoder):
    return KVCache(decoder.config, 1, dtype=torch.float32, device=torch.device("cpu"))


def test_only_the_stepping_decoder_rounds(wide):
    plain, int8 = decoder_of(wide), decoder_of(wide, int8_decoding=True)
    ids = token_ids(20, vocab=380)
    assert plain.stepping is plain
    caches = [cache_of(decoder) for decoder in (plain, int8)]
    for decoder, cache in zip((plain, int8), caches, strict=True):
        append(decoder, ids, cache)
    # Also one row at a time, as a chunk of one token is computed.
    exact = [
        extend(decoder, [7], cache) for decoder, cache in zip((plain, int8), caches, strict=True)
    ]
    assert torch.equal(*exact)
    for a, b in zip(caches[0].v, caches[1].v, strict=True):
        assert torch.equal(a[:, :21], b[:, :21])

    caches[1].truncate(20)
    rounded = extend(int8.stepping, [7], caches[1])
    assert not torch.equal(rounded, exact[0])
    p, q = exact[0].log_softmax(-1), rounded.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum()) < 1e-3


def test_a_store_is_shared_by_both(wide, tmp_path):
    """Blocks and their keys do not depend on the setting, answers hardly."""
    passages = ["Anna keeps the lamp of Karsk.", "The ferry leaves at noon."]

    def ask(weights):
        settings = Settings(
            model=str(wide), home=tmp_path / "home", dtype="float32", decode_weights=weights
        )
        with Engine.open(settings) as engine:
            answer = engine.answer("Who?", passages=passages, max_tokens=6, strategy="reuse")
            return answer, engine.model.fingerprint, engine.model.decoder

    stored, fingerprint, _ = ask("stored")
    int8, same, decoder = ask("int8")
    assert same == fingerprint
    assert decoder.stepping is not decoder
    assert {source.tier for source in int8.sources} == {"disk"}
    # The first token comes out of prefill, which is not rounded.
    assert int8.token_ids[0] == stored.token_ids[0]


@pytest.mark.parametrize("dtype", [torch.float64])
def test_it_says_where_it_cannot_run(wide, dtype):
    config = ModelConfig.from_hf(read_json(wide / "config.json"))
    with pytest.raises(UnsupportedModelError, match=r"decode_weights 'int8'.*float64"):
        Decoder(config, Weights(wide), dtype=dtype, int8_decoding=True)
