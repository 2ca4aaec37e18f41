"""How much to recompute, and whether to load at all, from what this machine was measured to do."""

from kvrag.fusion.controller.control import Controller, Decision, Estimates, Reason
from kvrag.fusion.controller.plan import ChunkSource
from kvrag.fusion.controller.tier_speed import TierEstimate
from kvrag.fusion.controller.tiers import TierAdvice, TierCheck, TierPrice

__all__ = [
    "ChunkSource",
    "Controller",
    "Decision",
    "Estimates",
    "Reason",
    "TierAdvice",
    "TierCheck",
    "TierEstimate",
    "TierPrice",
]
