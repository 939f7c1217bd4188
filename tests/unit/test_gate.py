"""Trying a teacher on dev lists: which queries and candidates, what is kept, when a gate opens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.recipe import GateConfig, TeacherConfig
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.models.cosine_teacher import CosineTeacher
from d2llm.models.student import Student
from d2llm.ops.measures import per_query_measures
from d2llm.pipeline import gate as verb
from d2llm.pipeline.dev_lists import dev_queries, make_dev_lists
from d2llm.pipeline.gate import GATE_FILE, gate, read_gate
from fake_models import FakeJudgements, FakeStudent, Interruption
from tiny_models import tiny_student_config, write_tiny_model

LETTERS = "abcdefghijkl"
TEACHER = TeacherConfig(model="told")


def everyday(name="everyday"):
    """Twelve dev queries; the words of each point to three passages, one of which is relevant."""
    passages = {
        f"{letter}{n}": Passage(f"{letter}{n}", f"{letter * 4} thing {n}") for letter in LETTERS for n in range(3)
    }
    queries = {f"q{letter}": Query(f"q{letter}", f"{letter * 4} please") for letter in LETTERS}
    queries["none"] = Query("none", "nothing")
    grades = {f"q{letter}": {f"{letter}2": 1, f"{letter}1": 0} for letter in LETTERS} | {"none": {"a0": 0}}
    return Dataset(name, Path(name), passages, queries, {"dev": grades})


class Told:
    """A judge that knows the answers, or takes them for the wrong ones; with ``fail_after`` it stops there."""

    def __init__(self, *, right=True, fingerprint="told", fail_after=None):
        self.fingerprint, self.right, self.fail_after = fingerprint, right, fail_after
        self.asked = 0

    def prompt_fingerprint(self, task):
        return task

    def judge(self, pairs, task, **_):
        if self.fail_after is not None and self.asked >= self.fail_after:
            raise Interruption
        self.asked += len(pairs)
        best = "2" if self.right else "0"
        values = [query[0] == passage[0] and passage.endswith(best) for query, passage in pairs]
        return FakeJudgements(np.array(values, np.float32), 1)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("gate") / "bert", "bert")
    return Student.create(tiny_student_config(model, tuning="frozen"), dtype="float32")


@pytest.fixture
def trial(student, tmp_path, monkeypatch):
    """Runs a gate with a teacher that is told what to say."""

    def run(judge, *, judged=None, **settings):
        monkeypatch.setattr(verb, "load_judge", lambda *_, **__: judge)
        return gate(
            judged or [(everyday(), "asymmetric")],
            tmp_path / "run",
            teacher=TEACHER,
            student=student,
            settings=GateConfig(**{"queries": 12, "depth": 3} | settings),
            show_progress=False,
        )

    return run


def test_the_sample_is_random_and_nested_and_has_two_ends():
    dataset = everyday()
    small, large = ([q.id for q in dev_queries(dataset, num_queries=n, seed=0)] for n in (4, 8))
    assert large[:4] == small
    assert small != sorted(small)
    end = [q.id for q in dev_queries(dataset, num_queries=4, seed=0, from_end=True)]
    assert not {*end} & {*large}
    everything = [q.id for q in dev_queries(dataset, num_queries=50, seed=0)]
    assert sorted(everything) == [f"q{letter}" for letter in LETTERS]  # "none" has no positive
    assert [q.id for q in dev_queries(dataset, num_queries=50, seed=0, from_end=True)] == everything
    assert [q.id for q in dev_queries(dataset, num_queries=50, seed=1)] != everything


@pytest.mark.parametrize("qrels", [{}, {"dev": {"qa": {"a0": 0}}}])
def test_no_dev_query_is_an_error(qrels):
    with pytest.raises(InputError, match=r"dev\.tsv has no query with a positive"):
        dev_queries(dataclasses.replace(everyday(), qrels=qrels), num_queries=3, seed=0)


def test_lists_are_the_union_of_words_and_vectors():
    dataset, student = everyday(), FakeStudent()
    queries = dev_queries(dataset, num_queries=3, seed=0)
    found = make_dev_lists(dataset, "asymmetric", queries, student=student, depth=2, with_positives=False)
    vectors = student.encode_passages([passage.full_text for passage in dataset.passages.values()]).vectors
    for query in queries:
        scores = vectors @ student.encode_queries([query.text]).vectors[0]
        nearest = [list(dataset.passages)[row] for row in np.argsort(-scores)[:2]]
        letter = query.id[1]
        assert found.candidates[query.id][:2] == [f"{letter}0", f"{letter}1"]  # equal words: by id
        assert set(found.candidates[query.id]) == {f"{letter}0", f"{letter}1", *nearest}
    assert found.qrels == {query.id: dataset.qrels["dev"][query.id] for query in queries}


def test_lists_with_positives_leave_out_repeats_of_them():
    dataset = everyday()
    dataset.passages["a0"] = Passage("a0", dataset.passages["a2"].text.upper())
    found = make_dev_lists(
        dataset, "asymmetric", [dataset.queries["qa"]], student=FakeStudent(), depth=3, with_positives=True
    )
    assert found.candidates["qa"][0] == "a2"
    assert "a0" not in found.candidates["qa"]
    assert "a1" in found.candidates["qa"]


def test_a_head_without_an_anchor_proposes_by_cosine():
    dataset = everyday()
    queries = dev_queries(dataset, num_queries=2, seed=0)
    found = make_dev_lists(
        dataset, "asymmetric", queries, student=FakeStudent(head="paper"), depth=2, with_positives=False
    )
    assert all(len(ids) >= 2 for ids in found.candidates.values())


def test_a_teacher_that_knows_opens_and_one_that_misleads_closes(trial, student, tmp_path):
    report = trial(Told())
    (row,) = report.sets
    assert (row.name, row.task, row.num_queries, row.teacher, row.is_open) == ("everyday", "asymmetric", 12, 1.0, True)
    assert report.closed == ()
    # The cosine's figure is that of the student's scores on the same lists.
    dataset = everyday()
    lists = make_dev_lists(
        dataset,
        "asymmetric",
        dev_queries(dataset, num_queries=12, seed=0),
        student=student,
        depth=3,
        with_positives=False,
    )
    cosine = CosineTeacher(student)
    rankings = {}
    for query, ids in lists.candidates.items():
        pairs = [(dataset.queries[query].text, dataset.passages[passage].full_text) for passage in ids]
        scores = dict(zip(ids, cosine.judge(pairs, "asymmetric").log_odds.tolist(), strict=True))
        rankings[query] = sorted(ids, key=lambda passage, scores=scores: (-scores[passage], passage))
    expected = np.mean(list(per_query_measures(rankings, lists.qrels)["nDCG@10"].values()))
    assert row.cosine == pytest.approx(expected)
    assert row.difference == pytest.approx(1 - expected)
    assert report.num_judged == sum(len(ids) for ids in lists.candidates.values())
    assert report.cosine == student.fingerprint

    wrong = trial(Told(right=False, fingerprint="wrong"))
    assert wrong.sets[0].difference < 0
    assert not wrong.sets[0].is_open
    assert wrong.closed == ("everyday",)
    assert read_gate(tmp_path / "run", "told") == {"everyday": True}
    assert read_gate(tmp_path / "run", "wrong") == {"everyday": False}
    assert read_gate(tmp_path / "run", "untried") is None
    assert read_gate(tmp_path / "elsewhere", "told") is None


def test_a_teacher_no_better_than_the_cosine_is_closed(trial, student):
    report = trial(CosineTeacher(student))
    assert (report.sets[0].difference, report.sets[0].p_value, report.sets[0].is_open) == (0, 1, False)


def test_a_task_has_all_queries_of_its_sets(trial):
    judged = [(everyday(), "asymmetric"), (everyday("second"), "asymmetric"), (everyday("third"), "symmetric")]
    report = trial(Told(), judged=judged, queries=6)
    assert [(row.name, row.num_queries) for row in report.sets] == [("everyday", 6), ("second", 6), ("third", 6)]
    assert [(row.name, row.num_queries) for row in report.tasks] == [("asymmetric", 12), ("symmetric", 6)]
    assert report.tasks[0].cosine == pytest.approx((report.sets[0].cosine + report.sets[1].cosine) / 2)
    assert report.tasks[0].p_value < report.sets[0].p_value


def test_judgements_are_kept_when_it_is_stopped(trial, monkeypatch, tmp_path):
    from d2llm.pipeline.evaluation import judging

    monkeypatch.setattr(judging, "_PAIRS_AT_ONCE", 10)
    monkeypatch.setattr(judging, "_WRITE_SECONDS", 0)
    with pytest.raises(Interruption):
        trial(Told(fail_after=20))
    assert not (tmp_path / "run" / GATE_FILE).exists()
    rest, whole = Told(), Told(fingerprint="whole")
    assert trial(rest).sets[0].is_open
    trial(whole)
    assert 0 < rest.asked <= whole.asked - 20
    again = Told()
    assert trial(again).num_judged == again.asked == 0


def test_queries_that_fitted_a_stack_are_counted(trial, monkeypatch):
    monkeypatch.setattr(verb, "stacked_queries", lambda config: {"everyday": frozenset({"qa", "qb", "other"})})
    assert trial(Told()).num_seen == 2


def test_a_foreign_gate_file_is_not_replaced(trial, tmp_path):
    path = tmp_path / "run" / GATE_FILE
    path.parent.mkdir()
    for content, message in (("{", "not valid JSON"), ('{"kind": "door"}', "not what"), ("[]", "not what")):
        path.write_text(content)
        with pytest.raises(DataFormatError, match=message):
            trial(Told())
        assert path.read_text() == content


def test_the_file_says_what_made_it(trial, tmp_path):
    trial(Told(), alpha=0.01)
    found = json.loads((tmp_path / "run" / GATE_FILE).read_text())
    assert (found["kind"], found["format_version"]) == ("gate", 1)
    assert "d2llm" in found["packages"]
    assert found["gates"]["told"]["settings"]["alpha"] == 0.01
    assert found["gates"]["told"]["sets"][0]["p_value"] < 0.01
