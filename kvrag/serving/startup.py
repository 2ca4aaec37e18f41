"""What a server finds out before it accepts requests."""

from __future__ import annotations

import logging

from kvrag.blending import Blending
from kvrag.engine import Engine
from kvrag.errors import KvragError
from kvrag.verify.gate import blending_of

__all__ = ["checked_blending", "prepare"]

_LOG = logging.getLogger(__name__)


def checked_blending(engine: Engine) -> Blending:
    """Whether the engine may blend, by the short form of `kvrag verify` unless that is off.

    The log says that it is being checked, since that takes a while, and what came of it.
    """
    if not engine.settings.verify_on_start:
        return Blending(reason="not checked: the setting verify_on_start is off")
    _LOG.info("checking blending …")
    return blending_of(engine.settings, engine.model)


def prepare(engine: Engine) -> None:
    """Open what the first question to the corpus would wait for, if it can be opened.

    Passages need none of it, so that a server without an embedder is better than no server.
    """
    try:
        engine.prepare()
    except KvragError as exc:
        _LOG.warning("questions to the corpus will fail: %s", exc)
