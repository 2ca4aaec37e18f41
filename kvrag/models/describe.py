"""What a model is, for people and programs, read from its config alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from kvrag.models.config import ModelConfig
from kvrag.models.rope_config import RopeConfig

__all__ = ["describe", "layer_ranges", "sentences"]

T = TypeVar("T")

#: The numbers that say how a RoPE variant stretches its frequencies.
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
    "yarn": (
        "factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "original_max_positions",
        "attention_factor",
    ),
    "longrope": ("original_max_positions", "attention_factor", "stretch"),
}


def describe(config: ModelConfig, *, kv_itemsize: int) -> dict[str, Any]:
    """Facts as JSON has them: numbers, texts, and lists of layer indices.

    Args:
        kv_itemsize: bytes of one stored number of K or V.

    `window_kv_bytes_per_token` is the part of `kv_bytes_per_token` that lies in layers with a
    window, where it is used by the window's tokens alone.
    """
    layers = range(config.num_layers)
    windowed = [index for index in layers if config.windows[index] is not None]
    kv_bytes = config.kv_elements_per_token * kv_itemsize
    return {
        "family": config.family,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "mlp_size": config.mlp_size,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "tied_embeddings": config.tied_embeddings,
        "kv_bytes_per_token": kv_bytes,
        "window_kv_bytes_per_token": kv_bytes * len(windowed) // config.num_layers,
        "global_layers": config.num_layers - len(windowed),
        "windows": [
            {"window": window, "layers": found}
            for window, found in _grouped(config.windows)
            if window is not None
        ],
        "rope": [
            {"layers": found} | _rope_numbers(rope)
            for rope, found in _grouped(layer.rope for layer in config.layers)
            if rope is not None
        ],
        "layers_without_rope": [index for index in layers if config.layers[index].rope is None],
        # A model with another kind of RoPE is refused before it has a config.
        "blending": True,
    }


def sentences(facts: dict[str, Any]) -> dict[str, str]:
    """What `describe` says of windows, RoPE and blending, in words; one line for each group."""
    seen = []
    if facts["global_layers"]:
        seen.append(f"{facts['global_layers']} of {facts['layers']} layers see all tokens")
    seen += [
        f"{_named(entry['layers'])} see the last {entry['window']} tokens: chunks farther away "
        "cost nothing there"
        for entry in facts["windows"]
    ]
    turned = [f"{_named(entry['layers'])}: {_rope_text(entry)}" for entry in facts["rope"]]
    why = "yes: RoPE of every layer is a function of the position alone, so K fits any place"
    if still := facts["layers_without_rope"]:
        turned.append(f"{_named(still)}: none")
    return {"windows": "\n".join(seen), "rope": "\n".join(turned), "blending": why}


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending indices for people: `0-4, 6, 8-10`."""
    runs: list[list[int]] = []
    for index in layers:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {layer_ranges(layers)}"


def _grouped(values: Iterable[T]) -> list[tuple[T, list[int]]]:
    """The different values in the order of their first layer, each with its layers."""
    groups: dict[T, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    return list(groups.items())


def _rope_numbers(rope: RopeConfig) -> dict[str, Any]:
    return {name: getattr(rope, name) for name in ("kind", "theta", "rotary_dim")} | {
        name: getattr(rope, name) for name in _ROPE_NUMBERS[rope.kind]
    }


def _rope_text(entry: dict[str, Any]) -> str:
    numbers = [
        f"{name.replace('_', ' ')} {_number(value)}"
        for name, value in entry.items()
        if name not in ("kind", "layers", "stretch")
    ]
    if stretch := entry.get("stretch"):
        numbers.append(f"stretched by {_number(min(stretch))} to {_number(max(stretch))}")
    return f"{entry['kind']} ({', '.join(numbers)})"


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.0f}" if value == int(value) else f"{value:.6g}"
