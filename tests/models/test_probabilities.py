"""From scores to probabilities: drawing the pairs, fitting, and saving the result with a student."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtri

from d2llm import Student
from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.models.probabilities import ProbabilityCalibration, TaskCalibration
from d2llm.models.protocols import PlainStudent
from d2llm.models.tokens import EncodedTexts
from d2llm.ops.calibration import expected_calibration_error, reliability_bins
from d2llm.training.fit_probabilities import MIN_QUERIES, NUM_HARD, NUM_RANDOM, fit_probabilities, score_drawn
from tiny_models import tiny_student_config, write_tiny_model

SLOPE, OFFSET = 0.7, -5.0
FITTED = TaskCalibration(
    slope=SLOPE, offset=OFFSET, num_queries={"a": 40}, num_pairs=400, error_before=0.5, error_after=0.01
)


def calibration(**tasks: TaskCalibration) -> ProbabilityCalibration:
    return ProbabilityCalibration(num_hard=1, num_random=8, tasks=tasks or {"asymmetric": FITTED})


class Numbered(PlainStudent):
    """A student whose score depends on the pair's numbers: high for query n with passage n, else low, with noise."""

    fingerprint = "numbered"
    config = None
    vector_dim = 1
    has_dot = True

    def __init__(self, *, tells: float = 8.0) -> None:
        self.tells = tells

    def _encode(self, texts, *, instruction=None, advance=None):
        if advance is not None:
            advance(len(texts))
        return EncodedTexts(np.array([int(text.split()[0]) for text in texts], np.float32)[:, None], (), len(texts))

    encode_queries = encode_passages = _encode

    def query_vectors(self, query_vectors, task):
        return query_vectors

    def score(self, query, passages, task):
        is_own = passages[:, 0] % 1000 == query[0]
        fractions = (12.9898 * passages[:, 0].astype(np.float64) + 78.233 * query[0]) * 0.6180339887 % 1.0
        noise = np.clip(
            1.5 * ndtri(fractions), -3.0, 3.0
        )  # normal, so that the true probability is a logistic function
        return (2.0 + self.tells * is_own + noise).astype(np.float32)


def numbered(num_queries: int, *, split: str = "dev", name: str = "numbers") -> Dataset:
    """Query n is answered by passage n; 300 passages in all."""
    passages = {f"p{n}": Passage(f"p{n}", f"{n} word{n % 7} thing") for n in range(300)}
    queries = {f"q{n}": Query(f"q{n}", f"{n} word{n % 7}") for n in range(num_queries)}
    return Dataset(name, Path(name), passages, queries, {split: {f"q{n}": {f"p{n}": 1} for n in range(num_queries)}})


def test_a_probability_is_the_logistic_function_of_the_score():
    probabilities = calibration().probabilities([-3.0, 0.0, 5.0, 9.0], "asymmetric")
    assert np.allclose(probabilities, [1 / (1 + np.exp(-(SLOPE * x + OFFSET))) for x in (-3.0, 0.0, 5.0, 9.0)])
    assert calibration().base_rate == pytest.approx(0.1)
    assert calibration().probabilities(np.float32([1e30, -1e30]), "asymmetric").tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="not calibrated for symmetric search"):
        calibration().probabilities([0.0], "symmetric")


def test_the_score_of_a_query_with_more_words_says_less():
    student = ProbabilityCalibration(with_features={"asymmetric": FITTED.model_copy(update={"terms_slope": 2.0})})
    queries = ["cats", "cats by the sea, cats"]  # one term, and four
    probabilities = student.probabilities([9.0, 9.0], "asymmetric", queries=queries)
    log_odds = [SLOPE * 9 + OFFSET - 2 * np.log(1 + count) for count in (1, 4)]
    assert np.allclose(probabilities, 1 / (1 + np.exp(-np.array(log_odds))))
    with pytest.raises(InputError, match="not calibrated"):
        student.probabilities([9.0], "asymmetric")


class TestDrawing:
    def test_one_pair_in_ten_is_relevant(self):
        drawn = score_drawn(Numbered(), numbered(50), "asymmetric", num_queries=50, seed=0)
        assert len(drawn.scores) == 50 * (1 + NUM_HARD + NUM_RANDOM) == len(drawn.queries)
        assert drawn.relevant.reshape(50, -1).sum(axis=1).tolist() == [1] * 50
        # Relevant pairs score 2 + 8 +- 3 and the others 2 +- 3, so a relevant one among the others would show.
        assert drawn.scores[drawn.relevant].min() > 6.9
        assert drawn.scores[~drawn.relevant].max() < 5.1
        assert drawn.num_queries == {"numbers": 50}

    def test_near_duplicates_of_the_relevant_text_are_not_drawn(self):
        dataset = numbered(40)
        passages = {**dataset.passages, **{f"r{n}": Passage(f"r{n}", f"{n} word{n % 7} THING!") for n in range(40)}}
        drawn = score_drawn(Numbered(), replace(dataset, passages=passages), "asymmetric", num_queries=40, seed=0)
        assert drawn.scores[~drawn.relevant].max() < 5.1

    def test_a_query_without_other_passages_is_left_out(self):
        dataset = numbered(3)
        passages = {"p0": dataset.passages["p0"]}
        drawn = score_drawn(Numbered(), replace(dataset, passages=passages), "asymmetric", num_queries=3, seed=0)
        assert (len(drawn.scores), drawn.num_queries) == (0, {"numbers": 0})

    def test_the_number_of_queries_is_limited(self):
        drawn = score_drawn(Numbered(), numbered(50), "asymmetric", num_queries=7, seed=0)
        assert drawn.num_queries == {"numbers": 7}


class TestFitting:
    def test_fitted_probabilities_are_calibrated_and_keep_the_order(self):
        dataset = numbered(150)
        student = Numbered(tells=4.0)  # scores that overlap
        result = fit_probabilities(student, [(dataset, "asymmetric")])
        (fitted,) = result.tasks.values()
        assert fitted.slope > 0
        assert (fitted.num_queries, fitted.num_pairs) == ({"numbers": 150}, 1500)
        resampled = score_drawn(student, dataset, "asymmetric", num_queries=150, seed=1)
        probabilities = result.probabilities(resampled.scores, "asymmetric")
        assert probabilities.mean() == pytest.approx(0.1, abs=0.02)
        bins = reliability_bins(fitted.slope * resampled.scores + fitted.offset, resampled.relevant)
        assert expected_calibration_error(bins) < 0.05 < fitted.error_before
        order = np.argsort(resampled.scores)
        assert (np.diff(probabilities[order]) >= 0).all()

    def test_perfectly_separated_scores_give_a_finite_function(self):
        result = fit_probabilities(Numbered(tells=1000.0), [(numbered(40), "symmetric")])
        assert result.probabilities([2.0], "symmetric")[0] < 0.05
        assert result.probabilities([1002.0], "symmetric")[0] > 0.95

    @pytest.mark.parametrize(
        ("student", "num_queries", "reason"),
        [(Numbered(), MIN_QUERIES - 1, "29 judged dev queries"), (Numbered(tells=-9.0), 40, "do not distinguish")],
    )
    def test_a_task_that_cannot_be_fitted_is_skipped_with_a_reason(self, student, num_queries, reason, caplog):
        with caplog.at_level(logging.INFO, "d2llm.remarks"):
            result = fit_probabilities(student, [(numbered(num_queries), "asymmetric")])
        assert result.tasks == {}
        assert reason in caplog.text

    def test_data_sets_of_one_task_are_pooled(self):
        judged = [(numbered(20, name="a"), "asymmetric"), (numbered(15, name="b"), "asymmetric")]
        result = fit_probabilities(Numbered(), judged)
        assert result.tasks["asymmetric"].num_queries == {"a": 20, "b": 15}

    def test_a_data_set_without_a_dev_split_is_skipped(self):
        judged = [(numbered(40), "asymmetric"), (numbered(40, split="test", name="b"), "symmetric")]
        assert set(fit_probabilities(Numbered(), judged).tasks) == {"asymmetric"}


class TestFile:
    def test_a_written_calibration_is_read_back(self, tmp_path):
        calibration().write(tmp_path, "known")
        assert ProbabilityCalibration.read(tmp_path, "known") == calibration()

    def test_an_uncalibrated_student_has_no_file(self, tmp_path):
        student = Student.create(tiny_student_config(write_tiny_model(tmp_path / "bert", "bert")), dtype="float32")
        student.save(tmp_path / "student")
        assert not (tmp_path / "student" / ProbabilityCalibration.file_name).exists()
        assert ProbabilityCalibration.read(tmp_path / "student", student.fingerprint) is None
        assert not Student.load(tmp_path / "student").calibration

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"student": "another"}, "fitted to the student another"),
            ({"kind": "student"}, "kind"),
            (
                {"tasks": {"asymmetric": {**FITTED.model_dump(), "slope": -1.0}}},
                "tasks.asymmetric.slope is -1.0, but must be more than 0",
            ),
            ({"tasks": {"other": FITTED.model_dump()}}, "tasks.other"),
        ],
    )
    def test_an_invalid_file_is_reported_by_name(self, tmp_path, change, message):
        calibration().write(tmp_path, "known")
        path = tmp_path / ProbabilityCalibration.file_name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(DataFormatError, match=message) as error:
            ProbabilityCalibration.read(tmp_path, "known")
        assert path.name in str(error.value)


class TestStudent:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("probabilities")
        student = Student.create(tiny_student_config(write_tiny_model(folder / "bert", "bert")), dtype="float32")
        student.calibration = calibration()
        student.save(folder / "student")
        return folder / "student"

    @pytest.mark.parametrize("merge", [False, True])
    def test_the_calibration_is_saved_with_the_student_and_copies(self, folder, tmp_path, merge):
        student = Student.load(folder)
        assert student.calibration.tasks == {"asymmetric": FITTED}
        student.save(tmp_path / "copy", merge=merge)
        assert Student.load(tmp_path / "copy").calibration == student.calibration

    def test_training_discards_the_calibration(self, folder):
        student = Student.load(folder)
        student.prepare_training()
        assert not student.calibration

    def test_the_card_explains_the_probabilities(self, folder):
        card = (folder / "README.md").read_text()
        assert "if 10% of the passages are" in card
        assert "| asymmetric | 40 | 0.500 | 0.010 |" in card
