"""Plain reuse: stored KV as it is, rotated to its place; only the question is computed.

Chunks have not seen one another (PromptCache, arXiv 2311.04934; TurboRAG's reordered positions,
arXiv 2410.07590), which is what every repair is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvrag.fusion.base import register
from kvrag.fusion.layerwise import LayerwiseStrategy
from kvrag.fusion.prompt import Prompt

__all__ = ["Reuse"]


@register
@dataclass(frozen=True, slots=True)
class Reuse(LayerwiseStrategy):
    """No context row at all; the ratio has no meaning here."""

    name: ClassVar[str] = "reuse"

    def candidates(self, prompt: Prompt) -> range:
        return range(0)
