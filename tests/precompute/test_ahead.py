"""Stages in threads: bounded, in order, and stopped together."""

from __future__ import annotations

import threading
import time

import pytest

from kvrag.precompute.ahead import Stages


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_items_keep_their_order_through_several_stages():
    with Stages() as stages:
        doubled = (2 * n for n in stages.ahead(range(100), room=3))
        assert list(stages.ahead(doubled, room=1)) == list(range(0, 200, 2))


def test_a_stage_is_no_further_ahead_than_its_room():
    taken = []

    def items():
        for n in range(100):
            taken.append(n)
            yield n

    with Stages() as stages:
        ahead = stages.ahead(items(), room=4)
        assert next(ahead) == 0
        wait_until(lambda: len(taken) == 6)  # one was given, four wait, one is in hand
        time.sleep(0.2)
        assert len(taken) == 6


def test_an_error_comes_out_behind_what_came_before_it():
    def items():
        yield 1
        raise ValueError("the second")

    with Stages() as stages:
        ahead = stages.ahead(stages.ahead(items(), room=2), room=2)
        assert next(ahead) == 1
        with pytest.raises(ValueError, match="the second"):
            next(ahead)


def test_leaving_stops_stages_that_wait_and_that_are_waited_for():
    ended = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            ended.set()

    before = threading.active_count()
    with Stages() as stages:
        ahead = stages.ahead(stages.ahead(endless(), room=1), room=1)
        next(ahead)
    assert threading.active_count() == before
    del ahead, stages
    wait_until(ended.is_set)
