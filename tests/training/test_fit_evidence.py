"""Weights of evidence: fitted where it is worth something, and measured on queries that the fit did not see."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.recipe import StudentConfig
from d2llm.core.types import Passage
from d2llm.models.evidence import Evidence, EvidenceWeights, TaskEvidence, WordsFactor, read_evidence
from d2llm.models.student import Student
from d2llm.ops.fusion import sum_weights
from d2llm.ops.words import windows
from d2llm.training import fit_evidence as module
from d2llm.training.dev import dev_queries
from d2llm.training.fit_evidence import EvidenceLists, fit_evidence, make_evidence_lists, weigh
from d2llm.training.fit_scores import fit_scores
from tiny_data import topics
from tiny_models import tiny_student_config, write_tiny_model

TERMS = ("words", "words_share", "window_words", "window_words_share")


def lists(num, *, informative, seed=0):
    """Lists of ten passages, one relevant; of which some columns say a little."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        scores = rng.standard_normal((10, 5)).astype(np.float32)
        scores[0, informative] += 1.5
        made.append((scores, np.eye(10)[0]))
    return made


def of_set(name, made, statistics=None) -> EvidenceLists:
    return EvidenceLists(name, made, np.zeros((len(made), 1), np.float32) if statistics is None else statistics)


def test_evidence_that_tells_more_gets_weight():
    found = weigh([of_set("a", lists(200, informative=[0, 1]))], TERMS)
    own, fused = found.dev["a"]
    assert fused > own + 0.1
    assert found.weights["words"] == pytest.approx(1.0, abs=0.35)  # as good as the student's own score
    assert max(found.weights[term] for term in TERMS[1:]) < 0.35
    assert found.num_queries == {"a": 200}


def test_evidence_that_tells_nothing_gets_none():
    made = [of_set(name, lists(30, informative=[0], seed=n)) for n, name in enumerate("ab")]
    found = weigh(made, TERMS)
    gained = np.mean([fused - own for own, fused in found.dev.values()])
    assert (gained > 0) == any(found.weights.values())
    assert found.num_queries == {"a": 30, "b": 30}


@pytest.mark.parametrize(("worth", "is_kept"), [(1.5, True), (0.0, False)])
def test_windows_get_weight_where_they_are_worth_reading(worth, is_kept):
    terms = ("words", "window_vectors")
    made = [(scores[:, :3].copy(), grades) for scores, grades in lists(200, informative=[0, 1])]
    for scores, _ in made:
        scores[0, 2] += worth
    found = weigh([of_set("a", made)], terms)
    alone = weigh([of_set("a", [(scores[:, :2], grades) for scores, grades in made])], ("words",))
    if is_kept:
        assert found.weights["window_vectors"] == pytest.approx(1.0, abs=0.35)
        assert found.without_windows.weights == pytest.approx(alone.weights, rel=1e-3)
        assert found.dev["a"][1] >= alone.dev["a"][1] + module.WORTH_READING
    else:
        assert found.weights == pytest.approx(alone.weights, rel=1e-3)
        assert found.without_windows is None
    evidence = Evidence(student="x", tasks={"asymmetric": found})
    assert evidence.weights("asymmetric", windows=False).terms == pytest.approx(alone.weights, rel=1e-3)
    assert evidence.weights("asymmetric").counts_windows == is_kept


def test_words_count_for_what_the_query_says():
    rng = np.random.default_rng(3)
    made, statistics = lists(400, informative=[0]), rng.standard_normal((400, 2)).astype(np.float32)
    for (scores, _), (tells, _) in zip(made, statistics, strict=True):
        scores[:, 1] *= 3
        scores[0, 1] += 12.0 * (
            tells > 0
        )  # words find the passage where the first statistic is high, else they mislead
    found = weigh([of_set("a", made[:200], statistics[:200]), of_set("b", made[200:], statistics[200:])], TERMS)
    constant = weigh([of_set("a", made[:200]), of_set("b", made[200:])], TERMS)
    assert constant.words_factor is None  # what is the same for all queries tells nothing
    assert found.words_factor.slopes[0] > 0.5
    assert abs(found.words_factor.slopes[1]) < 0.3
    assert found.words_factor.lowest < -0.5 < 0.5 < found.words_factor.highest
    assert module._mean_after(found) > module._mean_after(constant) + 0.005


def test_statistics_that_say_nothing_do_not_count():
    rng = np.random.default_rng(0)
    made = lists(300, informative=[0, 1])
    kept = [weigh([of_set("a", made, rng.standard_normal((300, 4)).astype(np.float32))], TERMS) for _ in range(5)]
    for found in kept:
        assert found.words_factor is None or np.abs(found.words_factor.slopes).max() < 0.3


class TestStudent:
    @pytest.fixture(scope="class")
    def config(self, tmp_path_factory) -> StudentConfig:
        model = write_tiny_model(tmp_path_factory.mktemp("model"), "modernbert", initializer_range=0.1)
        return tiny_student_config(model)

    @pytest.fixture
    def student(self, config) -> Student:
        return Student.create(config, device="cpu", dtype="float32")

    def test_lists_hold_positives_and_the_nearest_by_words_and_vectors(self, student):
        source = topics()
        made = make_evidence_lists(
            student, source.dataset, "asymmetric", terms=TERMS[:2], depth=2, num_passages=1, show_progress=False
        )
        positives = source.dataset.positives("dev")
        assert len(made.lists) == len(positives)
        assert {scores.shape[1] for scores, _ in made.lists} == {3}
        assert sorted(int((grades > 0).sum()) for _, grades in made.lists) == sorted(map(len, positives.values()))

    def test_lists_have_the_best_windows(self, student):
        dataset = topics().dataset
        texts = {name: f"{passage.text} Also this. And that." for name, passage in dataset.passages.items()}
        longer = replace(dataset, passages={name: Passage(name, text) for name, text in texts.items()})
        names = list(texts)
        made = make_evidence_lists(
            student,
            longer,
            "asymmetric",
            terms=("words", "window_vectors"),
            num_passages=len(names),
            depth=len(names),
            show_progress=False,
        )
        queries = dev_queries(longer, num_queries=200, seed=0)
        anchors = student.anchor_queries(
            student.encode_queries([query.text for query in queries]).vectors, "asymmetric"
        )
        windowed = [[text[start:end] for start, end in windows(text)] for text in texts.values()]
        for (scores, _), anchor in zip(made.lists, anchors, strict=True):
            assert len(scores) == len(names)  # every passage is in the list, in the corpus' order
            best = [float((student.encode_passages(parts).vectors @ anchor).max()) for parts in windowed]
            np.testing.assert_allclose(scores[:, 2], best, rtol=1e-3, atol=1e-3)

    def test_each_task_is_fitted_on_its_own_data(self, student, monkeypatch, caplog):
        monkeypatch.setattr(module, "MIN_QUERIES", 1)
        dataset = topics().dataset
        found = fit_evidence(student, [(dataset, "asymmetric")], terms=TERMS[:2], show_progress=False)
        assert found.student == student.fingerprint
        assert found.tasks.keys() == {"asymmetric"}
        assert found.tasks["asymmetric"].weights.keys() == set(TERMS[:2])
        monkeypatch.setattr(module, "MIN_QUERIES", 10_000)
        with caplog.at_level("WARNING", "d2llm.remarks"):
            assert fit_evidence(student, [(dataset, "asymmetric")], show_progress=False).tasks == {}
        assert "at least 10000 are needed" in caplog.text
        with pytest.raises(InputError, match="no evidence to fit weights for"):
            fit_evidence(student, [(dataset, "asymmetric")], terms=(), show_progress=False)

    def test_weights_are_saved_and_no_index_has_to_be_made_anew(self, student, tmp_path):
        before = student.fingerprint
        weights = {"words": 0.5, "window_words": 0.0}
        factor = WordsFactor(slopes=(0.1, 0.2, 0.3, 0.4), offset=1.5, lowest=-2, highest=2)
        fitted = TaskEvidence(weights=weights, words_factor=factor, dev={"a": (0.5, 0.6)}, num_queries={"a": 40})
        student.evidence = Evidence(student=before, tasks={"asymmetric": fitted})
        student.save(tmp_path / "student")
        loaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
        assert loaded.fingerprint == before
        assert loaded.evidence == student.evidence
        assert loaded.evidence_weights("asymmetric") == EvidenceWeights(terms={"words": 0.5}, words_factor=factor)
        assert not loaded.evidence_weights("symmetric")
        loaded.prepare_training()
        assert not loaded.evidence_weights("asymmetric")

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("{", "cannot be read"),
            ({"kind": "evidence", "student": "other", "tasks": {}}, "was fitted to the student other"),
            ({"kind": "evidence", "student": "x", "format_version": 9, "tasks": {}}, "format version 9"),
            ({"kind": "probabilities", "student": "x", "tasks": {}}, "cannot be read"),
            (
                {"student": "x", "tasks": {"asymmetric": {"weights": {"words": -1}, "dev": {}, "num_queries": {}}}},
                "greater than or equal to 0",
            ),
            (
                {"student": "x", "tasks": {"asymmetric": {"weights": {"sounds": 1}, "dev": {}, "num_queries": {}}}},
                "sounds",
            ),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused(self, tmp_path, content, problem):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "evidence.json").write_text(text)
        with pytest.raises(DataFormatError, match=re.escape(problem)) as error:
            read_evidence(tmp_path, "x")
        assert "delete the file" in str(error.value) or "update d2llm" in str(error.value)


def test_scores_are_fitted_for_one_task_and_kept_for_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIN_QUERIES", 1)
    monkeypatch.setattr("d2llm.training.fit_probabilities.MIN_QUERIES", 1)
    model = write_tiny_model(tmp_path / "model", "modernbert", initializer_range=0.1)
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    kept = TaskEvidence(weights={"words": 2.0}, dev={}, num_queries={})
    student.evidence = Evidence(student=student.fingerprint, tasks={"symmetric": kept})
    report = fit_scores(student, [topics().dataset], "asymmetric", show_progress=False)
    assert student.evidence.tasks["symmetric"] == kept
    assert report.evidence == student.evidence.tasks["asymmetric"].model_dump()
    calibration = student.calibration.tasks.get("asymmetric")  # none where the scores tell nothing apart
    assert report.probabilities == (calibration and calibration.model_dump())
    before = student.evidence
    assert fit_scores(student, [topics().dataset], "asymmetric", words=False, show_progress=False).evidence is None
    assert student.evidence == before


def test_scores_that_tell_nothing_leave_the_own_score_alone():
    assert sum_weights([(np.zeros((4, 3)), np.eye(4)[0])] * 3).tolist() == [1, 0, 0]
