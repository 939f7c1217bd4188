"""How to search: the settings of ``search`` and of every other way to ask an index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from d2llm.core.errors import InputError
from d2llm.core.names import did_you_mean
from d2llm.core.types import EvidenceTerm, Grouping, SourceName, Task
from d2llm.models.evidence import EvidenceWeights


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How to search.

    Attributes:
        task: which branch of the IEM; None means the index's own.
        top_k: length of a ranking; every passage when it is beyond the corpus.
        num_candidates: passages that get the full score; each source proposes an equal part, ``top_k`` at least.
        filter: an SQL-like condition on metadata (``store.filters``); it is applied before the choice of the first k.
        sources: who proposes candidates; several are united, and all get the student's full score. None means
            "vectors", and "bm25" with them where the student's score counts words. "ann" is "vectors" by an approximate
            index (``build_ann``): quicker, with the recall that was measured when it was built.
        evidence: weights of what counts beside the vectors (``models.evidence``), in place of the student's own; with
            none the vectors' score is all.
        hybrid: rank by reciprocal-rank fusion of the student's ranking and BM25's, with this share, 0 to 1, for BM25;
            None: by the student's score alone. BM25 then always proposes, beside the sources that are named, or the
            vectors.
        exact: the exact ranking of all passages by the full score, with its certificate. A head without an
            inner-product part ("paper") is always searched so.
        budget_ms: of an exact search: stop scoring in time; the certificate says what is proved.
        explain: say of each passage why it stands where it does.
        group: rank documents (``Passage.document_id``; a passage without one is its own) by their "best" passage, or by
            the "sum" of their best passages' odds. ``top_k`` then counts documents, and more candidates are taken where
            there are too few documents among them.
        document_passages: passages of a document that are shown, and with "sum" summed.
        neighbours: also give the passages of the same document up to this many positions before and after each.
    """

    task: Task | None = None
    top_k: int = 10
    num_candidates: int = 1000
    filter: str | None = None
    sources: tuple[SourceName, ...] | None = None
    evidence: EvidenceWeights | Mapping[EvidenceTerm, float] | None = None
    hybrid: float | None = None
    exact: bool = False
    budget_ms: float | None = None
    explain: bool = False
    group: Grouping = "passage"
    document_passages: int = 3
    neighbours: int = 0

    def proposers(self, *, counts_words: bool) -> tuple[SourceName, ...]:
        """Who proposes candidates; ``counts_words``: whether words are a part of the student's score."""
        named: tuple[SourceName, ...] = self.sources or (("vectors", "bm25") if counts_words else ("vectors",))
        return named if self.hybrid is None or "bm25" in named else (*named, "bm25")

    def check(self) -> None:
        """Make sure that the settings go together.

        Raises:
            InputError: they do not.
        """
        if self.top_k < 1 or self.num_candidates < 1:
            raise InputError(
                f"top_k is {self.top_k} and num_candidates is {self.num_candidates}; both must be at least 1"
            )
        if self.sources is not None and not self.sources:
            raise InputError("sources is empty; name 'vectors', 'ann', 'bm25' or several")
        terms = self.evidence.terms if isinstance(self.evidence, EvidenceWeights) else self.evidence or {}
        for term, weight in terms.items():
            if term not in get_args(EvidenceTerm) or not 0 <= weight < math.inf:
                raise InputError(
                    f"evidence gives {term!r} the weight {weight}; weights must be at least 0, of: "
                    f"{', '.join(get_args(EvidenceTerm))}"
                )
        if self.hybrid is not None and not 0 <= self.hybrid <= 1:
            raise InputError(f"hybrid is {self.hybrid}; BM25's share must be between 0 and 1")
        if self.exact and (self.hybrid is not None or self.sources not in (None, ("vectors",))):
            raise InputError(
                "an exact search ranks all passages by the student's score: leave hybrid and sources alone"
            )
        if self.budget_ms is not None and not self.exact:
            raise InputError("budget_ms is for an exact search; set exact as well, or leave it out")
        if self.group not in get_args(Grouping):
            raise InputError(f"group is {self.group!r}, but must be one of {', '.join(get_args(Grouping))}")
        if self.document_passages < 1 or self.neighbours < 0:
            raise InputError(
                f"document_passages is {self.document_passages} and neighbours is {self.neighbours}; they must be at "
                "least 1 and 0"
            )
        if self.exact and self.group != "passage":
            raise InputError("an exact search proves a ranking of passages: leave group alone, or exact")
        if self.hybrid is not None and self.group == "sum":
            raise InputError("fused scores are sums of ranks and cannot be summed as odds: set group to 'best'")


def changed(settings: SearchSettings | None, changes: Mapping[str, Any]) -> SearchSettings:
    """The settings (None: all as by default) with single fields changed.

    Raises:
        InputError: there is no such field.
    """
    known = [field.name for field in fields(SearchSettings)]
    for name in changes:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are: {', '.join(known)}"
            raise InputError(f"there is no setting {name!r} of a search{hint}")
    return replace(settings or SearchSettings(), **changes)
