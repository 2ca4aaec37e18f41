"""How chunks are looked for: what a request may choose of retrieval, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kvrag.errors import InputError
from kvrag.retrieval.errors import FilterError
from kvrag.retrieval.where import Where

__all__ = ["RerankMode", "Search", "SearchMode"]

SearchMode = Literal["hybrid", "dense", "lexical"]
RerankMode = Literal["none", "cross_encoder"]


@dataclass(frozen=True, slots=True)
class Search:
    """What of retrieval a request chooses; None is the setting's.

    mode:   by meaning (`dense`), by words (`lexical`), or by both (`hybrid`)
    where:  a filter over the documents' metadata, see docs/retrieval.md; no other chunk is ranked
    mmr:    0 to 1: the part of relevance in maximal marginal relevance, the rest being novelty;
            1 leaves chunks as they are ranked
    distinct: 0 to 1: of two chunks that are more similar than that (Jaccard's similarity of their
            runs of three words) the lower-ranked is left out, and the next takes its place; 1
            leaves out none
    rerank: what orders the first 20 anew: `none`, or the settings' `cross_encoder`

    Raises:
        InputError: anything else; the message says what is allowed.
    """

    mode: SearchMode | None = None
    where: Mapping[str, Any] | None = None
    mmr: float | None = None
    distinct: float | None = None
    rerank: RerankMode | None = None

    def __post_init__(self) -> None:
        """Check every field, the filter included."""
        if self.mode is not None and self.mode not in get_args(SearchMode):
            raise InputError(
                f"search is {self.mode!r:.80}; allowed are {', '.join(get_args(SearchMode))}"
            )
        if self.rerank is not None and self.rerank not in get_args(RerankMode):
            raise InputError(
                f"rerank is {self.rerank!r:.80}; allowed are {', '.join(get_args(RerankMode))}"
            )
        for name, value in (("mmr", self.mmr), ("distinct", self.distinct)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= 1):
                raise InputError(f"{name} is {value!r:.80}; it must be a number from 0 to 1")
        self.filter()

    @classmethod
    def of(cls, given: Search | str | None) -> Search:
        """`given` itself, or the search of that mode."""
        if isinstance(given, Search):
            return given
        return cls(mode=given)  # type: ignore[arg-type]  # checked there

    def or_else(self, mode: SearchMode, mmr: float, distinct: float, rerank: RerankMode) -> Search:
        """This, with what it leaves open."""
        return Search(
            self.mode or mode,
            self.where,
            mmr if self.mmr is None else self.mmr,
            distinct if self.distinct is None else self.distinct,
            self.rerank or rerank,
        )

    def filter(self) -> Where | None:
        """The filter, parsed; None for none."""
        if self.where is None:
            return None
        try:
            return Where.parse(self.where)
        except FilterError as exc:
            raise InputError(str(exc)) from exc
