"""d2llm in Haystack: embedders, a ranker and a retriever over an index, as components of a pipeline.

Components are serialised with the names and folders of their models. ``Pipeline.loads`` reads them back if d2llm's
modules are allowed: ``Pipeline.loads(text, allowed_modules=["d2llm.*"])``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.inputs import check_count, objects_of
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.types import DEFAULT_TOP_K, RankedPassage, Task
from d2llm.integrations.filters import all_of, haystack_condition
from d2llm.integrations.texts import (
    embed_passages,
    embed_queries,
    passage_metadata,
    passage_text,
    rank_texts,
    search_one,
    search_settings,
)
from d2llm.models.protocols import task_for
from d2llm.models.student import Student
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import SearchSettings

require("haystack", extra="haystack", purpose="d2llm in Haystack")

from haystack import Document, component, default_from_dict, default_to_dict  # noqa: E402

# Components that name the same student share it, as long as one of them holds it.
_loaded: WeakValueDictionary[tuple[str, str | None, str | None], Student] = WeakValueDictionary()


class _Component:
    """Base class of all components, each of which keeps its arguments as attributes."""

    def to_dict(self) -> dict[str, Any]:
        """The component as plain values."""
        arguments = list(signature(type(self).__init__).parameters)[1:]
        return default_to_dict(self, **{name: getattr(self, name) for name in arguments})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """The component that ``to_dict`` serialised."""
        return default_from_dict(cls, data)


class _StudentComponent(_Component):
    """A component that needs only a student, which it loads when it is first used."""

    student: str
    device: str | None
    dtype: str | None
    _model: Student | None = None

    def warm_up(self) -> None:
        """Load the student."""
        self._ready()

    def _ready(self) -> Student:
        self._model = self._model or _load(self.student, self.device, self.dtype)
        return self._model


@component
class D2LLMTextEmbedder(_StudentComponent):
    """The vector of a query, whose inner product with a passage's vector is that of the score.

    Args:
        student: a student's folder, or the name of a shipped one.
        task: the branch of the head; None: that of what the student was trained for.
        device: where it computes; None: chosen automatically.
        dtype: its number format; None: chosen automatically.
    """

    def __init__(
        self,
        student: str = DEFAULT_STUDENT,
        *,
        task: Task | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.student = str(student)
        self.task: Task | None = task
        self.device = device
        self.dtype = dtype

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """Embed a query.

        Raises:
            InputError: the query is not a text, or the student's head has no inner product.
        """
        student = self._ready()
        return {"embedding": embed_queries(student, [text], task_for(student, self.task))[0].tolist()}


@component
class D2LLMDocumentEmbedder(_StudentComponent):
    """The vectors of documents, encoded from the ``title`` in their meta, if they have one, and their content.

    Args:
        student: a student's folder, or the name of a shipped one.
        device: where it computes; None: chosen automatically.
        dtype: its number format; None: chosen automatically.
    """

    def __init__(self, student: str = DEFAULT_STUDENT, *, device: str | None = None, dtype: str | None = None) -> None:
        self.student = str(student)
        self.device = device
        self.dtype = dtype

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents; returns copies of them with embeddings.

        Raises:
            InputError: a document has no text.
        """
        documents = objects_of(documents, "documents", Document)
        vectors = embed_passages(self._ready(), [_text(document) for document in documents])
        both = zip(documents, vectors, strict=True)
        return {"documents": [replace(document, embedding=vector.tolist()) for document, vector in both]}


@component
class D2LLMRanker(_StudentComponent):
    """Orders documents by the student's full score (``Student.rank``).

    Args:
        student: a student's folder, or the name of a shipped one.
        top_k: how many documents to keep; None means all.
        index: the folder of an index that the student made, which knows how rare words are; None: tables that ship do.
        task: the branch of the IEM; None: that of the index, or of what the student was trained for.
        device: where it computes; None: chosen automatically.
        dtype: its number format; None: chosen automatically.

    Raises:
        InputError: ``top_k`` is below 1.
    """

    def __init__(
        self,
        student: str = DEFAULT_STUDENT,
        *,
        top_k: int | None = DEFAULT_TOP_K,
        index: str | None = None,
        task: Task | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        check_count(top_k, "top_k", optional=True)
        self.student = str(student)
        self.index = None if index is None else str(index)
        self._opened: Index | None = None
        self.top_k = top_k
        self.task: Task | None = task
        self.device = device
        self.dtype = dtype

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, Any]:
        """The best documents, best first, as copies with their scores; ``top_k`` None: the component's setting.

        Of documents with the same id, which two retrievers may have found, one remains, as with Haystack's own rankers.

        Raises:
            InputError: a document has no text, or ``top_k`` is below 1.
        """
        documents = _without_repetitions(objects_of(documents, "documents", Document))
        texts = [_text(document) for document in documents]
        student, kept = self._ready(), self.top_k if top_k is None else top_k
        if self.index is not None and self._opened is None:
            self._opened = Index.open(Path(self.index), student)
        ranked = rank_texts(student, query, texts, self.task, kept, self._opened)
        return {"documents": [replace(documents[index], score=score) for index, score in ranked]}


@component
class D2LLMRetriever(_Component):
    """Searches an index: candidates, then the student's full score, as ``Index.search`` does.

    Args:
        index: the index's folder.
        top_k: how many documents.
        filters: in Haystack's language, on metadata fields (``meta.year``), ``id`` and ``meta.title``.
        settings: other fields of ``SearchSettings``, such as ``{"exact": True}``; a ``filter`` there, in d2llm's own
            language, applies in addition to ``filters``.
        student: the student that made the index, if it has moved since.
        device: where it computes; None: chosen automatically.
        dtype: its number format; None: chosen automatically.

    Raises:
        InputError: the settings contradict each other.
        FilterError: ``filters`` cannot be parsed.
    """

    def __init__(
        self,
        index: str,
        *,
        top_k: int = DEFAULT_TOP_K,
        filters: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        student: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.index = str(index)
        self.top_k = top_k
        self.filters = filters
        self.settings = dict(settings or {})
        self.student = student
        self.device = device
        self.dtype = dtype
        self._index: Index | None = None
        self._search_settings(top_k, filters)

    def warm_up(self) -> None:
        """Open the index and load its student."""
        self._ready()

    @component.output_types(documents=list[Document])
    def run(self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None) -> dict[str, Any]:
        """The best passages as documents, best first; arguments that are None default to the component's settings.

        Raises:
            InputError: the query has no text, or ``top_k`` is below 1.
            FilterError: ``filters`` cannot be parsed, or do not fit the metadata.
        """
        settings = self._search_settings(
            self.top_k if top_k is None else top_k, self.filters if filters is None else filters
        )
        return {"documents": [_document(result) for result in search_one(self._ready(), query, settings)]}

    def _ready(self) -> Index:
        if self._index is None:
            student = None if self.student is None else _load(self.student, self.device, self.dtype)
            index = Index.open(Path(self.index), student, device=self.device, dtype=self.dtype)
            _ = index.student  # loaded now, not with the first query
            self._index = index
        else:
            self._index.refresh(if_newer=True)  # nobody else holds it
        return self._index

    def _search_settings(self, top_k: int, filters: Mapping[str, Any] | None) -> SearchSettings:
        if "top_k" in self.settings:
            raise InputError("settings has top_k, which is an argument of its own: give top_k instead")
        settings = search_settings(None, self.settings, {})
        condition = all_of([settings.filter, haystack_condition(filters) if filters else None])
        return settings.replace(top_k=top_k, filter=condition)


def _load(student: str, device: str | None, dtype: str | None) -> Student:
    key = (student, device, dtype)
    loaded = _loaded.get(key)
    if loaded is None:
        loaded = _loaded[key] = Student.load(student, device=device, dtype=dtype)
    return loaded


def _without_repetitions(documents: list[Document]) -> list[Document]:
    """The documents without those whose id another one has; the one with the highest score remains."""
    kept: dict[str, Document] = {}
    for document in documents:
        other = kept.get(document.id)
        if other is None or _earlier_score(document) > _earlier_score(other):
            kept[document.id] = document
    return list(kept.values())


def _earlier_score(document: Document) -> float:
    return -math.inf if document.score is None else document.score


def _text(document: Document) -> str:
    if document.content is None:
        raise InputError(f"document {document.id!r} has no text; d2llm reads nothing else, so leave it out")
    return passage_text(document.content, document.meta)


def _document(result: RankedPassage) -> Document:
    passage = result.passage
    return Document(id=passage.id, content=passage.text, meta=passage_metadata(passage), score=result.score)
