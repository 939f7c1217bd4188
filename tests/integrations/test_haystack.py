from __future__ import annotations

import asyncio
import gc

import numpy as np
import pytest

from d2llm.core.errors import FilterError, InputError, ModelNotFoundError
from d2llm.core.types import Passage
from d2llm.integrations.filters import haystack_condition as as_condition
from indexed_student import PASSAGES, QUERIES, make_indexed
from late_import import late_import
from tiny_models import DIM, TEXTS

haystack = late_import("haystack", reason="pip install 'd2llm[haystack]'")
integration = late_import("d2llm.integrations.haystack")

FLOAT32 = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    return make_indexed(tmp_path_factory.mktemp("haystack"))


@pytest.fixture
def folder(indexed):
    return str(indexed.student_folder)


@pytest.fixture
def retriever(indexed):
    return integration.D2LLMRetriever(str(indexed.index.folder), **FLOAT32)


@pytest.fixture
def documents():
    return [haystack.Document(id=p.id, content=p.text, meta={**p.metadata, "title": p.title}) for p in PASSAGES]


def as_pairs(output):
    return [(document.id, document.score) for document in output["documents"]]


class TestEmbedders:
    def test_the_inner_product_of_embeddings_is_the_inner_product(self, indexed, folder):
        embedded = integration.D2LLMDocumentEmbedder(folder, **FLOAT32).run(
            [haystack.Document(content=text) for text in TEXTS]
        )["documents"]
        assert [document.content for document in embedded] == TEXTS
        vectors = np.array([document.embedding for document in embedded])
        assert vectors.shape == (len(TEXTS), DIM)
        for query in QUERIES:
            vector = integration.D2LLMTextEmbedder(folder, **FLOAT32).run(query)["embedding"]
            np.testing.assert_allclose(vectors @ vector, indexed.dots(query, TEXTS), rtol=1e-5, atol=1e-5)
            assert integration.D2LLMTextEmbedder(folder, task="symmetric", **FLOAT32).run(query)["embedding"] != vector

    def test_titles_are_embedded_and_documents_are_copied(self, documents, indexed, folder):
        embedded = integration.D2LLMDocumentEmbedder(folder, **FLOAT32).run(documents)["documents"]
        expected = indexed.student.encode_passages([passage.full_text for passage in PASSAGES]).vectors
        np.testing.assert_array_equal([document.embedding for document in embedded], expected)
        assert {document.embedding for document in documents} == {None}
        assert integration.D2LLMDocumentEmbedder(folder).run([]) == {"documents": []}

    def test_embedders_work_with_haystacks_own_retriever(self, documents, indexed, folder):
        from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
        from haystack.document_stores.in_memory import InMemoryDocumentStore

        store = InMemoryDocumentStore(embedding_similarity_function="dot_product")
        store.write_documents(integration.D2LLMDocumentEmbedder(folder, **FLOAT32).run(documents)["documents"])
        pipeline = haystack.Pipeline()
        pipeline.add_component("embedder", integration.D2LLMTextEmbedder(folder, **FLOAT32))
        pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=8, scale_score=False))
        pipeline.connect("embedder.embedding", "retriever.query_embedding")
        output = pipeline.run({"embedder": {"text": QUERIES[0]}})["retriever"]
        dots = indexed.dots(QUERIES[0], [passage.full_text for passage in PASSAGES])
        expected = sorted(zip([p.id for p in PASSAGES], dots, strict=True), key=lambda pair: -pair[1])
        assert [document for document, _ in as_pairs(output)] == [passage for passage, _ in expected]
        np.testing.assert_allclose([s for _, s in as_pairs(output)], [s for _, s in expected], rtol=1e-4, atol=1e-5)


class TestRanker:
    @pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
    def test_documents_are_sorted_by_the_students_scores(self, documents, indexed, folder, task):
        output = integration.D2LLMRanker(folder, task=task, **FLOAT32).run(QUERIES[0], documents)
        scores = indexed.scores(QUERIES[0], task)
        assert as_pairs(output) == sorted(scores.items(), key=lambda item: -item[1])
        assert {document.score for document in documents} == {None}

    def test_top_k(self, documents, folder):
        ranker = integration.D2LLMRanker(folder, top_k=2, **FLOAT32)
        assert len(ranker.run(QUERIES[0], documents)["documents"]) == 2
        assert len(ranker.run(QUERIES[0], documents, top_k=5)["documents"]) == 5
        assert ranker.run(QUERIES[0], []) == {"documents": []}

    def test_a_document_that_was_found_twice_is_ranked_once(self, documents, folder):
        """As Haystack's own rankers do: of two with the same id, the one with the higher score remains."""
        ranker = integration.D2LLMRanker(folder, **FLOAT32)
        better = haystack.Document(id=documents[0].id, content=documents[0].content, meta={"from": "b"}, score=0.9)
        worse = haystack.Document(id=documents[0].id, content=documents[0].content, meta={"from": "c"}, score=0.1)
        output = ranker.run(QUERIES[0], [documents[0], better, *documents[1:], worse])["documents"]
        assert sorted(document.id for document in output) == sorted(document.id for document in documents)
        assert next(each for each in output if each.id == better.id).meta == {"from": "b"}

    def test_missing_values_are_no_text(self, documents, folder):
        ranker = integration.D2LLMRanker(folder, **FLOAT32)
        untitled, nan = (
            haystack.Document(id="a", content=TEXTS[0], meta=meta) for meta in ({}, {"title": float("nan")})
        )
        scores = [ranker.run(QUERIES[0], [each])["documents"][0].score for each in (untitled, nan)]
        assert scores[0] == scores[1]

    def test_invalid_requests_are_rejected(self, documents, folder, tmp_path):
        with pytest.raises(InputError, match="top_k is 0"):
            integration.D2LLMRanker(folder, top_k=0)
        with pytest.raises(InputError, match="top_k is 0"):
            integration.D2LLMRanker(folder).run("rain", documents, top_k=0)
        with pytest.raises(InputError, match="document 'empty' has no text"):
            integration.D2LLMRanker(folder).run("rain", [haystack.Document(id="empty")])
        with pytest.raises(ModelNotFoundError):
            integration.D2LLMRanker(str(tmp_path / "nothing")).warm_up()


class TestRetriever:
    def test_results_equal_those_of_the_index(self, indexed, retriever):
        for query in QUERIES:
            found, expected = dict(as_pairs(retriever.run(query))), dict(indexed.found(query))
            assert list(found) == list(expected)
            assert found == pytest.approx(expected, rel=1e-5)  # it may read the query in another engine
        (first,) = retriever.run(TEXTS[5], filters={"field": "id", "operator": "==", "value": "p5"})["documents"]
        metadata = {"title": "the reads", "document_id": "d1", "position": 1, "year": 2005, "language": "en"}
        assert (first.id, first.content, first.meta) == ("p5", TEXTS[5], metadata)

    def test_what_others_write_is_found(self, indexed, retriever):
        text = "a passage that was not there before"
        retriever.run(text)
        indexed.index.upsert([Passage("new", text)])
        try:
            assert "new" in {document.id for document in retriever.run(text)["documents"]}
        finally:
            indexed.index.delete(["new"])

    def test_a_call_overrides_the_retrievers_settings(self, indexed):
        settings = {"filter": "year >= 2002", "sources": ["vectors", "bm25"], "hybrid": 0.5}
        filters = {"field": "meta.year", "operator": "<", "value": 2007}
        configured = integration.D2LLMRetriever(
            str(indexed.index.folder), top_k=3, filters=filters, settings=settings, **FLOAT32
        )
        options = {"filter": "year >= 2002 AND year < 2007", "sources": ("vectors", "bm25"), "hybrid": 0.5}
        assert as_pairs(configured.run(QUERIES[0])) == indexed.found(QUERIES[0], top_k=3, **options)
        output = configured.run(QUERIES[0], top_k=4, filters={"field": "year", "operator": "<", "value": 2006})
        options["filter"] = "year >= 2002 AND year < 2006"
        assert as_pairs(output) == indexed.found(QUERIES[0], top_k=4, **options)

    def test_invalid_settings_are_rejected(self, indexed, retriever, tmp_path):
        folder = str(indexed.index.folder)
        with pytest.raises(InputError, match="top_k is 0"):
            integration.D2LLMRetriever(folder, top_k=0)
        with pytest.raises(InputError, match="no search setting 'topk'; did you mean 'top_k'"):
            integration.D2LLMRetriever(folder, settings={"topk": 3})
        with pytest.raises(InputError, match="top_k, which is an argument of its own"):
            integration.D2LLMRetriever(folder, settings={"top_k": 3})
        with pytest.raises(FilterError, match="colour"):
            retriever.run("rain", filters={"field": "colour", "operator": "==", "value": "red"})
        with pytest.raises(InputError, match="nothing"):
            integration.D2LLMRetriever(str(tmp_path / "nothing")).warm_up()


FILTERS = [
    {"field": "meta.year", "operator": operator, "value": 2004} for operator in ("==", "!=", ">", ">=", "<", "<=")
] + [
    {"field": "meta.year", "operator": "in", "value": [2001, 2005]},
    {"field": "meta.year", "operator": "not in", "value": [2001, 2005]},
    {"field": "meta.language", "operator": "==", "value": "de"},
    {"field": "meta.year", "operator": "==", "value": None},
    {"field": "meta.year", "operator": "!=", "value": None},
    {"field": "meta.year", "operator": "in", "value": [2001, None]},
    {"field": "meta.title", "operator": "==", "value": None},
    {"field": "meta.title", "operator": "not in", "value": ["the reads"]},
    {
        "operator": "NOT",
        "conditions": [
            {"field": "meta.year", "operator": ">", "value": 2003},
            {"field": "meta.language", "operator": "==", "value": "en"},
        ],
    },
    {
        "operator": "OR",
        "conditions": [
            {"field": "meta.title", "operator": "==", "value": "the reads"},
            {
                "operator": "AND",
                "conditions": [
                    {"field": "meta.year", "operator": "<", "value": 2006},
                    {"operator": "NOT", "conditions": [{"field": "meta.year", "operator": "<", "value": 2004}]},
                ],
            },
        ],
    },
]


class TestFilters:
    @pytest.mark.parametrize("filters", FILTERS, ids=str)
    def test_filters_match_the_same_documents_as_in_haystack(self, documents, retriever, filters):
        matches = haystack.utils.filters.document_matches_filter
        for document in documents:  # those without a title have none in Haystack
            document.meta = {name: value for name, value in document.meta.items() if value != ""}
        expected = {document.id for document in documents if matches(filters, document)}
        assert 0 < len(expected) < len(documents)
        assert {document for document, _ in as_pairs(retriever.run("rain", filters=filters))} == expected

    def test_a_list_without_values_matches_nothing_and_its_negation_everything(self, retriever):
        none, every = ({"field": "meta.year", "operator": operator, "value": []} for operator in ("in", "not in"))
        assert as_pairs(retriever.run("rain", filters=none)) == []
        assert len(as_pairs(retriever.run("rain", filters=every))) == len(as_pairs(retriever.run("rain")))

    def test_fields_of_metadata_may_be_named_like_those_of_haystacks_documents(self):
        assert as_condition({"field": "meta.score", "operator": ">", "value": 1}).startswith('("score" > 1 ')

    def test_numbers_of_numpy(self):
        for value, written in ((np.float64(3.5), "3.5"), (np.int64(4), "4"), (np.bool_(True), "TRUE")):
            assert f'("a" = {written} ' in as_condition({"field": "a", "operator": "==", "value": value})

    def test_quotes_are_escaped(self):
        condition = as_condition({"field": 'a"b', "operator": "==", "value": "it's"})
        assert condition == """("a""b" = 'it''s' AND NOT ("a""b" IS NULL))"""

    @pytest.mark.parametrize(
        ("filters", "message"),
        [
            ({"field": "a"}, "give field, operator and value"),
            ({"field": "a", "operator": "~", "value": 1}, "no operator '~'"),
            ({"field": "content", "operator": "==", "value": "x"}, "'content' cannot be used"),
            ({"field": "a", "operator": "in", "value": "x"}, "needs a list"),
            ({"operator": "AND", "conditions": 5}, "AND needs a list of conditions"),
            ({"field": "a", "operator": ">", "value": [1]}, "is compared with"),
            ({"field": "a", "operator": ">", "value": None}, "is compared with None"),
            ({"operator": "AND", "conditions": []}, "AND has no conditions"),
            ("year > 2000", "a dictionary is needed, but str"),
        ],
    )
    def test_invalid_filters_are_rejected(self, filters, message):
        with pytest.raises(FilterError, match=message):
            as_condition(filters)


class TestPipelines:
    def test_a_pipeline_survives_serialization(self, indexed, folder, retriever):
        pipeline = haystack.Pipeline()
        pipeline.add_component("retriever", retriever)
        pipeline.add_component("ranker", integration.D2LLMRanker(folder, task="symmetric", top_k=3, **FLOAT32))
        pipeline.connect("retriever.documents", "ranker.documents")
        data = {"retriever": {"query": QUERIES[1]}, "ranker": {"query": QUERIES[1]}}
        output = as_pairs(pipeline.run(data)["ranker"])
        scores = sorted(indexed.scores(QUERIES[1], "symmetric").items(), key=lambda item: -item[1])
        assert [document for document, _ in output] == [passage for passage, _ in scores[:3]]
        np.testing.assert_allclose([score for _, score in output], [score for _, score in scores[:3]], rtol=1e-5)
        restored = haystack.Pipeline.loads(pipeline.dumps(), allowed_modules=["d2llm.*"])
        assert as_pairs(restored.run(data)["ranker"]) == output
        assert as_pairs(asyncio.run(restored.run_async(data))["ranker"]) == output

    @pytest.mark.parametrize(
        "make_component",
        [
            lambda path: integration.D2LLMTextEmbedder(path, task="symmetric", **FLOAT32),
            lambda path: integration.D2LLMDocumentEmbedder(path, **FLOAT32),
            lambda path: integration.D2LLMRanker(path, top_k=None, task="symmetric", **FLOAT32),
            lambda path: integration.D2LLMRetriever(
                path, top_k=3, filters=FILTERS[0], settings={"sources": ["bm25"]}, student="s", **FLOAT32
            ),
        ],
    )
    def test_every_component_can_be_serialized(self, make_component):
        component = make_component("a/folder")
        serialized = component.to_dict()
        assert serialized["type"] == f"d2llm.integrations.haystack.{type(component).__name__}"
        assert type(component).from_dict(serialized).to_dict() == serialized
        assert serialized["init_parameters"]["device"] == "cpu"

    def test_components_share_a_student_while_one_holds_it(self, folder):
        from d2llm.integrations.haystack import _loaded

        embedder, ranker = integration.D2LLMTextEmbedder(folder, **FLOAT32), integration.D2LLMRanker(folder, **FLOAT32)
        embedder.warm_up()
        ranker.warm_up()
        key = (folder, "cpu", "float32")
        assert embedder._ready() is ranker._ready() is _loaded[key]
        del embedder, ranker
        gc.collect()
        assert key not in _loaded
