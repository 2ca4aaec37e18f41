"""Catalog and index under random adds, deletes, references and reopenings, against a dict."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrag.retrieval import IndexRule, VectorIndex

from .helpers import DIM, EMBEDDER, add, make_document, open_catalog, unit_vectors

NUMBERS = st.integers(0, 6)
NAMESPACES = st.sampled_from(["a", "b"])


class CatalogMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.catalog = open_catalog(Path(self.folder.name))
        self.indexes = {name: self.open_index(name) for name in "ab"}
        self.documents: dict[tuple[str, int], list[int]] = {}
        self.references: set[tuple[str, int, str]] = set()  # (key, chunk id, scope)
        self.used_ids: set[int] = set()

    def open_index(self, namespace):
        path = Path(self.folder.name) / f"{namespace}.faiss"
        rule = IndexRule("flat" if namespace == "a" else "hnsw", written_most=4)
        return VectorIndex.open(path, self.catalog, namespace, EMBEDDER, DIM, rule)

    @rule(namespace=NAMESPACES, number=NUMBERS)
    def add(self, namespace, number):
        generation = self.catalog.generation(namespace)
        added = add(self.catalog, number, namespace=namespace, chunks=1 + number % 3)
        assert added == ((namespace, number) not in self.documents)
        assert (self.catalog.generation(namespace) > generation) == added
        if added:
            ids = self.catalog.document_chunks(namespace, make_document(number).id)
            assert len(ids) == 1 + number % 3
            assert not self.used_ids & set(ids)
            self.used_ids |= set(ids)
            self.documents[namespace, number] = ids

    @rule(namespace=NAMESPACES, number=NUMBERS)
    def delete(self, namespace, number):
        deleted = self.catalog.delete_document(namespace, make_document(number).id)
        ids = self.documents.pop((namespace, number), None)
        if ids is None:
            assert deleted is None
            return
        before = {key for key, _, _ in self.references}
        self.references = {ref for ref in self.references if ref[1] not in ids}
        after = {key for key, _, _ in self.references}
        assert deleted.chunk_ids == tuple(ids)
        assert deleted.orphaned_block_keys == tuple(sorted(before - after))

    @rule(key=st.sampled_from("kl"), chunk_id=st.integers(1, 30), scope=st.sampled_from("xy"))
    def refer(self, key, chunk_id, scope):
        exists = any(chunk_id in ids for ids in self.documents.values())
        assert self.catalog.add_block_ref(key, chunk_id, scope) == exists
        if exists:
            self.references.add((key, chunk_id, scope))

    @rule(key=st.sampled_from("kl"))
    def forget(self, key):
        gone = {ref for ref in self.references if ref[0] == key}
        assert self.catalog.forget_block(key) == len(gone)
        self.references -= gone

    @rule(namespace=NAMESPACES)
    def save(self, namespace):
        assert self.indexes[namespace].save()

    @rule(namespace=NAMESPACES)
    def save_all(self, namespace):
        assert self.indexes[namespace].save(now=True)
        assert self.indexes[namespace].is_saved

    @rule()
    def reopen(self):
        self.catalog.close()
        self.catalog = open_catalog(Path(self.folder.name))
        self.indexes = {name: self.open_index(name) for name in "ab"}

    @invariant()
    def agrees(self):
        assert list(self.catalog.block_keys()) == sorted({key for key, _, _ in self.references})
        for namespace in "ab":
            expected = {
                chunk_id: unit_vectors(number, len(ids))[ordinal]
                for (name, number), ids in self.documents.items()
                if name == namespace
                for ordinal, chunk_id in enumerate(ids)
            }
            counts = self.catalog.counts(namespace)
            assert (counts.chunks, counts.vectors) == (len(expected), len(expected))
            referred = {chunk_id for _, chunk_id, scope in self.references if scope == "x"}
            assert list(self.catalog.chunks_without_block(namespace, "x")) == sorted(
                expected.keys() - referred
            )
            index = self.indexes[namespace]
            index.refresh()
            found = index.search(unit_vectors(77, 1)[0], 1000)
            assert sorted(chunk_id for chunk_id, _ in found) == sorted(expected)
            for chunk_id, vector in expected.items():
                assert index.search(vector, 1)[0][1] > 0.9999, chunk_id

    def teardown(self):
        self.catalog.close()
        self.folder.cleanup()


TestCatalogMachine = CatalogMachine.TestCase
TestCatalogMachine.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
