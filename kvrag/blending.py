"""Whether stored KV may be blended into prompts, and what runs where it may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvrag.fusion import FusionStrategy, create
from kvrag.prefill import Prefilled
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
        return _Warned(context, warning), create("full")


class _Warned(Context):
    """A context whose prefill carries one warning more."""

    def __init__(self, context: Context, warning: str) -> None:
        self._context, self._warning = context, warning
        self.fitted = context.fitted
        self.layout_s, self.retrieve_s = context.layout_s, context.retrieve_s

    def prefill(
        self,
        strategy: FusionStrategy,
        *,
        new_tokens: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Prefilled | None:
        prefilled = self._context.prefill(strategy, new_tokens=new_tokens, cancelled=cancelled)
        if prefilled is None:
            return None
        return replace(prefilled, warnings=(self._warning, *prefilled.warnings))
