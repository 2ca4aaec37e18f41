"""A ledger used at random, against a dict: whose blocks go, and what may never go."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvrag.store.eviction import POLICIES, policy_named
from kvrag.store.ledger import Ledger, Limits, Standing

from .helpers import make_key

LIMIT, QUOTA, SHARE = 40, 25, 0.4
TAGS = ("a" * 32, "b" * 32, "c" * 32)
keys = st.builds(make_key, st.integers(0, 5), st.sampled_from(TAGS))
standings = st.sampled_from(Standing)


class LedgerMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(list(POLICIES)))
    def start(self, policy):
        limits = Limits(LIMIT, namespace_nbytes=QUOTA, reserved_share=SHARE)
        self.ledger = Ledger(limits, policy=policy_named(policy))
        self.held = {}  # key -> (nbytes, standing)
        self.receipts = []

    def used(self, tag=None, least=Standing.PASSING, held=None):
        return sum(
            nbytes
            for key, (nbytes, standing) in (self.held if held is None else held).items()
            if tag in (None, key.tag) and standing >= least
        )

    def pinned(self):
        return {receipt.key for receipt in self.receipts}

    def free_to_go(self, key, standing):
        """Bytes that may give way to a block of this standing: own ones, and everyone's."""
        shielded = standing is Standing.PASSING
        mine = theirs = corpus = 0
        for other, (nbytes, stands) in self.held.items():
            if other == key or other in self.pinned() or stands is Standing.KEPT:
                continue
            if stands is Standing.CORPUS and shielded:
                corpus += nbytes
                continue
            theirs += nbytes
            mine += nbytes if other.tag == key.tag else 0
        return mine, theirs, corpus

    @rule(key=keys, nbytes=st.integers(1, 12), standing=standings, lands=st.booleans())
    def write(self, key, nbytes, standing, lands):
        before = dict(self.held)
        grown = max(0, nbytes - before.get(key, (0,))[0])
        over_quota = self.used(key.tag) + grown - QUOTA
        over_limit = self.used() + grown - LIMIT
        mine, theirs, corpus = self.free_to_go(key, standing)
        reservation = self.ledger.reserve(key, nbytes, cost=1, standing=standing)
        if reservation is None:
            # There was really too little that might go (what is reserved might have to stay).
            assert over_quota > mine or over_limit > theirs
            assert self.ledger.refusal(key, nbytes)
            return
        victims = reservation.victims
        assert over_quota <= mine + corpus
        assert over_limit <= theirs + corpus
        if over_quota > 0 and over_limit <= 0:
            assert {victim.tag for victim in victims} == {key.tag}
        if over_quota <= 0 and over_limit <= 0:
            assert not victims
        for victim in victims:
            assert victim != key
            assert victim not in self.pinned()
            assert before[victim][1] is not Standing.KEPT
            del self.held[victim]
            self.ledger.evicted(reservation, victim)
        if standing is Standing.PASSING and any(
            before[victim][1] is Standing.CORPUS for victim in victims
        ):
            assert self.used(least=Standing.CORPUS) >= SHARE * LIMIT
        if lands:
            self.ledger.commit(reservation, standing=standing)
            self.held[key] = (nbytes, max(standing, before.get(key, (0, standing))[1]))
        else:
            self.ledger.abort(reservation)

    @rule(key=keys, nbytes=st.integers(1, 12))
    def abort_before_anything_is_deleted(self, key, nbytes):
        reservation = self.ledger.reserve(key, nbytes)
        if reservation is not None:
            self.ledger.abort(reservation)

    @rule(key=keys)
    def touch(self, key):
        assert self.ledger.touch(key, cost=2) == (key in self.held)

    @rule(key=keys)
    def remove(self, key):
        assert self.ledger.remove(key) == (key in self.held)
        self.held.pop(key, None)
        self.receipts = [receipt for receipt in self.receipts if receipt.key != key]

    @rule(key=keys, standing=standings)
    def stand(self, key, standing):
        assert (self.ledger.stand(key, standing) is not None) == (key in self.held)
        if key in self.held:
            self.held[key] = (self.held[key][0], standing)

    @rule(key=keys)
    def pin(self, key):
        receipt = self.ledger.pin(key)
        assert (receipt is not None) == (key in self.held)
        if receipt is not None:
            self.receipts.append(receipt)

    @rule()
    def unpin(self):
        if self.receipts:
            self.ledger.unpin(self.receipts.pop(0))

    @rule(key=keys, nbytes=st.integers(1, 12))
    def adopt(self, key, nbytes):
        fits = self.used(key.tag) + nbytes <= QUOTA and self.used() + nbytes <= LIMIT
        receipt = self.ledger.adopt(key, nbytes)
        assert (receipt is not None) == (key in self.held or fits)
        if receipt is not None:
            self.ledger.unpin(receipt)
            self.held.setdefault(key, (nbytes, Standing.PASSING))

    @invariant()
    def the_books_are_those_of_the_dict(self):
        if not hasattr(self, "held"):
            return
        assert len(self.ledger) == len(self.held)
        assert all(key in self.ledger for key in self.held)
        assert self.ledger.used_nbytes == self.used() <= LIMIT
        for tag in TAGS:
            assert self.ledger._used[tag] == self.used(tag) <= QUOTA


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
