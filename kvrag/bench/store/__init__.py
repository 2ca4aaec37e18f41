"""`kvrag bench store`: how near each tier is to the speed of what it is made of. Opens no model."""

from kvrag.bench.store.options import StoreOptions
from kvrag.bench.store.run import run

__all__ = ["StoreOptions", "run"]
