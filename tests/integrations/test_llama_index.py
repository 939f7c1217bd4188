from __future__ import annotations

import asyncio

import numpy as np
import pytest

from d2llm.core.errors import FilterError, InputError
from d2llm.core.recipe import InteractionConfig
from d2llm.models.student import Student
from d2llm.retrieval.search import SearchSettings
from indexed_student import PASSAGES, QUERIES, make_indexed
from tiny_models import DIM, TEXTS, tiny_student_config, write_tiny_model

pytest.importorskip("llama_index.core", reason="pip install 'd2llm[llama-index]'")

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import SimilarityMode
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from pydantic import ValidationError

from d2llm.integrations.llama_index import D2LLMEmbedding, D2LLMRerank, D2LLMRetriever

NODES = [
    NodeWithScore(node=TextNode(id_=p.id, text=p.text, metadata={**p.metadata, "title": p.title})) for p in PASSAGES
]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    return make_indexed(tmp_path_factory.mktemp("llama-index"))


def as_pairs(nodes):
    return [(found.node.node_id, found.score) for found in nodes]


class TestEmbedding:
    def test_their_inner_product_is_the_anchor(self, indexed):
        embedding = D2LLMEmbedding(student=indexed.student, embed_batch_size=3)
        vectors = embedding.get_text_embedding_batch(TEXTS)
        assert np.shape(vectors) == (len(TEXTS), DIM)
        for query in QUERIES:
            vector = embedding.get_query_embedding(query)
            found = [embedding.similarity(vector, other, SimilarityMode.DOT_PRODUCT) for other in vectors]
            np.testing.assert_allclose(found, indexed.anchors(query, TEXTS), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(embedding.get_text_embedding(TEXTS[0]), vectors[0], atol=1e-5)
        symmetric = D2LLMEmbedding(student=indexed.student, task="symmetric")
        assert symmetric.get_query_embedding(QUERIES[0]) != embedding.get_query_embedding(QUERIES[0])

    def test_asynchronously_and_of_nothing(self, indexed):
        embedding = D2LLMEmbedding(student=indexed.student)
        assert asyncio.run(embedding.aget_query_embedding("rain")) == embedding.get_query_embedding("rain")
        assert asyncio.run(embedding.aget_text_embedding("rain")) == embedding.get_text_embedding("rain")
        together = asyncio.run(embedding.aget_text_embedding_batch(TEXTS))
        assert together == embedding.get_text_embedding_batch(TEXTS)
        assert embedding.get_text_embedding_batch([]) == []

    def test_in_a_vector_store_index(self, indexed):
        embedding = D2LLMEmbedding(student=indexed.student)
        nodes = [TextNode(id_=str(n), text=text) for n, text in enumerate(TEXTS)]
        made = VectorStoreIndex(nodes, embed_model=embedding)
        found = made.as_retriever(similarity_top_k=3).retrieve(QUERIES[0])
        assert len(found) == 3

    def test_what_is_written_down(self, indexed):
        embedding = D2LLMEmbedding(student=indexed.student)
        assert embedding.model_name == f"d2llm-{indexed.student.fingerprint}"
        assert "student" not in embedding.to_dict()
        assert embedding.to_dict()["class_name"] == "D2LLMEmbedding"

    def test_what_cannot_be_used(self, indexed, tmp_path):
        with pytest.raises(InputError, match="embeddings_cache"):
            D2LLMEmbedding(student=indexed.student, embeddings_cache=SimpleKVStore())
        with pytest.raises(ValidationError, match="instance of Student"):
            D2LLMEmbedding(student="d2llm-minilm")
        with pytest.raises(InputError, match="a text is needed"):
            D2LLMEmbedding(student=indexed.student).get_query_embedding(3)
        config = tiny_student_config(write_tiny_model(tmp_path / "backbone"))
        head = InteractionConfig(head="paper", hidden_dim=16, feature_dim=8)
        with pytest.raises(InputError, match="'paper'"):
            D2LLMEmbedding(student=Student.create(config.model_copy(update={"interaction": head}), device="cpu"))


class TestRerank:
    @pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
    def test_nodes_have_the_students_scores_best_first(self, indexed, task):
        rerank = D2LLMRerank(student=indexed.student, task=task)
        found = rerank.postprocess_nodes(NODES, query_str=QUERIES[0])
        scores = indexed.scores(QUERIES[0], task)
        assert as_pairs(found) == sorted(scores.items(), key=lambda item: -item[1])
        assert {given.score for given in NODES} == {None}
        assert found[0].node is NODES[int(found[0].node.node_id[1:])].node

    def test_the_first_ones_also_asynchronously(self, indexed):
        rerank = D2LLMRerank(student=indexed.student, top_n=2)
        found = rerank.postprocess_nodes(NODES, query_str=QUERIES[1])
        assert len(found) == 2
        assert as_pairs(asyncio.run(rerank.apostprocess_nodes(NODES, query_str=QUERIES[1]))) == as_pairs(found)
        assert rerank.postprocess_nodes([], query_str=QUERIES[1]) == []

    def test_bad_requests(self, indexed):
        with pytest.raises(InputError, match="no query"):
            D2LLMRerank(student=indexed.student).postprocess_nodes(NODES)
        with pytest.raises(ValidationError, match="greater than or equal to 1"):
            D2LLMRerank(student=indexed.student, top_n=0)
        with pytest.raises(ValidationError, match="instance of Student"):
            D2LLMRerank(student="d2llm-minilm")


class TestRetriever:
    def test_it_finds_what_the_index_finds(self, indexed):
        retriever = D2LLMRetriever(indexed.index)
        for query in QUERIES:
            assert as_pairs(retriever.retrieve(query)) == indexed.found(query)
            assert as_pairs(asyncio.run(retriever.aretrieve(query))) == indexed.found(query)
        (first,) = D2LLMRetriever(indexed.index, filter="id = 'p5'").retrieve(TEXTS[5])
        known = {"title": "the reads", "document_id": "d1", "position": 1, "year": 2005, "language": "en"}
        assert (first.node.node_id, first.node.text, first.node.metadata) == ("p5", TEXTS[5], known)

    def test_settings(self, indexed):
        settings = SearchSettings(filter="year >= 2003", task="symmetric")
        found = as_pairs(D2LLMRetriever(indexed.index, settings, top_k=3).retrieve(QUERIES[0]))
        assert found == indexed.found(QUERIES[0], filter="year >= 2003", task="symmetric", top_k=3)
        assert len(found) == 3
        with pytest.raises(InputError, match="top_k is 0"):
            D2LLMRetriever(indexed.index, top_k=0)
        with pytest.raises(TypeError, match="topk"):
            D2LLMRetriever(indexed.index, topk=3)
        with pytest.raises(FilterError, match="colour"):
            D2LLMRetriever(indexed.index, filter="colour = 'red'").retrieve("rain")

    def test_in_a_query_engine_with_the_reranker(self, indexed):
        engine = RetrieverQueryEngine(
            D2LLMRetriever(indexed.index),
            response_synthesizer=NoText(llm=MockLLM()),
            node_postprocessors=[D2LLMRerank(student=indexed.student, top_n=3)],
        )
        found = as_pairs(engine.query(QUERIES[2]).source_nodes)
        expected = indexed.found(QUERIES[2], top_k=3)
        assert [node for node, _ in found] == [passage for passage, _ in expected]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-5)
