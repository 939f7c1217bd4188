"""Search settings: the same in Python, on the command line (``d2llm search``) and over HTTP (``/v1/search``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import BeforeValidator

from d2llm.core.errors import InputError
from d2llm.core.inputs import shown
from d2llm.core.settings import Settings, Shown, setting
from d2llm.core.types import (
    DEFAULT_ANN_RECALL,
    DEFAULT_CONTEXT_TOKENS,
    DEFAULT_NUM_CANDIDATES,
    DEFAULT_TOP_K,
    ContextOrder,
    ExpansionMethod,
    Grouping,
    ScoreFeature,
    SourceName,
    Task,
)

if TYPE_CHECKING:
    from d2llm.models.score_features import FeatureWeights

    ScoreFeatures = FeatureWeights | Mapping[ScoreFeature, float]
else:
    ScoreFeatures = Any  # the command line, which imports this module, has no use for NumPy

MIN_CHUNK_TOKENS = 8
"""Least number of tokens of a passage."""
SELECTED_FROM = 5
"""``mmr`` and ``near_duplicates`` select from this many times ``top_k`` places, by default."""
_PYTHON_ONLY = Shown(python_only=True)


class SearchSettings(Settings):
    """How to search.

    Example:
        >>> from d2llm import SearchSettings
        >>> SearchSettings(top_k=3, filter="year > 2020").replace(top_k=5)
        SearchSettings(top_k=5, filter='year > 2020')
    """

    noun: ClassVar[str] = "search setting"

    task: Task | None = setting(
        None,
        "Whether a passage should answer the query (asymmetric) or mean the same (symmetric).",
        Shown(default="the index's"),
    )
    top_k: int = setting(DEFAULT_TOP_K, "Length of the ranking.", ge=1, title="Results")
    num_candidates: int = setting(
        DEFAULT_NUM_CANDIDATES, "Passages that get the full score; more is slower and more exact.", ge=1
    )
    filter: str | None = setting(
        None,
        "Only passages whose metadata match this condition, as in \"year >= 2020 AND language = 'en'\".",
        Shown(metavar="CONDITION"),
        title="Filter",
        examples=["year >= 2020 AND language = 'en'"],
    )
    sources: tuple[SourceName, ...] | None = setting(
        None,
        "Sources of candidates, which all get the full score. vectors, if named, is an exact scan; ann is an "
        "approximate index, with the recall measured when it was built. A fusion with BM25 always has bm25.",
        Shown(
            option="source",
            default="vectors, by the approximate index if there is one, and bm25 if the student's score counts words",
        ),
        title="Candidates",
        strict=False,
        min_length=1,
        max_length=3,
        fail_fast=True,
    )
    score_features: ScoreFeatures | None = setting(
        None,
        "Weights of the terms of the score other than the vectors, replacing the student's; if empty, only the vectors "
        "count.",
        Shown(default="the student's", python_only=True),
    )
    hybrid: float | None = setting(
        None,
        "Fuse the student's ranking with BM25's, by reciprocal ranks; the value is BM25's weight, for example 0.5.",
        Shown(metavar="WEIGHT"),
        title="Hybrid",
        ge=0,
        le=1,
    )
    exact: bool = setting(False, "Rank all passages exactly, with a proof (certificate).", title="Exact")
    budget_ms: float | None = setting(
        None, "With exact: stop after this many milliseconds, and report how much is proved.", ge=0
    )
    explain: bool = setting(False, "Explain the rank of each passage.")
    group: Grouping = setting(
        "passage",
        "Rank passages, or documents by their best passage, or by the sum of the odds of their three best; a ranking "
        "then has so many documents.",
    )
    max_num_candidates: int | None = setting(
        None,
        "With group: take no more candidates than this, even if they belong to too few documents.",
        _PYTHON_ONLY,
        ge=1,
    )
    document_passages: int = setting(
        3, "Passages shown for each document, and summed with group sum.", _PYTHON_ONLY, ge=1
    )
    neighbours: int = setting(0, "Also return this many passages before and after each, of the same document.", ge=0)
    mmr: float | None = setting(
        None,
        "Diverse results (maximal marginal relevance): the value is the weight of the score, for example 0.7; the rest "
        "counts against likeness to better results.",
        Shown(metavar="WEIGHT"),
        ge=0,
        le=1,
    )
    near_duplicates: float | None = setting(
        None,
        "Leave out passages whose vectors have at least this cosine with that of a better result, for example 0.95, "
        "and that say nothing beyond it.",
        Shown(metavar="COSINE"),
        ge=0,
        le=1,
    )
    select_from: int | None = setting(
        None,
        "With mmr or near_duplicates: how many of the first results to select from.",
        Shown(default=f"{SELECTED_FROM} times top_k"),
        ge=1,
    )
    typo_tolerance: bool = setting(
        True,
        "Take a word that no passage has, and that is no English word, for a typing error, if a word of the passages "
        "is one letter or one exchange away; each ranking names what it corrected.",
    )
    sort: str | None = setting(
        None,
        "Show the results in the order of a metadata field, as in year or year:desc, those without a value last; which "
        "passages are results, and their ranks, is still up to the score.",
        Shown(metavar="FIELD[:desc]", default="by score"),
        pattern=r"^[^:]+(:asc|:desc)?$",
    )
    facets: tuple[str, ...] | None = setting(
        None,
        "Also count how often each value of these metadata fields occurs, in all passages that the filter allows and "
        "in the candidates of the query.",
        Shown(option="facet", metavar="FIELD"),
        strict=False,
        min_length=1,
        max_length=10,
        fail_fast=True,
    )
    instruction: str | None = setting(
        None,
        "Put before each query where its vector is made, for models trained with instructions; words, teacher and "
        "writer see the plain query.",
        Shown(default="the student's query prefix"),
        examples=["Instruct: Given a question, retrieve passages that answer it\nQuery: "],
    )

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

    def corrects_words(self, *, counts_words: bool) -> bool:
        """Whether typing errors are corrected: only where words count; ``counts_words`` as for ``proposers``."""
        return self.typo_tolerance and (counts_words or "bm25" in self.proposers(counts_words=False))

    def check(self) -> None:
        """Check the combination of the settings.

        Raises:
            InputError: settings contradict each other.
        """
        terms = getattr(self.score_features, "terms", self.score_features or {})
        if not isinstance(terms, Mapping):
            raise InputError(f"score_features is {shown(terms)}, but must be a dictionary of weights")
        for term, weight in cast("Mapping[str, float]", terms).items():
            if term not in get_args(ScoreFeature) or not 0 <= weight < math.inf:
                raise InputError(
                    f"score_features gives {term!r} the weight {weight}; weights must be at least 0, of: "
                    f"{', '.join(get_args(ScoreFeature))}"
                )
        if self.exact and (self.hybrid is not None or self.sources not in (None, ("vectors",))):
            raise InputError("an exact search ranks all passages by the student's score: leave out hybrid and sources")
        if self.budget_ms is not None and not self.exact:
            raise InputError("budget_ms is for an exact search; set exact as well, or leave it out")
        if self.exact and self.group != "passage":
            raise InputError("an exact search proves a ranking of passages: leave out either group or exact")
        if self.hybrid is not None and self.group == "sum":
            raise InputError("fused scores are sums of ranks and cannot be summed as odds: set group to 'best'")
        if self.select_from is not None and not self.selects:
            raise InputError("select_from is for mmr and near_duplicates; set one of them as well, or leave it out")
        if self.select_from is not None and self.select_from < self.top_k:
            raise InputError(
                f"select_from is {self.select_from}, but top_k is {self.top_k}: results cannot be selected from fewer "
                "places than there are results"
            )


EXPANSION_TEXTS: dict[ExpansionMethod, int] = {"multi": 3, "hyde": 1}
"""How many texts are written for a query, by default."""


class ExpansionSettings(Settings):
    """Whether a language model expands queries, and how."""

    noun: ClassVar[str] = "setting of an expansion"

    expand: ExpansionMethod | None = setting(
        None,
        "Also search for what a language model writes for the query: other queries with the same meaning (multi), or "
        "passages that would answer it (hyde).",
        Shown(default="only the query"),
    )
    expansions: int | None = setting(
        None,
        "With expand: how many queries or passages to write.",
        Shown(metavar="NUMBER", default="{multi} queries, {hyde} passage".format(**EXPANSION_TEXTS)),
        ge=1,
    )

    def check(self) -> None:
        """Check the combination of the settings.

        Raises:
            InputError: there is a number of texts, but no method.
        """
        if self.expand is None and self.expansions is not None:
            raise InputError("expansions is for expand 'multi' or 'hyde'; set expand as well, or leave expansions out")


MAX_TURNS, MAX_TURN_CHARS = 100, 100_000
"""Of a conversation."""


class Turn(Settings):
    """One turn of a conversation."""

    noun: ClassVar[str] = "field of a turn"

    role: Literal["user", "assistant"] = setting("user", "Who wrote it.")
    content: str = setting(..., "What was written.", min_length=1, max_length=MAX_TURN_CHARS)


def _turn(value: object) -> object:
    return {"content": value} if isinstance(value, str) else value


TurnLike = Annotated[Turn, BeforeValidator(_turn, json_schema_input_type=str | Turn)]
"""A text counts as the user's."""


class ConversationSettings(Settings):
    """The conversation that a query belongs to."""

    noun: ClassVar[str] = "setting of a conversation"

    history: tuple[TurnLike, ...] = setting(
        (),
        "Earlier turns of the conversation, the oldest first; a language model then rewrites the query so that it can "
        "be understood without them.",
        Shown(metavar="FILE"),
        strict=False,
        max_length=MAX_TURNS,
        fail_fast=True,
    )


class AnnSettings(Settings):
    """How much an approximate index is to find."""

    noun: ClassVar[str] = "setting of an approximate index"

    recall: float = setting(
        DEFAULT_ANN_RECALL,
        "Fraction of the exact candidates to find, with 95 % confidence; of the first ten, more are found.",
        gt=0,
        le=1,
    )
    depth: int = setting(DEFAULT_NUM_CANDIDATES, "Number of candidates of a search.", ge=1)


class SimilaritySettings(Settings):
    """Which passages of an index count as saying the same."""

    noun: ClassVar[str] = "setting of similar passages"

    threshold: float = setting(0.9, "Least probability that two passages mean the same.", ge=0, le=1)
    neighbours: int = setting(10, "Nearest passages by the vectors that each one is compared with.", ge=1, le=1000)


class ClassifySettings(Settings):
    """How texts are classified by the examples in an index."""

    noun: ClassVar[str] = "setting of a classifier"

    field: str = setting("label", "Metadata field of the passages that has their class.", Shown(metavar="NAME"))
    none_rate: float = setting(
        0.1, "Fraction of the texts that are expected to belong to no class: higher says so more often.", gt=0, lt=1
    )


class ExcerptSettings(Settings):
    """How results are shown beside their neighbours."""

    excerpts: bool = setting(
        False, "Merge results with their neighbours, as parts of their documents; neighbouring ones become one part."
    )


class ContextSettings(Settings):
    """The one text that results make for a language model."""

    noun: ClassVar[str] = "setting of a context"

    max_tokens: int = setting(
        DEFAULT_CONTEXT_TOKENS,
        "Maximum length, in tokens, of the results as one text with numbered sources, for a language model to answer "
        "from; near duplicates are left out.",
        Shown(option="context", metavar="TOKENS", default="no such text"),
        ge=1,
    )
    order: ContextOrder = setting(
        "rank",
        "Order of its sources. rank: the best first. document: those of a document together, in its order.",
        Shown(option="context_order", default="rank"),
    )
    answering: float | None = setting(
        None,
        "Keep only sentences that answer the query with at least this probability, such as .7; nothing if there are "
        "none.",
        Shown(metavar="P", default="whole passages"),
        ge=0,
        le=1,
    )


class ChunkingSettings(Settings):
    """How texts are split into passages, as far as it is not as in the index."""

    noun: ClassVar[str] = "setting of splitting"

    chunk_tokens: int | None = setting(
        None,
        "Maximum tokens of a passage, title included; by default those of the index, or 128 in a new one.",
        Shown(metavar="N"),
        ge=MIN_CHUNK_TOKENS,
    )
    chunk_overlap: int | None = setting(
        None,
        "Tokens that a passage repeats from the previous one; by default as in the index, or none in a new one.",
        Shown(metavar="N"),
        ge=0,
    )
    late: bool = setting(False, "Encode each text as a whole, then pool its passages (late chunking).")
    late_window: int | None = setting(
        None,
        "Tokens encoded at once with late chunking.",
        Shown(metavar="N", default="as many as the backbone can read"),
        ge=1,
    )
    whole: bool = setting(False, "Do not split texts: each is one passage, cut at the student's limit.")

    def check(self) -> None:
        """Check the combination of the settings.

        Raises:
            InputError: settings contradict each other.
        """
        numbers = (self.chunk_tokens, self.chunk_overlap, self.late_window)
        if self.whole and (self.late or any(value is not None for value in numbers)):
            raise InputError("whole splits nothing; leave out chunk_tokens, chunk_overlap, late and late_window")
        if self.late_window is not None and not self.late:
            raise InputError("late_window is for late; give both, or leave it out")
