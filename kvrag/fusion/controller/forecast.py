"""When a run will be done: its layers one after the other, beside the loading they wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvrag.fusion.controller.plan import Needed, Plan, Work

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
    loading: Callable[[str, Needed], float],
    beside: Callable[[str], float],
) -> Forecast:
    """Walk through the plan.

    Args:
        first_s: seconds of what is computed before the first layer; loading runs beside it.
        computing: seconds of some work.
        loading: seconds until a tier has delivered so much to who waits for it; tiers load side by
            side.
        beside: how fast a tier delivers while there is computing, as a share of that.
    """
    speeds = {tier: beside(tier) for tier in plan.tiers}
    loaded = {tier: first_s * speed for tier, speed in speeds.items()}
    now, stall = first_s, 0.0
    for stage in plan.stages:
        missing = (loading(*part) - loaded[part[0]] for part in stage.needed.items())
        wait = max(0.0, max(missing, default=0.0))
        computed = computing(stage.work)
        for tier, speed in speeds.items():
            loaded[tier] += wait + computed * speed
        stall += wait
        now += wait + computed
    return Forecast(now, stall)
