"""The RoPE variants, and reading one from a Hugging Face config.

Every variant here is a pure function of the position, which is what lets K be stored un-rotated
and turned to its place when the place is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvrag.errors import UnsupportedModelError
from kvrag.models.config_values import object_of, positive, size
from kvrag.models.families import FULL, SLIDING, Family

__all__ = ["ROPE_KINDS", "RopeConfig", "read_rope", "rope_parameters"]

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one layer.

    Args:
        kind: one of `ROPE_KINDS`; fields that belong to other kinds keep their defaults.
        theta: base of the frequencies.
        rotary_dim: how many leading dimensions of a head turn; the others carry no position.
        factor: linear, llama3, yarn: how much longer positions become.
        low_freq_factor, high_freq_factor: llama3.
        original_max_positions: llama3, yarn, longrope: the context of pre-training.
        beta_fast, beta_slow, truncate: yarn.
        attention_factor: yarn, longrope: cosines and sines are multiplied by it.
        stretch: longrope: a divisor for each frequency, the long or the short set.
    """

    kind: str
    theta: float
    rotary_dim: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    stretch: tuple[float, ...] = ()


def rope_parameters(family: Family, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """RoPE parameters by layer type, from any of the spellings.

    `rope_parameters` (transformers 5) may hold one set or one a layer type; before there were
    `rope_theta` and `rope_scaling`, and `rope_local_base_freq` for sliding layers, which were
    never scaled.

    Raises:
        UnsupportedModelError: two spellings that differ, or sets by layer type in a family that
            has one for all layers.
    """
    given = object_of(config, "rope_parameters")
    scaling = object_of(config, "rope_scaling")
    theta = config.get("rope_theta", 10000.0)
    by_type = FULL in given or SLIDING in given
    if by_type and not family.local_rope:
        raise UnsupportedModelError(
            f"RoPE parameters that differ by layer type ({', '.join(given)}) are not "
            f"supported for {config.get('model_type')!r}"
        )
    full = object_of(given, FULL) if by_type else given
    if full and any(
        full.get(name, value) != value or name not in full for name, value in scaling.items()
    ):
        raise UnsupportedModelError(
            "the model's config has both rope_parameters and rope_scaling, and they differ: put "
            f"the entries of rope_scaling ({', '.join(scaling)}) into rope_parameters"
        )
    scaled = {"rope_theta": theta} | scaling | full
    if config.get("model_type") == "phi3" and scaled.get("rope_type", scaled.get("type")) in (
        "su",
        "yarn",
    ):
        # Older configs of this family call its longrope so.
        scaled["rope_type"] = "longrope"
    if not family.local_rope:
        return {FULL: scaled, SLIDING: scaled}
    local = {"rope_theta": config.get("rope_local_base_freq")}
    return {FULL: scaled, SLIDING: local | (object_of(given, SLIDING) if by_type else {})}


def read_rope(
    rope: Mapping[str, Any], config: Mapping[str, Any], *, head_dim: int, context_length: int
) -> RopeConfig:
    """One layer's RoPE from its parameters `rope` and the model's `config`.

    longrope has two sets of frequencies, and other implementations choose by the length of the
    sequence at hand. Here the choice is made once, by `context_length`: the long set when it
    exceeds the context of pre-training. Otherwise K of a short prompt would not fit a long one.

    Raises:
        UnsupportedModelError: a variant or number that is refused by name.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "dynamic":
        raise UnsupportedModelError(
            "RoPE variant 'dynamic' is not supported: its frequencies depend on how long the "
            "sequence is, so stored K could not be turned to its place in another prompt"
        )
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(
            f"RoPE variant {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}"
        )
    theta = positive({"RoPE rope_theta": rope.get("rope_theta")}, "RoPE rope_theta")
    if theta <= 1:
        raise UnsupportedModelError(f"RoPE rope_theta is {theta}; a number above 1 is needed")
    rotary_dim = _rotary_dim(rope, config, head_dim)
    if kind == "default":
        return RopeConfig(kind, theta, rotary_dim)
    given = {f"RoPE {name}": value for name, value in rope.items()}
    if kind == "linear":
        return RopeConfig(kind, theta, rotary_dim, factor=positive(given, "RoPE factor"))
    limit = size(config, "max_position_embeddings")
    # Phi writes the original length beside the RoPE parameters, where it has priority.
    original = size(
        {
            "RoPE original_max_position_embeddings": config.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
        },
        "RoPE original_max_position_embeddings",
        limit,
    )
    if kind == "llama3":
        return _llama3(given, theta, rotary_dim, original)
    # The ratio of the lengths stands in for a factor that is not given.
    factor = positive(given, "RoPE factor", limit / original)
    if kind == "yarn":
        return _yarn(given, theta, rotary_dim, original, factor)
    if original == 1:
        raise UnsupportedModelError(
            "RoPE original_max_position_embeddings is 1; longrope needs a larger one"
        )
    short, long = (
        _stretch(rope, name, rotary_dim // 2) for name in ("short_factor", "long_factor")
    )
    plain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeConfig(
        kind,
        theta,
        rotary_dim,
        original_max_positions=original,
        attention_factor=positive(given, "RoPE attention_factor", plain),
        stretch=long if context_length > original else short,
    )


def _rotary_dim(rope: Mapping[str, Any], config: Mapping[str, Any], head_dim: int) -> int:
    name = "partial_rotary_factor"
    partial = positive(rope if rope.get(name) is not None else config, name, 1.0)
    dim = int(head_dim * partial)
    if not 0 < dim <= head_dim or dim % 2:
        raise UnsupportedModelError(
            f"partial_rotary_factor {partial} of head_dim {head_dim} turns {dim} dimensions; "
            f"an even number between 2 and {head_dim} is needed"
        )
    return dim


def _llama3(given: Mapping[str, Any], theta: float, rotary_dim: int, original: int) -> RopeConfig:
    rope = RopeConfig(
        "llama3",
        theta,
        rotary_dim,
        factor=positive(given, "RoPE factor"),
        low_freq_factor=positive(given, "RoPE low_freq_factor"),
        high_freq_factor=positive(given, "RoPE high_freq_factor"),
        original_max_positions=original,
    )
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise UnsupportedModelError(
            f"RoPE low_freq_factor {rope.low_freq_factor} is not below high_freq_factor "
            f"{rope.high_freq_factor}"
        )
    return rope


def _yarn(
    given: Mapping[str, Any], theta: float, rotary_dim: int, original: int, factor: float
) -> RopeConfig:
    def magnitude(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    plain = magnitude()
    if given.get("RoPE mscale") and given.get("RoPE mscale_all_dim"):
        plain = magnitude(positive(given, "RoPE mscale")) / magnitude(
            positive(given, "RoPE mscale_all_dim")
        )
    truncate = given.get("RoPE truncate", True)
    if not isinstance(truncate, bool):
        raise UnsupportedModelError(f"RoPE truncate is {truncate!r}; true or false is needed")
    return RopeConfig(
        "yarn",
        theta,
        rotary_dim,
        factor=factor,
        original_max_positions=original,
        beta_fast=positive(given, "RoPE beta_fast", 32.0),
        beta_slow=positive(given, "RoPE beta_slow", 1.0),
        truncate=truncate,
        attention_factor=positive(given, "RoPE attention_factor", plain),
    )


def _stretch(rope: Mapping[str, Any], name: str, pairs: int) -> tuple[float, ...]:
    values = rope.get(name)
    if not isinstance(values, list) or len(values) != pairs:
        shown = f"{len(values)} numbers" if isinstance(values, list) else repr(values)
        raise UnsupportedModelError(
            f"RoPE {name} is {shown}; a list of {pairs}, one a pair of rotated dimensions, is "
            "needed"
        )
    return tuple(positive({f"RoPE {name}": value}, f"RoPE {name}") for value in values)
