"""d2llm in LlamaIndex: an embedding, a reranker (node postprocessor) and a retriever over an index."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.inputs import strings_of
from d2llm.core.types import RankedPassage, Task
from d2llm.integrations.filters import all_of, dictionary_condition, llama_index_condition, one_of
from d2llm.integrations.texts import (
    embed_passages,
    embed_queries,
    passage_metadata,
    passage_text,
    rank_texts,
    refuse_unknown,
    require_dot,
    require_loaded,
    search_one,
    search_settings,
)
from d2llm.models.protocols import task_for
from d2llm.models.student import Student
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import SearchSettings

require("llama_index.core", extra="llama-index", purpose="d2llm in LlamaIndex")

from llama_index.core.base.embeddings.base import BaseEmbedding  # noqa: E402
from llama_index.core.bridge.pydantic import Field, model_validator  # noqa: E402
from llama_index.core.callbacks.base import CallbackManager  # noqa: E402
from llama_index.core.postprocessor.types import BaseNodePostprocessor  # noqa: E402
from llama_index.core.retrievers import BaseRetriever  # noqa: E402
from llama_index.core.schema import IndexNode, MetadataMode, NodeWithScore, QueryBundle, TextNode  # noqa: E402


class D2LLMEmbedding(BaseEmbedding):
    """A student's vectors. Their inner product is that of the score, so a vector store must compare by inner product.

    LlamaIndex itself puts a node's metadata before its text (``excluded_embed_metadata_keys`` leaves some out).

    Args:
        student: the student that encodes.
        task: the branch of the head; by default that of what the student was trained for.
        options: options of LlamaIndex's ``BaseEmbedding``.

    Raises:
        InputError: the student's head has no inner product, there is no such option, or a cache is given: LlamaIndex's
            cache stores one vector per text, but a query and a passage with the same text have different ones.
    """

    student: Student = Field(exclude=True)
    task: Task | None = None

    def __init__(self, *, student: Student, task: Task | None = None, **options: Any) -> None:
        refuse_unknown(options, type(self).model_fields, type(self).__name__)
        if options.get("embeddings_cache") is not None:
            raise InputError("embeddings_cache mixes up queries and passages of the same text; leave it out")
        if isinstance(student, Student):  # pyright: ignore[reportUnnecessaryIsInstance] - pydantic reports the rest
            require_dot(student)
            task = task_for(student, task)
            options = {"model_name": f"d2llm-{student.fingerprint}"} | options
        super().__init__(student=student, task=task, **options)  # pyright: ignore[reportCallIssue] - fields of this class

    @classmethod
    def class_name(cls) -> str:
        """The name of the class in LlamaIndex's serialisation."""
        return "D2LLMEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed_queries(self.student, [query], task_for(self.student, self.task))[0].tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return embed_passages(self.student, texts).tolist()

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


class D2LLMRerank(BaseNodePostprocessor):
    """Orders nodes by the student's full score (``Student.rank``).

    Of a node it reads the ``title`` in the metadata, if there is one, and the text; other metadata are ignored. How
    rare words are is known from ``index``, which the student made, or, without one, from tables that ship.
    """

    student: Student = Field(exclude=True)
    task: Task | None = None
    top_n: int | None = Field(default=None, ge=1)
    index: Index | None = Field(default=None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        refuse_unknown(values, cls.model_fields, cls.__name__)
        return values

    @classmethod
    def class_name(cls) -> str:
        """The name of the class in LlamaIndex's serialisation."""
        return "D2LLMRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InputError("there is no query to rank the nodes for; give query_str or query_bundle")
        texts = [passage_text(node.node.get_content(MetadataMode.NONE), node.node.metadata) for node in nodes]
        ranked = rank_texts(self.student, query_bundle.query_str, texts, self.task, self.top_n, self.index)
        return [NodeWithScore(node=nodes[index].node, score=score) for index, score in ranked]


class D2LLMRetriever(BaseRetriever):
    """Searches an index: candidates, then the student's full score, as ``Index.search`` does.

    Args:
        index: the index to search.
        settings: how to search.
        filters: LlamaIndex's ``MetadataFilters``, on metadata fields, ``id`` and ``title``; in addition to ``filter``.
        node_ids: search only these passages.
        doc_ids: search only the passages of these documents.
        callback_manager: as for LlamaIndex's ``BaseRetriever``.
        object_map: the same.
        objects: the same.
        verbose: the same.
        changes: single fields of the settings, as in ``D2LLMRetriever(index, top_k=3, filter="year >= 2020")``;
            ``similarity_top_k`` is another name of ``top_k``, and ``filter`` may be a dictionary
            (``filters.dictionary_condition``).

    Raises:
        InputError: there is no such setting, or settings contradict each other.
        FilterError: a filter has another form.
    """

    def __init__(
        self,
        index: Index,
        settings: SearchSettings | None = None,
        *,
        filters: Any = None,
        node_ids: Sequence[str] | None = None,
        doc_ids: Sequence[str] | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
        **changes: Any,
    ) -> None:
        super().__init__(callback_manager, object_map, objects, verbose)
        require_loaded(index, "index", "Index.open")
        self.index = index
        if not isinstance(changes.get("filter"), str | None):
            changes["filter"] = dictionary_condition(changes["filter"])
        chosen = search_settings(settings, changes, {"similarity_top_k": "top_k"})
        conditions = [
            chosen.filter,
            None if filters is None else llama_index_condition(filters),
            None if node_ids is None else one_of("id", _ids("node_ids", node_ids)),
            None if doc_ids is None else _of_documents(_ids("doc_ids", doc_ids)),
        ]
        self.settings = chosen.replace(filter=all_of(conditions))

    @property
    def similarity_top_k(self) -> int:
        """How many passages a search returns."""
        return self.settings.top_k

    @similarity_top_k.setter
    def similarity_top_k(self, value: int) -> None:
        self.settings = self.settings.replace(top_k=value)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if query_bundle.custom_embedding_strs:
            raise InputError(
                "the query has custom_embedding_strs (as HyDE makes them), which this retriever does not read; "
                "give one text, or use index.search(query, expansion=...)"
            )
        results = search_one(self.index, query_bundle.query_str, self.settings)
        return [NodeWithScore(node=_node(result), score=result.score) for result in results]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _ids(name: str, ids: Sequence[str]) -> list[str]:
    if isinstance(ids, str):
        raise InputError(f"{name} is {ids!r:.60}; give a list of texts")
    return strings_of(ids, name)


def _of_documents(ids: list[str]) -> str:
    """A passage that belongs to no document counts as its own."""
    return f"{one_of('document_id', ids)} OR {one_of('id', ids)}"


def _node(result: RankedPassage) -> TextNode:
    return TextNode(id_=result.passage.id, text=result.passage.text, metadata=passage_metadata(result.passage))
