"""Policies without a tier: each against a slow reference that looks at everything."""

from __future__ import annotations

import math
import random
from collections import OrderedDict

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvrag.store.entries import Entry, Pool, Standing
from kvrag.store.eviction import POLICIES, CostAware, Lfu, Lru, S3Fifo, policy_named
from kvrag.store.ledger import Ledger

from .helpers import make_key


def entry(uses=0, cost=1, nbytes=1):
    return Entry(b"", nbytes, cost, uses)


def test_the_smallest_rank_goes_first():
    assert Lru().rank(entry(), 3, 9) < Lru().rank(entry(), 4, 0)
    assert Lfu().rank(entry(uses=1), 9, 0) < Lfu().rank(entry(uses=2), 1, 0)
    rank = CostAware().rank
    assert rank(entry(uses=0), 1, 0) < rank(entry(uses=1), 1, 0)
    assert rank(entry(cost=1), 1, 0) < rank(entry(cost=2), 1, 0)
    assert rank(entry(nbytes=2), 1, 0) < rank(entry(nbytes=1), 1, 0)
    # What was used last when much had been evicted already beats what was valuable long ago.
    assert rank(entry(uses=3), 1, 0) < rank(entry(uses=0), 1, 10)


@given(st.integers(0, 254), st.integers(1, 10**9), st.integers(1, 10**12))
def test_the_value_is_rounded_by_an_eighth_at_most(uses, cost, nbytes):
    exact = (uses + 1) * cost / nbytes
    assert exact <= CostAware().rank(entry(uses, cost, nbytes), 0, 0) <= exact * 1.125


@pytest.mark.parametrize("name", POLICIES)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 5)), max_size=40))
def test_ranks_do_not_fall_within_a_group(name, uses):
    """This is what lets a queue's head stand for all of it."""
    policy, age, last = policy_named(name), 0.0, {}
    entries = [entry(cost=cost, nbytes=cost) for cost in (1, 1, 3, 5)]
    for now, (index, older) in enumerate(uses):
        used = entries[index]
        used.uses += 1
        age += older
        group, rank = policy.group(used), policy.rank(used, now, age)
        assert rank >= last.get(group, -math.inf)
        last[group] = rank


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="one of lru, lfu, cost, s3-fifo, got 'mru'"):
        policy_named("mru")


def test_s3_fifo_spares_what_was_used():
    policy, pool = S3Fifo(), Pool("a" * 32, Standing.PASSING)
    new, used, old = entry(uses=1), entry(uses=2), entry(uses=3)
    for each, group in ((new, S3Fifo.SMALL), (used, S3Fifo.SMALL), (old, S3Fifo.MAIN)):
        pool.join(each, group)
    assert policy.pick([new, old]) is new  # the small queue has more than its tenth
    assert policy.spare(new) is None
    assert policy.remembers(new)
    assert policy.spare(used) == (S3Fifo.MAIN, 0)
    assert policy.spare(old) == (S3Fifo.MAIN, 2)
    assert not policy.remembers(old)
    old.nbytes = pool.nbytes = 100
    assert policy.pick([new, old]) is old


class Reference:
    """A cache that looks at every entry, with the exact key."""

    def __init__(self, name, limit):
        self.name, self.limit = name, limit
        self.held, self.now, self.age = OrderedDict(), 0, 0.0

    def key(self, nbytes, cost, uses):
        value = {"lru": self.now, "lfu": uses}.get(self.name)
        if value is None:  # as coarse as the policy
            value = self.age + CostAware().group(entry(uses, cost, nbytes))
        return value

    def ask(self, name, nbytes, cost, victims):
        """`victims`: whom the ledger chose, which decides between entries of equal keys."""
        self.now += 1
        if name in self.held:
            nbytes, cost, uses, _ = self.held.pop(name)
            uses += 1
            self.held[name] = (nbytes, cost, uses, self.key(nbytes, cost, uses))
            return True
        while sum(size for size, *_ in self.held.values()) + nbytes > self.limit:
            least = min(key for *_, key in self.held.values())
            chosen = victims.pop(0)
            victim = next(one for one in self.held if make_key(one) == chosen)
            assert self.held[victim][3] == least
            self.age = max(self.age, self.held.pop(victim)[3])
        assert not victims
        self.held[name] = (nbytes, cost, 0, self.key(nbytes, cost, 0))
        return False


def ask(ledger, name, nbytes, cost, chosen=None):
    key = make_key(name)
    if ledger.touch(key):
        return True
    reservation = ledger.reserve(key, nbytes, cost=cost)
    if reservation is not None:
        for victim in reservation.victims:
            ledger.evicted(reservation, victim)
            if chosen is not None:
                chosen.append(victim)
        ledger.commit(reservation)
    return False


@pytest.mark.parametrize("name", ["lru", "lfu", "cost"])
@given(st.lists(st.integers(0, 15), max_size=200), st.integers(5, 40))
@example([9, 10, 2, 6, 6, 13, 14, 11, 4, 12, 10, 15, 7, 12, 0, 4, 7, 5, 12], 15)
def test_a_ledger_evicts_what_the_key_function_says(name, trace, limit):
    """Sizes and costs belong to the name; the reference sorts all it has at every step."""
    ledger, reference = Ledger(limit, policy=policy_named(name)), Reference(name, limit)
    for index in trace:
        nbytes, cost = 1 + index % 5, 1 + index % 3
        victims = []
        known = ask(ledger, index, nbytes, cost, victims)
        assert known == reference.ask(index, nbytes, cost, victims)
        held = {one for one in range(16) if make_key(one) in ledger}
        assert set(reference.held) == held


class S3Reference:
    """The paper's pseudo-code over lists, for blocks of one size (section 4, algorithm 1)."""

    def __init__(self, limit):
        self.limit, self.small, self.main, self.ghost, self.freq = limit, [], [], [], {}

    def ask(self, name):
        if name in self.freq:
            self.freq[name] = min(self.freq[name] + 1, 3)
            return True
        while len(self.small) + len(self.main) >= self.limit:
            self.evict()
        if name in self.ghost:
            self.ghost.remove(name)
            self.main.append(name)
        else:
            self.small.append(name)
        self.freq[name] = 0
        return False

    def evict(self):
        held = len(self.small) + len(self.main)
        while True:
            if self.small and (len(self.small) > 0.1 * held or not self.main):
                head = self.small.pop(0)
                if self.freq[head] > 1:
                    self.main.append(head)
                    self.freq[head] = 0
                    continue
                self.ghost.append(head)
            else:
                head = self.main.pop(0)
                if self.freq[head]:
                    self.freq[head] -= 1
                    self.main.append(head)
                    continue
            del self.freq[head]
            return


@given(st.lists(st.integers(0, 20), max_size=300), st.integers(2, 9))
def test_s3_fifo_is_the_papers(trace, limit):
    """Few blocks: the bound on chances is not met here, nor the one on what is remembered."""
    ledger, reference = Ledger(limit, policy=S3Fifo()), S3Reference(limit)
    for index in trace:
        assert ask(ledger, index, 1, 1) == reference.ask(index)


def hit_rate(name, trace, limit):
    ledger = Ledger(limit, policy=policy_named(name))
    return sum(ask(ledger, index, 1, 1) for index in trace) / len(trace)


def test_scans_hurt_lru_most():
    """A Zipf trace with scans of keys that never return: what `bench eviction` shows at large."""
    rng = random.Random(1)
    names = range(500)
    weights = [1 / (rank + 1) for rank in names]
    trace = rng.choices(names, weights, k=6000)
    for start in range(1000, 6000, 1000):
        trace[start:start] = range(10_000 + start, 10_000 + start + 400)
    rates = {name: hit_rate(name, trace, 50) for name in POLICIES}
    assert rates["s3-fifo"] > rates["lru"] + 0.02
    assert rates["lfu"] > rates["lru"] + 0.02
    assert rates["cost"] > rates["lru"] + 0.02
