"""d2llm in LangChain: embeddings, a reranker (document compressor) and a retriever over an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import ConfigDict, Field, model_validator

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.inputs import objects_of
from d2llm.core.types import RankedPassage, Task
from d2llm.integrations.filters import dictionary_condition
from d2llm.integrations.texts import (
    embed_passages,
    embed_queries,
    passage_metadata,
    passage_text,
    rank_texts,
    refuse_unknown,
    require_dot,
    search_one,
    search_settings,
)
from d2llm.models.protocols import task_for
from d2llm.models.student import Student
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import SearchSettings

require("langchain_core", extra="langchain", purpose="d2llm in LangChain")

from langchain_core.callbacks import (  # noqa: E402
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
    Callbacks,
)
from langchain_core.documents import BaseDocumentCompressor, Document  # noqa: E402
from langchain_core.embeddings import Embeddings  # noqa: E402
from langchain_core.retrievers import BaseRetriever  # noqa: E402
from langchain_core.runnables import run_in_executor  # noqa: E402

SCORE = "relevance_score"
"""Metadata field of the score, as in LangChain's own rerankers."""

_NAMES = {"k": "top_k", "fetch_k": "select_from", "lambda_mult": "mmr"}
"""LangChain's names of search settings."""
_SEARCH_TYPES = ("similarity", "mmr")
_MMR = 0.5  # LangChain's default of lambda_mult


class D2LLMEmbeddings(Embeddings):
    """A student's vectors. Their inner product is that of the score, so a vector store must compare by inner product.

    Args:
        student: the student that encodes.
        task: the branch of the head; by default that of what the student was trained for.

    Raises:
        InputError: the student's head has no inner product.
    """

    def __init__(self, student: Student, *, task: Task | None = None) -> None:
        require_dot(student)
        self.student = student
        self.task: Task = task_for(student, task)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of passages."""
        return embed_passages(self.student, texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query, whose inner product with a passage's vector is that of the score."""
        return embed_queries(self.student, [text], self.task)[0].tolist()


class D2LLMReranker(BaseDocumentCompressor):
    """Orders documents by the student's full score (``Student.rank``); the metadata get it as ``relevance_score``.

    Of a document it reads the ``title`` in the metadata, if there is one, and the text. How rare words are is known
    from ``index``, which the student made, or, without one, from tables that ship.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    student: Student
    task: Task | None = None
    top_k: int | None = Field(default=None, ge=1)
    index: Index | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        refuse_unknown(values, cls.model_fields, cls.__name__)
        return values

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,  # noqa: ARG002 - part of the interface
    ) -> list[Document]:
        """The best ``top_k`` documents (None: all), best first, as copies with their scores.

        Raises:
            InputError: something is not a text.
        """
        documents = objects_of(documents, "documents", Document)
        texts = [passage_text(document.page_content, document.metadata) for document in documents]
        ranked = rank_texts(self.student, query, texts, self.task, self.top_k, self.index)
        return [
            documents[index].model_copy(update={"metadata": {**documents[index].metadata, SCORE: score}})
            for index, score in ranked
        ]


class D2LLMRetriever(BaseRetriever):
    """Searches an index: candidates, then the student's full score, as ``Index.search`` does.

    Search settings are given as ``settings``, one by one (``D2LLMRetriever(index=index, top_k=3)``), or as LangChain's
    ``search_type`` and ``search_kwargs``; a call can override single ones, as in ``retriever.invoke(query, top_k=3,
    filter="year >= 2020")``. They may have LangChain's names (``k``, ``fetch_k``, ``lambda_mult``), and ``filter`` may
    be a dictionary (``filters.dictionary_condition``).

    Raises:
        InputError: there is no such setting, or settings contradict each other.
        FilterError: a filter is neither a condition nor such a dictionary.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    index: Index
    settings: SearchSettings = SearchSettings()

    @model_validator(mode="before")
    @classmethod
    def _read_settings(cls, values: dict[str, Any]) -> dict[str, Any]:
        fields = {name: value for name, value in values.items() if name in cls.model_fields}
        changes = {name: value for name, value in values.items() if name not in fields}
        if changes:
            fields["settings"] = _changed(fields.get("settings"), _without_search_type(changes))
        return fields

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - part of the interface
        **changes: Any,
    ) -> list[Document]:
        return [_document(result) for result in search_one(self.index, query, _changed(self.settings, changes))]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **changes: Any
    ) -> list[Document]:
        manager = run_manager.get_sync()
        return await run_in_executor(None, self._get_relevant_documents, query, run_manager=manager, **changes)


def _without_search_type(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of LangChain's ``as_retriever`` as single settings."""
    changes = {name: value for name, value in options.items() if name not in ("search_type", "search_kwargs")}
    for name, value in cast("dict[str, Any]", options.get("search_kwargs") or {}).items():
        if name in changes:
            raise InputError(f"{name} is also in search_kwargs; give it once")
        changes[name] = value
    search_type = options.get("search_type", "similarity")
    if search_type not in _SEARCH_TYPES:
        raise InputError(f"search_type {search_type!r} is not one of {', '.join(_SEARCH_TYPES)}; {_NO_THRESHOLD}")
    if search_type == "mmr" and "mmr" not in changes:
        changes.setdefault("lambda_mult", _MMR)
    return changes


_NO_THRESHOLD = (
    "scores are not relevances between 0 and 1, so there is no threshold: filter the results by their relevance_score"
)


def _changed(settings: SearchSettings | None, changes: Mapping[str, Any]) -> SearchSettings:
    if "score_threshold" in changes:
        raise InputError(f"score_threshold cannot be used: {_NO_THRESHOLD}")
    if "filter" in changes and not isinstance(changes["filter"], str | None):
        changes = {**changes, "filter": dictionary_condition(changes["filter"])}
    return search_settings(settings, changes, _NAMES)


def _document(result: RankedPassage) -> Document:
    passage = result.passage
    return Document(
        page_content=passage.text, id=passage.id, metadata={**passage_metadata(passage), SCORE: result.score}
    )
