"""One computes, the others take it; and what happens when that one does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from kvrag.blocks.single_flight import SingleFlight
from kvrag.store.claims import Claims
from tests.store.doubles import in_threads
from tests.store.helpers import make_block, make_key


class Computing:
    """Computes when told to; counts how often it was asked, and keeps what it made."""

    def __init__(self, name=0):
        self.key, self.block = make_key(name), make_block(name)
        self.begun, self.go = threading.Event(), threading.Event()
        self.count = 0
        self.errors = []
        self.stored = None

    def __call__(self):
        self.count += 1
        self.begun.set()
        assert self.go.wait(20)
        if self.errors:
            raise self.errors.pop()
        self.stored = self.block
        return self.block

    def make(self, flights, *, cancelled=lambda: False, most_s=20.0):
        return flights.make(
            self.key, self, load=lambda: self.stored, cancelled=cancelled, most_s=most_s
        )


@pytest.fixture(params=["threads", "and processes"])
def flights(request, tmp_path):
    claims = None if request.param == "threads" else Claims(tmp_path / "claims")
    flights = SingleFlight(claims)
    yield flights
    flights.close()


def in_thread(work):
    results = []

    def run():
        try:
            results.append(work())
        except Exception as exc:
            results.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_many_want_it_and_one_computes(flights):
    computing = Computing()
    threading.Timer(0.2, computing.go.set).start()
    made = in_threads(8, lambda index: computing.make(flights))
    assert computing.count == 1
    assert sum(one.computed for one in made) == 1
    assert all(one.block is computing.block for one in made)


def test_what_was_stored_since_the_miss_is_taken(flights):
    computing = Computing()
    computing.stored = computing.block
    made = computing.make(flights)
    assert (made.block, made.computed, computing.count) == (computing.block, False, 0)


def test_the_next_one_computes_if_the_first_fails(flights):
    computing = Computing()
    computing.errors = [ZeroDivisionError()]
    first, failed = in_thread(lambda: computing.make(flights))
    assert computing.begun.wait(10)
    others = [in_thread(lambda: computing.make(flights)) for _ in range(3)]
    time.sleep(0.1)
    computing.go.set()
    for thread, _ in [(first, failed), *others]:
        thread.join(10)
    assert isinstance(failed[0], ZeroDivisionError)  # to its own caller alone
    assert [made.block for _, (made,) in others] == [computing.block] * 3
    assert computing.count == 2


def test_who_is_cancelled_while_waiting_goes(flights):
    computing, cancelled = Computing(), threading.Event()
    leader, _ = in_thread(lambda: computing.make(flights))
    assert computing.begun.wait(10)
    thread, results = in_thread(lambda: computing.make(flights, cancelled=cancelled.is_set))
    time.sleep(0.05)
    assert not results
    cancelled.set()
    thread.join(5)
    assert results == [None]
    computing.go.set()
    leader.join(10)
    assert computing.count == 1


def test_nobody_waits_for_ever(flights):
    """One that hangs holds the next up for its bound, and then both compute."""
    computing = Computing()
    leader, first = in_thread(lambda: computing.make(flights))
    assert computing.begun.wait(10)
    computing.begun.clear()
    thread, results = in_thread(lambda: computing.make(flights, most_s=0.2))
    assert computing.begun.wait(10)
    computing.go.set()
    for one in (leader, thread):
        one.join(10)
    assert results[0].computed
    assert results[0].waited_s >= 0.2
    assert first[0].computed
    assert computing.make(flights).computed is False  # nothing is left behind


def test_two_blocks_in_different_order(flights):
    """Each leads one and then wants the other's: both end, and each was computed once."""
    one, two = Computing(1), Computing(2)

    def both(first, second):
        made = [first.make(flights)]
        return [*made, second.make(flights)]

    a, found_a = in_thread(lambda: both(one, two))
    b, found_b = in_thread(lambda: both(two, one))
    assert one.begun.wait(10)
    assert two.begun.wait(10)
    one.go.set()
    time.sleep(0.1)  # the first now waits for the second's
    two.go.set()
    for thread in (a, b):
        thread.join(10)
    assert (one.count, two.count) == (1, 1)
    assert [made.block for made in found_a[0]] == [one.block, two.block]
    assert [made.block for made in found_b[0]] == [two.block, one.block]


CLAIMER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from kvrag.store.claims import Claims
    from tests.store.helpers import make_key

    print(Claims(Path(sys.argv[1])).claim(make_key(0)), flush=True)
    time.sleep(60)
    """
)


@pytest.fixture
def claimer(tmp_path):
    """Another process, which has claimed block 0."""
    command = [sys.executable, "-c", CLAIMER, str(tmp_path / "claims")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_another_process_is_waited_for_until_it_dies(tmp_path, claimer):
    computing, claims = Computing(), Claims(tmp_path / "claims")
    assert not claims.claim(make_key(0))
    assert claims.claim(make_key(1))
    claims.release(make_key(1))
    flights = SingleFlight(claims)
    computing.go.set()
    thread, results = in_thread(lambda: computing.make(flights))
    time.sleep(0.2)
    assert not results
    claimer.send_signal(signal.SIGKILL)
    thread.join(10)
    assert results[0].computed
    flights.close()
    flights.close()


def test_another_process_that_hangs_is_waited_for_so_long(tmp_path, claimer):
    computing = Computing()
    computing.go.set()
    made = computing.make(SingleFlight(Claims(tmp_path / "claims")), most_s=0.2)
    assert made.computed
    assert made.waited_s >= 0.2


def test_without_a_file_every_claim_is_granted(tmp_path):
    claims = Claims(tmp_path / "none" / "claims")
    assert claims.claim(make_key(0))
    claims.release(make_key(0))
    claims.close()
    assert claims.claim(make_key(0))
