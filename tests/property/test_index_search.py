from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2llm.core.types import Passage
from d2llm.ops.selection import top_rows
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore
from examples import examples
from fake_models import DotStudent, FakeScorer, FakeStudent, PreparedDotStudent
from searching import search

WORDS = ["cat", "dog", "fish", "bird", "horse", "sleeps", "runs", "swims", "flies", "eats"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)


@pytest.fixture(scope="module")
def student():
    return FakeStudent()


@pytest.fixture(scope="module")
def index(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "i"
    generator = np.random.default_rng(7)
    # Two of ten words: many passages differ only in the order of their words, so ties occur.
    encode([Passage(f"{n}", " ".join(generator.choice(WORDS, 2))) for n in range(150)], student, folder)
    return Index.open(folder).view


def ranked_hits(index, student, text, **arguments):
    (ranking,) = search(index, student, [text], **arguments)
    return [(hit.rank, hit.passage.id, hit.score) for hit in ranking.passages]


@settings(max_examples=examples(30))
@given(text=texts, top_k=st.integers(1, 160), exact=st.booleans())
def test_top_k_is_a_prefix_of_top_k_plus_one(index, student, text, top_k, exact):
    shorter = ranked_hits(index, student, text, top_k=top_k, exact=exact)
    longer = ranked_hits(index, student, text, top_k=top_k + 1, exact=exact)
    assert shorter == longer[:top_k]


@settings(max_examples=examples(30))
@given(text=texts, top_k=st.integers(1, 160), num_candidates=st.integers(150, 400))
def test_enough_candidates_give_the_exact_scan(index, student, text, top_k, num_candidates):
    proposed = ranked_hits(index, student, text, top_k=top_k, num_candidates=num_candidates)
    assert proposed == ranked_hits(index, student, text, top_k=top_k, exact=True)


@pytest.fixture(scope="module")
def edited_index(tmp_path_factory):
    index = Index.create(tmp_path_factory.mktemp("living") / "i", DotStudent(), vector_format="float32")
    generator = np.random.default_rng(8)
    index.upsert(Passage(f"{n}", " ".join(generator.choice(WORDS, 2)), metadata={"n": n % 3}) for n in range(200))
    index.delete([str(n) for n in range(0, 200, 9)])
    return index


@settings(max_examples=examples(40))
@given(
    queries=st.lists(texts, min_size=1, max_size=40),
    top_k=st.integers(1, 210),
    num_candidates=st.sampled_from([210, 400]),
    condition=st.sampled_from([None, "n = 1", "n > 5"]),
    explain=st.booleans(),
)
def test_a_student_scored_by_its_inner_product_is_ranked_by_the_scan(
    edited_index, queries, top_k, num_candidates, condition, explain
):
    options = {"top_k": top_k, "num_candidates": num_candidates, "filter": condition, "explain": explain}
    slow = search(edited_index.view, DotStudent(), queries, **options)
    with mock.patch.object(FakeScorer, "__call__", side_effect=AssertionError("scored again")):
        fast = search(edited_index.view, PreparedDotStudent(), queries, **options)
    assert [ranking.query.text for ranking in fast] == queries
    for actual, expected in zip(fast, slow, strict=True):
        assert actual.passages == expected.passages
        assert actual.num_candidates == len(actual.passages)
        assert {"encode", "candidates", "score"} == set(actual.seconds)


@pytest.mark.parametrize(
    "options", [{"hybrid": 0.5}, {"sources": ("vectors", "bm25")}, {"group": "best"}, {"sources": ("bm25",)}]
)
def test_options_that_need_more_candidates_get_them(edited_index, options):
    queries = ["cat sleeps", "dog fish runs"]
    for fast, slow in zip(
        search(edited_index.view, PreparedDotStudent(), queries, top_k=4, **options),
        search(edited_index.view, DotStudent(), queries, top_k=4, **options),
        strict=True,
    ):
        assert fast.passages == slow.passages
        assert fast.num_candidates == slow.num_candidates > 4


@given(
    scores=st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, np.inf, -np.inf]), max_size=30),
    top_k=st.integers(0, 35),
    shuffle=st.randoms(use_true_random=False),
)
def test_top_rows_equals_sorting_everything(scores, top_k, shuffle):
    ids = [f"{n:02d}" for n in range(len(scores))]
    shuffle.shuffle(ids)
    expected = sorted(range(len(scores)), key=lambda row: (-scores[row], ids[row]))[:top_k]
    assert top_rows(np.array(scores, np.float32), top_k, lambda rows: [ids[row] for row in rows]).tolist() == expected


texts_of_any_kind = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(
        st.tuples(texts_of_any_kind.filter(bool), texts_of_any_kind, texts_of_any_kind),
        min_size=1,
        max_size=12,
        unique_by=lambda content: content[0],
    ),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    data=st.data(),
)
def test_written_passages_and_vectors_are_read_back(tmp_path_factory, contents, dtype, data):
    passages = [Passage(name, text, title) for name, text, title in contents]
    # Multiples of 1/8 below 16 are exact in every dtype.
    eighths = st.integers(-127, 127).map(lambda n: n / 8)
    vectors = np.array([data.draw(st.lists(eighths, min_size=3, max_size=3)) for _ in passages], np.float32)
    folder = tmp_path_factory.mktemp("roundtrip") / "i"
    store = IndexStore.create(folder, StoredSpec(student="s", dim=3, vector_format=dtype))
    store.write(store.compare(passages), vectors)
    index = Index.open(folder).view
    rows = index.rows([passage.id for passage in passages])
    assert index.passages(rows) == passages
    np.testing.assert_array_equal(index.vectors(rows), vectors)
