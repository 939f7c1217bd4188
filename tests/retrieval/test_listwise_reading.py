"""A search whose first passages a language model ranks by their vectors, sharded or not."""

from __future__ import annotations

import pytest

from d2llm.core.errors import InputError, MismatchError, RecipeError
from d2llm.core.types import Passage
from d2llm.models.backbone import Backbone
from d2llm.models.listwise_reader import ListwiseReader
from d2llm.recipe import BackboneConfig
from d2llm.retrieval.index import Index
from d2llm.retrieval.shard import shard
from fake_models import FakeStudent
from rerankers import listwise
from sharded_index import BoundedStudent, random_passages
from tiny_models import TEXTS, write_tiny_model

QUERY = "apple plum fig"


def new_reader(folder, *, student="fake-student", vector_dim=16, steps=4):
    backbone = Backbone.load(BackboneConfig(model=str(write_tiny_model(folder))), device="cpu", dtype="float32")
    return ListwiseReader(backbone, vector_dim, student, steps=steps).eval()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("listwise")


@pytest.fixture(scope="module")
def reader(workspace):
    return new_reader(workspace / "model")


@pytest.fixture(scope="module")
def index(workspace):
    index = Index.create(workspace / "index", BoundedStudent())
    index.upsert(random_passages(60))
    return index


def ids_of(ranking):
    return [one.passage.id for one in ranking.passages]


def expected_order(index, reader, depth):
    student_ranking = index.search(QUERY, top_k=60)
    ids = ids_of(student_ranking)
    (read,) = reader.rank([QUERY], [index.view.vectors(index.view.rows(ids[:depth]))])
    assert read.order.tolist() != list(range(depth))
    return [ids[position] for position in read.order] + ids[depth:]


@pytest.mark.parametrize("depth", [3, 12])
def test_the_first_passages_are_in_the_decoded_order_and_the_others_below(index, reader, depth):
    expected = expected_order(index, reader, depth)
    ranking = index.search(QUERY, top_k=60, rerank=listwise(reader, depth))
    assert ids_of(ranking) == expected
    assert [one.score for one in ranking.passages] == pytest.approx([1 / rank for rank in range(1, 61)])
    assert [one.log_odds for one in ranking.passages] == [None] * 60
    assert [one.student_rank for one in ranking.passages[depth:]] == list(range(depth + 1, 61))
    report = ranking.reranking
    assert (report.read, report.unsure, report.num_truncated) == (tuple(range(1, depth + 1)), (), 0)
    assert report.moved == tuple((p.student_rank, p.rank) for p in ranking.passages if p.student_rank != p.rank)
    assert ranking.seconds["rerank"] == report.seconds > 0
    assert report.kind == "listwise"
    short = index.search(QUERY, top_k=3, rerank=listwise(reader, depth))
    assert ids_of(short) == expected[:3]


def test_a_sharded_index_gives_the_same_order(index, reader, workspace):
    shard(index.folder, workspace / "shards", 3)
    sharded = Index.open(workspace / "shards", BoundedStudent())
    reranker = listwise(reader, 12)
    ranking = sharded.search(QUERY, top_k=60, rerank=reranker)
    assert ids_of(ranking) == expected_order(index, reader, 12)


def test_equal_passages_are_ranked_by_id(workspace, reader):
    for name, numbers in (("up", range(6)), ("down", reversed(range(6)))):
        index = Index.create(workspace / name, FakeStudent())
        index.upsert([Passage(f"p{n}", TEXTS[0]) for n in numbers])
        ranking = index.search("the cat", rerank=listwise(reader))
        assert ids_of(ranking) == [f"p{n}" for n in range(6)]


def test_a_head_without_an_inner_product_and_an_empty_result(workspace, reader):
    index = Index.create(workspace / "paper", FakeStudent(head="paper"))
    index.upsert([Passage(f"p{n}", text, metadata={"year": n}) for n, text in enumerate(TEXTS)])
    student_ranking = index.search("the cat", top_k=8)
    ranking = index.search("the cat", top_k=8, rerank=listwise(reader, 1))
    assert ids_of(ranking) == ids_of(student_ranking)
    assert index.search("the cat", filter="year > 99", rerank=listwise(reader)).passages == ()


def test_documents_and_diverse_results(index, reader):
    order = expected_order(index, reader, 12)
    documents = index.search(QUERY, top_k=60, group="best", rerank=listwise(reader, 12))
    shown = ids_of(documents)
    assert shown == [passage_id for passage_id in order if passage_id in shown]
    diverse = index.search(QUERY, top_k=5, mmr=0.5, rerank=listwise(reader, 12))
    assert ids_of(diverse)[0] == order[0]


def test_what_does_not_fit_is_refused(index, reader, workspace):
    with pytest.raises(RecipeError, match="num_passages"):
        listwise(reader, 0)
    reranker = listwise(reader)
    for changes in ({"exact": True}, {"hybrid": 0.5}):
        with pytest.raises(InputError, match="leave out exact and hybrid"):
            index.search(QUERY, rerank=reranker, **changes)
    with pytest.raises(InputError, match="cannot be summed as odds"):
        index.search(QUERY, rerank=reranker, group="sum")
    other = new_reader(workspace / "other", student="another")
    with pytest.raises(MismatchError, match="reads vectors of the student another, but the index was made by fake"):
        index.search(QUERY, rerank=listwise(other))
    narrow = new_reader(workspace / "narrow", vector_dim=5)
    with pytest.raises(MismatchError, match="have 16 dimensions"):
        index.search(QUERY, rerank=listwise(narrow))
