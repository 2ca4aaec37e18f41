from __future__ import annotations

import threading
import time

import pytest

from kvrag.store.ledger import Ledger, Limits, Standing

from .helpers import make_key

A, B, C, D = (make_key(name) for name in "ABCD")


def filled(limit, **sizes):
    ledger = Ledger(limit)
    ledger.load((make_key(name), size, 0.0) for name, size in sizes.items())
    return ledger


def write(ledger, key, nbytes, **options):
    reservation = ledger.reserve(key, nbytes)
    assert reservation is not None
    victims = reservation.victims
    for victim in victims:
        ledger.evicted(reservation, victim)
    ledger.commit(reservation, **options)
    return list(victims)


def test_the_least_recently_used_go_first():
    ledger = filled(30, A=10, B=10, C=10)
    ledger.touch(A)
    assert write(ledger, D, 20) == [B, C]
    assert A in ledger
    assert D in ledger
    assert ledger.used_nbytes == 30


def test_no_victim_if_it_fits_and_none_if_it_cannot():
    ledger = filled(30, A=10)
    assert write(ledger, B, 20) == []
    assert ledger.reserve(C, 31) is None
    assert ledger.used_nbytes == 30
    assert len(ledger) == 2
    assert Ledger(0).reserve(A, 1) is None
    assert write(Ledger(None), A, 10**18) == []


def test_pinned_and_protected_blocks_stay():
    ledger = filled(30, A=10, B=10, C=10)
    receipt = ledger.pin(A)
    assert ledger.stand(B, Standing.KEPT)
    assert ledger.reserve(D, 11) is None
    assert write(ledger, D, 10) == [C]
    ledger.unpin(receipt)
    ledger.stand(B, Standing.PASSING)
    # What changes its standing counts as used: B is the youngest now.
    assert write(ledger, C, 20) == [A, D]


def test_committed_as_protected():
    ledger = Ledger(10)
    write(ledger, A, 10, standing=Standing.KEPT)
    assert ledger.reserve(B, 1) is None


def test_an_aborted_write_gives_room_and_victims_back():
    ledger = filled(30, A=10, B=10, C=10)
    reservation = ledger.reserve(D, 20)
    assert reservation.victims == (A, B)
    assert ledger.used_nbytes == 30
    ledger.evicted(reservation, A)
    ledger.abort(reservation)
    assert A not in ledger
    assert ledger.used_nbytes == 20
    assert write(ledger, D, 20) == [B]  # B is the oldest again


def test_a_write_with_victims_left_cannot_be_committed():
    ledger = filled(10, A=10)
    reservation = ledger.reserve(B, 10)
    with pytest.raises(ValueError, match="1 victims"):
        ledger.commit(reservation)
    ledger.abort(reservation)
    for close in (ledger.commit, ledger.abort):
        with pytest.raises(ValueError, match="closed already"):
            close(reservation)
    assert ledger.used_nbytes == 10


def test_one_reservation_a_key():
    ledger = Ledger(None)
    ledger.reserve(A, 1)
    with pytest.raises(ValueError, match="being written"):
        ledger.reserve(A, 1)


@pytest.mark.parametrize("size", [4, 10, 16])
def test_replacing_counts_the_difference_and_keeps_the_old_until_then(size):
    ledger = filled(20, A=10, B=4)
    reservation = ledger.reserve(A, size)
    assert A not in reservation.victims
    for victim in reservation.victims:
        ledger.evicted(reservation, victim)
    assert A in ledger
    assert ledger.used_nbytes <= 20
    assert ledger.reserve(C, 11) is None  # the copy being replaced is nobody's victim
    ledger.commit(reservation)
    assert ledger.used_nbytes == size + 4 * (B in ledger)


def test_a_block_lost_while_it_is_replaced_does_not_break_the_sum():
    ledger = filled(10, A=6, B=4)
    reservation = ledger.reserve(A, 6)
    ledger.remove(A)
    assert ledger.used_nbytes == 10
    assert ledger.reserve(C, 6) is None
    ledger.commit(reservation)
    assert ledger.used_nbytes == 10


def test_a_block_adopted_while_it_is_written_keeps_its_pin():
    ledger = Ledger(20)
    reservation = ledger.reserve(A, 10)
    receipt = ledger.adopt(A, 10)
    ledger.commit(reservation)
    assert ledger.used_nbytes == 10
    assert ledger.reserve(B, 11) is None
    ledger.unpin(receipt)
    assert write(ledger, B, 11) == [A]


def test_adopting_never_exceeds_the_limit():
    ledger = filled(20, A=15)
    assert ledger.adopt(B, 6) is None
    assert B not in ledger
    assert ledger.adopt(B, 5) is not None
    assert ledger.used_nbytes == 20


def test_receipts_release_their_own_pin_once():
    ledger = filled(10, A=10)
    mine, other = ledger.pin(A), ledger.pin(A)
    ledger.unpin(mine)
    ledger.unpin(mine)
    assert ledger.reserve(B, 1) is None  # the other one holds it
    ledger.unpin(other)
    # A pin of a block that is gone does not hold the next one of that name, nor release it.
    old = ledger.pin(A)
    ledger.remove(A)
    write(ledger, A, 10)
    new = ledger.pin(A)
    ledger.unpin(old)
    assert ledger.reserve(B, 1) is None
    ledger.unpin(new)
    assert write(ledger, B, 1) == [A]


def test_unknown_keys():
    ledger = Ledger(10)
    assert ledger.pin(A) is None
    assert not ledger.touch(A)
    assert not ledger.remove(A)
    assert ledger.stand(A, Standing.KEPT) is None


def test_a_lowered_limit_is_honoured_by_the_next_admission():
    ledger = filled(10, A=10, B=10, C=10)
    assert ledger.used_nbytes == 30
    ledger.stand(A, Standing.KEPT)
    assert ledger.reserve(D, 1) is None
    ledger.stand(A, Standing.PASSING)
    assert set(write(ledger, D, 1)) == {A, B, C}
    assert ledger.used_nbytes == 1


def test_a_lowered_limit_is_honoured_by_shedding_what_may_go():
    ledger = filled(15, A=10, B=10, C=10, D=10)
    ledger.stand(A, Standing.KEPT)
    receipt = ledger.pin(B)
    one = ledger.shed()
    assert one.victims == (C,)
    assert ledger.shed() is None  # one at a time
    ledger.abort(one)  # the tier failed: it is back
    assert ledger.used_nbytes == 40
    for expected in (C, D):
        one = ledger.shed()
        assert one.victims == (expected,)
        ledger.evicted(one, expected)
        ledger.abort(one)
    assert ledger.shed() is None  # what is left above the limit must stay
    ledger.unpin(receipt)
    one = ledger.shed()
    ledger.evicted(one, B)
    ledger.abort(one)
    assert (ledger.shed(), ledger.used_nbytes) == (None, 10)


def test_a_lowered_quota_takes_from_who_exceeds_it():
    ledger = Ledger(Limits(namespace_nbytes=15))
    ours, theirs = [make_key(name, "a" * 32) for name in range(2)], make_key(0, "b" * 32)
    ledger.load([(key, 10, 0.0) for key in (theirs, *ours)])
    one = ledger.shed()
    assert one.victims == (ours[0],)
    ledger.evicted(one, ours[0])
    ledger.abort(one)
    assert ledger.shed() is None


def test_a_victim_cannot_be_written_before_it_is_deleted():
    """Else the late deletion would remove the new copy."""
    ledger = filled(10, A=10)
    reservation = ledger.reserve(B, 10)
    assert ledger.adopt(A, 10) is None
    order = []

    def put_the_victim():
        other = ledger.reserve(A, 10)
        order.append("reserved" if other is not None else "refused")

    thread = threading.Thread(target=put_the_victim)
    thread.start()
    time.sleep(0.05)
    order.append("deleted")
    ledger.evicted(reservation, A)
    ledger.commit(reservation)
    thread.join()
    assert order[0] == "deleted"


def test_a_limit_below_zero_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        Ledger(-1)
