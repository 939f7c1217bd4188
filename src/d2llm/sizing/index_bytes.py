"""Bytes of an index by part, on disk and in memory, from the code of its formats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from d2llm.core.types import PartKind
from d2llm.models.protocols import task_for
from d2llm.models.score_features import FeatureWeights
from d2llm.models.student import Student
from d2llm.retrieval.open_index import part_formats
from d2llm.sizing.plan import SizePlan
from d2llm.sizing.texts import TextFacts
from d2llm.store.ann import ann_bytes
from d2llm.store.part_vectors import EXTENT_BYTES
from d2llm.store.vector_formats import VectorFormat, make_format
from d2llm.store.word_files import SEGMENT_ROWS, segment_bytes

_NORM_BYTES = 2  # of a row in BM25
_POSTING_BYTES, _ADDED_TEXT_BYTES = 6, 9  # of a word that a passage lacks: row and count, and its text in the table


@dataclass(frozen=True, slots=True)
class StudentFacts:
    """What sizes and times need to know about a student.

    Attributes:
        name: as it was given.
        fingerprint: of configuration and weights.
        dim: width of a text's vector.
        token_dim: width of a token's vector, None if it has none.
        max_tokens: tokens of a passage that it reads; it cuts longer ones.
        max_query_tokens: tokens of a query that get a vector.
        has_dot: whether part of the score is an inner product; without one, a search scores every passage.
        counts_interaction: whether the interaction has a weight in the plan's task.
        formats: formats of the window vectors and token embeddings that the index stores.
        weights: the score features that its score counts in such an index.
        num_added_words: words that the index adds to a passage, at most.
    """

    name: str
    fingerprint: str
    dim: int
    token_dim: int | None
    max_tokens: int
    max_query_tokens: int
    has_dot: bool
    counts_interaction: bool
    formats: dict[PartKind, str]
    weights: FeatureWeights
    num_added_words: int = 0

    @classmethod
    def of_student(cls, student: Student, plan: SizePlan) -> StudentFacts:
        """The facts of a student for the plan's index and task.

        Raises:
            InputError: the plan stores token embeddings, which the student does not have.
        """
        task = task_for(student, plan.task)
        formats = part_formats(student, task, window_vectors=plan.window_vectors, token_vectors=plan.token_vectors)
        prepared = student.prepare(np.ones(student.vector_dim, np.float32), task)
        projection = student.token_projection
        return cls(
            name=plan.student,
            fingerprint=student.fingerprint,
            dim=student.vector_dim,
            token_dim=student.token_dim,
            max_tokens=student.config.backbone.max_passage_tokens,
            max_query_tokens=0 if projection is None else projection.max_query_tokens,
            has_dot=student.has_dot,
            counts_interaction=not student.has_dot or prepared.bound > 0,
            formats=formats,
            weights=student.feature_weights(task, stored=frozenset(formats)),
            num_added_words=0 if (expansion := student.document_expansion) is None else expansion.num_words,
        )

    def part_format(self, kind: PartKind) -> VectorFormat:
        """The format of the vectors of a kind of parts that the index stores."""
        return make_format(self.formats[kind], self.dim if kind == "window" else self.token_dim or 0)


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Bytes of a part of an index.

    ``memory`` is what searches read again and again: the times hold if it stays in memory. ``basis`` says what both
    were computed from.
    """

    part: str
    disk: int
    memory: int
    basis: str


def index_parts(
    plan: SizePlan, student: StudentFacts, texts: TextFacts, num_passages: int, *, approximate: bool
) -> list[PartBytes]:
    """The parts of a compacted index of ``num_passages`` such passages; ``texts`` are as long as the plan's."""
    return list(_part_bytes(plan, student, texts, num_passages, approximate=approximate))


def _part_bytes(
    plan: SizePlan, student: StudentFacts, texts: TextFacts, num_passages: int, *, approximate: bool
) -> Iterator[PartBytes]:
    row = texts.row_bytes + texts.stored_text * texts.text_bytes
    yield PartBytes(
        "texts and ids",
        round(num_passages * row),
        0,
        f"{texts.text_bytes:.0f} bytes of text stored as {texts.stored_text:.2f} times as many, {texts.row_bytes:.0f} "
        f"for the rest ({texts.source}); without metadata",
    )
    code_size = make_format(plan.vector_format, student.dim).code_size
    yield PartBytes(
        f"vectors, {plan.vector_format}",
        num_passages * code_size * plan.vector_copies,
        num_passages * code_size,
        f"{code_size:,} bytes for {student.dim} dimensions, on disk {'once' if plan.vector_copies == 1 else 'twice'}",
    )
    words = word_bytes(texts, num_passages)
    yield PartBytes(
        "words",
        words,
        words + num_passages * _NORM_BYTES,
        f"{texts.words:.0f} words, {texts.distinct_words:.0f} of them different, {texts.sentences:.1f} sentences "
        f"({texts.source})",
    )
    if per_passage := student.num_added_words:
        yield PartBytes(
            "words that passages lack",
            num_passages * per_passage * (_POSTING_BYTES + _ADDED_TEXT_BYTES),
            num_passages * per_passage * _POSTING_BYTES,
            f"at most {per_passage} words a passage, {_POSTING_BYTES} bytes each in the words and {_ADDED_TEXT_BYTES} "
            "in the table",
        )
    for kind in student.formats:
        per_passage = parts_of_passage(kind, student, texts)
        part_size = student.part_format(kind).code_size
        extent_bytes = num_passages * EXTENT_BYTES
        codes = round(num_passages * per_passage * part_size)
        yield PartBytes(
            f"vectors of {kind}s, {student.formats[kind]}",
            codes + extent_bytes,
            codes + 2 * extent_bytes,
            f"{per_passage:.1f} {kind}s a passage, {part_size} bytes each, and {EXTENT_BYTES} for their place, which "
            f"memory holds twice ({texts.source})",
        )
    if approximate:
        size = ann_bytes(num_passages)
        yield PartBytes("approximate index", size, size, "the neighbours of each row in a graph")


def word_bytes(texts: TextFacts, num_passages: int) -> int:
    """Bytes of the words of so many passages, in segments as large as an index joins them to."""
    num_segments = math.ceil(num_passages / SEGMENT_ROWS)
    rows = num_passages / num_segments
    tokens = rows * (texts.words + texts.sentences)
    size = segment_bytes(rows, texts.terms(rows * texts.words), rows * texts.distinct_words, tokens)
    return round(num_segments * size)


def parts_of_passage(kind: PartKind, student: StudentFacts, texts: TextFacts) -> float:
    """How many windows, or tokens with a vector, a passage has."""
    return texts.windows if kind == "window" else texts.read_tokens(student.max_tokens) * texts.token_vectors
