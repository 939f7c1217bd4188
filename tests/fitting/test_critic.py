"""The critic: what it keeps, what it rejects and why, and what a teacher changes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from d2llm.core import progress
from d2llm.core.errors import OutOfTimeError
from d2llm.core.types import TASKS, Passage
from d2llm.evaluation import pool_scores
from d2llm.fitting.critic import CriticSettings, review_queries
from d2llm.fitting.report import audit_page
from d2llm.fitting.write_queries import Draft, DraftStore, passage_hash
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import TeacherScores, load_teacher, recorded_teacher
from d2llm.recipe.recipe import named_teacher
from d2llm.retrieval.index import Index
from list_endpoint import list_teacher
from tiny_models import TEXTS, tiny_student_config, write_tiny_model

PASSAGES = [Passage(f"p{number}", text) for number, text in enumerate(TEXTS)]
REPEATED = Passage("p0-again", TEXTS[0] + "!")


class TableTeacher:
    """Gives pairs log-odds from a table, 1 by default, and counts them."""

    fingerprint = "table"

    def __init__(self, log_odds):
        self.log_odds = log_odds
        self.num_scored = 0

    def prompt_fingerprint(self, task):
        return f"table-{TASKS.index(task)}"

    def score_pairs(self, pairs, task, *, with_features=False, advance=None):
        del task, with_features
        self.num_scored += len(pairs)
        if advance is not None:
            advance(len(pairs))
        values = np.array([self.log_odds.get(pair, 1.0) for pair in pairs], np.float32)
        return TeacherScores(values, None, num_truncated=0, num_tokens=0)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    model = write_tiny_model(root / "model", "bert")
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    index = Index.create(root / "index", student)
    index.add([*PASSAGES, REPEATED])
    return index


@pytest.fixture
def drafts(tmp_path):
    """A function that stores queries, by passage, and returns the store."""

    def store(queries, kind="question"):
        drafts = DraftStore(tmp_path, "writer")
        by_id = {passage.id: passage for passage in PASSAGES}
        drafts.add(Draft(passage_hash(by_id[name]), kind, tuple(texts), 10, 5) for name, texts in queries.items())
        return drafts

    return store


def review(drafts, index, **options):
    return review_queries(drafts, [*PASSAGES, REPEATED], index, **options)


def test_queries_that_find_their_passage_are_kept_with_its_repetition(drafts, index):
    result = review(drafts({"p0": ["where did the cat sleep"]}), index, settings=CriticSettings(depth=9))
    [kept] = result.kept
    assert kept.positives == ("p0", "p0-again")
    assert kept.written.passage_id == "p0"
    assert 1 <= kept.rank <= 9
    assert result.rejected == ()


def test_the_task_that_was_written_with_a_query_takes_no_part_in_the_review(drafts, index):
    store = drafts({"p0": ["task: Find a passage about dogs | query: where did the cat sleep"]})
    [kept] = review(store, index, settings=CriticSettings(depth=9)).kept
    assert kept.written.text == "where did the cat sleep"
    assert kept.written.instruction == "task: Find a passage about dogs | query: "


def test_queries_that_do_not_find_their_passage_are_rejected(drafts, index):
    query = "where did the cat sleep"
    [ranking] = index.search([query], top_k=9)
    last = next(entry.passage.id for entry in reversed(ranking.passages) if entry.passage.id != "p0-again")
    result = review(drafts({last: [query]}), index, settings=CriticSettings(depth=3))
    assert result.kept == ()
    assert result.reasons == {"not found again": 1}
    assert "among the first 3" in result.rejected[0].detail


def test_a_query_that_words_find_is_kept_before_the_score_counts_words(drafts, index):
    queries = {passage.id: f"which {' '.join(passage.text.split()[-3:])}" for passage in PASSAGES[1:]}
    rankings = index.search(list(queries.values()), top_k=3)
    found = [[entry.passage.id for entry in ranking.passages] for ranking in rankings]
    missed = {name: query for (name, query), names in zip(queries.items(), found, strict=True) if name not in names}
    result = review(drafts({name: [query] for name, query in missed.items()}), index, settings=CriticSettings(depth=3))
    assert result.kept  # by the score alone, the first three have none of them


def test_rules_and_repetitions_come_first_and_are_counted(drafts, index):
    written = drafts({
        "p1": ["which animal runs fast", "Which animal runs fast?", "dog"],
        "p2": [TEXTS[2], "what does this passage say", "which animal runs fast"],
    })  # fmt: skip
    result = review(written, index, settings=CriticSettings(depth=9))
    assert [query.written.text for query in result.kept] == ["which animal runs fast"]
    assert result.reasons == {"repeated": 2, "too short": 1, "copied": 1, "about the text": 1}


def test_a_teacher_adds_positives_and_rejects_unanswered_queries(drafts, index, tmp_path):
    queries = {"p1": ["which animal runs fast"], "p2": ["what falls on the roof"]}
    full = {passage.id: passage.full_text for passage in PASSAGES}
    [ranking] = index.search(["which animal runs fast"], top_k=9)
    other = next(entry.passage.id for entry in ranking.passages if entry.passage.id not in ("p1", "p0-again"))
    log_odds = {(queries["p1"][0], full[name]): -3.0 for name in full} | {
        (queries["p1"][0], full["p1"]): 2.0,
        (queries["p1"][0], full[other]): 2.5,
        (queries["p2"][0], full["p2"]): -0.5,
        (queries["p1"][0], REPEATED.text): -3.0,
    }
    teacher = TableTeacher(log_odds)
    options = {"teacher": teacher, "label_store": tmp_path / "labels", "settings": CriticSettings(depth=9)}
    result = review(drafts(queries), index, **options)
    [kept] = result.kept
    assert (kept.positives, kept.log_odds) == (("p1", other), 2.0)
    assert result.reasons == {"not answered": 1}
    assert (result.num_unscored, teacher.num_scored) == (0, 12)
    again = review(DraftStore(tmp_path, "writer"), index, **options)
    assert (again.kept, teacher.num_scored) == (result.kept, 12)


def test_a_query_that_the_teacher_has_no_time_to_read_is_kept(drafts, index, tmp_path, monkeypatch):
    """What it has read by then counts, in the next call too."""

    def check_time():
        if teacher.num_scored > 6:  # while it reads the second query
            raise OutOfTimeError

    queries = {"p1": ["which animal runs fast"], "p2": ["what falls on the roof"]}
    own = [(queries[name][0], PASSAGES[number].full_text) for number, name in ((1, "p1"), (2, "p2"))]
    teacher = TableTeacher(dict.fromkeys(own, 5.0))
    options = {"teacher": teacher, "label_store": tmp_path / "labels", "settings": CriticSettings(depth=9)}
    written = drafts(queries)
    monkeypatch.setattr(pool_scores, "_PAIRS_AT_ONCE", 1)  # one query at a time
    with monkeypatch.context() as patch:
        patch.setattr(progress, "check_time", check_time)
        hurried = review(written, index, **options)
    assert (len(hurried.kept), hurried.num_unscored) == (2, 1)
    assert sorted(query.log_odds or 0.0 for query in hurried.kept) == [0.0, 5.0]
    teacher.num_scored = 0
    assert [query.log_odds for query in review(written, index, **options).kept] == [5.0, 5.0]
    assert teacher.num_scored == 6


def test_a_query_without_a_grade_is_kept_as_if_there_were_no_teacher(drafts, index, tmp_path):
    written = drafts({"p1": ["which animal runs fast"], "p2": ["what falls on the roof"]})
    [ranking] = index.search(["what falls on the roof"], top_k=9)
    best = next(entry.passage for entry in ranking.passages if entry.passage.id != "p2")
    texts = [PASSAGES[2].full_text, best.full_text]
    lists = tmp_path / "lists.jsonl"
    lists.write_text(json.dumps({"query": "what falls on the roof", "passages": texts, "grades": [80, 85]}))
    teacher = load_teacher(recorded_teacher(named_teacher("graded:large"), lists))
    options = {"label_store": tmp_path / "labels", "settings": CriticSettings(depth=9, num_scored=8)}
    result = review(written, index, teacher=teacher, **options)
    unread, read = sorted(result.kept, key=lambda query: query.written.passage_id)
    assert (unread.positives, unread.log_odds) == (("p1",), None)
    assert (read.positives, read.log_odds) == (("p2", best.id), pytest.approx(10 / 12))
    assert (result.num_ungraded, result.num_unscored) == (1, 0)


def test_a_teacher_that_ranks_is_not_shown_a_single_passage(drafts, index, tmp_path):
    written = drafts({"p1": ["which animal runs fast"]})
    with list_teacher(tmp_path, "listwise") as (file, endpoint):
        teacher = load_teacher(named_teacher(str(file)))
        options = {"teacher": teacher, "label_store": tmp_path / "labels"}
        alone = review(written, index, settings=CriticSettings(depth=9, num_scored=0), **options)
        assert len(endpoint.requests) == 1  # the trial
        result = review(written, index, settings=CriticSettings(depth=9, num_scored=3), **options)
    assert [(query.log_odds, query.positives) for query in alone.kept] == [(None, ("p1",))]
    assert alone.num_unscored == 0
    assert [query.log_odds is None for query in result.kept] == [False]


def test_a_query_that_many_passages_answer_is_too_general(drafts, index, tmp_path):
    teacher = TableTeacher({})  # every passage is as relevant as the own one
    settings = CriticSettings(depth=9, num_scored=8, max_positives=3)
    written = drafts({"p1": ["which animal runs fast"]})
    result = review(written, index, teacher=teacher, label_store=tmp_path / "labels", settings=settings)
    assert result.reasons == {"too general": 1}
    assert "9 passages answer it" in result.rejected[0].detail


def test_the_audit_page_shows_kept_and_rejected_queries_escaped(drafts, index):
    written = drafts({"p1": ["which <b>animal</b> runs fast", "dog"]})
    result = review(written, index, settings=CriticSettings(depth=9))
    page = audit_page(result, {passage.id: passage.full_text for passage in PASSAGES})
    assert "which &lt;b&gt;animal&lt;/b&gt; runs fast" in page
    assert "Rejected: too short" in page
    assert "a dog runs fast" in page
