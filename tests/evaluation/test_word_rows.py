"""Lexical rows of a report: fitted sums of cosine or student, and the student without parts of its score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import PART_KINDS
from d2llm.evaluation import shortcuts
from d2llm.evaluation.contenders import Contenders
from d2llm.models.score_features import FeatureWeights, WordsFactor
from d2llm.ops.weighted_sum import sum_weights
from d2llm.store.bm25 import WordIndex
from fake_models import FakeStudent, TokenStudent
from tiny_evaluations import everyone, make_words, measure, with_indexes_of

FITTED = "fitted sum: BM25 + cosine, tuned"
FITTED_STUDENT = "D2LLM, weights fitted here"
WEIGHTS = {"bm25": 0.5, "window_bm25_fraction": 1.5}


class WordyStudent(FakeStudent):
    """A student whose score includes word features."""

    def feature_weights(self, task, *, stored=PART_KINDS):
        return FeatureWeights(terms=WEIGHTS if task == "asymmetric" else {})


class ScalingStudent(FakeStudent):
    """A student whose words count for half, whatever the query."""

    def feature_weights(self, task, *, stored=PART_KINDS):
        factor = WordsFactor(slopes=(0.0,) * 4, offset=float(np.log(0.5)), lowest=-5, highest=5)
        return FeatureWeights(terms=WEIGHTS, words_factor=factor)


@pytest.fixture(autouse=True)
def few_permutations(monkeypatch):
    monkeypatch.setattr("d2llm.evaluation.figures.NUM_PERMUTATIONS", 100)


@pytest.fixture(scope="module")
def words():
    return make_words()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder in which these tests reuse each other's results."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def without_results(work, tmp_path):
    """A work folder for a test that fits other weights: it holds indexes only."""
    return with_indexes_of(work, tmp_path)


def stored(vectors):
    """Vectors rounded to bfloat16, as the index stores them."""
    bits = vectors.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def by_hand(index, dataset, query, score, weights):
    """The weighted sum of scores for every passage."""
    query_terms = index.query(query.text)
    passages, windows = index.score(query_terms, np.arange(len(index)))
    limit = query_terms.limit or 1.0
    features = {
        "bm25": passages,
        "bm25_fraction": passages / limit,
        "window_bm25": windows,
        "window_bm25_fraction": windows / limit,
    }
    total = score + sum(weight * features[term] for term, weight in weights.items())
    return dict(zip(dataset.passages, total.tolist(), strict=True))


def check(rankings, dataset, score_of, weights):
    """Check the scores of all rankings, and that no unranked passage scores higher."""
    index = WordIndex.from_texts(passage.full_text for passage in dataset.passages.values())
    for query_id, ranking in rankings.items():
        expected = by_hand(index, dataset, dataset.queries[query_id], score_of(dataset.queries[query_id].text), weights)
        assert [score for _, score in ranking] == pytest.approx([expected[p] for p, _ in ranking], rel=1e-4, abs=1e-4)
        best_unranked = max((score for p, score in expected.items() if p not in dict(ranking)), default=-np.inf)
        assert ranking[-1][1] >= best_unranked - 1e-4


def cosine_of(dataset, student):
    """A function that gives the cosines of a query with all passages, as ``CosineStudent`` computes them."""

    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    texts = [passage.full_text for passage in dataset.passages.values()]
    passages = stored(unit(student.encode_passages(texts).vectors))
    return lambda text: passages @ unit(student.encode_queries([text]).vectors)[0]


def padded(lists, *weights):
    """Weights for the first columns of some lists, and 0 for the others."""
    return np.array([*weights, *[0.0] * (lists[0][0].shape[1] - len(weights))])


def test_the_sum_ranks_by_weights_fitted_on_dev(words, without_results, monkeypatch):
    dev = dict(list(words.qrels["test"].items())[:9])
    test = {query_id: grades for query_id, grades in words.qrels["test"].items() if query_id not in dev}
    dataset = replace(words, qrels={"dev": dev, "test": test})
    fitted_on = []
    monkeypatch.setattr(
        shortcuts, "sum_weights", lambda lists: fitted_on.append(lists) or padded(lists, 1.0, 0.25, 2.0)
    )
    report = measure(dataset, everyone(), without_results, top_k=100)
    assert report.row(FITTED).cost.bytes_per_passage > report.row("cosine, tuned").cost.bytes_per_passage == 32
    for lists, num_columns in zip(fitted_on, (3, 5), strict=True):
        assert len(lists) == 9
        assert all(scores.shape == (len(grades), num_columns) for scores, grades in lists)
        assert all(sorted(set(grades)) >= [0, 1] for _, grades in lists)
    tuned = cosine_of(dataset, FakeStudent(fingerprint="tuned"))
    check(report.details.rankings[FITTED], dataset, tuned, {"bm25": 0.25, "bm25_fraction": 2.0})
    student = FakeStudent()
    passages = stored(student.encode_passages([passage.full_text for passage in dataset.passages.values()]).vectors)
    check(
        report.details.rankings[FITTED_STUDENT],
        dataset,
        lambda text: student.score(student.encode_queries([text]).vectors[0], passages, "asymmetric"),
        {"bm25": 0.25, "bm25_fraction": 2.0},
    )
    for name, own in ((FITTED, "cosine"), (FITTED_STUDENT, "D2LLM")):
        (note,) = [note for note in report.notes if note.startswith(name)]
        assert note == f"{name}: 1 x {own} + 0.25 x BM25 + 2 x BM25 / its bound, fitted on 9 dev queries"


def test_without_dev_the_weights_are_cross_fitted(words, without_results, monkeypatch):
    fitted = []

    def fit(lists):
        fitted.append(len(lists))
        return padded(lists, 1.0, float(len(fitted)))

    monkeypatch.setattr(shortcuts, "sum_weights", fit)
    report = measure(words, everyone(), without_results)
    assert fitted == [12] * 4  # two halves of each sum
    rankings = report.details.rankings[FITTED]
    assert list(rankings) == list(words.queries)
    tuned = cosine_of(words, FakeStudent(fingerprint="tuned"))
    for first, weight in ((0, 2.0), (1, 1.0)):
        half = {query_id: rankings[query_id] for query_id in list(rankings)[first::2]}
        check(half, words, tuned, {"bm25": weight})


def test_the_fitted_sum_can_be_the_baseline(words, work):
    report = measure(words, everyone(), work, baseline="fitted_sum")
    assert report.baseline == FITTED
    assert report.comparison("D2LLM", "nDCG@10").baseline == FITTED
    few = replace(words, qrels={"test": dict(list(words.qrels["test"].items())[:3])})
    with pytest.raises(InputError, match="too few queries to fit"):
        measure(few, everyone(), work, baseline="fitted_sum")
    with pytest.raises(InputError, match="no cosine to add"):
        measure(words, everyone(untuned=None, tuned_cosine=None), work, baseline="fitted_sum")
    missing = measure(few, everyone(), work).missing
    assert [(row.name, row.kind) for row in missing] == [(FITTED, "fitted_sum"), (FITTED_STUDENT, "fitted_student")]


def test_no_weights_are_a_missing_row(words, without_results, monkeypatch):
    def nothing(_):
        raise InputError("no list has a relevant passage")

    monkeypatch.setattr(shortcuts, "sum_weights", nothing)
    report = measure(words, everyone(), without_results)
    reason = "no list has a relevant passage"
    assert [(row.name, row.reason) for row in report.missing] == [(FITTED, reason), (FITTED_STUDENT, reason)]
    assert report.row("D2LLM").num_items == 24


def test_weights_are_fitted_again_if_judgements_have_changed(words, without_results, monkeypatch):
    fitted = []
    monkeypatch.setattr(shortcuts, "sum_weights", lambda lists: fitted.append(1) or padded(lists, 1.0, 0.5))
    dev = dict(list(words.qrels["test"].items())[:9])
    test = {query_id: grades for query_id, grades in words.qrels["test"].items() if query_id not in dev}
    for grade, calls in ((1, 1), (1, 1), (2, 2)):
        changed = {query_id: dict.fromkeys(grades, grade) for query_id, grades in dev.items()}
        measure(replace(words, qrels={"dev": changed, "test": test}), everyone(), without_results)
        assert len(fitted) == 2 * calls  # of the cosine and of the student


def test_the_student_is_fitted_with_all_its_score_features(words, without_results, monkeypatch):
    columns = []

    def fit(lists):
        columns.append(lists[0][0].shape[1])
        return sum_weights(lists)

    monkeypatch.setattr(shortcuts, "sum_weights", fit)
    student = TokenStudent()
    report = measure(words, Contenders(student), without_results)
    assert columns == [6, 6]  # its own score, four kinds of words, and tokens
    row, own = report.row(FITTED_STUDENT), report.row("D2LLM")
    assert row.measures["nDCG@10"].value >= own.measures["nDCG@10"].value
    (note,) = [note for note in report.notes if note.startswith(FITTED_STUDENT)]
    assert note.startswith(f"{FITTED_STUDENT}: 1 x D2LLM + ")


def test_without_a_tuned_cosine_the_untuned_one_is_used(words, work):
    report = measure(words, everyone(tuned_cosine=None), work)
    assert report.row("fitted sum: BM25 + cosine, untuned").num_items == 24


def test_the_own_score_keeps_weight_one():
    rng = np.random.default_rng(0)
    lists = [(rng.standard_normal((10, 2)) + np.eye(10)[0][:, None], np.eye(10)[0]) for _ in range(50)]
    own, other = sum_weights(lists)
    assert own == 1
    assert other == pytest.approx(1, abs=0.6)


def test_ablated_parts_of_the_score_get_rows(words, work):
    report = measure(words, everyone(student=WordyStudent()), work, num_candidates=260)
    names = ["D2LLM without BM25 of passages", "D2LLM without BM25 of windows", "D2LLM without the interaction"]
    assert [row.name for row in report.rows if row.name.startswith("D2LLM without")] == names
    student = FakeStudent()
    texts = [passage.full_text for passage in words.passages.values()]
    passages = stored(student.encode_passages(texts).vectors)

    def score(text):
        return student.score(student.encode_queries([text]).vectors[0], passages, "asymmetric")

    def dot(text):
        return passages @ student.query_vectors(student.encode_queries([text]).vectors, "asymmetric")[0]

    rankings = report.details.rankings
    check(rankings["D2LLM"], words, score, WEIGHTS)
    check(rankings[names[0]], words, score, {"window_bm25_fraction": 1.5})
    check(rankings[names[1]], words, score, {"bm25": 0.5})
    check(rankings[names[2]], words, dot, WEIGHTS)
    assert {part.row for part in report.parts} == set(names)
    assert {part.baseline for part in report.parts} == {"D2LLM"}
    assert not {part.row for part in report.comparisons} & set(names)
    part = next(part for part in report.parts if (part.row, part.measure) == (names[0], "nDCG@10"))
    without, full = (report.row(name).measures["nDCG@10"].value for name in (names[0], "D2LLM"))
    assert part.difference.value == pytest.approx(without - full)


def test_an_interaction_that_is_off_has_a_note_and_no_row(words, work, monkeypatch):
    monkeypatch.setattr(WordyStudent, "why_no_interaction", lambda self, task: f"off in {task} search", raising=False)
    report = measure(words, everyone(student=WordyStudent()), work, num_candidates=260)
    assert "D2LLM without the interaction" not in [row.name for row in report.rows]
    assert "off in asymmetric search" in report.notes


def test_a_student_without_word_features_has_no_parts(words, work):
    report = measure(words, everyone(), work)
    assert report.parts == ()
    assert not [row for row in report.rows if "without" in row.name]


def test_the_factor_of_words_can_be_ablated(words, work):
    report = measure(words, everyone(student=ScalingStudent()), work, num_candidates=260)
    name = "D2LLM without the words factor"
    assert name in {one.row for one in report.parts}
    student = FakeStudent()
    passages = stored(student.encode_passages([passage.full_text for passage in words.passages.values()]).vectors)

    def score(text):
        return student.score(student.encode_queries([text]).vectors[0], passages, "asymmetric")

    check(report.details.rankings["D2LLM"], words, score, {term: weight / 2 for term, weight in WEIGHTS.items()})
    check(report.details.rankings[name], words, score, WEIGHTS)
