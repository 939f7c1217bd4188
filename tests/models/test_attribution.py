"""Which words matter: parts that add up, places that fit, and what happens when a word goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2llm import Student
from d2llm.models.attribution import attribute
from tiny_models import randomise, tiny_student_config, write_tiny_model

QUERY = "a cat by the sea"
PASSAGE = "the cat sat on the mat, and slept in the sun"


@pytest.fixture(scope="module", params=["bert", "llama"])
def student(request, tmp_path_factory) -> Student:
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param)
    made = Student.create(tiny_student_config(folder), dtype="float32")
    randomise(made.pooling)
    randomise(made.interaction)
    return made


@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
def test_the_score_is_the_students_and_has_two_parts(student, task):
    found = attribute(student, QUERY, PASSAGE, task)
    query = student.encode_queries([QUERY]).vectors[0]
    vectors = student.encode_passages([PASSAGE]).vectors
    assert found.score == pytest.approx(float(student.score(query, vectors, task)[0]), abs=1e-4)
    assert found.anchor == pytest.approx(float(vectors[0] @ student.anchor_queries(query[None], task)[0]), abs=1e-4)
    assert found.anchor + found.interaction == pytest.approx(found.score, abs=1e-4)


def test_words_are_the_passages_own_in_order(student):
    found = attribute(student, QUERY, PASSAGE, "asymmetric")
    assert [PASSAGE[word.start : word.end] for word in found.words] == PASSAGE.replace(",", "").split()
    assert not found.truncated


def test_weights_are_the_slope_of_the_score_along_the_states(student):
    """Shrinking one word's states by a little lowers the score by that share of the word's weight."""
    found = attribute(student, QUERY, PASSAGE, "asymmetric")
    tokens = student.tokenize([PASSAGE], "passage")
    states, mask = student.backbone(*student.backbone.pad(tokens.ids))
    query = torch.from_numpy(student.encode_queries([QUERY]).vectors)

    def score(states: torch.Tensor) -> float:
        with torch.no_grad():
            return student.interaction(query, student.pool(states, mask), "asymmetric").logits.item()

    offsets = student.backbone.tokenizer(PASSAGE, return_offsets_mapping=True)["offset_mapping"]
    little = 1e-3
    for word in found.words:
        own = [at for at, (start, end) in enumerate(offsets) if start < word.end and end > word.start]
        more, less = states.detach().clone(), states.detach().clone()
        more[0, own] *= 1 + little
        less[0, own] *= 1 - little
        slope = (score(more) - score(less)) / (2 * little)
        assert word.weight == pytest.approx(slope, abs=0.05 + 0.1 * abs(slope))  # the layers have kinks


def test_what_was_not_read_has_no_words(student):
    long = " ".join([PASSAGE] * 20)
    found = attribute(student, QUERY, long, "asymmetric")
    assert found.truncated
    assert 0 < len(found.words) < len(long.split())
    assert all(np.isfinite(word.weight) for word in found.words)


def test_signs_of_scripts_without_spaces_are_words_of_their_own(student):
    found = attribute(student, QUERY, "the 猫 sat 日本", "asymmetric")
    assert [(word.start, word.end) for word in found.words] == [(0, 3), (4, 5), (6, 9), (10, 11), (11, 12)]


def test_a_head_without_an_anchor_has_no_parts(tmp_path):
    config = tiny_student_config(write_tiny_model(tmp_path / "m", "bert"))
    config = config.model_copy(update={"interaction": config.interaction.model_copy(update={"head": "paper"})})
    student = Student.create(config, dtype="float32")
    found = attribute(student, QUERY, PASSAGE, "asymmetric")
    assert found.anchor is None
    assert found.interaction is None
    assert len(found.words) == 11


def test_the_shipped_student_lights_up_the_words_that_answer():
    passage = "Iterating over an open file gives its lines one by one. Mountains are high."
    found = attribute(Student.load("d2llm-minilm"), "how do I read a file line by line?", passage, "asymmetric")
    best = sorted(found.words, key=lambda word: -word.weight)[:2]
    assert {passage[word.start : word.end] for word in best} == {"file", "lines"}
    worst = min(found.words, key=lambda word: word.weight)
    assert passage[worst.start : worst.end] in {"Mountains", "are", "high"}
