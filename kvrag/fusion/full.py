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

    def first_row(self, prompt: Prompt) -> int:
        return len(prompt.prefix_ids)
