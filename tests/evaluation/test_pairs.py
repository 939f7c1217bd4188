"""``d2llm evaluate`` on labelled pairs: every figure recomputed from the fake models' scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.evaluation.contenders import Contenders
from d2llm.ops.pair_measures import binary_measurer
from d2llm.ops.significance import bootstrap_statistic, holm, resampled_p_value
from d2llm.retrieval.cosine import CosineStudent
from d2llm.store.bm25 import WordIndex
from fake_models import FakeStudent, FakeTeacher
from late_import import late_import
from tiny_evaluations import WORDS, everyone, figures, measure, run

ROWS = ["BM25", "cosine, untuned", "cosine, tuned", "D2LLM, paper head", "cosine, D2LLM vectors", "D2LLM", "teacher"]
RESAMPLES = 40
stats = late_import("scipy.stats")


@pytest.fixture(autouse=True, scope="module")
def fewer_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2llm.evaluation.pairs.NUM_RESAMPLES", RESAMPLES)
        yield


@pytest.fixture(autouse=True)
def hardly_any_resamples(monkeypatch):
    """Speeds up tests that do not check intervals; the module-scoped report is made before this applies."""
    monkeypatch.setattr("d2llm.evaluation.pairs.NUM_RESAMPLES", 4)


def make_pairs(kind="binary", sizes=None, labels=None):
    """Pairs of texts that share zero to four words; the more they share, the likelier a positive label."""
    rng = np.random.default_rng(8)
    splits = {}
    for split, size in (sizes or {"dev": 40, "test": 60}).items():
        pairs = []
        for n in range(size):
            words = rng.choice(WORDS, 8, replace=False).tolist()
            shared = int(rng.integers(0, 5))
            quality = shared / 4 + rng.normal(0, 0.3)
            label = {
                "binary": str(int(quality > 0.5)),
                "classes": "contradiction" if quality < 0.3 else "neutral" if quality < 0.7 else "entailment",
                "scores": None,
            }[kind]
            score = round(float(np.clip(quality, 0, 1)) * 5, 1) if kind == "scores" else None
            # Queries may repeat.
            query = " ".join(words[:4]) if n % 7 else "cat dog wet"
            label = labels[n % len(labels)] if labels else label
            pairs.append(LabelledPair(f"{n}", query, " ".join(words[4 - shared : 8 - shared]), label, score))
        splits[split] = tuple(pairs)
    classes = tuple(sorted({pair.label for pairs in splits.values() for pair in pairs if pair.label}))
    return PairDataset("sayings", Path("sayings"), kind, classes, splits, ("test: 2 pairs have an empty text",))


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def scores_by_hand(pairs):
    """row -> [n] scores, each pair scored on its own."""

    def student(fingerprint, score):
        model = FakeStudent(fingerprint=fingerprint)
        return np.array(
            [
                score(model.encode_queries([p.query]).vectors[0], model.encode_passages([p.passage]).vectors[0])
                for p in pairs
            ],
            np.float64,
        )

    def cosine(query, passage):
        return unit(query) @ unit(passage)

    def full(query, passage):
        return 2 * query @ passage + np.tanh(passage[0] * query[1])

    passages = list(dict.fromkeys(pair.passage for pair in pairs))
    lexical = WordIndex.from_texts(passages)
    return {
        "BM25": np.array(
            [lexical.scores(lexical.query(p.query))[passages.index(p.passage)] for p in pairs], np.float64
        ),
        "cosine, untuned": student("base", cosine),
        "cosine, tuned": student("tuned", cosine),
        "D2LLM, paper head": student("paper", full),
        "cosine, D2LLM vectors": student("fake-student", lambda q, p: 2 * q @ p),
        "D2LLM": student("fake-student", full),
        "teacher": np.array([len(set(p.query.split()) & set(p.passage.split())) for p in pairs], np.float64),
    }


def best_cut(scores, quality):
    """The highest threshold (between neighbouring scores or outside them all) that maximises ``quality``."""
    distinct = np.unique(scores)
    cuts = [distinct[0], *((distinct[:-1] + distinct[1:]) / 2), np.nextafter(distinct[-1], np.inf)]
    return max(reversed(cuts), key=lambda cut: round(quality(scores >= cut), 12))


def f1_of(predicted, truth):
    return 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())


def ap_of(scores, truth):
    """Mean precision at each positive pair; tied scores enter together."""
    return np.mean([truth[scores >= score].mean() for score in scores[truth]])


def auc_of(scores, truth):
    above = scores[truth][:, None] - scores[~truth][None]
    return np.mean((above > 0) + (above == 0) / 2)


def positives(pairs):
    return np.array([pair.label == "1" for pair in pairs])


def binary_by_hand(scores, truth, tuning_scores, tuning_truth):
    accuracy_cut = best_cut(tuning_scores, lambda predicted: np.mean(predicted == tuning_truth))
    f1_cut = best_cut(tuning_scores, lambda predicted: f1_of(predicted, tuning_truth))
    return {
        "accuracy": np.mean((scores >= accuracy_cut) == truth),
        "F1": f1_of(scores >= f1_cut, truth),
        "AP": ap_of(scores, truth),
        "AUC": auc_of(scores, truth),
    }


# --- binary labels ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sayings():
    return make_pairs()


@pytest.fixture(scope="module")
def report(sayings):
    return measure(sayings, everyone(), teacher_queries=None, seed=2)


@pytest.fixture(scope="module")
def scores(sayings):
    return {split: scores_by_hand(pairs) for split, pairs in sayings.splits.items()}


def test_binary_measures_by_definition(report, scores, sayings):
    truth, tuning_truth = (positives(sayings.splits[split]) for split in ("test", "dev"))
    assert [row.name for row in report.rows] == ROWS
    assert 10 < truth.sum() < 50
    for row in report.rows:
        expected = binary_by_hand(scores["test"][row.name], truth, scores["dev"][row.name], tuning_truth)
        assert figures(row) == pytest.approx(expected), row.name
        assert list(row.measures) == list(expected)
        assert row.num_items == 60
    assert len({figures(row)["AP"] for row in report.rows}) == len(ROWS)


def test_counts_and_notes_of_a_report(report, sayings):
    assert (report.kind, report.num_items, report.num_left_out) == ("pairs", 60, 0)
    assert report.num_passages == len({pair.passage for pair in sayings.splits["test"]})
    assert (report.main_measure, report.subject, report.baseline) == ("AP", "D2LLM", "cosine, tuned")
    assert report.notes == ("test: 2 pairs have an empty text",)
    assert report.sample_rows == ()
    assert [(row.name, row.kind) for row in report.missing] == [("hybrid: BM25 + D2LLM", "hybrid")]
    assert report.missing[0].reason == "single pairs have no ranks that could be fused"


def test_every_row_has_its_cost(report):
    for row in report.rows:
        assert row.cost.pairs_per_second > 0
        if row.name == "BM25":
            assert row.cost.total is None
            continue
        assert 0 < row.cost.total.p50 <= row.cost.total.p95
        if row.name != "teacher":
            assert row.cost.peak_memory_mib > 10


def test_intervals_and_comparisons_resample_the_pairs(report, scores, sayings):
    truth = positives(sayings.splits["test"])

    def ap(name):
        measure = binary_measurer(scores["test"][name], truth, thresholds=None)
        return lambda rows: measure(rows)["AP"]

    def resampled(name):
        return bootstrap_statistic(ap(name), 60, num_resamples=RESAMPLES, seed=2)

    p_values = []
    for row in report.rows:
        estimate = row.measures["AP"]
        interval, values = resampled(row.name)
        assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
        for each in row.measures.values():
            assert each.low <= each.value <= each.high
        if row.name == "cosine, tuned":
            assert report.comparison(row.name, "AP") is None
            continue
        comparison = report.comparison(row.name, "AP")
        p_values.append(resampled_p_value(values - resampled("cosine, tuned")[1]))
        assert comparison.p_value == pytest.approx(p_values[-1])
        expected = ap(row.name)(np.arange(60)) - ap("cosine, tuned")(np.arange(60))
        assert comparison.difference.value == pytest.approx(expected)
        assert comparison.num_items == 60
    adjusted = [report.comparison(name, "AP").adjusted_p for name in ROWS if name != "cosine, tuned"]
    assert adjusted == pytest.approx(holm(p_values))
    assert len(report.comparisons) == 4 * 6


def test_agreement_calibration_and_histograms(report, scores, sayings):
    truth = positives(sayings.splits["test"])
    rows = {row.name: row for row in report.agreement}
    assert list(rows) == ROWS[:-1]
    teacher_scores = scores["test"]["teacher"]
    for name, row in rows.items():
        expected = np.corrcoef(teacher_scores, scores["test"][name])[0, 1]
        assert row.agreement.pearson_over_all == pytest.approx(expected, abs=1e-6)
        assert row.agreement.num_pairs == 60
        assert row.top_10_overlap is None
    assert [entry.name for entry in report.calibration] == ["D2LLM", "teacher"]
    for entry in report.calibration:
        assert sum(bin_.count * bin_.fraction_positive for bin_ in entry.bins) == pytest.approx(truth.sum())
    assert [entry.name for entry in report.histograms] == ["cosine, untuned", "cosine, tuned", "D2LLM", "teacher"]
    for entry in report.histograms:
        assert (sum(entry.counts.positive), sum(entry.counts.negative)) == (truth.sum(), (~truth).sum())


def test_examples_are_pairs_that_only_one_system_gets_right(report, scores, sayings):
    truth = positives(sayings.splits["test"])
    correct = {}
    for name in ("D2LLM", "cosine, tuned"):
        dev = positives(sayings.splits["dev"])
        cut = best_cut(scores["dev"][name], lambda predicted: np.mean(predicted == dev))  # noqa: B023 - used at once
        correct[name] = (scores["test"][name] >= cut) == truth
        assert report.details.values[name]["AP"] == tuple(correct[name].astype(float))
    wins = {str(index) for index in np.flatnonzero(correct["D2LLM"] & ~correct["cosine, tuned"])}
    losses = {str(index) for index in np.flatnonzero(~correct["D2LLM"] & correct["cosine, tuned"])}
    assert {example.id for example in report.details.wins} == set(sorted(wins, key=int)[:10]) != set()
    assert {example.id for example in report.details.losses} <= losses
    assert len(report.details.losses) == min(10, len(losses)) > 0
    example, pair = report.details.wins[0], sayings.splits["test"][int(report.details.wins[0].id)]
    assert (example.query, example.value, example.baseline_value) == (pair.query, 1, 0)
    assert example.relevant[0].text == pair.passage
    assert example.relevant[0].is_relevant == (pair.label == "1")


def test_the_teacher_on_a_sample(sayings, scores):
    teacher = FakeTeacher()
    report = measure(sayings, everyone(teacher=teacher), teacher_queries=25, seed=2)
    test, dev = sayings.splits["test"], sayings.splits["dev"]
    judged = teacher.pairs[:50]  # first the sample of test, then that of dev
    sample = [n for n, pair in enumerate(test) if (pair.query, pair.passage) in judged[:25]]
    tuning = [n for n, pair in enumerate(dev) if (pair.query, pair.passage) in judged[25:]]
    assert (len(sample), len(tuning)) == (25, 25)
    expected = binary_by_hand(
        scores["test"]["teacher"][sample],
        positives(test)[sample],
        scores["dev"]["teacher"][tuning],
        positives(dev)[tuning],
    )
    assert figures(report.row("teacher")) == pytest.approx(expected)
    assert [row.num_items for row in report.rows] == [60] * 6 + [25]
    assert [row.num_items for row in report.sample_rows] == [25] * 7
    truth = positives(test)[sample]
    for row in report.sample_rows:
        assert figures(row)["AUC"] == pytest.approx(auc_of(scores["test"][row.name][sample], truth))
    comparison = report.comparison("teacher", "AP")
    assert comparison.num_items == 25
    of_tuned = ap_of(scores["test"]["cosine, tuned"][sample], truth)
    assert comparison.difference.value == pytest.approx(expected["AP"] - of_tuned)
    assert report.comparison("D2LLM", "AP").num_items == 60
    assert {row.agreement.num_pairs for row in report.agreement} == {25}


def test_the_sampled_teacher_as_baseline(sayings, scores):
    teacher = FakeTeacher()
    report = measure(sayings, everyone(teacher=teacher), teacher_queries=25, seed=2, baseline="teacher")
    judged = set(teacher.pairs[:25])
    sample = [n for n, pair in enumerate(sayings.splits["test"]) if (pair.query, pair.passage) in judged]
    truth = positives(sayings.splits["test"])[sample]
    comparison = report.comparison("D2LLM", "AP")
    assert comparison.num_items == 25
    expected = ap_of(scores["test"]["D2LLM"][sample], truth) - ap_of(scores["test"]["teacher"][sample], truth)
    assert comparison.difference.value == pytest.approx(expected)
    assert {int(one.id) for one in (*report.details.wins, *report.details.losses)} <= set(sample)


def test_without_dev_threshold_measures_are_left_out():
    report = measure(make_pairs(sizes={"test": 60}), everyone())
    assert {tuple(row.measures) for row in report.rows} == {("AP", "AUC")}
    note = "there is no dev split to choose thresholds on; the measures that need one are left out"
    assert note in report.notes
    truth = positives(make_pairs(sizes={"test": 60}).splits["test"])
    values = report.details.values["D2LLM"]["AP"]
    assert np.mean(np.array(values)[truth]) == pytest.approx(figures(report.row("D2LLM"))["AUC"])


def test_dev_is_measured_with_thresholds_from_train():
    both = make_pairs(sizes={"train": 40, "dev": 30})
    report = measure(both, Contenders(FakeStudent()), split="dev")
    test, dev = (scores_by_hand(both.splits[split])["D2LLM"] for split in ("dev", "train"))
    expected = binary_by_hand(test, positives(both.splits["dev"]), dev, positives(both.splits["train"]))
    assert figures(report.row("D2LLM")) == pytest.approx(expected)


# --- grades and classes -----------------------------------------------------------------------------------------------


def test_graded_measures_by_definition(monkeypatch):
    monkeypatch.setattr("d2llm.evaluation.pairs.NUM_RESAMPLES", RESAMPLES)
    graded = make_pairs("scores", sizes={"test": 60})
    report = measure(graded, everyone(), teacher_queries=30)
    grades = np.array([pair.score for pair in graded.splits["test"]])
    expected = scores_by_hand(graded.splits["test"])
    assert report.main_measure == "Spearman"
    for row in report.rows[:-1]:
        assert figures(row) == pytest.approx(
            {
                "Pearson": np.corrcoef(expected[row.name], grades)[0, 1],
                "Spearman": stats.spearmanr(expected[row.name], grades).statistic,
            },
            abs=1e-6,
        )
        for estimate in row.measures.values():
            assert estimate.low <= estimate.value <= estimate.high
    assert report.rows[-1].num_items == 30
    assert report.calibration == report.histograms == ()
    assert report.notes == ("test: 2 pairs have an empty text",)  # there is no dev split, and none is needed
    (win, *_), ranks, truth = report.details.wins, stats.rankdata(expected["D2LLM"]), stats.rankdata(grades)
    assert win.value == pytest.approx(1 - abs(ranks - truth)[int(win.id)] / 59)
    assert win.relevant[0].id == f"{win.id}: {graded.splits['test'][int(win.id)].score:g}"


def nli_by_hand(scores, classes, tuning_scores, tuning_classes):
    """Entailment vs. contradiction without neutral; entailment vs. all others; three classes by two cuts."""
    classes, tuning_classes = np.array(classes), np.array(tuning_classes)
    decided, tuning_decided = classes != "neutral", tuning_classes != "neutral"
    yes, tuning_yes = classes == "entailment", tuning_classes == "entailment"
    decided_scores, decided_truth = tuning_scores[tuning_decided], tuning_yes[tuning_decided]
    cut = best_cut(decided_scores, lambda predicted: np.mean(predicted == decided_truth))
    f1_cut = best_cut(decided_scores, lambda predicted: f1_of(predicted, decided_truth))
    other = best_cut(tuning_scores, lambda predicted: np.mean(predicted == tuning_yes))
    distinct = np.unique(tuning_scores)
    cuts = [distinct[0], *((distinct[:-1] + distinct[1:]) / 2), np.nextafter(distinct[-1], np.inf)]

    def three(values, lower, upper):
        return np.select([values >= upper, values >= lower], ["entailment", "neutral"], "contradiction")

    reached = max(
        np.mean(three(tuning_scores, lower, upper) == tuning_classes)
        for at, lower in enumerate(cuts)
        for upper in cuts[at:]
    )
    predicted, truth = scores[decided] >= f1_cut, yes[decided]
    return reached, {
        "accuracy (entailment/contradiction)": np.mean((scores[decided] >= cut) == truth),
        "AP": ap_of(scores[decided], truth),
        "precision": (predicted & truth).sum() / predicted.sum(),
        "recall": (predicted & truth).sum() / truth.sum(),
        "accuracy (entailment/other)": np.mean((scores >= other) == yes),
    }


def test_nli_measures_by_definition():
    nli = make_pairs("classes")
    report = measure(nli, everyone(), teacher_queries=None)
    classes, tuning = ([pair.label for pair in nli.splits[split]] for split in ("test", "dev"))
    scores, tuning_scores = (scores_by_hand(nli.splits[split]) for split in ("test", "dev"))
    assert report.main_measure == "accuracy (3 classes)"
    for row in report.rows:
        _, expected = nli_by_hand(scores[row.name], classes, tuning_scores[row.name], tuning)
        actual = figures(row)
        three = actual.pop("accuracy (3 classes)")
        assert actual == pytest.approx(expected), row.name
        if row.name != "teacher":
            assert three == np.mean(report.details.values[row.name]["accuracy (3 classes)"])
    assert report.calibration[0].num_pairs == 60


def test_three_classes_use_the_best_two_cuts():
    nli = make_pairs("classes")
    doubled = PairDataset(
        nli.name, nli.path, "classes", nli.classes, {"dev": nli.splits["dev"], "test": nli.splits["dev"]}, ()
    )
    scores, classes = scores_by_hand(nli.splits["dev"])["D2LLM"], [pair.label for pair in nli.splits["dev"]]
    best, _ = nli_by_hand(scores, classes, scores, classes)
    report = measure(doubled, Contenders(FakeStudent()))
    assert figures(report.row("D2LLM"))["accuracy (3 classes)"] == pytest.approx(best)


@pytest.mark.parametrize("names", [("SUPPORTS", "REFUTES", "NOT_ENOUGH_INFO"), ("Entails", "Contradicts", "neutral")])
def test_other_names_of_the_three_classes(names):
    renamed = measure(make_pairs("classes", labels=names), Contenders(FakeStudent()))
    usual = measure(make_pairs("classes", labels=("entailment", "contradiction", "neutral")), Contenders(FakeStudent()))
    assert [figures(row) for row in renamed.rows] == [figures(row) for row in usual.rows]


# --- reused results ---------------------------------------------------------------------------------------------------


def test_a_second_evaluation_reuses_all_results(sayings, tmp_path):
    first, second = everyone(), everyone()
    before = measure(sayings, first, tmp_path, teacher_queries=20)
    assert len(first.teacher.pairs) == 2 * 20 + 3 + 3  # both samples; to time it, three probes singly and together
    after = measure(sayings, second, tmp_path, teacher_queries=20)
    assert second.teacher.pairs == []
    assert second.student.encoded_passages == second.paper_head.encoded_passages == 0
    assert after.rows == before.rows
    assert after.comparisons == before.comparisons
    assert after.details == before.details
    assert after.notes == (*before.notes, "7 parts were measured by an earlier run")


def test_students_with_the_same_vectors_share_one_encoding(sayings):
    student = FakeStudent()
    report = measure(sayings, Contenders(student))
    assert [row.kind for row in report.rows] == ["bm25", "dot", "d2llm"]
    distinct = sum(len({pair.passage for pair in sayings.pairs(split)}) for split in ("test", "dev"))
    num_timed = 2 * min(len(sayings.pairs("test")), report.settings["latency_queries"])  # each alone, for both
    assert student.encoded_passages == distinct + num_timed


def test_stored_results_depend_on_the_task(sayings, tmp_path):
    measure(sayings, Contenders(FakeStudent()), tmp_path)
    student = FakeStudent()
    report = measure(sayings, Contenders(student), tmp_path, task="symmetric")
    assert student.encoded_passages > 0
    assert figures(report.rows[-1]) == figures(measure(sayings, Contenders(student), task="symmetric").rows[-1])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_unusable_pairs_are_rejected():
    student = FakeStudent()

    def refuse(dataset, error, match, **settings):
        with pytest.raises(error, match=match):
            measure(dataset, everyone(student=student), **settings)
        assert student.encoded_passages == 0

    refuse(make_pairs(), DataFormatError, "split 'train' was not read; read: dev, test", split="train")
    refuse(make_pairs(labels=["0"]), DataFormatError, "split 'test' has no positive pair, so nothing can be measured")
    refuse(make_pairs(labels=["1"]), DataFormatError, "split 'test' has no negative pair")
    classes = make_pairs("classes", labels=["sport", "music", "other"])
    refuse(classes, DataFormatError, "pair '0' has the class 'sport'; known are yes/no .* entailment, entails, supp")
    no_dev = make_pairs("classes", sizes={"test": 30})
    refuse(no_dev, InputError, "the classes need thresholds fitted on another split; add a dev split")
    no_class = make_pairs("classes", labels=["entailment", "contradiction"])
    refuse(no_class, InputError, "no pair of the dev split is 'neutral'")
    refuse(make_pairs(), InputError, "the baseline 'hybrid' is not among the rows of this report", baseline="hybrid")
    refuse(make_pairs(), InputError, "a sample of 1 pairs, and of 1 to .* increase the sample", teacher_queries=1)


def test_constant_grades_are_rejected():
    graded = make_pairs("scores")
    graded = PairDataset(
        graded.name,
        graded.path,
        "scores",
        (),
        {"test": tuple(LabelledPair(p.id, p.query, p.passage, None, 3.0) for p in graded.splits["test"])},
        (),
    )
    with pytest.raises(InputError, match="all 60 judgements are 3: there is nothing to correlate with"):
        measure(graded, Contenders(FakeStudent()))


def test_a_run_is_a_missing_row_for_pairs(sayings):
    report = measure(sayings, everyone(runs=[run("theirs", {"q": ["a"]})]))
    assert report.missing[-1].name == "theirs"
    assert report.missing[-1].reason == "a run ranks passages, and this data set has single pairs"


def test_external_models_can_score_pairs(sayings):
    report = measure(
        sayings,
        everyone(
            bi_encoders={"their encoder": CosineStudent(FakeStudent(fingerprint="base"))},
            cross_encoders={"their judge": FakeTeacher(fingerprint="judge")},
        ),
        teacher_queries=None,
    )
    assert figures(report.row("their encoder")) == figures(report.row("cosine, untuned"))
    assert figures(report.row("their judge")) == figures(report.row("teacher"))
    assert report.row("their judge").fingerprint == "judge"


def test_missing_rows_have_a_reason(sayings):
    report = measure(sayings, Contenders(FakeStudent(head="paper"), why_missing={"teacher": "asleep"}))
    assert [row.name for row in report.rows] == ["BM25", "D2LLM"]
    assert {row.name: row.reason for row in report.missing}["teacher"] == "asleep"
    assert len(report.missing) == 6
    assert report.agreement == ()
