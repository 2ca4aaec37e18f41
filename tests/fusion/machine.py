"""A machine on paper: what computing and tiers cost is given, and a controller is to find out."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

from kvrag.fusion import Prompt
from kvrag.fusion.controller import ChunkSource, Controller, Decision
from kvrag.fusion.controller.forecast import Forecast, forecast
from kvrag.fusion.controller.plan import Needed, Work, alone, make_plan
from kvrag.fusion.full import Full
from kvrag.fusion.layerwise import LayerwiseStrategy
from kvrag.fusion.stream import Amounts, TierRead

LAYERS = 30
#: SmolLM2-135M's shape, and its bytes of KV a token.
CONFIG = SimpleNamespace(
    num_layers=LAYERS,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    mlp_size=1536,
    windows=(None,) * LAYERS,
)
KV_NBYTES = 23040
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Uniform(LayerwiseStrategy):
    """The same share of rows in every layer, as the paper's formulas have it."""

    ratio: float = 0.15

    name: ClassVar[str] = "uniform"
    tunable: ClassVar[bool] = True

    def candidates(self, prompt: Prompt) -> range:
        return range(len(prompt.prefix_ids), prompt.question_start)


def decoder():
    layers = [SimpleNamespace(index=i, first_visible=lambda position: 0) for i in range(LAYERS)]
    return SimpleNamespace(config=CONFIG, layers=layers)


def prompt(tokens: int, *, question: int = 30) -> Prompt:
    chunks = [(0,) * CHUNK] * (tokens // CHUNK)
    return Prompt.build((0,) * 30, chunks, (0,) * question, prefix_match=True)


def sources(tokens: int, tier: str = "disk", cached_chunks: int | None = None) -> list[ChunkSource]:
    """cached_chunks: how many, the first ones, lie in the page cache; None if nobody can tell."""
    layer_nbytes = (KV_NBYTES * CHUNK // LAYERS,) * LAYERS
    shares = [None if cached_chunks is None else float(i < cached_chunks) for i in range(tokens)]
    return [ChunkSource(tier, layer_nbytes, shares[i]) for i in range(tokens // CHUNK)]


@dataclass
class Machine:
    """`ask` runs one request as the controller decides. Speeds may be changed in between.

    latency_s: of the first byte of a request. cached_bytes_per_s: of what the page cache holds.
    beside: share of its speed that loading keeps beside computing. noise: everything takes up to
    this share more or less than it should.
    """

    controller: Controller = field(default_factory=lambda: Controller(decoder()))
    bytes_per_s: float = 2e9
    cached_bytes_per_s: float = 5e9
    beside: float = 1.0
    latency_s: float = 0.002
    linear: float = 150e9
    attention: float = 80e9
    noise: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def computing(self, work: Work) -> float:
        linear = (work.flops - work.attention_flops) / self.linear
        attention = work.attention_flops / self.attention
        return linear + attention + 2e-4 * work.visits + 2e-7 * work.placed

    def loading(self, tier: str, needed: Needed) -> float:
        return self.first_s(tier, needed.first) + self.rest_s(tier, needed.rest)

    def first_s(self, tier: str, amounts: Amounts) -> float:
        latency_s = 0.0 if tier == "ram" or not amounts.nbytes else self.latency_s
        return latency_s + self.rest_s(tier, amounts)

    def rest_s(self, tier: str, amounts: Amounts) -> float:
        bytes_per_s = 1e10 if tier == "ram" else self.bytes_per_s
        return amounts.nbytes / bytes_per_s + amounts.cached / self.cached_bytes_per_s

    def truth(self, plan) -> Forecast:
        return forecast(
            plan,
            first_s=0.0,
            computing=self.computing,
            loading=self.loading,
            beside=lambda tier: self.beside,
        )

    def read(self, tier: str, needed: Needed, stall_s: float) -> TierRead:
        """What a request measures of its loading, of which it waited `stall_s`."""
        first_s, rest_s = self.first_s(tier, needed.first), self.rest_s(tier, needed.rest)
        waited_s = min(rest_s, max(0.0, stall_s - first_s))
        rest_s, off = waited_s + (rest_s - waited_s) / self.beside, self._about_one()
        return TierRead(
            nbytes=round(sum(needed.first[1:] + needed.rest[1:])),
            seconds=(first_s + rest_s) * off,
            first=needed.first,
            first_s=first_s * off,
            rest=needed.rest,
            rest_s=rest_s * off,
            rest_waited_s=waited_s * off,
        )

    def precompute(self, chunks: int = 8) -> None:
        """Blocks are computed alone, which shows the speed of computing everything."""
        for _ in range(chunks):
            seconds = self.computing(alone(CONFIG, 30, CHUNK))
            self.controller.computed_alone(30, CHUNK, seconds * self._about_one())

    def full_s(self, tokens: int) -> float:
        """What full prefill takes in truth."""
        return self.truth(make_plan(Full(), decoder(), prompt(tokens), ())).seconds

    def ask(
        self,
        tokens: int,
        strategy,
        *,
        adapt: bool = True,
        tier: str = "disk",
        cached_chunks: int | None = None,
    ) -> tuple[Decision, Forecast]:
        """The decision, and what came of it."""
        stored = sources(tokens, tier, cached_chunks)
        decision = self.controller.decide(prompt(tokens), strategy, stored, adapt=adapt)
        found = self.truth(decision.plan)
        compute_s = found.compute_s * self._about_one()
        stall_s = found.stall_s * self._about_one()
        if decision.strategy.uses_blocks:
            needed = decision.plan.needed[tier]
            self.controller.loaded({tier: self.read(tier, needed, found.stall_s)})
        seconds = compute_s + stall_s
        self.controller.ran(decision, compute_s=compute_s, stall_s=stall_s, seconds=seconds)
        return decision, Forecast(seconds, stall_s)

    def _about_one(self) -> float:
        return 1 + self.rng.uniform(-self.noise, self.noise)
