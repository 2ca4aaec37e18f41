"""Whether stored KV may be blended into prompts, and what runs where it may not."""

from __future__ import annotations

from dataclasses import dataclass

from kvrag.fusion import FusionStrategy, create
from kvrag.stream import Context
from kvrag.verify.check import Check

__all__ = ["Blending"]


@dataclass(frozen=True, slots=True)
class Blending:
    """Allowed until a check says otherwise.

    reason: why it is refused, or was not checked. checks: what was found, if it was.
    """

    allowed: bool = True
    reason: str | None = None
    checks: tuple[Check, ...] = ()

    def admit(self, context: Context, strategy: FusionStrategy) -> tuple[Context, FusionStrategy]:
        """What runs for a request: `strategy`, or full prefill with a warning that says why."""
        if self.allowed or not strategy.uses_blocks:
            return context, strategy
        warning = f"full prefill instead of {strategy.name}: blending is refused ({self.reason})"
        return context.warned(warning), create("full")
