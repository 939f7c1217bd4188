"""Testing a teacher on dev lists: choice of queries and candidates, stored judgements, and when a gate opens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage
from d2llm.data.collation import LabelledSource, collate, epoch_batches
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.pair_training import plan_of_pairs, read_pair_training_set
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.data.plan import TrainingSource
from d2llm.models.interaction import PairScores
from d2llm.models.student import Student
from d2llm.models.teachers.cosine import CosineTeacher
from d2llm.models.teachers.pair_teacher import TeacherScores
from d2llm.ops.measures import per_query_measures
from d2llm.recipe import GateConfig, TeacherConfig
from d2llm.recipe.losses import Objective
from d2llm.reports.training_tables import gate_table
from d2llm.training import gate as verb
from d2llm.training.dev_sets import dev_queries, make_dev_pairs, make_teacher_dev_set
from d2llm.training.gate import GATE_FILE, PRECHECK_QUERIES, gate, precheck, read_gate
from d2llm.training.sentences import describe_gates, describe_precheck, gate_advice
from fake_models import FakeStudent, Interruption
from tiny_data import LETTERS, everyday, make_plan
from tiny_distill import losses_of
from tiny_models import tiny_student_config, write_tiny_model

TEACHER = TeacherConfig(model="told")


class OracleTeacher:
    """Knows the answers or, without ``right``, picks wrong ones; is interrupted after ``fail_after`` pairs."""

    def __init__(self, *, right=True, fingerprint="told", fail_after=None):
        self.fingerprint, self.right, self.fail_after = fingerprint, right, fail_after
        self.asked = 0

    def prompt_fingerprint(self, task):
        return task

    def score_pairs(self, pairs, task, **_):
        if self.fail_after is not None and self.asked >= self.fail_after:
            raise Interruption
        self.asked += len(pairs)
        best = "2" if self.right else "0"
        values = [query[0] == passage[0] and passage.endswith(best) for query, passage in pairs]
        return TeacherScores(np.array(values, np.float32), None, 1, 0)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("gate") / "bert", "bert")
    return Student.create(tiny_student_config(model, tuning="frozen"), dtype="float32")


@pytest.fixture
def trial(student, tmp_path, monkeypatch):
    """Runs a gate with the given judge as the teacher."""

    def run(teacher, *, datasets=None, **settings):
        monkeypatch.setattr(verb, "load_teacher", lambda *_, **__: teacher)
        return gate(
            datasets or [(everyday(), "asymmetric")],
            tmp_path / "run",
            teacher=TEACHER,
            student=student,
            settings=GateConfig(**{"queries": 12, "depth": 3} | settings),
        )

    return run


def test_query_samples_are_random_nested_and_have_two_ends():
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
def test_data_without_dev_queries_is_rejected(qrels):
    with pytest.raises(InputError, match=r"dev\.tsv has no query with a positive"):
        dev_queries(dataclasses.replace(everyday(), qrels=qrels), num_queries=3, seed=0)


def test_lists_join_candidates_by_words_and_by_vectors():
    dataset, student = everyday(), FakeStudent()
    queries = dev_queries(dataset, num_queries=3, seed=0)
    dev_set = make_teacher_dev_set(dataset, "asymmetric", queries, student=student, depth=2, with_positives=False)
    vectors = student.encode_passages([passage.full_text for passage in dataset.passages.values()]).vectors
    for query in queries:
        scores = vectors @ student.encode_queries([query.text]).vectors[0]
        nearest = [list(dataset.passages)[row] for row in np.argsort(-scores)[:2]]
        letter = query.id[1]
        assert dev_set.candidates[query.id][:2] == [f"{letter}0", f"{letter}1"]  # equal BM25 scores: ordered by id
        assert set(dev_set.candidates[query.id]) == {f"{letter}0", f"{letter}1", *nearest}
    assert dev_set.qrels == {query.id: dataset.qrels["dev"][query.id] for query in queries}


def test_lists_with_positives_leave_out_their_repeats():
    dataset = everyday()
    dataset.passages["a0"] = Passage("a0", dataset.passages["a2"].text.upper())
    dev_set = make_teacher_dev_set(
        dataset, "asymmetric", [dataset.queries["qa"]], student=FakeStudent(), depth=3, with_positives=True
    )
    assert dev_set.candidates["qa"][0] == "a2"
    assert "a0" not in dev_set.candidates["qa"]
    assert "a1" in dev_set.candidates["qa"]


def test_a_head_without_an_inner_product_proposes_by_cosine():
    dataset = everyday()
    queries = dev_queries(dataset, num_queries=2, seed=0)
    dev_set = make_teacher_dev_set(
        dataset, "asymmetric", queries, student=FakeStudent(head="paper"), depth=2, with_positives=False
    )
    assert all(len(ids) >= 2 for ids in dev_set.candidates.values())


def test_good_teacher_opens_and_bad_teacher_closes_the_gate(trial, student, tmp_path):
    report = trial(OracleTeacher())
    (row,) = report.sets
    assert (row.name, row.task, row.num_items, row.teacher, row.is_open) == ("everyday", "asymmetric", 12, 1.0, True)
    assert report.closed == ()
    # The cosine's value is the nDCG of the student's own scores on the same lists.
    dataset = everyday()
    dev_set = make_teacher_dev_set(
        dataset,
        "asymmetric",
        dev_queries(dataset, num_queries=12, seed=0),
        student=student,
        depth=3,
        with_positives=False,
    )
    cosine = CosineTeacher(student)
    rankings = {}
    for query, ids in dev_set.candidates.items():
        pairs = [(dataset.queries[query].text, dataset.passages[passage].full_text) for passage in ids]
        scores = dict(zip(ids, cosine.score_pairs(pairs, "asymmetric").log_odds.tolist(), strict=True))
        rankings[query] = sorted(ids, key=lambda passage, scores=scores: (-scores[passage], passage))
    expected = np.mean(list(per_query_measures(rankings, dev_set.qrels)["nDCG@10"].values()))
    assert row.cosine == pytest.approx(expected)
    assert row.difference == pytest.approx(1 - expected)
    assert report.num_scored == sum(len(ids) for ids in dev_set.candidates.values())
    assert report.cosine == student.fingerprint

    wrong = trial(OracleTeacher(right=False, fingerprint="wrong"))
    assert wrong.sets[0].difference < 0
    assert not wrong.sets[0].is_open
    assert wrong.closed == ("everyday",)
    assert read_gate(tmp_path / "run", "told") == {"everyday": True}
    assert read_gate(tmp_path / "run", "wrong") == {"everyday": False}
    assert read_gate(tmp_path / "run", "untried") is None
    assert read_gate(tmp_path / "elsewhere", "told") is None


def test_teacher_equal_to_the_cosine_keeps_the_gate_closed(trial, student):
    report = trial(CosineTeacher(student))
    assert (report.sets[0].difference, report.sets[0].p_value, report.sets[0].is_open) == (0, 1, False)


def test_a_task_pools_the_queries_of_its_sets(trial):
    datasets = [(everyday(), "asymmetric"), (everyday("second"), "asymmetric"), (everyday("third"), "symmetric")]
    report = trial(OracleTeacher(), datasets=datasets, queries=6)
    assert [(row.name, row.num_items) for row in report.sets] == [("everyday", 6), ("second", 6), ("third", 6)]
    assert [(row.name, row.num_items) for row in report.tasks] == [("asymmetric", 12), ("symmetric", 6)]
    assert report.tasks[0].cosine == pytest.approx((report.sets[0].cosine + report.sets[1].cosine) / 2)
    assert report.tasks[0].p_value < report.sets[0].p_value


def test_judgements_survive_an_interruption(trial, monkeypatch, tmp_path):
    from d2llm.evaluation import pool_scores

    monkeypatch.setattr(pool_scores, "_PAIRS_AT_ONCE", 10)
    monkeypatch.setattr(pool_scores, "_SHARD_SECONDS", 0)
    with pytest.raises(Interruption):
        trial(OracleTeacher(fail_after=20))
    assert not (tmp_path / "run" / GATE_FILE).exists()
    resumed, whole = OracleTeacher(), OracleTeacher(fingerprint="whole")
    assert trial(resumed).sets[0].is_open
    trial(whole)
    assert 0 < resumed.asked <= whole.asked - 20
    repeated = OracleTeacher()
    assert trial(repeated).num_scored == repeated.asked == 0


def test_queries_used_to_fit_an_ensemble_are_counted(trial, monkeypatch):
    monkeypatch.setattr(verb, "ensemble_queries", lambda config: {"everyday": frozenset({"qa", "qb", "other"})})
    assert trial(OracleTeacher()).num_seen == 2


def test_a_foreign_gate_file_is_not_replaced(trial, tmp_path):
    path = tmp_path / "run" / GATE_FILE
    path.parent.mkdir()
    for content, message in (("{", "not valid JSON"), ('{"kind": "door"}', "not a gate"), ("[]", "not a gate")):
        path.write_text(content)
        with pytest.raises(DataFormatError, match=message):
            trial(OracleTeacher())
        assert path.read_text() == content


def test_gate_file_records_settings_and_packages(trial, tmp_path):
    trial(OracleTeacher(), alpha=0.01)
    content = json.loads((tmp_path / "run" / GATE_FILE).read_text())
    assert (content["kind"], content["format_version"]) == ("gate", 1)
    assert "d2llm" in content["packages"]
    assert content["gates"]["told"]["settings"]["alpha"] == 0.01
    assert content["gates"]["told"]["sets"][0]["p_value"] < 0.01


# --- labelled pairs ---------------------------------------------------------------------------------------------------


def pair_set(truth, *, kind="binary", name="couples", split="dev"):
    """Pairs with the labels or scores ``truth``; the n-th passage is "<name> <n>", by which judges find its score."""
    pairs = tuple(
        LabelledPair(
            f"{split}-{n}",
            f"query {n // 2}",
            f"{name} {n}",
            None if kind == "scores" else str(value),
            float(value) if kind == "scores" else None,
        )
        for n, value in enumerate(truth)
    )
    return PairDataset(name, Path(name), kind, (), {split: pairs}, ())


class ScoredTeacher(OracleTeacher):
    """Gives the passage "<name> <n>" the n-th score of that data set."""

    def __init__(self, fingerprint="says", **scores):
        super().__init__(fingerprint=fingerprint)
        self.scores = scores

    def score_pairs(self, pairs, task, **_):
        self.asked += len(pairs)
        names_and_numbers = [passage.split() for _, passage in pairs]
        return TeacherScores(
            np.array([self.scores[name][int(n)] for name, n in names_and_numbers], np.float32), None, 0, 0
        )


@pytest.fixture
def compare(trial, monkeypatch):
    """Runs a gate on pair sets with the given judges as teacher and cosine."""

    def run(teacher, cosine, *sets, **settings):
        monkeypatch.setattr(verb, "CosineTeacher", lambda student: cosine)
        return trial(teacher, datasets=sets, **settings)

    return run


YES_NO = ["1", "0"] * 10


def test_binary_pairs_are_measured_by_average_precision(compare, tmp_path):
    right, wrong = [int(label) + n / 100 for n, label in enumerate(YES_NO)], [-int(label) for label in YES_NO]
    report = compare(
        ScoredTeacher(couples=right), ScoredTeacher("cosine", couples=wrong), (pair_set(YES_NO), "symmetric")
    )
    (row,) = report.sets
    assert (row.name, row.task, row.measure, row.num_items) == ("couples", "symmetric", "AP", 20)
    # All positives tie below the ten negatives, so they are retrieved together at a precision of 10 / 20.
    assert (row.teacher, row.cosine, row.difference) == pytest.approx((1, 0.5, 0.5))
    # Every pair moves from the wrong side of all others to the right one: 2 of 2^20 sign patterns are as extreme.
    assert row.p_value < 0.001
    assert row.is_open
    assert report.closed == ()
    assert report.num_scored == 20
    assert [dataclasses.replace(row, name="couples") for row in report.tasks] == [row]
    swapped = compare(
        ScoredTeacher("turned", couples=wrong), ScoredTeacher("other", couples=right), (pair_set(YES_NO), "symmetric")
    )
    assert swapped.sets[0].difference == pytest.approx(-0.5)
    assert swapped.closed == ("couples",)
    assert read_gate(tmp_path / "run", "says") == {"couples": True}
    assert read_gate(tmp_path / "run", "turned") == {"couples": False}
    # A second run takes the values from the store and calls no judge.
    repeated = ScoredTeacher(couples=wrong)
    assert compare(repeated, ScoredTeacher("cosine"), (pair_set(YES_NO), "symmetric")).sets == report.sets
    assert repeated.asked == 0


def test_too_few_pairs_keep_the_gate_closed(compare):
    report = compare(
        ScoredTeacher(couples=[1, 0, 1, 0]),
        ScoredTeacher("cosine", couples=[0, 1, 0, 1]),
        (pair_set(YES_NO[:4]), "symmetric"),
    )
    assert report.sets[0].teacher == 1
    assert report.sets[0].p_value == pytest.approx(2 / 16, abs=0.02)
    assert not report.sets[0].is_open


def test_graded_pairs_are_measured_by_spearman(compare):
    grades = list(range(16))
    sets = [(pair_set(grades, kind="scores"), "symmetric")]
    report = compare(ScoredTeacher(couples=grades), ScoredTeacher("cosine", couples=grades[::-1]), *sets)
    assert (report.sets[0].measure, report.sets[0].teacher, report.sets[0].cosine) == ("Spearman", 1, -1)
    assert report.sets[0].is_open
    # Two neighbours have swapped places, all others are in order.
    nearly = [1, 0, *grades[2:]]
    report = compare(ScoredTeacher("nearly", couples=nearly), ScoredTeacher("right", couples=grades), *sets)
    assert report.sets[0].teacher == pytest.approx(1 - 6 * 2 / (16 * (16**2 - 1)))
    assert not report.sets[0].is_open


CLASSES = ["contradiction", "neutral", "entailment"] * 12


def test_classes_use_thresholds_fitted_on_the_other_half(compare):
    dataset = pair_set(CLASSES, kind="classes")
    number = {"contradiction": 0, "neutral": 1, "entailment": 2}
    # Each class alternates between the halves in sample order; the second half's scores are above all of the first's.
    counts, shifted = dict.fromkeys(number, 0), [0.0] * len(CLASSES)
    for pair in make_dev_pairs(dataset, "symmetric", num_pairs=36, seed=0).pairs:
        shifted[int(pair.passage.split()[1])] = number[pair.label] + 10 * (counts[pair.label] % 2)
        counts[pair.label] += 1
    right = [number[label] for label in CLASSES]
    report = compare(ScoredTeacher(couples=right), ScoredTeacher("cosine", couples=shifted), (dataset, "symmetric"))
    (row,) = report.sets
    assert (row.measure, row.teacher) == ("accuracy (3 classes)", 1)
    # One half's thresholds make the other all entailment or all contradiction: a third is right.
    assert row.cosine == pytest.approx(1 / 3)
    assert row.is_open


def test_a_class_too_rare_for_thresholds_is_rejected(compare):
    dataset = pair_set(CLASSES[:6], kind="classes")
    compare(ScoredTeacher(couples=range(6)), ScoredTeacher("cosine", couples=range(6)), (dataset, "symmetric"))
    rare = pair_set(["contradiction", "neutral", "entailment", "contradiction", "neutral"], kind="classes")
    with pytest.raises(InputError, match="no pair of the dev split is 'entailment'"):
        compare(ScoredTeacher("b", couples=range(5)), ScoredTeacher("c", couples=range(5)), (rare, "symmetric"))


def test_a_query_counts_as_ten_pairs_and_repeats_are_judged_once(compare):
    dataset = pair_set(YES_NO * 3)
    twin = dataclasses.replace(dataset.splits["dev"][0], id="twin")
    dataset = dataclasses.replace(dataset, splits={"dev": (*dataset.splits["dev"], twin)})
    scores = {"couples": [int(label) for label in YES_NO * 3]}
    small = compare(ScoredTeacher(**scores), ScoredTeacher("cosine", **scores), (dataset, "symmetric"), queries=2)
    assert (small.sets[0].num_items, small.num_scored) == (20, 20)
    whole = compare(ScoredTeacher(**scores), ScoredTeacher("cosine", **scores), (dataset, "symmetric"), queries=7)
    assert (whole.sets[0].num_items, whole.num_scored) == (61, 40)  # the larger sample contains the smaller


def test_changed_texts_under_the_same_ids_are_judged_again(compare):
    scores = {"couples": [1, 0] * 10, "others": [0, 1] * 10}
    before = compare(ScoredTeacher(**scores), ScoredTeacher("cosine", **scores), (pair_set(YES_NO), "symmetric"))
    changed = dataclasses.replace(pair_set(YES_NO, name="others"), name="couples")
    after = compare(ScoredTeacher(**scores), ScoredTeacher("cosine", **scores), (changed, "symmetric"))
    assert (before.sets[0].teacher, after.sets[0].teacher) == (1, 0.5)
    assert after.num_scored == 20


def test_only_sets_with_the_same_measure_are_pooled(compare):
    names = {"couples": YES_NO, "doubles": YES_NO[:10], "grades": list(range(12))}
    sets = [
        (pair_set(truth, kind="scores" if name == "grades" else "binary", name=name), "symmetric")
        for name, truth in names.items()
    ]
    right = {name: [float(value) for value in truth] for name, truth in names.items()}
    wrong = {name: [-value for value in values] for name, values in right.items()}
    report = compare(ScoredTeacher(**right), ScoredTeacher("cosine", **wrong | {"couples": right["couples"]}), *sets)
    rows = [(row.name, row.measure, row.num_items, row.is_open) for row in report.tasks]
    assert rows == [("symmetric", "AP", 30, True), ("symmetric", "Spearman", 12, True)]
    assert report.tasks[0].cosine == pytest.approx((20 * 1 + 10 * 0.5) / 30)
    assert report.closed == ("couples",)  # equal scores
    cells_shown = [(cells[1], cells[2], cells[-1]) for cells in gate_table(report).texts()]
    assert cells_shown[:3] == [("AP", "20", "closed"), ("AP", "10", "open"), ("Spearman", "12", "open")]
    assert cells_shown[3:] == [("AP", "30", "open"), ("Spearman", "12", "open")]
    assert gate_advice(report).startswith("gate: closed for couples: ")


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (pair_set(YES_NO, split="train"), InputError, "there are no dev pairs, so nothing can be measured on them"),
        (pair_set(["1", "1"]), DataFormatError, "no negative pair"),
        (pair_set(["red", "blue"], kind="classes"), DataFormatError, "natural language inference: entailment, "),
    ],
)
def test_unmeasurable_pairs_are_rejected(dataset, error, message):
    with pytest.raises(error, match=message):
        make_dev_pairs(dataset, "symmetric", num_pairs=10, seed=0)


@pytest.mark.parametrize("kind", ["binary", "classes", "scores"])
def test_closed_pair_set_ignores_the_teachers_labels(kind, tmp_path):
    truth = {"binary": YES_NO, "classes": CLASSES, "scores": list(range(12))}[kind]
    pairs = pair_set(truth, kind=kind, split="train")
    prepared = read_pair_training_set(pairs)
    plan = make_plan(plan_of_pairs(prepared, "train", seed=0))
    source = TrainingSource(prepared.dataset, plan, "symmetric", pairs=pairs)
    key = {"prompt": "none", "dataset": "couples"}
    all_yes = LabelStore(tmp_path / "labels", teacher="told", **key)
    all_yes.write(
        [QueryLabels(e.query_id, e.passage_ids, np.full(len(e.targets), 5, np.float32)) for e in plan.entries]
    )
    untaught = LabelledSource.join(source, LabelStore(tmp_path / "labels", teacher="none", **key), keep_unlabelled=True)
    assert len(untaught.entries) == len(plan.entries)
    taught = LabelledSource.join(source, LabelStore(tmp_path / "labels", teacher="told", **key))
    assert untaught.num_unlabelled == len(plan.entries)
    assert taught.num_unlabelled == 0

    def losses(joined, fraction):
        ((labelled, draws),) = epoch_batches([joined], epoch=0, batch_queries=64, num_hard=1, num_easy=0, seed=0)
        batch = collate(labelled, draws)
        logits = torch.linspace(0.5, 3, batch.positive.size).reshape(batch.positive.shape)
        objective = Objective({"pair_cross_entropy": {"teacher_weight": fraction}, "list_imitation": 1.0})
        terms = losses_of(PairScores(logits, logits / 2, None), batch, objective)
        return {name: value.item() for name, value in terms.items()}

    own = losses(untaught, 0.0)
    assert set(own) == {"pair_cross_entropy"}
    for fraction in (0.5, 1.0):
        assert losses(untaught, fraction) == pytest.approx(own, rel=1e-5)
        assert losses(taught, fraction) != pytest.approx(own, rel=1e-2)


class TestFirstLook:
    @pytest.fixture
    def look(self, student, tmp_path, monkeypatch):
        def run(teacher):
            monkeypatch.setattr(verb, "load_teacher", lambda *_, **__: teacher)
            return precheck(
                [(everyday(), "asymmetric")],
                tmp_path / "run",
                teacher=TEACHER,
                student=student,
                settings=GateConfig(queries=2, depth=3),
            )

        return run

    def test_look_uses_bm25_candidates_and_stores_no_verdict(self, look, tmp_path):
        report = look(OracleTeacher())
        (row,) = report.sets
        assert (row.name, row.num_items, row.teacher) == (
            "everyday",
            12,
            1.0,
        )  # all twelve queries are fewer than a look takes
        assert PRECHECK_QUERIES >= 12
        assert report.num_scored == 12 * 3  # three passages match the words of each query; vectors propose no others
        assert read_gate(tmp_path / "run", "told") is None

    def test_a_query_without_candidates_counts_as_one_that_nothing_answers(self, look, monkeypatch):
        data = everyday()
        odd = next(iter(data.positives("dev")))
        queries = {**data.queries, odd: dataclasses.replace(data.queries[odd], text="zzyzx")}
        monkeypatch.setitem(globals(), "everyday", lambda: dataclasses.replace(data, queries=queries))
        (row,) = look(OracleTeacher()).sets
        assert (row.num_items, row.teacher) == (12, pytest.approx(11 / 12))

    def test_stored_judgements_are_reused(self, look):
        look(OracleTeacher())
        assert look(OracleTeacher(fail_after=0)).num_scored == 0

    def test_sentence_says_whether_the_teacher_beats_the_cosine(self, look):
        assert "is worse than the cosine by" in describe_precheck(look(OracleTeacher(right=False)))
        assert "is as good as the cosine or better" in describe_precheck(look(OracleTeacher(fingerprint="other")))


def test_a_verdict_in_words():
    assert describe_gates({"a": True, "b": False, "c": True}) == "open for a, c; closed for b"
    assert describe_gates({"a": True}) == "open for a"
