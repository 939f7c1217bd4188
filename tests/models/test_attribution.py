"""Word attribution: the score's parts add up, spans match the passage, and weights are slopes of the score."""

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
    model = Student.create(tiny_student_config(folder), dtype="float32")
    randomise(model.pooling)
    randomise(model.interaction)
    return model


@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
def test_score_is_the_students_and_splits_into_two_parts(student, task):
    attribution = attribute(student, QUERY, PASSAGE, task)
    query = student.encode_queries([QUERY]).vectors[0]
    vectors = student.encode_passages([PASSAGE]).vectors
    assert attribution.score == pytest.approx(float(student.score(query, vectors, task)[0]), abs=1e-4)
    assert attribution.dot == pytest.approx(float(vectors[0] @ student.query_vectors(query[None], task)[0]), abs=1e-4)
    assert attribution.dot + attribution.interaction == pytest.approx(attribution.score, abs=1e-4)


def test_words_are_the_passages_words_in_order(student):
    attribution = attribute(student, QUERY, PASSAGE, "asymmetric")
    assert [PASSAGE[word.start : word.end] for word in attribution.words] == PASSAGE.replace(",", "").split()
    assert not attribution.truncated


def test_weights_are_the_slope_of_the_score_along_the_states(student):
    """Scaling one word's states by 1 - step lowers the score by step times the word's weight."""
    attribution = attribute(student, QUERY, PASSAGE, "asymmetric")
    tokens = student.tokenize([PASSAGE], "passage")
    states, mask = student.backbone(*student.backbone.pad(tokens.ids))
    query = torch.from_numpy(student.encode_queries([QUERY]).vectors)

    def score(states: torch.Tensor) -> float:
        with torch.no_grad():
            return student.interaction(query, student.pool(states, mask), "asymmetric").logits.item()

    offsets = student.backbone.tokenizer(PASSAGE, return_offsets_mapping=True)["offset_mapping"]
    step = 1e-3
    for word in attribution.words:
        positions = [position for position, (start, end) in enumerate(offsets) if start < word.end and end > word.start]
        scaled_up, scaled_down = states.detach().clone(), states.detach().clone()
        scaled_up[0, positions] *= 1 + step
        scaled_down[0, positions] *= 1 - step
        slope = (score(scaled_up) - score(scaled_down)) / (2 * step)
        assert word.weight == pytest.approx(slope, abs=0.05 + 0.1 * abs(slope))  # loose, because the layers have kinks


def test_text_beyond_the_token_limit_has_no_words(student):
    long = " ".join([PASSAGE] * 20)
    attribution = attribute(student, QUERY, long, "asymmetric")
    assert attribution.truncated
    assert 0 < len(attribution.words) < len(long.split())
    assert all(np.isfinite(word.weight) for word in attribution.words)


def test_characters_of_scripts_without_spaces_are_words(student):
    attribution = attribute(student, QUERY, "the 猫 sat 日本", "asymmetric")
    assert [(word.start, word.end) for word in attribution.words] == [(0, 3), (4, 5), (6, 9), (10, 11), (11, 12)]


def test_a_head_without_an_inner_product_does_not_split_the_score(tmp_path):
    config = tiny_student_config(write_tiny_model(tmp_path / "m", "bert"))
    config = config.model_copy(update={"interaction": config.interaction.model_copy(update={"head": "paper"})})
    student = Student.create(config, dtype="float32")
    attribution = attribute(student, QUERY, PASSAGE, "asymmetric")
    assert attribution.dot is None
    assert attribution.interaction is None
    assert len(attribution.words) == 11


def test_the_shipped_student_highlights_the_answering_words():
    passage = "Iterating over an open file gives its lines one by one. Mountains are high."
    attribution = attribute(Student.load("d2llm-minilm"), "how do I read a file line by line?", passage, "asymmetric")
    best = sorted(attribution.words, key=lambda word: -word.weight)[:2]
    assert {passage[word.start : word.end] for word in best} == {"file", "lines"}
    worst = min(attribution.words, key=lambda word: word.weight)
    assert passage[worst.start : worst.end] in {"Mountains", "are", "high"}
