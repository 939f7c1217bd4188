"""Score features weights: fitted only where they help, and measured on queries held out of the fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage
from d2llm.data.pairs import read_pairs
from d2llm.models.score_features import FeatureWeights, ScoreFeatures, TaskFeatureWeights, WordsFactor
from d2llm.models.student import Student
from d2llm.ops.bm25_words import windows
from d2llm.ops.weighted_sum import sum_weights
from d2llm.recipe import StudentConfig
from d2llm.training import fit_score_features as module
from d2llm.training.dev_sets import dev_queries
from d2llm.training.fit_score_features import FeatureLists, fit_score_features, fit_task_weights, make_feature_lists
from d2llm.training.fit_scores import fit_scores
from tiny_data import topics
from tiny_models import tiny_student_config, write_tiny_model

TERMS = ("bm25", "bm25_fraction", "window_bm25", "window_bm25_fraction")


def lists(num, *, informative, seed=0):
    """Lists of ten passages, the first relevant; the ``informative`` columns score it a little higher."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(num):
        scores = rng.standard_normal((10, 5)).astype(np.float32)
        scores[0, informative] += 1.5
        examples.append((scores, np.eye(10)[0]))
    return examples


def make_lists(name, examples, statistics=None) -> FeatureLists:
    return FeatureLists(name, examples, np.zeros((len(examples), 1), np.float32) if statistics is None else statistics)


def test_informative_score_features_gets_weight():
    fitted = fit_task_weights([make_lists("a", lists(200, informative=[0, 1]))], TERMS)
    own, fused = fitted.dev["a"]
    assert fused > own + 0.1
    assert fitted.weights["bm25"] == pytest.approx(1.0, abs=0.35)  # as good as the student's own score
    assert max(fitted.weights[term] for term in TERMS[1:]) < 0.35
    assert fitted.num_queries == {"a": 200}


def test_a_set_without_a_list_is_left_out(tmp_path, caplog):
    student = Student.create(tiny_student_config(write_tiny_model(tmp_path / "model", "bert")), device="cpu")
    whole, far = topics(num_dev=40, name="whole").dataset, topics(num_dev=2, name="far").dataset
    monkeypatch = pytest.MonkeyPatch()
    original = module.make_feature_lists

    def none_for_far(student, dataset, task, **options):
        made = original(student, dataset, task, **options)
        return made if dataset is whole else replace(made, lists=[], statistics=made.statistics[:0])

    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="d2llm.remarks"):
        patch.setattr(module, "make_feature_lists", none_for_far)
        score_features = fit_score_features(student, [(whole, "symmetric"), (far, "symmetric")], terms=["bm25"])
    assert score_features.tasks["symmetric"].num_queries == {"whole": 40}
    assert "far: word weights are fitted without it" in caplog.text


def test_uninformative_score_features_is_kept_only_with_a_gain():
    sets = [make_lists(name, lists(30, informative=[0], seed=n)) for n, name in enumerate("ab")]
    fitted = fit_task_weights(sets, TERMS)
    gain = np.mean([fused - own for own, fused in fitted.dev.values()])
    assert (gain > 0) == any(fitted.weights.values())
    assert fitted.num_queries == {"a": 30, "b": 30}


@pytest.mark.parametrize(("benefit", "is_kept"), [(1.5, True), (0.0, False)])
def test_windows_get_weight_where_they_are_worth_reading(benefit, is_kept):
    terms = ("bm25", "window_vectors")
    examples = [(scores[:, :3].copy(), grades) for scores, grades in lists(200, informative=[0, 1])]
    for scores, _ in examples:
        scores[0, 2] += benefit
    fitted = fit_task_weights([make_lists("a", examples)], terms)
    without_vectors = fit_task_weights(
        [make_lists("a", [(scores[:, :2], grades) for scores, grades in examples])], ("bm25",)
    )
    if is_kept:
        assert fitted.weights["window_vectors"] == pytest.approx(1.0, abs=0.35)
        assert fitted.without_parts.weights == pytest.approx(without_vectors.weights, rel=1e-3)
        assert fitted.dev["a"][1] >= without_vectors.dev["a"][1] + module.MIN_PART_GAIN["window"]
    else:
        assert fitted.weights == pytest.approx(without_vectors.weights, rel=1e-3)
        assert fitted.without_parts is None
    score_features = ScoreFeatures(tasks={"asymmetric": fitted})
    assert score_features.weights("asymmetric", stored=()).terms == pytest.approx(without_vectors.weights, rel=1e-3)
    assert ("window" in score_features.weights("asymmetric").part_kinds) == is_kept


def test_an_index_may_lack_any_of_the_vectors_that_the_best_weights_need():
    """Windows and tokens both help: there are weights with both, with tokens alone, and with words alone."""
    terms = ("bm25", "window_vectors", "maxsim")
    rng = np.random.default_rng(0)
    examples = []
    for scores, grades in lists(200, informative=[0, 1]):
        parts = rng.standard_normal((len(scores), 2)).astype(np.float32)
        parts[0] += 2
        examples.append((np.concatenate([scores[:, :2], parts], axis=1), grades))
    fitted = fit_task_weights([make_lists("a", examples)], terms)
    score_features = ScoreFeatures(tasks={"asymmetric": fitted})
    assert score_features.weights("asymmetric").part_kinds == {"window", "token"}
    assert score_features.weights("asymmetric", stored=("token",)).part_kinds == {"token"}
    for stored in ((), ("window",)):
        weights = score_features.weights("asymmetric", stored=stored)
        assert not weights.part_kinds
        assert weights.counts_words
    useless = [(np.concatenate([s[:, :3], rng.standard_normal((len(s), 1))], axis=1), g) for s, g in examples]
    without = fit_task_weights([make_lists("a", useless)], terms)
    assert without.weights.keys() == {"bm25", "window_vectors"}
    assert without.without_parts.weights.keys() == {"bm25"}


def test_word_weight_depends_on_query_statistics():
    rng = np.random.default_rng(3)
    examples, statistics = lists(400, informative=[0]), rng.standard_normal((400, 2)).astype(np.float32)
    for (scores, _), (statistic, _) in zip(examples, statistics, strict=True):
        scores[:, 1] *= 3
        scores[0, 1] += 12.0 * (statistic > 0)  # words help where the first statistic is high, else they mislead
    fitted = fit_task_weights(
        [make_lists("a", examples[:200], statistics[:200]), make_lists("b", examples[200:], statistics[200:])], TERMS
    )
    constant = fit_task_weights([make_lists("a", examples[:200]), make_lists("b", examples[200:])], TERMS)
    assert constant.words_factor is None  # a constant statistic carries no information
    sets = [make_lists("a", examples[:200], statistics[:200]), make_lists("b", examples[200:], statistics[200:])]
    refused = fit_task_weights(sets, TERMS, words_factor=False)
    assert refused.words_factor is None
    assert module._mean_after(refused) < module._mean_after(fitted)
    assert fitted.words_factor.slopes[0] > 0.5
    assert abs(fitted.words_factor.slopes[1]) < 0.3
    assert fitted.words_factor.lowest < -0.5 < 0.5 < fitted.words_factor.highest
    assert module._mean_after(fitted) > module._mean_after(constant) + 0.005


def test_word_weight_depends_on_the_nearest_passage_if_that_is_better():
    rng = np.random.default_rng(4)
    examples, nearest = lists(400, informative=[0]), rng.standard_normal(400).astype(np.float32)
    statistics = rng.standard_normal((400, 2)).astype(np.float32)
    for (scores, _), near in zip(examples, nearest, strict=True):
        scores[:, 1] *= 3
        scores[0, 1] += 12.0 * (near < 0)  # words mislead where a passage is near
    parts = (slice(None, 200), slice(200, None))
    sets = [FeatureLists(f"s{part}", examples[part], statistics[part], nearest[part]) for part in parts]
    fitted = fit_task_weights(sets, TERMS)
    assert fitted.words_factor.nearest_slope < -0.5
    assert np.abs(fitted.words_factor.slopes).max() < 0.3
    for without in (
        [replace(each, nearest=None) for each in sets],
        [replace(each, nearest=0 * each.nearest) for each in sets],
    ):
        plain = fit_task_weights(without, TERMS)
        assert plain.words_factor is None or plain.words_factor.nearest_slope == 0
        assert module._mean_after(fitted) > module._mean_after(plain) + 0.005
    assert fit_task_weights(sets, TERMS, words_factor=False).words_factor is None


def test_uninformative_statistics_have_little_effect():
    rng = np.random.default_rng(0)
    examples = lists(300, informative=[0, 1])
    fits = [
        fit_task_weights([make_lists("a", examples, rng.standard_normal((300, 4)).astype(np.float32))], TERMS)
        for _ in range(5)
    ]
    statistics = rng.standard_normal((300, 4)).astype(np.float32)
    assert fit_task_weights([make_lists("a", examples, statistics)], TERMS, words_factor=True).words_factor is not None
    for fitted in fits:
        assert fitted.words_factor is None or np.abs(fitted.words_factor.slopes).max() < 0.3


HEAD = {"format_version": 1, "student": "x", "kind": "score_features"}


class TestStudent:
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory) -> StudentConfig:
        model = write_tiny_model(tmp_path_factory.mktemp("model"), "modernbert", initializer_range=0.1)
        return tiny_student_config(model)

    @pytest.fixture
    def student(self, config) -> Student:
        return Student.create(config, device="cpu", dtype="float32")

    def test_lists_hold_the_nearest_by_words_and_vectors_if_one_of_them_is_relevant(self, student):
        dataset, depth = topics().dataset, 4
        positives = dataset.positives("dev")

        def lists_of(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
            size = len(dataset.passages)
            made = make_feature_lists(student, dataset, "asymmetric", terms=TERMS[:2], depth=number, num_passages=size)
            assert len(made.statistics) == len(made.lists) == len(made.nearest)
            if number == size:  # lists of all passages: this student's score is mostly the inner product
                highest = [scores[:, 0].max() for scores, _ in made.lists]
                assert np.corrcoef(made.nearest, highest)[0, 1] > 0.5
            return list(made.lists)

        whole, lists = lists_of(len(dataset.passages)), lists_of(depth)
        assert sorted(int((grades > 0).sum()) for _, grades in whole) == sorted(map(len, positives.values()))
        assert 0 < len(lists) < len(positives)  # of some queries, no relevant passage is among the nearest
        for scores, grades in lists:
            assert scores.shape[1] == 3
            assert depth <= len(scores) <= 3 * depth
            assert grades.any()

    def test_window_column_is_the_best_window_score(self, student):
        dataset = topics().dataset
        texts = {name: f"{passage.text} Also this. And that." for name, passage in dataset.passages.items()}
        longer = replace(dataset, passages={name: Passage(name, text) for name, text in texts.items()})
        names = list(texts)
        result = make_feature_lists(
            student, longer, "asymmetric", terms=("bm25", "window_vectors"), num_passages=len(names), depth=len(names)
        )
        queries = dev_queries(longer, num_queries=200, seed=0)
        dot_queries = student.query_vectors(
            student.encode_queries([query.text for query in queries]).vectors, "asymmetric"
        )
        windowed = [[text[start:end] for start, end in windows(text)] for text in texts.values()]
        for (scores, _), dot_query in zip(result.lists, dot_queries, strict=True):
            assert len(scores) == len(names)  # every passage is in the list, in corpus order
            best = [float((student.encode_passages(parts).vectors @ dot_query).max()) for parts in windowed]
            np.testing.assert_allclose(scores[:, 2], best, rtol=1e-3, atol=1e-3)

    def test_each_task_is_fitted_on_its_own_data(self, student, monkeypatch, caplog):
        monkeypatch.setattr(module, "MIN_QUERIES", 1)
        dataset = topics().dataset
        score_features = fit_score_features(student, [(dataset, "asymmetric")], terms=TERMS[:2])
        assert score_features.tasks.keys() == {"asymmetric"}
        assert score_features.tasks["asymmetric"].weights.keys() == set(TERMS[:2])
        monkeypatch.setattr(module, "MIN_QUERIES", 10_000)
        with caplog.at_level("WARNING", "d2llm.remarks"):
            assert fit_score_features(student, [(dataset, "asymmetric")]).tasks == {}
        assert "at least 10000 are needed" in caplog.text
        with pytest.raises(InputError, match="no score features to fit weights for"):
            fit_score_features(student, [(dataset, "asymmetric")], terms=())

    def test_saving_weights_keeps_the_students_fingerprint(self, student, tmp_path):
        before = student.fingerprint
        weights = {"bm25": 0.5, "window_bm25": 0.0}
        factor = WordsFactor(slopes=(0.1, 0.2, 0.3, 0.4), offset=1.5, lowest=-2, highest=2, nearest_slope=-0.1)
        fitted = TaskFeatureWeights(weights=weights, words_factor=factor, dev={"a": (0.5, 0.6)}, num_queries={"a": 40})
        student.score_features = ScoreFeatures(tasks={"asymmetric": fitted})
        student.save(tmp_path / "student")
        loaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
        assert loaded.fingerprint == before
        assert loaded.score_features == student.score_features
        assert loaded.feature_weights("asymmetric") == FeatureWeights(terms={"bm25": 0.5}, words_factor=factor)
        assert not loaded.feature_weights("symmetric")
        loaded.prepare_training()
        assert not loaded.feature_weights("asymmetric")

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("{", "cannot be read"),
            (HEAD | {"student": "other", "tasks": {}}, "was fitted to the student other"),
            (HEAD | {"format_version": 9, "tasks": {}}, "format version 9"),
            (HEAD | {"kind": "probabilities", "tasks": {}}, "its kind is 'probabilities', not 'score_features'"),
            ({"tasks": {}}, "lacks 'student'"),
            (
                HEAD | {"tasks": {"asymmetric": {"weights": {"bm25": -1}, "dev": {}, "num_queries": {}}}},
                "tasks.asymmetric.weights.bm25 is -1, but must be at least 0",
            ),
            (HEAD | {"tasks": {"asymmetric": {"weights": {"sounds": 1}, "dev": {}, "num_queries": {}}}}, "sounds"),
        ],
    )
    def test_invalid_score_features_files_are_rejected(self, tmp_path, content, problem):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "score_features.json").write_text(text)
        with pytest.raises(DataFormatError, match=re.escape(problem)) as error:
            ScoreFeatures.read(tmp_path, "x")
        assert "delete the file" in str(error.value) or "update d2llm" in str(error.value)


def test_scores_are_fitted_for_one_task_and_kept_for_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIN_QUERIES", 1)
    monkeypatch.setattr("d2llm.training.fit_probabilities.MIN_QUERIES", 1)
    model = write_tiny_model(tmp_path / "model", "modernbert", initializer_range=0.1)
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    kept = TaskFeatureWeights(weights={"bm25": 2.0}, dev={}, num_queries={})
    student.score_features = ScoreFeatures(tasks={"symmetric": kept})
    report = fit_scores(student, [topics().dataset], "asymmetric")
    assert student.score_features.tasks["symmetric"] == kept
    assert report.score_features == student.score_features.tasks["asymmetric"].model_dump()
    calibration = student.calibration.tasks.get("asymmetric")  # None where the scores separate nothing
    assert report.probabilities == (calibration and calibration.model_dump())
    before = student.score_features
    assert fit_scores(student, [topics().dataset], "asymmetric", words=False).score_features is None
    assert student.score_features == before


def test_labelled_pairs_are_searched_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIN_QUERIES", 1)
    lines = [
        {"query": f"about topic{n}", "document": f"topic{n} and {'more ' * (n % 3)}words", "label": 1}
        for n in range(12)
    ]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = write_tiny_model(tmp_path / "model", "modernbert", initializer_range=0.1)
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    report = fit_scores(student, [read_pairs(tmp_path / "dev.jsonl")], "symmetric", window_vectors=False)
    assert report.score_features is not None
    assert report.score_features["num_queries"] == {"dev": 12}
    assert student.score_features.weights("symmetric")


def test_uninformative_scores_get_no_weight():
    assert sum_weights([(np.zeros((4, 3)), np.eye(4)[0])] * 3).tolist() == [1, 0, 0]
