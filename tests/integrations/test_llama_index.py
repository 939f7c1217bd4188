from __future__ import annotations

import asyncio

import numpy as np
import pytest
from pydantic import ValidationError

from d2llm.core.errors import FilterError, InputError
from d2llm.retrieval.search import SearchSettings
from indexed_student import PASSAGES, QUERIES, make_indexed
from late_import import late_import
from tiny_models import DIM, TEXTS

llama_index = late_import("llama_index.core", reason="pip install 'd2llm[llama-index]'")
integration = late_import("d2llm.integrations.llama_index")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    return make_indexed(tmp_path_factory.mktemp("llama-index"))


@pytest.fixture
def nodes():
    schema = llama_index.schema
    return [
        schema.NodeWithScore(node=schema.TextNode(id_=p.id, text=p.text, metadata={**p.metadata, "title": p.title}))
        for p in PASSAGES
    ]


def as_pairs(nodes):
    return [(result.node.node_id, result.score) for result in nodes]


class TestEmbedding:
    def test_the_inner_product_of_embeddings_is_the_inner_product(self, indexed):
        embedding = integration.D2LLMEmbedding(student=indexed.student, embed_batch_size=3)
        vectors = embedding.get_text_embedding_batch(TEXTS)
        assert np.shape(vectors) == (len(TEXTS), DIM)
        for query in QUERIES:
            vector = embedding.get_query_embedding(query)
            products = [
                embedding.similarity(vector, text_vector, llama_index.base.embeddings.base.SimilarityMode.DOT_PRODUCT)
                for text_vector in vectors
            ]
            np.testing.assert_allclose(products, indexed.dots(query, TEXTS), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(embedding.get_text_embedding(TEXTS[0]), vectors[0], atol=1e-5)
        symmetric = integration.D2LLMEmbedding(student=indexed.student, task="symmetric")
        assert symmetric.get_query_embedding(QUERIES[0]) != embedding.get_query_embedding(QUERIES[0])

    def test_async_calls_and_empty_input(self, indexed):
        embedding = integration.D2LLMEmbedding(student=indexed.student)
        assert asyncio.run(embedding.aget_query_embedding("rain")) == embedding.get_query_embedding("rain")
        assert asyncio.run(embedding.aget_text_embedding("rain")) == embedding.get_text_embedding("rain")
        together = asyncio.run(embedding.aget_text_embedding_batch(TEXTS))
        assert together == embedding.get_text_embedding_batch(TEXTS)
        assert embedding.get_text_embedding_batch([]) == []

    def test_embeddings_work_in_a_vector_store_index(self, indexed):
        embedding = integration.D2LLMEmbedding(student=indexed.student)
        nodes = [llama_index.schema.TextNode(id_=str(n), text=text) for n, text in enumerate(TEXTS)]
        index = llama_index.VectorStoreIndex(nodes, embed_model=embedding)
        results = index.as_retriever(similarity_top_k=3).retrieve(QUERIES[0])
        assert len(results) == 3

    def test_the_student_is_not_serialized(self, indexed):
        embedding = integration.D2LLMEmbedding(student=indexed.student)
        assert embedding.model_name == f"d2llm-{indexed.student.fingerprint}"
        assert "student" not in embedding.to_dict()
        assert embedding.to_dict()["class_name"] == "D2LLMEmbedding"

    def test_unsupported_settings_texts_and_heads_are_rejected(self, indexed, monkeypatch):
        with pytest.raises(InputError, match="embeddings_cache"):
            integration.D2LLMEmbedding(
                student=indexed.student, embeddings_cache=llama_index.storage.kvstore.SimpleKVStore()
            )
        with pytest.raises(ValidationError, match="instance of Student"):
            integration.D2LLMEmbedding(student="d2llm-minilm")
        with pytest.raises(InputError, match="a text is needed"):
            integration.D2LLMEmbedding(student=indexed.student).get_query_embedding(3)
        monkeypatch.setattr(type(indexed.student), "has_dot", property(lambda self: False))
        with pytest.raises(InputError, match="no inner product"):
            integration.D2LLMEmbedding(student=indexed.student)


class TestRerank:
    @pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
    def test_nodes_are_sorted_by_the_students_scores(self, indexed, nodes, task):
        rerank = integration.D2LLMRerank(student=indexed.student, task=task)
        results = rerank.postprocess_nodes(nodes, query_str=QUERIES[0])
        scores = indexed.scores(QUERIES[0], task)
        assert as_pairs(results) == sorted(scores.items(), key=lambda item: -item[1])
        assert {node.score for node in nodes} == {None}
        assert results[0].node is nodes[int(results[0].node.node_id[1:])].node

    def test_top_n_also_asynchronously(self, indexed, nodes):
        rerank = integration.D2LLMRerank(student=indexed.student, top_n=2)
        results = rerank.postprocess_nodes(nodes, query_str=QUERIES[1])
        assert len(results) == 2
        assert as_pairs(asyncio.run(rerank.apostprocess_nodes(nodes, query_str=QUERIES[1]))) == as_pairs(results)
        assert rerank.postprocess_nodes([], query_str=QUERIES[1]) == []

    def test_invalid_requests_are_rejected(self, indexed, nodes):
        with pytest.raises(InputError, match="no query"):
            integration.D2LLMRerank(student=indexed.student).postprocess_nodes(nodes)
        with pytest.raises(ValidationError, match="greater than or equal to 1"):
            integration.D2LLMRerank(student=indexed.student, top_n=0)
        with pytest.raises(ValidationError, match="instance of Student"):
            integration.D2LLMRerank(student="d2llm-minilm")
        with pytest.raises(InputError, match="D2LLMRerank has no option 'top_k'; did you mean 'top_n'"):
            integration.D2LLMRerank(student=indexed.student, top_k=2)
        with pytest.raises(InputError, match="D2LLMEmbedding has no option 'device'; there are: "):
            integration.D2LLMEmbedding(student=indexed.student, device="cpu")

    def test_missing_titles(self, indexed):
        schema = llama_index.schema
        rerank = integration.D2LLMRerank(student=indexed.student)
        nodes = [
            schema.NodeWithScore(node=schema.TextNode(text=TEXTS[0], metadata=metadata))
            for metadata in ({}, {"title": float("nan")}, {"title": None}, {"title": np.float64("nan")})
        ]
        assert len({result.score for result in rerank.postprocess_nodes(nodes, query_str=QUERIES[0])}) == 1


class TestRetriever:
    def test_results_equal_those_of_the_index(self, indexed):
        retriever = integration.D2LLMRetriever(indexed.index)
        for query in QUERIES:
            assert as_pairs(retriever.retrieve(query)) == indexed.found(query)
            assert as_pairs(asyncio.run(retriever.aretrieve(query))) == indexed.found(query)
        (first,) = integration.D2LLMRetriever(indexed.index, filter="id = 'p5'").retrieve(TEXTS[5])
        metadata = {"title": "the reads", "document_id": "d1", "position": 1, "year": 2005, "language": "en"}
        assert (first.node.node_id, first.node.text, first.node.metadata) == ("p5", TEXTS[5], metadata)

    def test_search_settings_are_used_and_checked(self, indexed):
        settings = SearchSettings(filter="year >= 2003", task="symmetric")
        results = as_pairs(integration.D2LLMRetriever(indexed.index, settings, top_k=3).retrieve(QUERIES[0]))
        assert results == indexed.found(QUERIES[0], filter="year >= 2003", task="symmetric", top_k=3)
        assert len(results) == 3
        with pytest.raises(InputError, match="top_k is 0"):
            integration.D2LLMRetriever(indexed.index, top_k=0)
        with pytest.raises(InputError, match="no search setting 'topk'; did you mean 'top_k'"):
            integration.D2LLMRetriever(indexed.index, topk=3)
        with pytest.raises(InputError, match="no search setting 'vector_store_query_mode'"):
            integration.D2LLMRetriever(indexed.index, vector_store_query_mode="mmr")
        with pytest.raises(FilterError, match="colour"):
            integration.D2LLMRetriever(indexed.index, filter="colour = 'red'").retrieve("rain")

    def test_llama_indexs_names_of_settings(self, indexed):
        manager = llama_index.callbacks.CallbackManager()
        retriever = integration.D2LLMRetriever(indexed.index, similarity_top_k=2, callback_manager=manager)
        assert as_pairs(retriever.retrieve(QUERIES[0])) == indexed.found(QUERIES[0], top_k=2)
        assert (retriever.similarity_top_k, retriever.callback_manager) == (2, manager)
        retriever.similarity_top_k = 3
        assert as_pairs(retriever.retrieve(QUERIES[0])) == indexed.found(QUERIES[0], top_k=3)
        with pytest.raises(InputError, match="similarity_top_k and top_k are the same"):
            integration.D2LLMRetriever(indexed.index, similarity_top_k=2, top_k=3)
        by_dictionary = integration.D2LLMRetriever(indexed.index, filter={"year": {"$gt": 2003}})
        assert as_pairs(by_dictionary.retrieve(QUERIES[0])) == indexed.found(QUERIES[0], filter="year > 2003")

    @pytest.mark.parametrize(
        ("filters", "condition"),
        [
            ([("year", 2004, "==")], "year = 2004"),
            ([("year", 2004, "!=")], "year <> 2004 OR year IS NULL"),
            ([("year", 2003, ">="), ("year", 2006, "<")], "year >= 2003 AND year < 2006"),
            ([("year", [2001, 2002], "in")], "year IN (2001, 2002)"),
            ([("year", [2001, 2002], "nin")], "year NOT IN (2001, 2002) OR year IS NULL"),
            ([("year", None, "is_empty")], "year IS NULL"),
            ([("title", "read", "text_match")], "title LIKE '%read%'"),
            ([("title", "_", "text_match"), "or", ("id", "p1", "==")], "id = 'p1'"),
            ([("year", 2002, "<"), "or", ("language", "de", "==")], "year < 2002 OR language = 'de'"),
            ([("year", 2002, "<"), "not", ("language", "de", "==")], "year >= 2002"),
        ],
        ids=str,
    )
    def test_metadata_filters(self, indexed, filters, condition):
        types = llama_index.vector_stores.types
        joins = [each for each in filters if isinstance(each, str)]
        metadata_filters = types.MetadataFilters(
            filters=[
                types.MetadataFilter(key=key, value=value, operator=operator)
                for key, value, operator in (each for each in filters if not isinstance(each, str))
            ],
            condition=joins[0] if joins else "and",
        )
        nested = types.MetadataFilters(filters=[metadata_filters])
        for each in (metadata_filters, nested):
            results = as_pairs(integration.D2LLMRetriever(indexed.index, filters=each).retrieve(QUERIES[0]))
            assert results == indexed.found(QUERIES[0], filter=condition) != []
        both = integration.D2LLMRetriever(indexed.index, filter="year > 2002", filters=metadata_filters)
        assert as_pairs(both.retrieve(QUERIES[0])) == indexed.found(QUERIES[0], filter=f"year > 2002 AND ({condition})")

    def test_node_ids_and_doc_ids(self, indexed):
        nodes = integration.D2LLMRetriever(indexed.index, node_ids=["p1", "p5"])
        assert {name for name, _ in as_pairs(nodes.retrieve(QUERIES[0]))} == {"p1", "p5"}
        documents = integration.D2LLMRetriever(indexed.index, doc_ids=["d1", "p0"])
        expected = {passage.id for passage in PASSAGES if passage.document_id == "d1"} | {"p0"}
        assert {name for name, _ in as_pairs(documents.retrieve(QUERIES[0]))} == expected
        assert integration.D2LLMRetriever(indexed.index, node_ids=[]).retrieve(QUERIES[0]) == []
        with pytest.raises(InputError, match="node_ids is 'p1'; give a list"):
            integration.D2LLMRetriever(indexed.index, node_ids="p1")

    def test_what_a_retriever_cannot_do_is_rejected(self, indexed):
        types = llama_index.vector_stores.types
        for operator, value in (("any", ["a"]), ("all", ["a"]), ("text_match_insensitive", "A"), ("contains", 3)):
            each = types.MetadataFilter(key="language", value=value, operator=operator)
            with pytest.raises(FilterError, match=f"'language' cannot be compared by '{operator}'"):
                integration.D2LLMRetriever(indexed.index, filters=types.MetadataFilters(filters=[each]))
        with pytest.raises(FilterError, match="MetadataFilters or a dictionary is needed, but str"):
            integration.D2LLMRetriever(indexed.index, filters="year > 2000")
        query = llama_index.schema.QueryBundle("rain", custom_embedding_strs=["it rains"])
        with pytest.raises(InputError, match="custom_embedding_strs"):
            integration.D2LLMRetriever(indexed.index).retrieve(query)
        with pytest.raises(InputError, match="index is 'folder', a path or name"):
            integration.D2LLMRetriever("folder")

    def test_retriever_and_reranker_work_in_a_query_engine(self, indexed):
        engine = llama_index.query_engine.RetrieverQueryEngine(
            integration.D2LLMRetriever(indexed.index),
            response_synthesizer=llama_index.response_synthesizers.no_text.NoText(llm=llama_index.llms.MockLLM()),
            node_postprocessors=[integration.D2LLMRerank(student=indexed.student, top_n=3)],
        )
        results = as_pairs(engine.query(QUERIES[2]).source_nodes)
        expected = indexed.found(QUERIES[2], top_k=3)
        assert [node for node, _ in results] == [passage for passage, _ in expected]
        np.testing.assert_allclose([s for _, s in results], [s for _, s in expected], rtol=1e-5)
