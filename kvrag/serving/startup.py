"""What a server finds out before it accepts requests."""

from __future__ import annotations

from kvrag.blending import Blending
from kvrag.engine import Engine
from kvrag.verify.gate import blending_of

__all__ = ["checked_blending"]


def checked_blending(engine: Engine) -> Blending:
    """Whether the engine may blend, by the short form of `kvrag verify` unless that is off."""
    if not engine.settings.verify_on_start:
        return Blending(reason="not checked: the setting verify_on_start is off")
    return blending_of(engine.settings, engine.model)
