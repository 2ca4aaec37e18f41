"""When a run will be done: its layers one after the other, beside the loading they wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvrag.fusion.controller.plan import Plan, Work

__all__ = ["Forecast", "forecast"]


class Forecast(NamedTuple):
    """Seconds. `seconds` is all, `stall_s` what of it waits for loading."""

    seconds: float
    stall_s: float

    @property
    def compute_s(self) -> float:
        return self.seconds - self.stall_s


def forecast(
    plan: Plan,
    *,
    first_s: float,
    computing: Callable[[Work], float],
    loading: Callable[[str, int], float],
) -> Forecast:
    """Walk through the plan.

    Args:
        first_s: seconds of what is computed before the first layer; loading runs beside it.
        computing: seconds of some work.
        loading: seconds until a tier has delivered so many bytes; tiers load side by side.
    """
    now, stall = first_s, 0.0
    for stage in plan.stages:
        arrival = max((loading(*part) for part in stage.needed.items()), default=0.0)
        wait = max(0.0, arrival - now)
        stall += wait
        now += wait + computing(stage.work)
    return Forecast(now, stall)
