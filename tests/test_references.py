"""What the catalog refers to is protected, and nothing is looked at twice."""

from __future__ import annotations

import pytest

from kvrag.references import References
from kvrag.store.tiered import TieredStore, TierSlot
from tests.retrieval.helpers import add, make_document, open_catalog
from tests.store.doubles import SlowTier
from tests.store.helpers import make_block, make_key

SIZE = make_block(0).nbytes


class CountingStore(TieredStore):
    """Notes what it is asked to protect."""

    def protect(self, keys):
        keys = list(keys)
        self.asked = [*getattr(self, "asked", []), *keys]
        super().protect(keys)


@pytest.fixture
def store():
    with CountingStore([TierSlot(SlowTier(), 4 * SIZE)]) as store:
        yield store


def test_a_query_looks_at_what_another_process_added_since(store, tmp_path):
    """While a corpus was made, each query walked over all of it: ten seconds at a million blocks,
    with every other query waiting.
    """
    with open_catalog(tmp_path) as mine, open_catalog(tmp_path) as other:
        add(other, 1, chunks=40)
        ids = other.document_chunks("default", make_document(1).id)
        for name in range(30):
            other.add_block_ref(str(make_key(name)), ids[name], "m")
        references = References(mine, store)
        assert store.asked == [make_key(name) for name in range(30)]
        for name in range(30, 33):
            store.asked.clear()
            other.add_block_ref(str(make_key(name)), ids[name], "m")
            references.refresh()
            references.refresh()
            assert store.asked == [make_key(name)]
        store.asked.clear()
        other.set_setting("default", "x", "y")  # another change than of references
        references.refresh()
        assert store.asked == []


def test_what_another_process_refers_to_is_kept(store, tmp_path):
    with open_catalog(tmp_path) as mine, open_catalog(tmp_path) as other:
        references = References(mine, store)
        for number in range(2):  # the second one after the first is deleted
            add(other, number, chunks=1)
            (chunk_id,) = other.document_chunks("default", make_document(number).id)
            other.add_block_ref(str(make_key(number)), chunk_id, "m")
            references.refresh()
            store.put(make_key(number), make_block(number))
            for name in range(10, 20):
                store.put(make_key(name), make_block(name))
            assert store.holds_durably(make_key(number))
            other.delete_document("default", make_document(number).id)
