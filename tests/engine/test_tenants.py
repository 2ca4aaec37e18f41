"""What one tenant can learn of another's texts: nothing, by what is asked of the tiers."""

from __future__ import annotations

import pytest

from kvrag.store.tier import Tier

from .test_answers import ask, open_engine

HELD = ["Anna keeps the lamp of Karsk.", "The ferry leaves when the lamp is lit."]
UNHEARD = ["Bela paints the hull of Orrel.", "A cable broke while the wind was up."]


class Recorder:
    """Stands before a tier and writes down every call: which, of which tier, with which numbers.

    Not the keys, which are others for every text, nor the bytes.
    """

    def __init__(self, tier: Tier, calls: list):
        self._tier, self._calls = tier, calls

    def __getattr__(self, name):
        found = getattr(self._tier, name)
        if not callable(found):
            return found

        def recorded(*args, **options):
            numbers = [value for value in (*args, *options.values()) if isinstance(value, int)]
            result = found(*args, **options)
            outcome = result if isinstance(result, bool) else type(result).__name__
            self._calls.append((self._tier.name, name, numbers, outcome))
            return result

        return recorded


def record(engine):
    calls: list = []
    for slot in engine.store._placement.slots:
        slot.tier = Recorder(slot.tier, calls)
    return calls


@pytest.mark.parametrize("options", [{}, {"encryption_key": "ab" * 32}], ids=["plain", "sealed"])
@pytest.mark.parametrize("strategy", ["fast", "reuse", "full"])
def test_anothers_text_and_an_unheard_one_are_the_same_to_the_tiers(
    tiny, tmp_path, options, strategy
):
    """One after the other, and again once they are stored for the tenant itself."""
    if options:
        pytest.importorskip("cryptography", reason="the extra encryption is not installed")
    folder, home = tiny("llama"), tmp_path / "home"
    options = {"controller": False, "strategy": strategy} | options
    with open_engine(folder, home, namespace="other", **options) as engine:
        ask(engine, passages=HELD)
    seen = []
    for texts in (HELD, UNHEARD):
        # Each in a namespace that has stored nothing, so that the first changes nothing for the
        # second.
        with open_engine(folder, home, namespace=f"mine {len(seen)}", **options) as engine:
            calls = record(engine)
            ask(engine, passages=texts)
            first = list(calls)
            calls.clear()
            ask(engine, passages=texts)
            seen.append((first, list(calls)))
    assert seen[0] == seen[1]
    if strategy != "full":
        operations = {name for _, name, _, _ in seen[0][0]}
        assert {"headers", "put"} <= operations  # a comparison of nothing proves nothing


def test_a_tenants_own_text_does_differ(tiny, tmp_path):
    """The recorder sees what a hit is: else the test above could not fail."""
    folder, home = tiny("llama"), tmp_path / "home"
    with open_engine(folder, home, namespace="mine") as engine:
        ask(engine, passages=HELD)
    seen = []
    for texts in (HELD, UNHEARD):
        with open_engine(folder, home, namespace="mine") as engine:
            calls = record(engine)
            ask(engine, passages=texts)
            seen.append(calls)
    assert seen[0] != seen[1]
    assert ("disk", "segments") in {call[:2] for call in seen[0]}
    assert ("disk", "put") in {call[:2] for call in seen[1]}
    assert ("disk", "put") not in {call[:2] for call in seen[0]}
