"""Tiny random models as folders of the Hugging Face format, written by hand: no transformers.

    folder = make_tiny_model(tmp_path / "model", family="qwen3", num_hidden_layers=2)
    embedder = make_tiny_embedder(tmp_path / "embedder")

The same arguments give the same bytes.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["SPECIAL_TOKENS", "make_tiny_cross_encoder", "make_tiny_embedder", "make_tiny_model"]

#: Their ids are their places.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORDS = (
    " the of and to in is that was for on as with by at from he his it are this be an not or but"
    " lamp keeper question passages answer system user assistant"
)
_VOCAB = 384


def make_tiny_model(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """Write config, float32 weights, tokenizer and ChatML template of a tiny random model.

    Args:
        family: llama, qwen2 or qwen3.
        overrides: entries of config.json, and `seed` (0) of the weights.
    """
    seed = overrides.pop("seed", 0)
    config = {
        "architectures": [f"{family.title()}ForCausalLM"],
        "model_type": family,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "torch_dtype": "float32",
    } | overrides
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
    _write_tokenizer(folder)
    tensors = {name: _random(name, shape, seed) for name, shape in _decoder_shapes(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_tiny_embedder(folder: Path) -> Path:
    """Write a tiny random BERT with mean pooling in the sentence-transformers layout."""
    hidden = 16
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    _write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
        ],
    )
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64})
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_json(
        folder / "config.json",
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": hidden,
            "intermediate_size": hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": _VOCAB,
            "max_position_embeddings": 64,
            "type_vocab_size": 2,
            "pad_token_id": 0,
        },
    )
    _write_tokenizer(folder)
    tensors = {name: _random(name, shape, 0) for name, shape in _bert_shapes(hidden).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_tiny_cross_encoder(folder: Path, *, labels: int = 1) -> Path:
    """Write a tiny random BERT with a classifier, as transformers saves one."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=_VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, num_labels=labels,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[(text, SPECIAL_TOKENS.index(text)) for text in SPECIAL_TOKENS],
    )
    tokenizer.save(str(path))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    fields = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_input_names": names}
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    _write_json(folder / "tokenizer_config.json", fields)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE: all bytes, and the common words of `_WORDS` by merges from the left."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    merges: list[tuple[str, str]] = []
    for word in _WORDS.split():
        left = "Ġ"
        for char in word:
            if len(vocab) < _VOCAB and left + char not in vocab:
                vocab[left + char] = len(vocab)
                merges.append((left, char))
            if left + char not in vocab:
                break
            left += char
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _decoder_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, mlp, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    biased = {"self_attn": config.get("attention_bias"), "mlp": config.get("mlp_bias")}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        for name, shape in linears.items():
            shapes[f"{layer}{name}.weight"] = shape
            part, projection = name.split(".")
            qwen2_bias = config["model_type"] == "qwen2" and projection[0] in "qkv"
            if biased[part] or qwen2_bias:
                shapes[f"{layer}{name}.bias"] = shape[:1]
        if config["model_type"] == "qwen3":
            shapes[layer + "self_attn.q_norm.weight"] = (config["head_dim"],)
            shapes[layer + "self_attn.k_norm.weight"] = (config["head_dim"],)
    return shapes


def _bert_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (_VOCAB, hidden),
        "embeddings.position_embeddings.weight": (64, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
    }
    square = (hidden, hidden)
    layer = "encoder.layer.0."
    attention = [f"{layer}attention.{name}" for name in ("self.query", "self.key", "self.value")]
    for name in (
        *attention,
        f"{layer}attention.output.dense",
        f"{layer}intermediate.dense",
        f"{layer}output.dense",
        "pooler.dense",
    ):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = square, (hidden,)
    for name in ("embeddings", f"{layer}attention.output", f"{layer}output"):
        shapes[f"{name}.LayerNorm.weight"] = shapes[f"{name}.LayerNorm.bias"] = (hidden,)
    return shapes


def _random(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Matrices of about unit gain, norm weights around 1, biases around 0; drawn by name."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if "norm" in name.lower():
        return 1 + 0.1 * noise
    return noise if "embed" in name or "head" in name else noise / shape[-1] ** 0.5


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
