"""Full prefill: everything computed, nothing loaded. The baseline and the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvrag.fusion.base import register
from kvrag.fusion.layerwise import LayerwiseStrategy
from kvrag.fusion.prompt import Prompt

__all__ = ["Full"]


@register
@dataclass(frozen=True, slots=True)
class Full(LayerwiseStrategy):
    """Every context row in every layer; the ratio has no meaning here."""

    name: ClassVar[str] = "full"
    uses_blocks: ClassVar[bool] = False

    def candidates(self, prompt: Prompt) -> range:
        return range(len(prompt.prefix_ids), prompt.question_start)

    def expected_rows(self, prompt: Prompt, layer: int, num_layers: int) -> float:
        return len(self.candidates(prompt))
