"""The words of the field as plain frozen types."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Literal

Task = Literal["symmetric", "asymmetric"]
"""``symmetric``: do two texts say the same. ``asymmetric``: does the passage answer the query."""
TASKS: tuple[Task, Task] = ("symmetric", "asymmetric")
"""The order in which a head's weights are kept."""

DEFAULT_TOP_K = 10
"""Length of a ranking."""
DEFAULT_NUM_CANDIDATES = 1_000
"""Passages of a search that get the full score."""
DEFAULT_TEACHER_PASSAGES = 20
"""Passages of a search that a teacher reads again at most."""

SystemKind = Literal[
    "bm25",
    "hybrid",
    "fitted_sum",
    "cosine_untuned",
    "cosine_tuned",
    "paper_head",
    "anchor",
    "d2llm",
    "shortcut",
    "teacher",
    "external",
]
"""What an evaluation measures: a ``hybrid`` fuses two rankings by rank, a ``fitted_sum`` adds the scores of BM25 and a
cosine with weights of dev queries, ``anchor`` is the inner-product part of a D2LLM student alone, a ``shortcut`` the
same student where something makes its search cheaper."""

EngineName = Literal["auto", "torch", "onnx", "onnx-int8", "openvino", "openvino-int8"]
"""What encodes texts (``models.engines.engines``); ``auto``: the fastest here that gives the same vectors."""

NumberFormat = Literal["float32", "bfloat16", "float16"]
"""In which models compute."""

SourceName = Literal["vectors", "ann", "bm25"]
"""Who proposes candidates: the highest inner products, about those (``store.ann``), or BM25."""

Ties = Literal["ids", "rows"]
"""What orders passages of equal scores: their ids, or their rows where any order will do and ids take time."""

RunStep = Literal["mine", "tune-teacher", "stack", "gate", "filter", "distill"]
"""The steps of a run that can be taken anew, in order; labels are kept by teacher and pair, and never made again."""

EvidenceTerm = Literal["words", "words_share", "window_words", "window_words_share", "window_vectors"]
"""A part of a student's score beside the vector of the passage: BM25 of the passage and of its best window, both also
divided by the query's limit, and the highest inner product with the vector of a window."""

Grouping = Literal["passage", "best", "sum"]
"""What a ranking is of: passages, or documents by their best passage or by the summed odds of their best passages."""

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
    """A text that asks."""

    id: str
    text: str


MetadataValue = str | int | float | bool | datetime | None
"""What a metadata field of a passage may hold."""

_NO_METADATA: Mapping[str, MetadataValue] = {}


@dataclass(frozen=True, slots=True)
class Passage:
    """A text that may answer.

    ``document_id`` and ``position`` say of which document it is a part, and the how-manieth; ``metadata`` holds what
    filters ask about.
    """

    id: str
    text: str
    title: str = ""
    document_id: str = ""
    position: int = 0
    metadata: Mapping[str, MetadataValue] = field(default_factory=lambda: _NO_METADATA, hash=False)

    @property
    def full_text(self) -> str:
        """Title and text as one string, as the encoders and BM25 read it."""
        return f"{self.title}\n{self.text}" if self.title else self.text

    @property
    def context(self) -> str:
        """What its vector depends on besides title and text; empty where it is read alone."""
        return ""


Span = tuple[int, int]
"""Where a part of a text begins and ends, in characters."""


@dataclass(frozen=True)
class WholeText:
    """A document's text with its title; at most ``window`` tokens are read at once (None: as many as can be)."""

    text: str
    title: str = ""
    window: int | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of all of it, 128 bits."""
        digest = hashlib.blake2b(f"{self.window}".encode(), digest_size=16)
        for part in (self.title, self.text):
            content = part.encode(errors="surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class LateChunk(Passage):
    """A passage that is read with the whole of its document around it: characters ``start`` to ``end`` of its text."""

    whole: WholeText = field(default=WholeText(""), repr=False)
    start: int = 0
    end: int = 0

    @property
    def context(self) -> str:
        """The document, by its hash, and the place in it."""
        return f"{self.whole.digest}:{self.start}:{self.end}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A passage proposed for a query, with the score that proposed it."""

    passage_id: str
    score: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a passage stands where it does.

    ``anchor`` is the inner product, ``interaction`` what the IEM added to it (None where the head has no anchor),
    ``lexical`` what BM25 added and ``windows`` what the best window's vector did (None where they do not count).
    ``source_ranks`` and ``source_scores`` are those of the sources that proposed it; ``terms`` counts the query's terms
    (stems, as BM25 sees them) in the passage.
    """

    anchor: float | None
    interaction: float | None
    lexical: float | None
    windows: float | None
    source_ranks: Mapping[str, int]
    source_scores: Mapping[str, float]
    terms: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """The document that a place stands for, in a ranking of documents.

    ``passage_score`` is its best passage's own score; ``others`` are its next best with theirs. ``num_scored`` of its
    passages were among the candidates.
    """

    id: str
    passage_score: float
    num_scored: int
    others: tuple[tuple[Passage, float], ...]


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """One place of a ranking.

    Attributes:
        rank: from 1.
        passage: in a ranking of documents, the document's best.
        score: what the list is sorted by. After a cascade it is log-odds: the teacher's or, where it did not read,
            those to be expected from the student's score.
        anchor_score: inner-product part of the student's score, where the head has one.
        explanation: why it stands here, if asked for.
        document: in a ranking of documents.
        before: passages before it in its document, in order, if asked for.
        after: passages after it.
        log_odds: of the teacher, if a cascade made it read this passage.
        student_rank: among the student's candidates, in a cascade.
    """

    rank: int
    passage: Passage
    score: float
    anchor_score: float | None = None
    explanation: Explanation | None = None
    document: RankedDocument | None = None
    before: tuple[Passage, ...] = ()
    after: tuple[Passage, ...] = ()
    log_odds: float | None = None
    student_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is proved of a ranking.

    Attributes:
        num_scored: passages that got the full score.
        num_left: passages that did not (of those that the search may return).
        highest_bound_left: no passage left has a higher score; -inf when none is left.
        kth_score: of the last place of the ranking; -inf when the ranking is empty.
        proved: how many of the first places are the exact ranking's, for certain. All of them without a budget.
    """

    num_scored: int
    num_left: int
    highest_bound_left: float
    kth_score: float
    proved: int


@dataclass(frozen=True, slots=True)
class CascadeReport:
    """What a teacher changed in a student's ranking.

    Attributes:
        read: the student's ranks that the teacher read, in the order of reading.
        unsure: the student's ranks whose order the student was unsure of, before anything was read.
        moved: (student's rank, rank now) of the first passages that changed place.
        num_truncated: passages that the teacher read in part.
        seconds: what choosing and reading took.
        out_of_time: the teacher would have read more, had its budget of time not ended.
    """

    read: tuple[int, ...]
    unsure: tuple[int, ...]
    moved: tuple[tuple[int, int], ...]
    num_truncated: int
    seconds: float
    out_of_time: bool


@dataclass(frozen=True, slots=True)
class Ranking:
    """The answer to one query, best first; ties are broken by passage id.

    ``num_candidates`` passages got the full score. ``certificate`` comes with an exact search, ``index_version`` with
    an index that has versions, ``cascade`` with a teacher that read again. ``truncated``: the query is longer than the
    student reads, so its end had no part in the student's scores.
    """

    query: Query
    passages: tuple[RankedPassage, ...]
    num_candidates: int
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    certificate: Certificate | None = None
    index_version: int | None = None
    cascade: CascadeReport | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class TeacherLabel:
    """One teacher's judgement of one pair with one prompt. ``log_odds`` = logit(yes) - logit(no)."""

    teacher: str
    prompt: str
    query_id: str
    passage_id: str
    log_odds: float
