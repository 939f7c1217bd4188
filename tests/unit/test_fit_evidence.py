"""Weights of evidence: fitted where it is worth something, and measured on queries that the fit did not see."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.core.recipe import EvidenceConfig, InteractionConfig, StudentConfig
from d2llm.models.evidence import Evidence
from d2llm.models.student import Student
from d2llm.pipeline.fit_evidence import EvidenceLists, fit_evidence, make_evidence_lists
from tiny_data import topics
from tiny_models import tiny_student_config, write_tiny_model

TERMS = ("words", "words_share", "window_words", "window_words_share")


class Weighed:
    """A student as far as the fit needs one."""

    def __init__(self, **config):
        self.evidence = Evidence(EvidenceConfig(**config))


def lists(num, *, informative, seed=0):
    """Lists of ten passages, one relevant; of which some columns say a little."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        scores = rng.standard_normal((10, 5)).astype(np.float32)
        scores[0, informative] += 1.5
        made.append((scores, np.eye(10)[0]))
    return made


def test_evidence_that_tells_more_gets_weight():
    student = Weighed(words=True, window_words=True)
    found = fit_evidence(student, [EvidenceLists("a", "asymmetric", lists(200, informative=[0, 1]))])["asymmetric"]
    own, fused = found.measure["a"]
    assert fused > own + 0.1
    assert found.weights["words"] == pytest.approx(1.0, abs=0.35)  # as good as the student's own score
    assert max(found.weights[term] for term in TERMS[1:]) < 0.35
    assert student.evidence.weights("asymmetric") == pytest.approx({k: v for k, v in found.weights.items() if v})
    assert student.evidence.weights("symmetric") == {}


def test_evidence_that_tells_nothing_gets_none():
    student = Weighed(words=True, window_words=True)
    made = [EvidenceLists(name, "symmetric", lists(30, informative=[0], seed=n)) for n, name in enumerate("ab")]
    found = fit_evidence(student, made)["symmetric"]
    gained = np.mean([fused - own for own, fused in found.measure.values()])
    assert (gained > 0) == bool(student.evidence.weights("symmetric"))
    assert found.num_queries == 60


def test_a_student_without_evidence_is_refused():
    with pytest.raises(InputError, match="no evidence to weigh"):
        fit_evidence(Weighed(), [])


def test_the_published_head_has_no_place_for_it():
    with pytest.raises(ValueError, match="'paper' has not"):
        StudentConfig(interaction=InteractionConfig(head="paper"), evidence=EvidenceConfig(words=True))


class TestStudent:
    @pytest.fixture(scope="class")
    def config(self, tmp_path_factory) -> StudentConfig:
        model = write_tiny_model(tmp_path_factory.mktemp("model"), "modernbert", initializer_range=0.1)
        return tiny_student_config(model).model_copy(update={"evidence": EvidenceConfig(words=True)})

    def test_lists_hold_positives_and_the_nearest_by_words_and_vectors(self, config):
        source = topics()
        student = Student.create(config, device="cpu", dtype="float32")
        made = make_evidence_lists(student, source.dataset, "asymmetric", depth=2, num_passages=1, show_progress=False)
        positives = source.dataset.positives("dev")
        assert len(made.lists) == len(positives)
        assert {scores.shape[1] for scores, _ in made.lists} == {3}
        assert sorted(int((grades > 0).sum()) for _, grades in made.lists) == sorted(map(len, positives.values()))

    def test_weights_are_saved_and_are_part_of_the_fingerprint(self, config, tmp_path):
        student = Student.create(config, device="cpu", dtype="float32")
        before = student.fingerprint
        student.evidence.set_weights("asymmetric", {"words": 0.5})
        assert student.fingerprint != before
        student.save(tmp_path / "student")
        loaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
        assert loaded.evidence_weights("asymmetric") == {"words": 0.5}
        assert loaded.evidence_weights("symmetric") == {}
        assert loaded.fingerprint == student.fingerprint
