"""Steps of decoding in one native call: every family's logits, K and V are those of torch."""

from __future__ import annotations

import pytest
import torch

from kvrag.errors import ModelError
from kvrag.generation.kv_cache import KVCache
from kvrag.kernels.native import load
from kvrag.models.config import ModelConfig
from kvrag.models.decoder import Decoder
from kvrag.models.folder import read_json
from kvrag.models.forward import append, extend
from kvrag.models.weights import Weights
from tests.models.tiny_models import FEW, VARIANTS, token_ids
from tests.tiny import make_tiny_model

BEHIND, STEPS = 40, 30


@pytest.fixture(scope="module")
def kernels_dir(pytestconfig):
    folder = pytestconfig.cache.mkdir("kvrag-kernels")
    if load(folder) is None:
        pytest.skip("native code cannot be compiled here")
    return folder


@pytest.fixture(autouse=True)
def _float32_arithmetic(monkeypatch):
    """Also on CPUs that calculate in bfloat16, which native code does not."""
    monkeypatch.setattr("kvrag.models.decoder.compute_dtype", lambda dtype, device: torch.float32)


def open_decoder(folder, dtype, **options):
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    return Decoder(config, Weights(folder), dtype=dtype, **options)


def stepped(decoder):
    """The logits (STEPS, vocab) of a token at a time behind a prompt, and the cache."""
    ids = token_ids(BEHIND + STEPS, vocab=380)
    cache = KVCache(decoder.config, 1, dtype=torch.float32, device=torch.device("cpu"))
    append(decoder, ids[:BEHIND], cache)
    logits = [extend(decoder.stepping, [token_id], cache) for token_id in ids[BEHIND:]]
    assert cache.length == len(ids)
    return torch.cat(logits), cache


def check_steps(folder, dtype, kernels_dir):
    native = open_decoder(folder, dtype, kernels_dir=kernels_dir)
    plain = open_decoder(folder, dtype, kernels="torch")
    assert native.steps_natively
    assert not plain.steps_natively
    ours, cache = stepped(native)
    expected, reference = stepped(plain)
    assert expected.std() > 0.5, "logits near zero would hide differences"
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)
    for one, other in zip((*cache.k, *cache.v), (*reference.k, *reference.v), strict=True):
        length = cache.length
        torch.testing.assert_close(one[:, :length], other[:, :length], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("family", "rope"), VARIANTS)
def test_steps_equal_torch(tiny, kernels_dir, family, rope):
    """Windows, layers without RoPE, norms at each place, biases, multipliers, joined weights."""
    check_steps(tiny(family, rope), torch.bfloat16, kernels_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("family", "rope"), FEW)
def test_steps_of_other_stored_dtypes(tiny, kernels_dir, family, rope, dtype):
    check_steps(tiny(family, rope), dtype, kernels_dir)


def test_several_rows_and_one_have_the_same_head(tiny, kernels_dir):
    """The head of one row reads the weight as it is stored, that of several packs it."""
    decoder = open_decoder(tiny("qwen2"), torch.bfloat16, kernels_dir=kernels_dir)
    rows = torch.randn(5, 32)
    each = torch.cat([decoder.logits(row[None]) for row in rows])
    torch.testing.assert_close(decoder.logits(rows), each, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_are_read_from_the_file(tiny, tmp_path, kernels_dir):
    """No second copy in memory where the file has the stored dtype."""
    from safetensors.torch import load_file, save_file

    folder = tiny("llama")
    stored = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({n: t.bfloat16() for n, t in stored.items()}, tmp_path / "model.safetensors")
    taken = []

    class Watched(Weights):
        def take(self, name, *shape):
            taken.append((name, super().take(name, *shape)))
            return taken[-1][1]

    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    decoder = Decoder(config, Watched(tmp_path), dtype=torch.bfloat16, kernels_dir=kernels_dir)
    mapped = {t.data_ptr() for name, t in taken if name.endswith("proj.weight")}
    used = {
        product.weight.data_ptr()
        for layer in decoder._native_layers._layers
        for product in layer.products.values()
    }
    assert used == mapped
    assert len(used) == 4 * 7


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows that int8's groups of 64 divide."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
    return make_tiny_model(tmp_path_factory.mktemp("wide"), "qwen3", **sizes)


def test_int8_steps_round_and_nothing_else_does(wide, kernels_dir):
    options = {"kernels_dir": kernels_dir}
    plain = open_decoder(wide, torch.bfloat16, **options)
    int8 = open_decoder(wide, torch.bfloat16, int8_decoding=True, **options)
    assert int8.stepping.steps_natively
    assert not int8.steps_natively, "its weights would only take memory"
    assert torch.equal(stepped(int8)[1].v[0][:, :BEHIND], stepped(plain)[1].v[0][:, :BEHIND])
    exact, rounded = (stepped(d)[0].log_softmax(-1) for d in (plain, int8))
    kl = (exact.exp() * (exact - rounded)).sum(-1)
    assert 1e-5 < kl.mean() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_int8_cannot_hold_stays_as_it_is(tiny, kernels_dir, dtype):
    """Inputs that groups do not divide: the same bits as without."""
    folder = tiny("llama")
    options = {"kernels_dir": kernels_dir}
    int8 = open_decoder(folder, dtype, int8_decoding=True, **options)
    plain = open_decoder(folder, dtype, **options)
    assert torch.equal(stepped(int8)[0], stepped(plain)[0])


def test_without_native_code_there_is_no_step(tiny):
    decoder = open_decoder(tiny("llama"), torch.bfloat16)
    assert not decoder.steps_natively
    with pytest.raises(ModelError, match="native code"):
        decoder.step(torch.zeros(1, 32), torch.zeros(4, 2, 2, 9, 8), 0)
