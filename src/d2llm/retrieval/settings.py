"""Search settings, shared by ``search`` and every other interface to an index."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any, TypedDict, TypeVar, cast, get_args

from d2llm.core.errors import FilterError, InputError
from d2llm.core.inputs import check_string, shown, strings_of
from d2llm.core.names import did_you_mean
from d2llm.core.types import DEFAULT_NUM_CANDIDATES, DEFAULT_TOP_K, TASKS, EvidenceTerm, Grouping, SourceName, Task
from d2llm.models.evidence import EvidenceWeights

SELECTED_FROM = 5
"""``mmr`` and ``near_duplicates`` select from this many times ``top_k`` places, by default."""


_WHOLE_NUMBERS = ("top_k", "num_candidates", "max_num_candidates", "document_passages", "neighbours", "select_from")


def _is_whole(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How to search.

    Attributes:
        task: which branch of the IEM to use; None means the index's task.
        top_k: length of the ranking; if it exceeds the corpus, every passage is ranked.
        num_candidates: number of passages that get the full score; each source proposes an equal share, but at least
            ``top_k``.
        filter: an SQL-like condition on metadata (``store.filters``), applied before the top k are chosen.
        sources: sources of candidates; the candidates of several are merged, and all get the student's full score. None
            means "vectors", plus "bm25" if the student's score counts words. "ann" is "vectors" by an approximate index
            (``build_ann``): faster, with the recall measured when it was built.
        evidence: weights of the evidence other than the vectors (``models.evidence``), replacing the student's; if
            empty, only the vectors count.
        hybrid: rank by reciprocal-rank fusion of the student's ranking and BM25's, with this weight, 0 to 1, for BM25;
            None ranks by the student's score alone. BM25 is then always a source, in addition to the given sources or
            the vectors.
        exact: compute the exact ranking of all passages by the full score, with a certificate. A head without an
            inner-product part ("paper") is always searched exactly.
        budget_ms: time limit of an exact search; the certificate says what is proved by then.
        explain: explain each passage's rank.
        group: rank documents (``Passage.document_id``; a passage without one counts as its own document) by their
            "best" passage, or by the "sum" of their best passages' odds. ``top_k`` then counts documents, and more
            candidates are taken if they belong to too few documents.
        max_num_candidates: with ``group``, take no more candidates than this, even if they belong to too few documents;
            None sets no limit.
        document_passages: number of passages shown per document, and with "sum" summed.
        neighbours: also return the passages of the same document up to this many positions before and after each.
        mmr: choose diverse results by maximal marginal relevance (``ops.diversity``), with this weight, 0 to 1, for the
            score; 1 gives the ranking itself. None does not diversify. The vectors compared are those in the index.
        near_duplicates: leave out a result if the cosine of its stored vector with that of a better result is at least
            this, 0 to 1, and it says nothing beyond that result (``ops.same_statement``). In a ranking of documents,
            their best passages are compared.
        select_from: ``mmr`` and ``near_duplicates`` select the results from this many of the first in the ranking; None
            means five times ``top_k``. An exact search proves all of these places; their selection is not the proved
            order.
        instruction: put before every query where its vector is made, in place of the student's ``query_prefix``: what
            a model that was trained with instructions expects. Words, a teacher and a writer see the plain query.
    """

    task: Task | None = None
    top_k: int = DEFAULT_TOP_K
    num_candidates: int = DEFAULT_NUM_CANDIDATES
    filter: str | None = None
    sources: tuple[SourceName, ...] | None = None
    evidence: EvidenceWeights | Mapping[EvidenceTerm, float] | None = None
    hybrid: float | None = None
    exact: bool = False
    budget_ms: float | None = None
    explain: bool = False
    group: Grouping = "passage"
    max_num_candidates: int | None = None
    document_passages: int = 3
    neighbours: int = 0
    mmr: float | None = None
    near_duplicates: float | None = None
    select_from: int | None = None
    instruction: str | None = None

    def __post_init__(self) -> None:
        if self.sources is not None:
            object.__setattr__(self, "sources", tuple(strings_of(self.sources, "sources")))
        for name in _WHOLE_NUMBERS:
            if _is_whole(value := getattr(self, name)):  # also NumPy's
                object.__setattr__(self, name, int(value))

    @property
    def selects(self) -> bool:
        """Whether the results are a selection from a longer ranking."""
        return self.mmr is not None or self.near_duplicates is not None

    @property
    def ranking_depth(self) -> int:
        """Length of the ranking from which the results are taken; ``top_k`` without a selection."""
        if not self.selects:
            return self.top_k
        return SELECTED_FROM * self.top_k if self.select_from is None else self.select_from

    def proposers(self, *, counts_words: bool) -> tuple[SourceName, ...]:
        """The sources of candidates; ``counts_words``: whether the student's score counts words."""
        named: tuple[SourceName, ...] = self.sources or (("vectors", "bm25") if counts_words else ("vectors",))
        return named if self.hybrid is None or "bm25" in named else (*named, "bm25")

    def check(self) -> None:
        """Check the settings and their combination.

        Raises:
            InputError: a setting is invalid, or settings contradict each other.
            FilterError: the filter is not a text.
        """
        self._check_types()
        if self.top_k < 1 or self.num_candidates < 1:
            raise InputError(
                f"top_k is {self.top_k} and num_candidates is {self.num_candidates}; both must be at least 1"
            )
        if not isinstance(self.filter, str | None):  # pyright: ignore[reportUnnecessaryIsInstance] - from callers
            raise FilterError(
                f'filter is a {type(self.filter).__name__}; write a condition as text, such as "year >= 2020 AND '
                "language = 'en'\" (the retrievers for LangChain, LlamaIndex and Haystack also take their own forms)"
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
            raise InputError("an exact search ranks all passages by the student's score: leave out hybrid and sources")
        if self.budget_ms is not None and not self.exact:
            raise InputError("budget_ms is for an exact search; set exact as well, or leave it out")
        self._check_documents()
        self._check_selection()

    def _check_types(self) -> None:
        for name in _WHOLE_NUMBERS:
            value: Any = getattr(self, name)
            if not _is_whole(value) and not (value is None and name in ("max_num_candidates", "select_from")):
                raise InputError(f"{name} is {shown(value)}, but must be a whole number")
        for name in ("hybrid", "budget_ms", "mmr", "near_duplicates"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value)):
                raise InputError(f"{name} is {shown(value)}, but must be a number")
        for name in ("filter", "instruction"):
            if getattr(self, name) is not None:
                check_string(getattr(self, name), name)
        if self.task is not None and self.task not in TASKS:
            raise InputError(f"task is {shown(self.task)}, but must be one of {', '.join(TASKS)}")
        for source in self.sources or ():
            if source not in get_args(SourceName):
                raise InputError(f"sources has {source!r}, but there are: {', '.join(get_args(SourceName))}")

    def _check_documents(self) -> None:
        if self.group not in get_args(Grouping):
            raise InputError(f"group is {self.group!r}, but must be one of {', '.join(get_args(Grouping))}")
        if self.document_passages < 1 or self.neighbours < 0:
            raise InputError(
                f"document_passages is {self.document_passages} and neighbours is {self.neighbours}; they must be at "
                "least 1 and 0"
            )
        if self.max_num_candidates is not None and self.max_num_candidates < 1:
            raise InputError(f"max_num_candidates is {self.max_num_candidates}, but must be at least 1")
        if self.exact and self.group != "passage":
            raise InputError("an exact search proves a ranking of passages: leave out either group or exact")
        if self.hybrid is not None and self.group == "sum":
            raise InputError("fused scores are sums of ranks and cannot be summed as odds: set group to 'best'")

    def _check_selection(self) -> None:
        for name, value in (("mmr", self.mmr), ("near_duplicates", self.near_duplicates)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name} is {value}, but must be between 0 and 1; leave it out to turn it off")
        if self.select_from is not None and not self.selects:
            raise InputError("select_from is for mmr and near_duplicates; set one of them as well, or leave it out")
        if self.select_from is not None and self.select_from < self.top_k:
            raise InputError(
                f"select_from is {self.select_from}, but top_k is {self.top_k}: results cannot be selected from fewer "
                "places than there are results"
            )


class SearchChanges(TypedDict, total=False):
    """The fields of ``SearchSettings`` as keyword arguments of ``search``."""

    task: Task | None
    top_k: int
    num_candidates: int
    filter: str | None
    sources: tuple[SourceName, ...] | None
    evidence: EvidenceWeights | Mapping[EvidenceTerm, float] | None
    hybrid: float | None
    exact: bool
    budget_ms: float | None
    explain: bool
    group: Grouping
    max_num_candidates: int | None
    document_passages: int
    neighbours: int
    mmr: float | None
    near_duplicates: float | None
    select_from: int | None
    instruction: str | None


_Function = TypeVar("_Function", bound=Callable[..., Any])


def shows_settings(function: _Function) -> _Function:
    """Let ``help`` and completion show every search setting of a function that takes them as ``**changes``."""
    own = signature(function)
    given = [each for each in own.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    settings = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(SearchSettings)
    ]
    cast(Any, function).__signature__ = own.replace(parameters=[*given, *settings])
    return function


def changed(settings: SearchSettings | None, changes: Mapping[str, Any]) -> SearchSettings:
    """The settings (None: the defaults) with single fields changed.

    Raises:
        InputError: there is no such field.
    """
    known = [field.name for field in fields(SearchSettings)]
    for name in changes:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are: {', '.join(known)}"
            raise InputError(f"there is no search setting {name!r}{hint}")
    return replace(settings or SearchSettings(), **changes)
