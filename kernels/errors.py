"""What the kernels raise on purpose."""

from __future__ import annotations

__all__ = ["KernelsUnavailableError"]


class KernelsUnavailableError(Exception):
    """The kernels asked for are unknown or cannot run here; the message says why."""
