"""The settings that a corpus was made with: whoever first adds documents fixes them for all."""

from __future__ import annotations

from kvrag.errors import CorpusSettingsError
from kvrag.retrieval.catalog import Catalog

__all__ = ["MadeWith"]


class MadeWith:
    """Kept in the catalog, for one namespace. Knows no setting's meaning."""

    def __init__(self, catalog: Catalog, namespace: str) -> None:
        self._catalog, self._namespace = catalog, namespace

    def fix(self, name: str, value: str) -> None:
        """Note `value`, unless another is noted. Raises as `check`."""
        stored = self._catalog.set_setting(self._namespace, _key(name), value, overwrite=False)
        self._hold(name, stored, value)

    def check(self, name: str, value: str) -> None:
        """Raises CorpusSettingsError if another value is noted."""
        self._hold(name, self._catalog.setting(self._namespace, _key(name)), value)

    def change(self, name: str, value: str) -> None:
        """Note `value` in any case."""
        self._catalog.set_setting(self._namespace, _key(name), value)

    def _hold(self, name: str, stored: str | None, value: str) -> None:
        if stored not in (None, value):
            raise CorpusSettingsError(
                f"the corpus {self._namespace!r} was made with another {name} ({stored:.64}, and "
                f"not {value:.64}): set it back, or rebuild the corpus (kvrag precompute … "
                "--rebuild)"
            )


def _key(name: str) -> str:
    return f"corpus_{name}"
