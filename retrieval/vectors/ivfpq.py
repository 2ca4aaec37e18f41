"""Approximate search of compressed vectors, in the few lists whose centres are near the question.

IVFPQ (Jégou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011)
behind a rotation that is learnt (OPQ: Ge, He, Ke and Sun, CVPR 2013). dim / 8 + 8 bytes a vector;
the exact ones, which decide the order of what is found, are the caller's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from .base import Bits, IndexKind, Matrix, Rows, Source, selector

__all__ = ["LEAST_VECTORS", "IvfPq"]

#: Fewer cannot be learnt from.
LEAST_VECTORS = 10_000
_COMPONENTS = 8  # of a vector, coded in a byte together
_CODE_BITS, _CODES = 8, 256
_SAMPLE_A_LIST = 64
_SAMPLE = 262_144
#: Of the rotation and the codes: more of them take minutes and find little more.
_CODE_SAMPLE_EACH = 64
_ROTATION_ROUNDS, _FIRST_ROUNDS = 5, 10
#: Share of the lists that a search looks at: `kvrag bench index` tells what that gives.
_PROBED = 1 / 64
_LEAST_PROBED = 32
#: Rows whose exact vectors are compared, at least, and for each that is wanted. In a larger index
#: more of them have nearly the same code: one in so many, up to a number that costs some 5 ms.
_REFINED, _REFINED_EACH = 100, 10
_REFINED_OF, _MOST_REFINED = 2_500, 1_000
_ALL_LISTS_ROWS = 100_000
_OUTGROWN = 4.0


class IvfPq:
    """A `Structure` over FAISS's IndexIVFPQ behind an OPQMatrix. `effort`: lists probed."""

    kind: ClassVar[IndexKind] = "ivfpq"

    def __init__(self, faiss: Any, index: Any) -> None:
        self._faiss, self.index = faiss, index
        self._ivf = faiss.downcast_index(index.index)
        self.effort = max(_LEAST_PROBED, round(self._ivf.nlist * _PROBED))

    @classmethod
    def trained(cls, faiss: Any, dim: int, source: Source) -> IvfPq:
        """An empty one whose lists and codes are learnt from a sample."""
        lists = _num_lists(source.count)
        pieces = max(1, dim // _COMPONENTS)
        inner = pieces * (dim // pieces)
        rotation = faiss.OPQMatrix(dim, pieces, inner)
        rotation.max_train_points = _CODE_SAMPLE_EACH * _CODES
        rotation.niter, rotation.niter_pq_0 = _ROTATION_ROUNDS, _FIRST_ROUNDS
        centres = faiss.IndexFlatIP(inner)
        ivf = faiss.IndexIVFPQ(
            centres, inner, lists, pieces, _CODE_BITS, faiss.METRIC_INNER_PRODUCT
        )
        index = faiss.IndexPreTransform(rotation, ivf)
        # What Python holds is freed with its names; the index is to hold it instead.
        for part in (rotation, centres, ivf):
            part.this.disown()
        ivf.own_fields = index.own_fields = True
        sample = source.sample(min(_SAMPLE, _SAMPLE_A_LIST * lists))
        ivf.cp.max_points_per_centroid = _SAMPLE_A_LIST
        ivf.pq.cp.max_points_per_centroid = _CODE_SAMPLE_EACH
        index.train(sample)
        return cls(faiss, index)

    @staticmethod
    def fits(faiss: Any, index: Any) -> bool:
        """Whether an index that was read from a file is one of these."""
        if type(index) is not faiss.IndexPreTransform or index.chain.size() != 1:
            return False
        inner = faiss.downcast_index(index.index)
        is_one = type(inner) is faiss.IndexIVFPQ and index.is_trained
        return bool(is_one and inner.metric_type == faiss.METRIC_INNER_PRODUCT)

    def append(self, vectors: Matrix) -> None:
        self.index.add(vectors)

    def forget(self, rows: Rows, live: Bits) -> None:
        # Lists have the numbers of their rows, so that none is renumbered; the count of all of
        # them is where the next row is numbered from.
        total = self.index.ntotal
        self._ivf.remove_ids(self._faiss.IDSelectorBatch(rows))
        self.index.ntotal = self._ivf.ntotal = total

    def nearest(self, query: Matrix, k: int, live: Bits | None, among: Rows | None) -> Rows:
        size = self.index.ntotal
        refined = min(size // _REFINED_OF, _MOST_REFINED)
        count = max(_REFINED, refined, _REFINED_EACH * k)
        if among is not None and len(among) <= count:
            return among
        probed = self.effort
        if among is not None and len(among) <= _ALL_LISTS_ROWS:
            probed = self._ivf.nlist
        elif among is not None:
            # Of what a search looks at, the same share is of rows that may be found.
            probed = min(self._ivf.nlist, self.effort * size // len(among))
        inner = self._faiss.SearchParametersIVF(
            nprobe=probed, sel=selector(self._faiss, None, among, size)
        )
        outer = self._faiss.SearchParametersPreTransform(index_params=inner)
        _, rows = self.index.search(query, min(size, count), params=outer)
        found: Rows = rows[0][rows[0] >= 0]
        return found

    def vectors(self, rows: Rows) -> None:
        return None

    def is_outgrown(self) -> bool:
        """Lists grow longer as vectors are added, and what was learnt is of the earlier ones."""
        return bool(_num_lists(self.index.ntotal) >= _OUTGROWN * self._ivf.nlist)


def _num_lists(count: int) -> int:
    """About four times the root of the number of vectors, a power of two."""
    wanted = min(4 * math.sqrt(count), count / 39)
    return 1 << max(0, round(math.log2(max(wanted, 1.0))))
