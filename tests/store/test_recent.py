from __future__ import annotations

from kvrag.store.recent import Recent

from .helpers import make_key


def test_the_least_recently_used_goes():
    """Two of three such caches forgot the oldest, however often it was used."""
    recent = Recent(most=3)
    for name in range(3):
        recent.keep(make_key(name), name)
    assert recent.get(make_key(0)) == 0
    recent.keep(make_key(1), "anew")
    recent.keep(make_key(3), 3)
    assert [recent.get(make_key(name)) for name in range(4)] == [0, "anew", None, 3]
    recent.forget(make_key(0))
    recent.forget(make_key(0))
    assert recent.get(make_key(0)) is None
    recent.clear()
    assert recent.get(make_key(1)) is None
