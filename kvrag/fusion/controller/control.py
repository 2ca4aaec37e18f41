"""The controller: which ratio a request gets, and whether it loads at all.

It measures what tiers deliver and what computing costs from request to request and forecasts each
request's time. Where loading takes longer than the computing beside it, more rows are computed in
the time that would be spent waiting (`max(r_quality, r_load)`, CacheBlend, arXiv 2405.16444,
section 5.1); where computing everything would be faster, everything is computed. Otherwise a
strategy keeps its own ratio, so that answers do not depend on the machine's mood.

No I/O, no threads, no clocks: it is told what was measured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvrag.errors import InputError
from kvrag.fusion.base import FusionStrategy
from kvrag.fusion.controller.fit import Fit
from kvrag.fusion.controller.forecast import Forecast, forecast
from kvrag.fusion.controller.plan import ChunkSource, Needed, Plan, Work, alone, make_plan
from kvrag.fusion.controller.probing import Probe, Probing
from kvrag.fusion.controller.tier_speed import TierEstimate, TierSpeed
from kvrag.fusion.controller.tiers import TierAdvice, TierCheck, TierPrice, cheapest
from kvrag.fusion.full import Full
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.stream import TierRead
from kvrag.models.decoder import Decoder

__all__ = ["Controller", "Decision", "Estimates", "Reason"]

#: quality: the strategy's own ratio. load: raised, because loading hides what that costs.
#: probe: the strategy's own, in place of full prefill, to see whether loading is still slower.
#: fixed: the request or the settings gave it, or the strategy has none.
Reason = Literal["quality", "load", "full: loading is slower", "probe", "fixed"]

#: A wait that is shorter, in seconds or as a share of all, is left alone.
LEAST_STALL_S, LEAST_STALL = 0.05, 0.1
#: What is better by less than this is not changed for.
MARGIN = 0.1
#: A raised ratio may cost this much of the time, and half of each step must be hidden.
SLACK = 1.05
STEP = 0.05
#: Kinds of requests that decisions are remembered of.
MOST_KEYS = 512
#: Share of the newest forecast's error in the mean.
GAIN = 0.2

#: A kind of request: the strategy without its ratio, the tiers, the bits of the context's tokens.
_Key = tuple[FusionStrategy, frozenset[str], int]

#: Places of `Work`'s numbers.
_FLOPS, _ATTENTION, _PLACED = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Decision:
    """What runs. Predictions are seconds from when the blocks were opened to the logits.

    They are None while something that matters was never measured. probe: what there is to learn
    from a run whose reason is "probe".
    """

    strategy: FusionStrategy
    reason: Reason
    plan: Plan | None
    predicted_s: float | None
    predicted_stall_s: float | None
    probe: Probe | None = None


@dataclass(frozen=True, slots=True)
class Estimates:
    """What was measured, recent requests most. None: nothing yet.

    full_flops_per_s, blend_flops_per_s: of full prefill and chunks computed alone, and of blends,
    all else of their time included. placed_s_per_token: rotating and writing a stored token, in all
    layers. ttft_error, stall_error: mean of |predicted - actual| / actual; stalls below 0.05 s are
    not counted. forecasts: how many there were. raised, full: decisions for a higher ratio, and
    against loading.
    """

    full_flops_per_s: float | None
    blend_flops_per_s: float | None
    placed_s_per_token: float | None
    tiers: dict[str, TierEstimate]
    forecasts: int
    ttft_error: float | None
    stall_error: float | None
    raised: int
    full: int


class Controller:
    """One model's. Thread-safe. The same measurements lead to the same decisions."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._lock = threading.Lock()
        # Time goes to operations first; attention's are at least as dear as others.
        stiffness = (3e-2, 1e-3, 1e-2, 3e-2)
        self._full = Fit(stiffness, like={_ATTENTION: _FLOPS})
        self._blend = Fit(stiffness, like={_ATTENTION: _FLOPS})
        self._tiers: dict[str, TierSpeed] = {}
        self._held: dict[_Key, FusionStrategy] = {}
        self._probing = Probing()  # of kinds that hold full prefill
        self._ttft_error, self._stall_error = _Mean(), _Mean()
        self._raised = self._fulls = 0

    # ---- deciding ----------------------------------------------------------------------------

    def decide(
        self,
        prompt: Prompt,
        strategy: FusionStrategy,
        sources: Sequence[ChunkSource | None],
        *,
        adapt: bool,
        behind: Sequence[int] | None = None,
    ) -> Decision:
        """What is to run, and how long that will take.

        Args:
            sources: one a chunk, None for a chunk that no tier has.
            adapt: whether the ratio is the controller's to choose; else it only forecasts.
            behind: see `make_plan`.
        """
        with self._lock:
            plan = make_plan(strategy, self._decoder, prompt, sources, behind)
            own = self._forecast(strategy, plan)
            if not adapt or not (strategy.tunable and strategy.uses_blocks):
                return _decision(strategy, "fixed", plan, own)
            if plan is None or own is None:
                return _decision(strategy, "quality", plan, own)
            # What was done for others counts for the like alone: options, tiers and about the size.
            key = replace(strategy, ratio=0.0), plan.tiers, prompt.context_tokens.bit_length()
            if not _waits(own):
                self._let_go(key)
                return _decision(strategy, "quality", plan, own)
            if not self._may_change(plan):
                return _decision(strategy, "quality", plan, own)
            if len(self._held) > MOST_KEYS:
                self._held.clear()
                self._probing.clear()
            instead = make_plan(Full(), self._decoder, prompt, ())
            if (full := self._instead(instead, own, key)) is not None:
                if self._probing.due(key):
                    probe = Probe(key, full.seconds)
                    return replace(_decision(strategy, "probe", plan, own), probe=probe)
                self._fulls += 1
                return _decision(Full(), "full: loading is slower", instead, full)
            raised = self._raise(prompt, strategy, sources, own)
            if raised is None:
                self._let_go(key)
                return _decision(strategy, "quality", plan, own)
            held = self._held.get(key)
            if held is not None and abs(held.ratio - raised.ratio) < 1.5 * STEP:
                raised = held if held.ratio > strategy.ratio else raised
            self._held[key] = raised
            self._raised += 1
            plan = make_plan(raised, self._decoder, prompt, sources)
            return _decision(raised, "load", plan, self._forecast(raised, plan))

    def _may_change(self, plan: Plan) -> bool:
        """Whether a forecast stands on good grounds, and may lead to another answer."""
        known = all(self._tiers[tier].knows(needed) for tier, needed in plan.needed.items())
        # Chunks that are computed anyway are stored, which full prefill would not do.
        return known and not plan.first.visits

    def _instead(self, plan: Plan | None, own: Forecast, key: _Key) -> Forecast | None:
        """The forecast of full prefill's `plan`, if that is faster than loading."""
        found = self._forecast(Full(), plan)
        computes = isinstance(self._held.get(key), Full)
        bound = own.seconds * (1 + MARGIN if computes else 1 - MARGIN)
        if found is None or found.seconds > bound:
            if computes:
                self._let_go(key)
            return None
        self._held[key] = Full()
        return found

    def _let_go(self, key: _Key) -> None:
        """The kind has its own ratio again."""
        self._held.pop(key, None)
        self._probing.forget(key)

    def _raise(
        self,
        prompt: Prompt,
        strategy: FusionStrategy,
        sources: Sequence[ChunkSource | None],
        own: Forecast,
    ) -> FusionStrategy | None:
        """The strategy with the highest ratio whose computing loading hides, if above its own."""
        best, before = None, own
        step = int(strategy.ratio / STEP + 1e-9) + 1
        while step * STEP <= 1 + 1e-9:
            higher = replace(strategy, ratio=min(1.0, round(step * STEP, 2)))
            found = self._forecast(higher, make_plan(higher, self._decoder, prompt, sources))
            if found is None or found.seconds > SLACK * own.seconds:
                break
            if found.seconds - before.seconds > (found.compute_s - before.compute_s) / 2:
                break
            if found.compute_s > before.compute_s:
                best = higher
            before, step = found, step + 1
        return best

    def _forecast(self, strategy: FusionStrategy, plan: Plan | None) -> Forecast | None:
        """None where nothing is known of something that the plan needs."""
        if plan is None:
            return None
        fit = self._blend if strategy.uses_blocks else self._full
        if not strategy.uses_blocks and fit.predict(plan.work) is None:
            fit = self._blend  # scattered rows are no faster than all
        if fit.predict(plan.work) is None or not all(
            tier in self._tiers and self._tiers[tier].seconds(needed) is not None
            for tier, needed in plan.needed.items()
        ):
            return None
        first_s = self._full.predict(plan.first) if plan.first.visits else 0.0
        if first_s is None:
            return None
        return forecast(
            plan,
            first_s=first_s,
            computing=_seconds(fit),
            loading=self._loading,
            beside=lambda tier: self._tiers[tier].beside(plan.needed[tier]),
        )

    def _loading(self, tier: str, needed: Needed) -> float:
        return self._tiers[tier].seconds(needed) or 0.0

    # ---- learning ----------------------------------------------------------------------------

    def computed_alone(self, prefix: int, tokens: int, seconds: float) -> None:
        """A chunk of `tokens` was computed alone behind `prefix` tokens."""
        with self._lock:
            self._full.add(alone(self._decoder.config, prefix, tokens), seconds)

    def loaded(self, reads: Mapping[str, TierRead]) -> None:
        """What a request read, by tier."""
        with self._lock:
            for tier, read in reads.items():
                if read.seconds > 0:
                    self._tiers.setdefault(tier, TierSpeed()).add(read)

    def ran(self, decision: Decision, *, compute_s: float, stall_s: float, seconds: float) -> None:
        """A run as decided came to its end.

        Args:
            compute_s: of the stages of the decision's plan, without waiting.
            stall_s: what it waited for loading. seconds: of all, as `Decision.predicted_s`.
        """
        with self._lock:
            if decision.plan is not None and compute_s > 0:
                fit = self._blend if decision.strategy.uses_blocks else self._full
                fit.add(decision.plan.work, compute_s)
            if decision.predicted_s is not None:
                if decision.probe is not None:
                    self._probing.tried(
                        decision.probe, predicted_s=decision.predicted_s, seconds=seconds
                    )
                self._ttft_error.add(abs(decision.predicted_s - seconds) / seconds)
            if decision.predicted_stall_s is not None and stall_s >= LEAST_STALL_S:
                self._stall_error.add(abs(decision.predicted_stall_s - stall_s) / stall_s)

    # ---- asking ------------------------------------------------------------------------------

    @property
    def estimates(self) -> Estimates:
        with self._lock:
            placed = self._blend.cost(_PLACED)
            return Estimates(
                full_flops_per_s=self._full.rate(_FLOPS),
                blend_flops_per_s=self._blend.rate(_FLOPS),
                placed_s_per_token=(
                    None if placed is None else placed * self._decoder.config.num_layers
                ),
                tiers={name: tier.estimate for name, tier in sorted(self._tiers.items())},
                forecasts=self._ttft_error.count,
                ttft_error=self._ttft_error.value,
                stall_error=self._stall_error.value,
                raised=self._raised,
                full=self._fulls,
            )

    def cheapest_tier(
        self,
        tokens: int,
        candidates: Sequence[TierPrice],
        *,
        strategy: FusionStrategy,
        nbytes_per_token: float,
        chunk_tokens: int = 256,
    ) -> TierAdvice:
        """Which is the cheapest tier from which a prompt of so many context tokens loads unnoticed?

        Args:
            nbytes_per_token: of stored KV in all layers.

        Raises:
            InputError: no tokens; or the strategy's computing was never measured or cannot be told.
        """
        if tokens < 1:
            raise InputError(f"a prompt of {tokens} context tokens loads nothing; give 1 or more")
        sizes = [min(chunk_tokens, tokens - begin) for begin in range(0, tokens, chunk_tokens)]
        prompt = Prompt.build((0,) * 32, [(0,) * n for n in sizes], (0,) * 32, prefix_match=False)
        layers = self._decoder.config.num_layers

        def planned(running: FusionStrategy, tier: str) -> Plan | None:
            nbytes = [(round(n * nbytes_per_token / layers),) * layers for n in sizes]
            sources = [ChunkSource(tier, layer_nbytes) for layer_nbytes in nbytes]
            return make_plan(running, self._decoder, prompt, sources)

        with self._lock:
            full = planned(Full(), "")
            plans = [planned(strategy, tier.name) for tier in candidates]
            own = planned(strategy, "")
            if own is None or full is None or not self._blend.count:
                raise InputError(
                    f"what strategy {strategy.name!r} computes was never measured; run it first"
                )
            nbytes = round(tokens * nbytes_per_token)
            checks = tuple(
                self._check(tier, plan, nbytes)
                for tier, plan in zip(candidates, plans, strict=True)
                if plan is not None
            )
            return TierAdvice(
                choice=cheapest(checks),
                tokens=tokens,
                nbytes=nbytes,
                strategy=strategy.name,
                ratio=strategy.ratio,
                compute_s=_seconds(self._blend)(own.work),
                full_s=_seconds(self._full if self._full.count else self._blend)(full.work),
                tiers=checks,
            )

    def _check(self, tier: TierPrice, plan: Plan, nbytes: int) -> TierCheck:
        given = tier.bytes_per_s
        if given is None and not (tier.name in self._tiers and self._tiers[tier.name].waited):
            # What the system happened to keep in memory of a tier says nothing of the tier.
            return TierCheck(tier.name, tier.price, None, None, None, None, None)

        def loading(name: str, needed: Needed) -> float:
            if given is None:
                return self._loading(name, needed)
            return (needed.first.nbytes + needed.rest.nbytes) / given

        def beside(name: str) -> float:
            return self._tiers[name].beside(plan.needed[name]) if given is None else 1.0

        found = forecast(
            plan, first_s=0.0, computing=_seconds(self._blend), loading=loading, beside=beside
        )
        if given is None:
            load_s = max(self._loading(*part) for part in plan.needed.items())
        else:
            load_s = nbytes / given
        return TierCheck(
            name=tier.name,
            price=tier.price,
            bytes_per_s=nbytes / load_s,
            load_s=load_s,
            stall_s=found.stall_s,
            ttft_s=found.seconds,
            hides=found.stall_s <= LEAST_STALL * found.seconds,
        )


class _Mean:
    """A mean in which the newest number counts `GAIN`."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.count = 0

    def add(self, number: float) -> None:
        self.value = number if self.value is None else self.value + GAIN * (number - self.value)
        self.count += 1


def _seconds(fit: Fit) -> Callable[[Work], float]:
    """Seconds of some work, for a fit that has measurements."""
    return lambda work: fit.predict(work) or 0.0


def _waits(own: Forecast) -> bool:
    """Whether a wait is foreseen that is worth another answer."""
    return own.stall_s >= max(LEAST_STALL_S, LEAST_STALL * own.seconds)


def _decision(
    strategy: FusionStrategy, reason: Reason, plan: Plan | None, found: Forecast | None
) -> Decision:
    seconds, stall_s = (None, None) if found is None else found
    return Decision(strategy, reason, plan, seconds, stall_s)
