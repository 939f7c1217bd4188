import numpy as np
import pytest

from d2llm.core.errors import IndexMismatchError, InputError, ModelError
from d2llm.core.types import Passage, Query
from d2llm.ops.rereading import StudentError
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings
from fake_models import FakeStudent, FakeTeacher, PreparedDotStudent
from rerankers import cascade
from searching import search

WORDS = "cat dog fish bird horse sleeps runs swims flies eats red green blue small large".split()  # noqa: SIM905
PASSAGES = [Passage(f"p{n:03d}", " ".join(np.random.default_rng(n).choice(WORDS, size=3 + n % 3))) for n in range(120)]
QUERIES = ["small red bird flies", "dog eats fish"]


@pytest.fixture(scope="module")
def student():
    return FakeStudent()


@pytest.fixture(scope="module")
def index(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "i"
    encode(PASSAGES, student, folder, vector_format="float32")
    return Index.open(folder).view


def brute_force(student, text, task="asymmetric"):
    """(id, score) of every passage by the definition of the fake student's score, in float64, best first."""
    query = student.encode_queries([text]).vectors[0].astype(np.float64)
    vectors = student.encode_passages([p.full_text for p in PASSAGES]).vectors.astype(np.float64)
    sign = 1 if task == "asymmetric" else -1
    scores = 2 * vectors @ query + sign * np.tanh(vectors[:, 0] * query[1])
    return sorted(zip([p.id for p in PASSAGES], scores, strict=True), key=lambda pair: (-round(pair[1], 4), pair[0]))


def pairs(ranking):
    return [(hit.passage.id, hit.score) for hit in ranking.passages]


@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("exact", [True, False])
def test_ranking_equals_brute_force(index, student, exact, task):
    rankings = search(index, student, QUERIES, task=task, top_k=7, num_candidates=60, exact=exact)
    for text, ranking in zip(QUERIES, rankings, strict=True):
        expected = brute_force(student, text, task)[:7]
        assert [passage_id for passage_id, _ in pairs(ranking)] == [passage_id for passage_id, _ in expected]
        np.testing.assert_allclose([s for _, s in pairs(ranking)], [s for _, s in expected], rtol=1e-5)
        assert [hit.rank for hit in ranking.passages] == [1, 2, 3, 4, 5, 6, 7]
        assert ranking.num_candidates == (120 if exact else 60)


@pytest.mark.parametrize("exact", [True, False])
def test_a_query_is_prepared_once(exact, tmp_path, monkeypatch):
    encode(PASSAGES, PreparedDotStudent(), tmp_path / "i", vector_format="float32")
    prepare, tasks = PreparedDotStudent.prepare, []

    def counting(student, query_vector, task):
        tasks.append(task)
        return prepare(student, query_vector, task)

    monkeypatch.setattr(PreparedDotStudent, "prepare", counting)
    search(Index.open(tmp_path / "i").view, PreparedDotStudent(), QUERIES, exact=exact)
    assert len(tasks) == len(QUERIES)


@pytest.mark.parametrize("changes", [{}, {"exact": True}, {"hybrid": 0.5}, {"group": "sum", "top_k": 4}])
def test_rank_ids_gives_the_same_ranking_as_rank(index, student, changes):
    searcher = Searcher(index, student, SearchSettings(**{"top_k": 7, **changes}))
    for ranking, id_ranking in zip(searcher.rank(QUERIES), searcher.rank_ids(QUERIES), strict=True):
        assert (id_ranking.query, id_ranking.truncated) == (ranking.query, ranking.truncated)
        assert list(id_ranking.passages) == pairs(ranking)


def test_rankings_have_texts_dot_scores_and_timings(index, student):
    (ranking,) = search(index, student, [Query("mine", QUERIES[0])], top_k=3)
    assert ranking.query == Query("mine", QUERIES[0])
    query = student.encode_queries([QUERIES[0]]).vectors[0]
    by_id = {passage.id: passage for passage in PASSAGES}
    for hit in ranking.passages:
        assert hit.passage == by_id[hit.passage.id]
        vector = student.encode_passages([hit.passage.full_text]).vectors[0]
        assert hit.dot_score == pytest.approx(2 * float(vector @ query), rel=1e-5)
        assert abs(hit.score - hit.dot_score) <= 1
    assert set(ranking.seconds) == {"encode", "candidates", "score"}
    assert all(value >= 0 for value in ranking.seconds.values())


def test_plain_text_queries_get_numbers_as_ids(index, student):
    assert [ranking.query.id for ranking in search(index, student, QUERIES)] == ["1", "2"]
    assert search(index, student, []) == []


def test_only_the_candidates_are_scored(index, student):
    (ranking,) = search(index, student, QUERIES[:1], top_k=2, num_candidates=2)
    dot_queries = index.segments[0].scan(
        student.query_vectors(student.encode_queries(QUERIES[:1]).vectors, "asymmetric")[0], 2
    )
    assert {passage_id for passage_id, _ in pairs(ranking)} == set(index.ids(dot_queries.rows))


def test_top_k_beyond_the_corpus_returns_all(index, student):
    for exact in (True, False):
        (ranking,) = search(index, student, QUERIES[:1], top_k=5000, exact=exact)
        assert [passage_id for passage_id, _ in pairs(ranking)] == [
            passage_id for passage_id, _ in brute_force(student, QUERIES[0])
        ]


def test_candidates_of_documents_are_limited(student, tmp_path):
    passages = [Passage(p.id, p.text, document_id=f"d{n // 60}", position=n % 60) for n, p in enumerate(PASSAGES)]
    encode(passages, student, tmp_path / "i")
    index = Index.open(tmp_path / "i").view
    options = {"group": "best", "top_k": 3, "num_candidates": 6}
    for limit, num_scored in ((None, 120), (50, 50), (6, 6), (1, 6)):
        (ranking,) = search(index, student, QUERIES[:1], max_num_candidates=limit, **options)
        assert ranking.num_candidates == num_scored
    both = options | {"sources": ("vectors", "bm25"), "hybrid": 0.5}
    (ranking,) = search(index, student, QUERIES[:1], max_num_candidates=50, **both)
    assert 6 <= ranking.num_candidates <= 50


def test_rows_scored_in_blocks_get_the_same_scores(index, student, monkeypatch):
    settings = {"num_candidates": 100, "top_k": 100, "score_features": {"bm25": 0.3}}
    (together,) = search(index, student, QUERIES[:1], **settings)
    monkeypatch.setattr("d2llm.models.row_features._SCORED_AT_ONCE", 7)
    (in_blocks,) = search(index, student, QUERIES[:1], **settings)
    assert pairs(in_blocks) == pairs(together)


def test_top_k_above_num_candidates_scores_top_k(index, student):
    (ranking,) = search(index, student, QUERIES[:1], top_k=30, num_candidates=10)
    assert len(ranking.passages) == ranking.num_candidates == 30


def test_head_without_inner_product_scans_everything(tmp_path):
    student = FakeStudent(head="paper")
    encode(PASSAGES, student, tmp_path / "i", vector_format="float32")
    (ranking,) = search(Index.open(tmp_path / "i").view, student, QUERIES[:1], top_k=4, num_candidates=4)
    assert ranking.num_candidates == 120
    assert [passage_id for passage_id, _ in pairs(ranking)] == [
        passage_id for passage_id, _ in brute_force(student, QUERIES[0])[:4]
    ]
    assert all(hit.dot_score is None for hit in ranking.passages)


def test_fusion_for_a_head_without_inner_product_includes_what_words_find(tmp_path):
    student = FakeStudent(head="paper")
    encode(PASSAGES, student, tmp_path / "i", vector_format="float32")
    index = Index.open(tmp_path / "i").view
    for query in ("small dog", "green horse sleeps"):
        (by_student,) = search(index, student, [query], top_k=3)
        (fused,) = search(index, student, [query], top_k=3, num_candidates=3, hybrid=1.0)
        ids = [hit.passage.id for hit in fused.passages]
        assert ids == index.ids(index.match(query, 3).rows)
        assert not set(ids) <= {hit.passage.id for hit in by_student.passages}
        assert fused.certificate is None  # it would prove the student's order


def test_the_default_task_is_that_of_the_index(tmp_path, student):
    encode(PASSAGES, student, tmp_path / "i", vector_format="float32", task="symmetric")
    index = Index.open(tmp_path / "i").view
    (default,) = search(index, student, QUERIES[:1])
    (symmetric,) = search(index, student, QUERIES[:1], task="symmetric")
    (asymmetric,) = search(index, student, QUERIES[:1], task="asymmetric")
    assert pairs(default) == pairs(symmetric) != pairs(asymmetric)


def test_equal_scores_are_ordered_by_id(tmp_path, student):
    passages = [Passage(name, "the same") for name in "dbca"]
    encode(passages, student, tmp_path / "i")
    index = Index.open(tmp_path / "i").view
    for exact in (True, False):
        (ranking,) = search(index, student, ["the same"], top_k=3, exact=exact)
        assert [passage_id for passage_id, _ in pairs(ranking)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("queries", "arguments", "message"),
    [
        (["cat"], {"top_k": 0}, "top_k is 0"),
        (["cat"], {"num_candidates": 0}, "num_candidates is 0"),
        (["cat", " \n"], {}, "query '2' has no text"),
        ([Query("q7", "")], {}, "query 'q7' has no text"),
    ],
)
def test_invalid_requests_are_rejected(index, student, queries, arguments, message):
    with pytest.raises(InputError, match=message):
        search(index, student, queries, **arguments)


def test_an_index_of_another_student_is_rejected(index):
    with pytest.raises(IndexMismatchError, match=r"fake-student.*stranger"):
        search(index, FakeStudent(fingerprint="stranger"), QUERIES)


@pytest.mark.parametrize("exact", [True, False])
def test_nan_scores_are_an_error(index, exact):
    class NanStudent(FakeStudent):
        def score(self, query_vector, passage_vectors, task):
            return np.full(len(passage_vectors), np.nan, np.float32)

    with pytest.raises(ModelError, match="query '1': 120 of 120 scores are NaN"):
        search(index, NanStudent(), ["cat"], exact=exact)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("topk", "top_k"), ("candidates", "num_candidates"), ("limit", "top_k"), ("source", "sources")],
)
def test_unknown_settings_suggest_the_intended_one(index, student, name, suggestion):
    with pytest.raises(InputError, match=f"no search setting '{name}'; did you mean '{suggestion}'"):
        search(index, student, QUERIES, **{name: 3})
    with pytest.raises(InputError, match="no search setting 'zzzz'; there are: task, top_k"):
        search(index, student, QUERIES, zzzz=3)


class TestSelection:
    """Diverse and distinct results, selected from a ranking."""

    def test_without_a_setting_nothing_is_selected(self, index, student):
        (ranking,) = search(index, student, QUERIES[:1])
        assert ranking.selection is None

    @pytest.mark.parametrize(
        "changes", [{}, {"exact": True}, {"hybrid": 0.5}, {"sources": ("bm25",)}, {"group": "best"}, {"top_k": 500}]
    )
    def test_weight_one_gives_the_ranking_itself(self, index, student, changes):
        changes = {"top_k": 7, **changes}
        (plain,) = search(index, student, QUERIES[:1], **changes)
        (ranking,) = search(index, student, QUERIES[:1], mmr=1.0, **changes)
        assert ranking.passages == plain.passages
        assert ranking.selection.ranks == tuple(range(1, len(plain.passages) + 1))
        assert ranking.selection.num_near_duplicates == 0

    @pytest.mark.parametrize("exact", [True, False])
    def test_results_are_those_of_the_longer_ranking(self, index, student, exact):
        (longer,) = search(index, student, QUERIES[:1], top_k=40, exact=exact)
        options = {"mmr": 0.3, "near_duplicates": 0.9, "select_from": 40, "exact": exact}
        (ranking,) = search(index, student, QUERIES[:1], top_k=6, **options)
        selection = ranking.selection
        assert [hit.rank for hit in ranking.passages] == [1, 2, 3, 4, 5, 6]
        assert pairs(ranking) == [pairs(longer)[rank - 1] for rank in selection.ranks]
        assert selection.selected_from == 40
        assert selection.ranks[0] == 1
        assert selection.ranks != tuple(sorted(selection.ranks))
        assert ranking.certificate == longer.certificate  # it proves the longer ranking

    def test_near_duplicates_are_counted_and_replaced(self, tmp_path, student):
        texts = ["red cat", "cat red", "red  cat", "red dog", "dog red", "blue fish"]
        encode([Passage(f"p{n}", text) for n, text in enumerate(texts)], student, tmp_path / "i")
        index = Index.open(tmp_path / "i").view
        (ranking,) = search(index, student, ["red cat"], top_k=3, near_duplicates=1.0)
        assert [hit.passage.id for hit in ranking.passages] == ["p0", "p3", "p5"]
        assert (ranking.selection.selected_from, ranking.selection.num_near_duplicates) == (6, 3)
        assert ranking.selection.ranks == (1, 4, 6)
        (short,) = search(index, student, ["red cat"], top_k=3, near_duplicates=1.0, select_from=3)
        assert [hit.passage.id for hit in short.passages] == ["p0"]
        assert short.selection.num_near_duplicates == 2

    def test_documents_are_selected_by_their_best_passages(self, tmp_path, student):
        texts = {"a": ["red cat", "blue fish"], "b": ["cat red", "green dog"], "c": ["dog eats"]}
        passages = [
            Passage(f"{name}{n}", text, document_id=name, position=n)
            for name, parts in texts.items()
            for n, text in enumerate(parts)
        ]
        encode(passages, student, tmp_path / "i")
        index = Index.open(tmp_path / "i").view
        (ranking,) = search(index, student, ["red cat"], group="best", near_duplicates=1.0)
        assert [hit.document.id for hit in ranking.passages] == ["a", "c"]
        assert [hit.passage.id for hit in ranking.passages] == ["a0", "c0"]
        assert [passage.id for passage, _ in ranking.passages[0].document.others] == ["a1"]

    @pytest.mark.parametrize("changes", [{"mmr": 0.5}, {"near_duplicates": 0.9}])
    def test_documents_are_selected_from_as_many_as_set(self, tmp_path, student, changes):
        passages = [Passage(p.id, p.text, document_id=f"d{n // 3}", position=n % 3) for n, p in enumerate(PASSAGES)]
        encode(passages, student, tmp_path / "i")
        index = Index.open(tmp_path / "i").view
        options = {"group": "best", "top_k": 4, "num_candidates": 4}
        (ranking,) = search(index, student, QUERIES[:1], select_from=25, **options, **changes)
        (all_candidates,) = search(
            index, student, QUERIES[:1], select_from=25, **options | {"num_candidates": 120}, **changes
        )
        assert ranking.selection == all_candidates.selection
        assert ranking.selection.selected_from == 25

    def test_a_teacher_reads_before_the_selection(self, index, student):
        reranker = cascade(FakeTeacher(), StudentError(1.0, 0.0, 1.0), num_passages=30, min_gain=0.0)
        options = {"top_k": 5, "rerank": reranker}
        (longer,) = search(index, student, QUERIES[:1], **options | {"top_k": 25})
        (ranking,) = search(index, student, QUERIES[:1], mmr=0.3, near_duplicates=0.9, **options)
        expected = [longer.passages[rank - 1] for rank in ranking.selection.ranks]
        assert ranking.selection.ranks != (1, 2, 3, 4, 5)
        assert [(hit.passage.id, hit.log_odds, hit.student_rank) for hit in ranking.passages] == [
            (hit.passage.id, hit.log_odds, hit.student_rank) for hit in expected
        ]

    def test_explanations_and_ids_are_those_of_the_results(self, index, student):
        settings = SearchSettings(top_k=6, mmr=0.3, explain=True, neighbours=1)
        searcher = Searcher(index, student, settings)
        (ranking,), (ids,) = searcher.rank(QUERIES[:1]), searcher.rank_ids(QUERIES[:1])
        assert list(ids.passages) == pairs(ranking)
        for hit in ranking.passages:
            assert hit.explanation.dot + hit.explanation.interaction == pytest.approx(hit.score)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mmr": 1.1}, "mmr is 1.1"),
            ({"mmr": float("nan")}, "mmr is nan"),
            ({"near_duplicates": -0.1}, r"near_duplicates is -0\.1"),
            ({"select_from": 20}, "select_from is for mmr and near_duplicates"),
            ({"select_from": 5, "mmr": 0.5}, "select_from is 5, but top_k is 10"),
            ({"max_num_candidates": 0}, "max_num_candidates is 0"),
        ],
    )
    def test_invalid_settings_are_rejected(self, index, student, changes, message):
        with pytest.raises(InputError, match=message):
            search(index, student, QUERIES, **changes)
