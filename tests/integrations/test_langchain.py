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

integration = late_import(
    "d2llm.integrations.langchain", needs="langchain_core", reason="pip install 'd2llm[langchain]'"
)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    return make_indexed(tmp_path_factory.mktemp("langchain"))


@pytest.fixture
def documents():
    from langchain_core.documents import Document

    return [Document(page_content=p.text, id=p.id, metadata={**p.metadata, "title": p.title}) for p in PASSAGES]


def as_pairs(documents):
    return [(document.id, document.metadata["relevance_score"]) for document in documents]


class TestEmbeddings:
    def test_the_inner_product_of_embeddings_is_the_inner_product(self, indexed):
        embeddings = integration.D2LLMEmbeddings(indexed.student)
        vectors = np.array(embeddings.embed_documents(TEXTS))
        assert vectors.shape == (len(TEXTS), DIM)
        for query in QUERIES:
            expected = indexed.dots(query, TEXTS)
            np.testing.assert_allclose(vectors @ embeddings.embed_query(query), expected, rtol=1e-5, atol=1e-5)
        symmetric = integration.D2LLMEmbeddings(indexed.student, task="symmetric")
        assert symmetric.embed_query(QUERIES[0]) != embeddings.embed_query(QUERIES[0])
        assert symmetric.embed_documents(TEXTS) == embeddings.embed_documents(TEXTS)

    def test_embeddings_are_plain_floats_also_asynchronously(self, indexed):
        embeddings = integration.D2LLMEmbeddings(indexed.student)
        vector = embeddings.embed_query("rain")
        assert {type(number) for number in vector} == {float}
        assert asyncio.run(embeddings.aembed_query("rain")) == vector
        assert asyncio.run(embeddings.aembed_documents(TEXTS)) == embeddings.embed_documents(TEXTS)
        assert embeddings.embed_documents([]) == []

    def test_embeddings_work_in_a_vector_store(self, indexed, documents):
        from langchain_core.vectorstores import InMemoryVectorStore

        store = InMemoryVectorStore(integration.D2LLMEmbeddings(indexed.student))
        store.add_documents(documents)
        assert len(store.similarity_search(QUERIES[0], k=3)) == 3

    def test_unsupported_texts_and_heads_are_rejected(self, indexed, monkeypatch):
        with pytest.raises(InputError, match="a text is needed"):
            integration.D2LLMEmbeddings(indexed.student).embed_documents(["a", 1])
        with pytest.raises(InputError, match=r"give Student.load\('d2llm-minilm'\)"):
            integration.D2LLMEmbeddings("d2llm-minilm")
        monkeypatch.setattr(type(indexed.student), "has_dot", property(lambda self: False))
        with pytest.raises(InputError, match="no inner product"):
            integration.D2LLMEmbeddings(indexed.student)


class TestReranker:
    @pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
    def test_documents_are_sorted_by_the_students_scores(self, indexed, documents, task):
        reranker = integration.D2LLMReranker(student=indexed.student, task=task)
        results = reranker.compress_documents(documents, QUERIES[0])
        scores = indexed.scores(QUERIES[0], task)
        assert as_pairs(results) == sorted(scores.items(), key=lambda item: -item[1])
        assert all("relevance_score" not in document.metadata for document in documents)
        assert results[0].metadata["language"] in ("en", "de")
        assert results[0].page_content == documents[int(results[0].id[1:])].page_content

    def test_missing_titles(self, indexed):
        """A title of pandas' NaN is none, and not the word "nan"."""
        from langchain_core.documents import Document

        reranker = integration.D2LLMReranker(student=indexed.student)
        titles = ({}, {"title": float("nan")}, {"title": None}, {"title": np.float64("nan")}, {"title": "nan"})
        scores = [
            reranker.compress_documents([Document(page_content=TEXTS[0], metadata=metadata)], QUERIES[0])[0].metadata[
                "relevance_score"
            ]
            for metadata in titles
        ]
        assert len(set(scores[:4])) == 1
        assert scores[4] != scores[0]

    def test_top_k_also_asynchronously(self, indexed, documents):
        reranker = integration.D2LLMReranker(student=indexed.student, top_k=2)
        results = reranker.compress_documents(documents, QUERIES[1])
        assert len(results) == 2
        assert asyncio.run(reranker.acompress_documents(documents, QUERIES[1])) == results
        assert reranker.compress_documents([], QUERIES[1]) == []

    def test_invalid_settings_are_rejected(self, indexed, documents):
        with pytest.raises(ValidationError, match="instance of Student"):
            integration.D2LLMReranker(student="d2llm-minilm")
        with pytest.raises(ValidationError, match="greater than or equal to 1"):
            integration.D2LLMReranker(student=indexed.student, top_k=0)
        with pytest.raises(InputError, match="D2LLMReranker has no option 'top_n'; did you mean 'top_k'"):
            integration.D2LLMReranker(student=indexed.student, top_n=3)
        with pytest.raises(InputError, match="a text is needed"):
            integration.D2LLMReranker(student=indexed.student).compress_documents(documents, None)


class TestRetriever:
    def test_results_equal_those_of_the_index(self, indexed):
        from langchain_core.documents import Document

        retriever = integration.D2LLMRetriever(index=indexed.index)
        for query in QUERIES:
            assert as_pairs(retriever.invoke(query)) == indexed.found(query)
        (first,) = retriever.invoke(TEXTS[5], top_k=1, filter="id = 'p5'")
        assert first.metadata.pop("relevance_score") == indexed.found(TEXTS[5], filter="id = 'p5'")[0][1]
        assert first == Document(
            id="p5",
            page_content=TEXTS[5],
            metadata={"title": "the reads", "document_id": "d1", "position": 1, "year": 2005, "language": "en"},
        )

    def test_a_call_overrides_the_retrievers_settings(self, indexed):
        settings = SearchSettings(top_k=3, filter="year >= 2003", task="symmetric")
        retriever = integration.D2LLMRetriever(index=indexed.index, settings=settings)
        options = {"top_k": 3, "filter": "year >= 2003", "task": "symmetric"}
        assert as_pairs(retriever.invoke(QUERIES[0])) == indexed.found(QUERIES[0], **options)
        results = as_pairs(retriever.invoke(QUERIES[0], top_k=5, exact=True))
        assert results == indexed.found(QUERIES[0], **(options | {"top_k": 5, "exact": True}))
        assert len(results) == 5

    def test_langchains_names_of_settings(self, indexed):
        retriever = integration.D2LLMRetriever(index=indexed.index)
        assert as_pairs(retriever.invoke(QUERIES[0], k=2)) == indexed.found(QUERIES[0], top_k=2)
        expected = indexed.found(QUERIES[0], top_k=4, select_from=8, mmr=0.2)
        assert as_pairs(retriever.invoke(QUERIES[0], k=4, fetch_k=8, lambda_mult=0.2)) == expected
        configured = integration.D2LLMRetriever(
            index=indexed.index, search_type="mmr", search_kwargs={"k": 4, "fetch_k": 8, "lambda_mult": 0.2}
        )
        assert as_pairs(configured.invoke(QUERIES[0])) == expected
        by_default = integration.D2LLMRetriever(index=indexed.index, search_type="mmr")
        assert by_default.settings == SearchSettings(mmr=0.5)
        filtered = integration.D2LLMRetriever(index=indexed.index, k=3, filter={"year": {"$gt": 2003}}, tags=["a"])
        assert as_pairs(filtered.invoke(QUERIES[0])) == indexed.found(QUERIES[0], top_k=3, filter="year > 2003")
        assert filtered.tags == ["a"]
        assert as_pairs(filtered.batch([QUERIES[1]], k=1)[0]) == indexed.found(
            QUERIES[1], top_k=1, filter="year > 2003"
        )

    def test_unknown_options_of_the_constructor_are_rejected(self, indexed):
        for options, message in [
            ({"top_n": 3}, "no search setting 'top_n'; did you mean 'top_k'"),
            ({"search_kwargs": {"score_threshold": 0.5}}, "score_threshold cannot be used"),
            ({"search_type": "similarity_score_threshold"}, "is not one of similarity, mmr"),
            ({"k": 2, "search_kwargs": {"k": 3}}, "k is also in search_kwargs"),
            ({"top_k": 0}, "top_k is 0"),
            ({"vectorstore": "a"}, "no search setting 'vectorstore'"),
        ]:
            with pytest.raises(InputError, match=message):
                integration.D2LLMRetriever(index=indexed.index, **options)

    @pytest.mark.parametrize(
        ("condition", "matches"),
        [
            ({"year": 2004}, lambda year, language: year == 2004),
            ({"year": {"$eq": 2004}}, lambda year, language: year == 2004),
            ({"year": {"$ne": 2004}}, lambda year, language: year != 2004),
            ({"year": {"$gte": 2003, "$lt": 2006}}, lambda year, language: year is not None and 2003 <= year < 2006),
            ({"year": {"$between": [2003, 2005]}}, lambda year, language: year is not None and 2003 <= year <= 2005),
            ({"year": [2001, 2002]}, lambda year, language: year in (2001, 2002)),
            ({"year": {"$in": [2001, 2002]}}, lambda year, language: year in (2001, 2002)),
            ({"year": {"$nin": [2001, 2002]}}, lambda year, language: year not in (2001, 2002)),
            ({"year": {"$exists": False}}, lambda year, language: year is None),
            ({"year": {"$exists": True}}, lambda year, language: year is not None),
            ({"year": None}, lambda year, language: year is None),
            ({"year": float("nan")}, lambda year, language: year is None),
            ({"year": np.int64(2004)}, lambda year, language: year == 2004),
            ({"language": {"$like": "d%"}}, lambda year, language: language == "de"),
            ({"language": "en", "year": {"$lt": 2003}}, lambda year, language: language == "en" and year < 2003),
            ({"$and": [{"language": "en"}, {"year": 2002}]}, lambda year, language: year == 2002),
            ({"$or": [{"language": "de"}, {"year": 2002}]}, lambda year, language: year in (None, 2002)),
            ({"$not": {"year": {"$gt": 2002}}}, lambda year, language: year is None or year <= 2002),
            ({"year": {"$not": {"$gt": 2002}}}, lambda year, language: year is None or year <= 2002),
            ({}, lambda year, language: True),
        ],
    )
    def test_dictionaries_as_filters(self, indexed, condition, matches):
        expected = {
            passage.id
            for passage in PASSAGES
            if matches(passage.metadata.get("year"), passage.metadata.get("language"))
        }
        retriever = integration.D2LLMRetriever(index=indexed.index)
        assert {document.id for document in retriever.invoke("rain", k=20, filter=condition)} == expected != set()

    @pytest.mark.parametrize(
        ("condition", "message"),
        [
            ({"year": {"$regex": "2"}}, r"'year' cannot be compared by '\$regex'.*use \$eq"),
            ({"$nor": [{"year": 1}]}, r"'\$nor' joins no conditions"),
            ({"$and": {"year": 1}}, r"\$and needs a list"),
            ({"$or": []}, "OR has no conditions"),
            ({"$or": [{}]}, r"a condition of \$or is empty"),
            ({"year": {}}, "'year' is compared with nothing"),
            ({"year": {"$between": [1]}}, "needs two values"),
            ({"year": {"nested": 1}}, "cannot be compared by 'nested'"),
            ({"year": "2004"}, "field 'year' is integer"),
            ({"colour": "red"}, "no field 'colour'"),
            ({'year" = 2004 OR "year': 1}, "there is no field"),
            (lambda document: True, "filter: function cannot be used"),
            ([("year", 2004)], "filter: list cannot be used"),
        ],
    )
    def test_filters_that_are_not_understood_are_rejected(self, indexed, condition, message):
        with pytest.raises(FilterError, match=message):
            integration.D2LLMRetriever(index=indexed.index).invoke("rain", filter=condition)

    def test_async_and_batch_calls_give_the_same_results(self, indexed):
        retriever = integration.D2LLMRetriever(index=indexed.index)
        expected = [indexed.found(query) for query in QUERIES * 5]
        assert [as_pairs(results) for results in retriever.batch(QUERIES * 5)] == expected
        assert as_pairs(asyncio.run(retriever.ainvoke(QUERIES[0]))) == expected[0]
        assert as_pairs(asyncio.run(retriever.ainvoke(QUERIES[0], top_k=2))) == expected[0][:2]
        assert [as_pairs(results) for results in asyncio.run(retriever.abatch(QUERIES * 5))] == expected

    def test_retriever_and_reranker_work_in_a_chain(self, indexed):
        from langchain_core.runnables import RunnableLambda

        retriever = integration.D2LLMRetriever(index=indexed.index)
        reranker = integration.D2LLMReranker(student=indexed.student, top_k=3)
        chain = retriever | RunnableLambda(lambda results: reranker.compress_documents(results, QUERIES[2]))
        results, expected = as_pairs(chain.invoke(QUERIES[2])), indexed.found(QUERIES[2], top_k=3)
        assert [document for document, _ in results] == [passage for passage, _ in expected]
        np.testing.assert_allclose([score for _, score in results], [score for _, score in expected], rtol=1e-5)

    def test_invalid_requests_are_rejected(self, indexed):
        retriever = integration.D2LLMRetriever(index=indexed.index)
        with pytest.raises(FilterError, match="colour"):
            retriever.invoke("rain", filter="colour = 'red'")
        with pytest.raises(InputError, match="top_k is 0"):
            retriever.invoke("rain", top_k=0)
        with pytest.raises(InputError, match="no search setting 'topk'; did you mean 'top_k'"):
            retriever.invoke("rain", topk=3)
        with pytest.raises(InputError, match="score_threshold cannot be used"):
            retriever.invoke("rain", score_threshold=0.5)
        with pytest.raises(InputError, match="k and top_k are the same"):
            retriever.invoke("rain", k=3, top_k=3)
        with pytest.raises(ValidationError, match="instance of Index"):
            integration.D2LLMRetriever(index="folder")
        with pytest.raises(InputError, match="a text is needed, but dict was given"):
            retriever.invoke({"query": "rain"})  # as a chain without an itemgetter does
