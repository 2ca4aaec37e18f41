"""What a check found: a number, the bound it is held against, and a sentence."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

__all__ = ["Check", "Verdict"]


@dataclass(frozen=True, slots=True)
class Check:
    """One measured property of one strategy, or of one kind of layer (`subject`).

    value, bound: None where there was nothing to measure; a value is also None where it was not
    finite, and then the check has failed.
    """

    name: str
    subject: str
    value: float | None
    bound: float | None
    passed: bool
    sentence: str

    @classmethod
    def of(cls, name: str, subject: str, value: float, bound: float, sentence: str) -> Self:
        """A check that passes if `value` is at most `bound`; NaN is more than any bound."""
        finite = value if math.isfinite(value) else None
        return cls(name, subject, finite, bound, value <= bound, sentence)

    @classmethod
    def without_value(cls, name: str, subject: str, sentence: str, *, passed: bool) -> Self:
        """A check that had nothing to measure."""
        return cls(name, subject, None, None, passed, sentence)

    @property
    def failure(self) -> str:
        """The check in one line, for a log."""
        number = "" if self.bound is None else f" ({self.shown} against {self.bound:.3g})"
        return f"{self.name}, {self.subject}: {self.sentence}{number}"

    @property
    def shown(self) -> str:
        """The value for people."""
        if self.bound is None:
            return ""
        return "not finite" if self.value is None else f"{self.value:.3g}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks of one run, in the order in which they were made. Seconds."""

    short: bool
    seconds: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str | None:
        """What failed, in one line; None if nothing did."""
        return "; ".join(check.failure for check in self.checks if not check.passed) or None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"passed": self.passed, **asdict(self)}
