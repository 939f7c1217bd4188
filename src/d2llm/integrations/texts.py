"""Shared code of the adapters: texts as d2llm reads them, their vectors, scores of pairs, and settings of a search."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_count, texts_of
from d2llm.core.names import did_you_mean
from d2llm.core.plain_values import plain_value
from d2llm.core.types import Passage, RankedPassage, Task
from d2llm.models.protocols import SearchStudent, task_for
from d2llm.retrieval.search import SearchSettings

if TYPE_CHECKING:
    from d2llm.models.student import Student
    from d2llm.models.tokens import EncodedTexts
    from d2llm.retrieval.index import Index

_log = logging.getLogger(__name__)


def passage_text(text: str, metadata: Mapping[str, Any]) -> str:
    """Title (the metadata's ``title``, if any) and text as one string, as an index reads a passage.

    Raises:
        InputError: the title is not a text.
    """
    return Passage("", text, title_of(metadata)).full_text


def title_of(fields: Mapping[str, Any]) -> str:
    """The ``title`` of some fields; empty if there is none, or if it is a missing value such as pandas' NaN.

    Raises:
        InputError: it is neither a text nor a number or date, which can be written as one.
    """
    title = plain_value(fields.get("title"))
    if title is None or isinstance(title, str):
        return title or ""
    if isinstance(title, bool) or not isinstance(title, int | float | date):
        raise InputError(f"a title must be a text, but {type(title).__name__} was given ({title!r:.60})")
    return str(title)


def passage_metadata(passage: Passage) -> dict[str, Any]:
    """A passage's metadata, together with its ``title``, ``document_id`` and ``position`` if it has them."""
    known: dict[str, Any] = {"title": passage.title} if passage.title else {}
    if passage.document_id:
        known |= {"document_id": passage.document_id, "position": passage.position}
    return {**passage.metadata, **known}


def embed_passages(student: SearchStudent, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors [n, dim] of passages; the number of truncated ones is logged.

    Raises:
        InputError: something is not a text.
    """
    require_texts(texts)
    return _read(student.encode_passages(texts), "passages")


def embed_queries(student: SearchStudent, texts: Sequence[str], task: Task) -> NDArray[np.float32]:
    """Vectors [n, dim] of queries, whose inner product with a passage's vector is that of the score.

    Raises:
        InputError: something is not a text, or the student's head has no inner product.
    """
    require_dot(student)
    require_texts(texts)
    return student.query_vectors(_read(student.encode_queries(texts), "queries"), task)


def search_settings(
    settings: SearchSettings | None, changes: Mapping[str, Any], names: Mapping[str, str]
) -> SearchSettings:
    """Settings (None: the defaults) with single fields changed; ``names`` are another library's names of fields.

    Raises:
        InputError: there is no such field, or it is given twice, under both names.
    """
    renamed: dict[str, Any] = {}
    for name, value in changes.items():
        field = names.get(name, name)
        if field in renamed:
            both = " and ".join(change for change in changes if names.get(change, change) == field)
            raise InputError(f"{both} are the same setting; give one of them")
        renamed[field] = value
    return SearchSettings.of(settings, **renamed)


def refuse_unknown(names: Iterable[str], known: Iterable[str], noun: str) -> None:
    """Make sure that all names are known options of what ``noun`` names.

    Raises:
        InputError: one is not.
    """
    options = list(known)
    for name in names:
        if name not in options:
            hint = did_you_mean(name, options) or f"; there are: {', '.join(options)}"
            raise InputError(f"{noun} has no option {name!r}{hint}")


def require_loaded(value: object, name: str, load: str) -> None:
    """Make sure that something is not only the path or name of what is needed; ``load`` says how to load it.

    Raises:
        InputError: it is.
    """
    if isinstance(value, str | Path):
        raise InputError(f"{name} is {str(value)!r:.60}, a path or name; give {load}({str(value)!r:.60})")


def search_one(index: Index, query: str, settings: SearchSettings) -> Sequence[RankedPassage]:
    """The best passages for one query.

    Raises:
        InputError: the query is not a text, such as the dictionary that a chain passes on.
    """
    require_texts([query])
    return index.search(query, settings).passages


def require_dot(student: SearchStudent) -> None:
    """Make sure that the student's vectors can be compared by inner product.

    Raises:
        InputError: the student's head has no inner-product part, or it is not loaded.
    """
    require_loaded(student, "student", "Student.load")
    if not student.has_dot:
        raise InputError(
            "this student has the head 'paper', which has no inner product of vectors; use it to rerank instead"
        )


def rank_texts(
    student: Student,
    query: str,
    texts: Sequence[str],
    task: Task | None = None,
    top_k: int | None = None,
    index: Index | None = None,
) -> list[tuple[int, float]]:
    """Position in ``texts`` and score (``Student.rank``) of the best ``top_k`` (None: all), best first.

    Ties are in input order. ``task`` is by default that of the ``index``, or what the student was trained for.

    Raises:
        InputError: something is not a text, or ``top_k`` is below 1.
        IndexMismatchError: another student made the index.
        ModelError: a score is not a number.
    """
    check_count(top_k, "top_k", optional=True)
    require_texts([query])
    require_texts(texts)
    scores = student.predict([(query, text) for text in texts], index=index, task=task_of(student, task, index))
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [(int(row), float(scores[row])) for row in order]


def task_of(student: Student, task: Task | None, index: Index | None) -> Task:
    """The task of a reranker: the given one, else that of its index, or what the student was trained for."""
    return index.view.task if task is None and index is not None else task_for(student, task)


def _read(encoded: EncodedTexts, noun: str) -> NDArray[np.float32]:
    if encoded.num_truncated:
        _log.warning(
            "%d of %d %s were too long and were read in part", encoded.num_truncated, len(encoded.vectors), noun
        )
    return encoded.vectors


def require_texts(texts: Sequence[str]) -> None:
    """Make sure that these are several texts.

    Raises:
        InputError: it is a single text, or something is not a text.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        texts_of(texts)
    for text in texts:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may pass anything
            raise InputError(f"a text is needed, but {type(text).__name__} was given ({text!r:.60})")
