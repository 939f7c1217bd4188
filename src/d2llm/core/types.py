"""The basic types of semantic search, as plain frozen values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Literal, SupportsIndex, get_args, overload

from d2llm.core.names import counted
from d2llm.core.short_repr import short, short_repr

Task = Literal["symmetric", "asymmetric"]
"""``symmetric``: whether two texts mean the same. ``asymmetric``: whether the passage answers the query."""
TASKS: tuple[Task, Task] = ("symmetric", "asymmetric")
"""All tasks, in the order in which a head stores their weights."""


def default_task(trained: Sequence[Task]) -> Task:
    """The task to use a student for that was trained for these: the only one, or else asymmetric."""
    return trained[0] if len(trained) == 1 else "asymmetric"


DEFAULT_TOP_K = 10
"""Length of a ranking."""
MAX_ID_CHARS = 4_096
"""Longest id of a passage or a document: as long as a path may be. An id is in every search result."""
DEFAULT_NUM_CANDIDATES = 200
"""Number of passages that get the full score in a search."""
DEFAULT_ANN_RECALL = 0.98
"""Of the exact candidates, in an approximate index; more of the first ten are found."""
DEFAULT_RERANKED_PASSAGES = 20
"""Maximum number of passages that a reranker reads in a search."""
DEFAULT_CONTEXT_TOKENS = 2_000
"""Maximum number of tokens of a context for an answer."""

SystemKind = Literal[
    "bm25",
    "hybrid",
    "fitted_sum",
    "cosine_untuned",
    "cosine_tuned",
    "paper_head",
    "dot",
    "d2llm",
    "fitted_student",
    "shortcut",
    "teacher",
    "external",
]
"""Systems that an evaluation measures: ``hybrid`` fuses two rankings by rank, ``fitted_sum`` adds the scores of BM25
and a cosine with weights fitted on dev queries, ``dot`` is the inner-product part of a D2LLM student alone,
``fitted_student`` is the student with weights of its score features fitted on the same queries as those of the fitted
sum, and ``shortcut`` is the same student with a cheaper search."""

EngineName = Literal["auto", "torch", "onnx", "onnx-int8", "openvino", "openvino-int8"]
"""Engines that encode texts (``models.engines.engines``); ``auto``: the fastest one on this machine that gives the same
vectors."""

NumberFormat = Literal["float32", "bfloat16", "float16"]
"""Number formats in which models compute."""

SourceName = Literal["vectors", "ann", "bm25"]
"""Sources of candidates: the highest inner products, an approximation of them (``store.ann``), or BM25."""

Ties = Literal["ids", "rows"]
"""What orders passages with equal scores: their ids, or their rows if any order will do and looking up ids is slow."""

RunStep = Literal["mine", "tune-teacher", "ensemble", "gate", "filter", "distill"]
"""The steps of a run that can be repeated, in order. Labels are stored by teacher and pair and never computed again."""

ScoreFeature = Literal["bm25", "bm25_fraction", "window_bm25", "window_bm25_fraction", "window_vectors", "maxsim"]
"""A term of a student's score besides the passage's vector: BM25 of the passage and of its best window, both also
divided by the query's upper limit, the highest inner product with the vector of a window, and the mean, over the tokens
of the query that count, of the highest cosine with a token of the passage."""

PartKind = Literal["window", "token"]
"""Parts of passages whose vectors an index can store: windows of two sentences, or tokens."""
PART_KINDS: tuple[PartKind, ...] = get_args(PartKind)
PART_NAMES: dict[PartKind, str] = {"window": "window vectors", "token": "token embeddings"}

Grouping = Literal["passage", "best", "sum"]
"""What is ranked: passages, or documents by their best passage or by the summed odds of their best passages."""

ExpansionMethod = Literal["multi", "hyde"]
"""What a language model adds to a query: other queries with its meaning, or passages that would answer it."""

ContextOrder = Literal["rank", "document"]
"""The order of a context's sources: the best one first, or all of a document together, in its order."""

Qrels = Mapping[str, Mapping[str, int]]
"""query_id -> passage_id -> relevance grade (above 0 is relevant)."""


def is_text(value: object) -> bool:
    """Whether a value is a string that can be written as UTF-8 (a lone surrogate cannot)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Query:
    """A text to search with; its id is unique in a data set.

    Example:
        >>> from d2llm import Query
        >>> Query("q1", "how hot should the water be?")
        Query(id='q1', text='how hot should the water be?')
    """

    id: str
    text: str
    instruction: str | None = None
    """What a student reads before it in training and on dev; by default that of its data set."""

    __repr__ = short_repr


MetadataValue = str | int | float | bool | datetime | None
"""Values of a passage's metadata fields."""

_NO_METADATA: Mapping[str, MetadataValue] = {}


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage of a corpus.

    ``document_id`` is the document that it belongs to, and ``position`` its position there; ``metadata`` holds the
    fields that filters use.

    Example:
        >>> from d2llm import Passage
        >>> Passage("tea", "Green tea needs water of 80 °C.", title="Tea", metadata={"year": 2021})
        Passage(id='tea', text='Green tea needs water of 80 °C.', title='Tea', metadata={'year': 2021})
    """

    id: str
    text: str
    title: str = ""
    document_id: str = ""
    position: int = 0
    metadata: Mapping[str, MetadataValue] = field(default_factory=lambda: _NO_METADATA, hash=False)

    __repr__ = short_repr

    @property
    def full_text(self) -> str:
        """Title and text as one string, as the encoders and BM25 read it."""
        return f"{self.title}\n{self.text}" if self.title else self.text

    @property
    def context(self) -> str:
        """What its vector depends on besides title and text; empty if it is encoded on its own."""
        return ""


def piece_id(document_id: str, piece_number: int) -> str:
    """The id of a document's piece; pieces are numbered from 1."""
    return f"{document_id}#{piece_number}"


Span = tuple[int, int]
"""Start and end of a part of a text, in characters."""


@dataclass(frozen=True)
class WholeText:
    """A document's text with its title; at most ``window`` tokens are encoded at once (None: as many as possible)."""

    text: str
    title: str = ""
    window: int | None = None

    __repr__ = short_repr

    @cached_property
    def digest(self) -> str:
        """128-bit hash of window, title and text."""
        digest = hashlib.blake2b(f"{self.window}".encode(), digest_size=16)
        for part in (self.title, self.text):
            content = part.encode(errors="surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class LateChunk(Passage):
    """A passage that is encoded within its whole document: characters ``start`` to ``end`` of the document's text."""

    whole: WholeText = field(default=WholeText(""), repr=False)
    start: int = 0
    end: int = 0

    __repr__ = short_repr

    @property
    def context(self) -> str:
        """The document's hash and the passage's position in it."""
        return f"{self.whole.digest}:{self.start}:{self.end}"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a document: its text, the headings that it is under, outermost first, and its page, from 1."""

    text: str
    headings: tuple[str, ...] = ()
    page: int | None = None

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class SectionedPassage(Passage):
    """A document that was read from a file; no piece of it reaches over the end of a section."""

    sections: tuple[Section, ...] = field(default=(), repr=False)

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class Candidate:
    """A passage proposed for a query, with the score that proposed it."""

    passage_id: str
    score: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a passage has its rank.

    ``dot`` is the inner product, ``interaction`` what the IEM added to it (None if the head has no inner product),
    ``lexical`` what BM25 added, ``windows`` what the best window's vector added, and ``tokens`` what the token
    embeddings added (None if the score does not use them). ``source_ranks`` and ``source_scores`` come from the sources
    that proposed the passage; ``terms`` counts the query's terms (stems, as BM25 uses them) in it, and ``term_spans``
    says where they are in its full text (title, line break, text), in characters.
    """

    dot: float | None
    interaction: float | None
    lexical: float | None
    windows: float | None
    tokens: float | None
    source_ranks: Mapping[str, int]
    source_scores: Mapping[str, float]
    terms: Mapping[str, int]
    term_spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict[str, tuple[Span, ...]])

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """The document of an entry in a ranking of documents.

    ``passage_score`` is the score of its best passage; ``others`` are its next best passages with their scores.
    ``num_scored`` of its passages were among the candidates.
    """

    id: str
    passage_score: float
    num_scored: int
    others: tuple[tuple[Passage, float], ...]

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """One entry of a ranking.

    Attributes:
        rank: from 1.
        passage: the passage; in a ranking of documents, the document's best one.
        score: what the ranking is sorted by: the student's score, or the reranker's.
        dot_score: inner-product part of the student's score, if the head has one.
        explanation: why it has this rank, if requested.
        document: the document, in a ranking of documents.
        before: passages before it in its document, in order, if requested.
        after: passages after it in its document, in order, if requested.
        log_odds: the teacher's, if one read this passage in a reranking.
        student_rank: rank among the student's candidates, in a reranking.
    """

    rank: int
    passage: Passage
    score: float
    dot_score: float | None = None
    explanation: Explanation | None = None
    document: RankedDocument | None = None
    before: tuple[Passage, ...] = ()
    after: tuple[Passage, ...] = ()
    log_odds: float | None = None
    student_rank: int | None = None

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class Certificate:
    """What an exact search has proved about a ranking.

    Attributes:
        num_scored: passages that got the full score.
        num_left: passages that did not (of those that the search may return).
        highest_bound_left: upper bound of the scores of the latter; -inf if there are none.
        kth_score: score of the last entry of the ranking; -inf if the ranking is empty.
        proved: how many of the first entries are proved to be those of the exact ranking. All of them without a budget.
    """

    num_scored: int
    num_left: int
    highest_bound_left: float
    kth_score: float
    proved: int


@dataclass(frozen=True, slots=True)
class RerankReport:
    """What a reranker changed in a student's ranking.

    Attributes:
        kind: the kind of reranker.
        read: student ranks of the passages that it read, in reading order.
        unsure: student ranks whose order the student was unsure of, before anything was read.
        moved: (student rank, new rank) of the first passages whose rank changed.
        num_truncated: passages that were read only in part.
        seconds: time to choose and read the passages.
        out_of_time: whether the time budget ended before everything was read that would have been.
    """

    kind: str
    read: tuple[int, ...]
    unsure: tuple[int, ...]
    moved: tuple[tuple[int, int], ...]
    num_truncated: int
    seconds: float
    out_of_time: bool


@dataclass(frozen=True, slots=True)
class QueryExpansion:
    """What a language model added to the search of a query.

    Attributes:
        method: how the texts were used (``retrieval.expansion``).
        texts: other queries, or hypothetical passages; empty if the plain query was searched.
        seconds: time to write them; for queries expanded together, the mean.
        num_dropped: parts of the model's answers that were of no use.
        truncated: whether the query was longer than the model may read, so that its end had no effect on the texts.
        num_truncated: number of texts that the student read only in part.
        problem: why there is no text; None if there is one.
    """

    method: ExpansionMethod
    texts: tuple[str, ...]
    seconds: float
    num_dropped: int = 0
    truncated: bool = False
    num_truncated: int = 0
    problem: str | None = None

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class QueryRewriting:
    """How the last question of a conversation became a query that can be understood alone.

    Attributes:
        asked: the question as it was given.
        text: the query that was searched; ``asked`` if a language model wrote nothing of use.
        seconds: time to write it; 0 if it was already known.
        num_dropped: parts of the model's answer that were of no use.
        num_turns_left_out: the earliest turns, which the model did not read.
        truncated: whether the model did not read the end of a turn, or of the question.
        problem: why ``asked`` was searched; None if the model wrote a query.
    """

    asked: str
    text: str
    seconds: float
    num_dropped: int = 0
    num_turns_left_out: int = 0
    truncated: bool = False
    problem: str | None = None

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class Selection:
    """How the results were selected from a longer ranking (``mmr``, ``near_duplicates``); its order need not be kept.

    Attributes:
        selected_from: length of that ranking.
        num_near_duplicates: how many of its entries were left out because they are near duplicates of better ones.
        ranks: the rank in it of each result.
        near_duplicates: for the id of each passage that was left out, that of the better one that says the same.
    """

    selected_from: int
    num_near_duplicates: int
    ranks: tuple[int, ...]
    near_duplicates: Mapping[str, str] = field(default_factory=dict[str, str])

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A part of a document around one or more results: consecutive passages.

    Attributes:
        results: the results in it, best first.
        passages: all of its passages, in the order of the document.
        text: their texts in that order, each part once. Where the title changes, the new one stands before the text.
    """

    results: tuple[RankedPassage, ...]
    passages: tuple[Passage, ...]
    text: str

    __repr__ = short_repr

    @property
    def document_id(self) -> str:
        """The id of the document."""
        return self.passages[0].document_id

    @property
    def passage_ids(self) -> list[str]:
        """The ids of its passages."""
        return [passage.id for passage in self.passages]

    @property
    def ranks(self) -> list[int]:
        """The ranks of the results in it."""
        return [result.rank for result in self.results]


@dataclass(frozen=True, slots=True)
class MissingShard:
    """A shard that gave no answer to a search: its number, its folder or URL, and why."""

    number: int
    address: str
    problem: str


@dataclass(frozen=True, slots=True)
class FacetValue:
    """A value of a field, and how many of all passages that the filter allows, and of the candidates, have it."""

    value: MetadataValue
    num_passages: int
    num_candidates: int


@dataclass(frozen=True, slots=True)
class Facet:
    """How often the values of a metadata field occur, the most frequent first.

    ``num_values`` counts all values, of which at most 100 are listed; ``num_without`` passages have none.
    """

    values: tuple[FacetValue, ...]
    num_values: int
    num_without: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """The result of one query, best first; ties are broken by passage id. It is a sequence of its passages.

    ``num_candidates`` passages got the full score. ``certificate`` is set by an exact search, ``index_version`` by an
    index with versions, ``reranking`` by a search with a reranker. ``truncated``: the query is longer than the
    student reads, so its end did not affect the student's scores. ``selection``: the entries were selected from a
    longer ranking; a certificate then proves that ranking, not the order of the selection. ``expansion``: what a
    language model added to the query. ``missing_shards``: shards of a sharded index that gave no answer; their passages
    are not in the ranking, and its certificate says nothing about them. ``num_shards``: of how many; None if the index
    is not sharded. ``sources``: the sources of the candidates; none in an exact search, which considers every passage.
    ``facets``: by field, how often its values occur, if the search asked. With ``sort``, the passages are in the order
    of a field, and their ``rank`` is that by score. ``corrections``: words of the query that were taken for typing
    errors, each with the word that was searched instead. ``rewriting``: how the query was made of a conversation's last
    question; ``query`` is then what was made.

    Example:
        >>> from d2llm import Ranking, Student
        >>> ranking = Student.load("d2llm-minilm").rank("what do bees make?", ["Tea is hot.", "Bees make honey."])
        >>> isinstance(ranking, Ranking)
        True
        >>> for result in ranking:
        ...     print(result.rank, result.passage.text)
        1 Bees make honey.
        2 Tea is hot.
        >>> ranking.query.text, len(ranking)
        ('what do bees make?', 2)
    """

    query: Query
    passages: tuple[RankedPassage, ...]
    num_candidates: int
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    certificate: Certificate | None = None
    index_version: int | None = None
    reranking: RerankReport | None = None
    truncated: bool = False
    selection: Selection | None = None
    expansion: QueryExpansion | None = None
    missing_shards: tuple[MissingShard, ...] = ()
    num_shards: int | None = None
    sources: tuple[str, ...] = ()
    facets: Mapping[str, Facet] = field(default_factory=dict[str, Facet])
    corrections: Mapping[str, str] = field(default_factory=dict[str, str])
    rewriting: QueryRewriting | None = None

    def __repr__(self) -> str:
        first = ", ".join(f"{short(result.passage.id)} {result.score:.2f}" for result in self.passages[:3])
        more = ", ..." if len(self) > 3 else ""
        count = counted(len(self), "passage")
        return f"Ranking({short(self.query.text)}, {count}{': ' if first else ''}{first}{more})"

    def __len__(self) -> int:
        return len(self.passages)

    def __iter__(self) -> Iterator[RankedPassage]:
        return iter(self.passages)

    @overload
    def __getitem__(self, index: SupportsIndex) -> RankedPassage: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RankedPassage, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> RankedPassage | tuple[RankedPassage, ...]:
        return self.passages[index]


@dataclass(frozen=True, slots=True)
class IdRanking:
    """The result of one query as (passage id, score), best first; ``truncated`` as in ``Ranking``."""

    query: Query
    passages: tuple[tuple[str, float], ...]
    truncated: bool
