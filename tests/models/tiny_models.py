"""Tiny random models in Hugging Face folders, and transformers' own pass over them in float64.

Weights are large enough that attention is far from uniform, and biases and norm weights are random
too, so that leaving one out is seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FAMILIES = ("llama", "llama-bias", "qwen2", "qwen3")
ROPES = ("default", "llama3")
#: Every family, RoPE variant, and tying of the embeddings at least once.
VARIANTS = [(family, rope, tied) for family in FAMILIES for rope in ROPES for tied in (False, True)]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = (
    "Anna keeps the lamp of Karsk. The lamp is lit when the ferry leaves, and it burns all night. "
    "Who keeps the lamp? The keeper's daughter wrote: “naïve cafés, 1,024 lamps, 3.14 kg of oil”. "
    "Ångström, Zürich, 東京, Москва, 😀🚢. if (x != y) { return x + y; }\n\n\tTabs\r\nand lines.  "
    "You answer questions from the passages that the user gives. Answer briefly. Passages Question "
)


def make_tokenizer(
    folder: Path, *, vocab_size: int = 400, template: str | None = CHATML, **options
) -> None:
    """A byte-level BPE over all bytes, trained on `TEXT`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "bos_token": None,
        "pad_token": SPECIAL[0],
        "unk_token": None,
    } | options
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_config(family: str, rope: str = "default", *, tied: bool = False, **overrides):
    """transformers' config of a tiny model of `family`; "llama-bias" has biases everywhere."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kind, extra = {
        "llama": (LlamaConfig, {}),
        "llama-bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 16}),
    }[family]
    rope_parameters = {"rope_type": "default", "rope_theta": 1000.0}
    if rope == "llama3":
        rope_parameters = {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    options = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope_parameters,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return kind(**(options | extra | overrides))


def make_tiny_model(
    folder: Path, family: str = "llama", rope: str = "default", *, seed: int = 0, **options
) -> Path:
    """Write config, float32 weights and tokenizer into `folder`."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, rope, **options)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(hf, seed)
    folder.mkdir(parents=True, exist_ok=True)
    hf.save_pretrained(folder)
    make_tokenizer(folder, vocab_size=config.vocab_size)
    return folder


@torch.no_grad()
def randomise(hf: torch.nn.Module, seed: int) -> None:
    """Random everything: matrices of about unit gain, norm weights around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in hf.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif "embed" in name or "lm_head" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)


def reference_model(folder: Path, dtype: torch.dtype = torch.float64, attention: str = "sdpa"):
    """transformers' model; in float64 its norms, which it computes in float32, are float64 too."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    hf = hf.to(dtype).eval()
    if dtype is torch.float64:
        for module in hf.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _norm_of(module)
    return hf


def _norm_of(module: torch.nn.Module):
    def forward(x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        return module.weight * (x * scale)

    return forward


def token_ids(n: int, seed: int = 0, vocab: int = 400) -> list[int]:
    """Random ids that are no control tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), vocab, (n,), generator=generator).tolist()


class TinyModels:
    """Folders of tiny models under one root, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def __call__(self, family: str = "llama", rope: str = "default", **options) -> Path:
        name = "-".join([family, rope, *(f"{k}={v}" for k, v in sorted(options.items()))])
        if name not in self._made:
            folder = self._root / f"model-{len(self._made)}"
            self._made[name] = make_tiny_model(folder, family, rope, **options)
        return self._made[name]
