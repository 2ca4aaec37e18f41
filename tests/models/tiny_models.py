"""Tiny random models in Hugging Face folders, and transformers' own pass over them in float64.

Weights are large enough that attention is far from uniform, and biases and norm weights are random
too, so that leaving one out is seen.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

#: Longer than every window below and than every RoPE's original context, `long` prompts are.
LONG = 90
_GEMMA_LOCAL = {"rope_type": "default", "rope_theta": 100.0}
#: Families by variant: transformers' `model_type` and entries that differ from `_SIZES`.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-window": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    # The fourth of five layers has no RoPE.
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "smollm3-window": (
        "smollm3",
        {
            "num_hidden_layers": 5,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    # The sixth of seven layers is global, by the family's own pattern.
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-types": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 9,
            "sliding_window": 16,
            "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 16, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo2-bias": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.21,
            "residual_multiplier": 0.37,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "granite-bias": (
        "granite",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 0.3,
            "attention_multiplier": 0.5,
            "residual_multiplier": 1.9,
            "logits_scaling": 3.0,
        },
    ),
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_FACTORS = {
    "short_factor": [1.0, 1.05, 1.3, 2.0],
    "long_factor": [1.1, 1.9, 4.5, 9.0],
}
#: RoPE variants by name: `rope_parameters` beside `rope_theta`. A context of 512 is beyond the
#: original 64 of "longrope", so its long factors hold, and within that of "longrope-short".
ROPES: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": _YARN,
    "yarn-betas": _YARN | {"beta_fast": 6.0, "beta_slow": 1.5, "truncate": False},
    "yarn-mscale": _YARN | {"beta_fast": 8, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-factor": _YARN | {"beta_fast": 5, "attention_factor": 1.4},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64} | _FACTORS,
    "longrope-short": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 512,
        "factor": 4.0,
        **_FACTORS,
    },
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.75},
    "partial-longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.05, 1.3],
        "long_factor": [1.1, 1.9, 4.5],
    },
}
#: Every family's variants with a RoPE that its models are published with, and every RoPE.
VARIANTS = [
    ("llama", "default"),
    ("llama", "linear"),
    ("llama", "llama3"),
    ("llama", "longrope"),
    ("llama-bias", "yarn-betas"),
    ("mistral", "default"),
    ("mistral", "yarn"),
    ("mistral-window", "default"),
    ("qwen2", "yarn"),
    ("qwen2", "yarn-factor"),
    ("qwen2", "llama3"),
    ("qwen2-window", "default"),
    ("qwen3", "default"),
    ("qwen3", "llama3"),
    ("qwen3", "yarn-mscale"),
    ("qwen3-window", "linear"),
    ("smollm3", "default"),
    ("smollm3", "yarn"),
    ("smollm3-window", "linear"),
    ("gemma3", "default"),
    ("gemma3", "linear"),
    ("gemma3-types", "linear"),
    ("phi3", "default"),
    ("phi3", "partial"),
    ("phi3", "longrope"),
    ("phi3", "longrope-short"),
    ("phi3-window", "default"),
    ("phi3-window", "partial-longrope"),
    ("olmo2", "default"),
    ("olmo2-bias", "llama3"),
    ("granite", "default"),
    ("granite-bias", "linear"),
]
#: One of each family, for what costs more: windows beside global layers and without, no RoPE,
#: sandwich norms, partial rotation, norms over all heads, multipliers.
FEW = [
    ("llama", "llama3"),
    ("mistral-window", "default"),
    ("qwen2-window", "default"),
    ("qwen3-window", "linear"),
    ("smollm3-window", "linear"),
    ("gemma3", "linear"),
    ("phi3-window", "partial-longrope"),
    ("olmo2", "default"),
    ("granite", "default"),
]

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


def tiny_config(family: str, rope: str = "default", *, tied: bool | None = None, **overrides):
    """transformers' config of a tiny model: a variant of `FAMILIES` with one of `ROPES`.

    `tied`: whether the embeddings are tied, if not as the variant has it.
    """
    from transformers import CONFIG_MAPPING

    model_type, extra = FAMILIES[family]
    rope_parameters = {"rope_theta": 1000.0} | ROPES[rope]
    if model_type == "gemma3_text":
        rope_parameters = {
            "sliding_attention": dict(_GEMMA_LOCAL),
            "full_attention": rope_parameters,
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
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    options |= extra
    if model_type == "phi3":
        # This family keeps it beside `rope_parameters`, and there it has precedence.
        original = ROPES[rope].get("original_max_position_embeddings", 512)
        options["original_max_position_embeddings"] = original
    if tied is not None:
        options["tie_word_embeddings"] = tied
    return CONFIG_MAPPING[model_type](**copy.deepcopy(options | overrides))


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
    # Gemma stores w and multiplies by 1 + w.
    centre = 0.0 if hf.config.model_type.startswith("gemma") else 1.0
    for name, parameter in hf.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(centre + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif "embed" in name or "lm_head" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)


def reference_model(folder: Path, dtype: torch.dtype = torch.float64, attention: str = "sdpa"):
    """transformers' model; in float64 what it computes in float32 is float64 too, but for angles.

    Norms are replaced, and Gemma's factor of the embeddings, a float32 number, is the exact square
    root. Angles, cosines and sines stay float32 as they are in every implementation, so that a
    comparison tells of everything else.
    """
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    hf = hf.to(dtype).eval()
    if dtype is torch.float64:
        for module in hf.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _norm_of(module)
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=dtype)
    return hf


def _norm_of(module: torch.nn.Module):
    gemma = type(module).__name__.startswith("Gemma")
    eps = module.eps if gemma else module.variance_epsilon

    def forward(x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return (1 + module.weight if gemma else module.weight) * (x * scale)

    return forward


def token_ids(n: int, seed: int = 0, vocab: int = 400) -> list[int]:
    """Random ids that are no control tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), vocab, (n,), generator=generator).tolist()


class TinyModels:
    """Folders of tiny models under one root, and references of them, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}
        self._references: dict[Path, torch.nn.Module] = {}

    def __call__(self, family: str = "llama", rope: str = "default", **options) -> Path:
        name = "-".join([family, rope, *(f"{k}={v}" for k, v in sorted(options.items()))])
        if name not in self._made:
            folder = self._root / f"model-{len(self._made)}"
            self._made[name] = make_tiny_model(folder, family, rope, **options)
        return self._made[name]

    def reference(self, folder: Path) -> torch.nn.Module:
        """`reference_model` in float64; do not change it."""
        if folder not in self._references:
            self._references[folder] = reference_model(folder)
        return self._references[folder]
