"""Ditto: a mean of tokens weighted by their attention to themselves, against the model's own attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.methods.poolings.ditto import Ditto
from d2llm.models.export.graphs import TextGraph
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, InteractionConfig, StudentConfig
from tiny_models import TEXTS, write_tiny_model

HEAD = (1, 2)


def create(folder: Path, layer: int = HEAD[0], head: int = HEAD[1]) -> Student:
    settings = {"model": str(folder), "tuning": "frozen", "max_passage_tokens": 64, "max_query_tokens": 64}
    config = StudentConfig(
        backbone=BackboneConfig.model_validate(settings),
        pooling=Ditto(layer=layer, head=head),
        interaction=InteractionConfig(head="cosine"),
    )
    return Student.create(config, device="cpu", dtype="float32")


@pytest.mark.parametrize("architecture", ["bert", "llama", "modernbert", "xlm_roberta", "t5"])
def test_vectors_are_means_weighted_by_the_diagonal(tmp_path: Path, architecture: str) -> None:
    student = create(write_tiny_model(tmp_path / architecture, architecture))
    vectors = student.encode_passages(TEXTS[:4]).vectors  # of different lengths, so some are padded
    for text, vector in zip(TEXTS[:4], vectors, strict=True):
        ids = torch.tensor(student.backbone.tokenize([text], "passage").ids)
        with torch.inference_mode():
            output = student.backbone.model(input_ids=ids, output_attentions=True)
        states = output.last_hidden_state[0].double().numpy()
        attention = output.attentions[HEAD[0]][0, HEAD[1]].double().numpy()
        np.testing.assert_allclose(attention.sum(axis=1), 1, rtol=1e-5)
        mean = sum(attention[i, i] * states[i] for i in range(len(states))) / np.trace(attention)
        expected = mean / np.linalg.norm(mean) * np.sqrt(len(mean))
        np.testing.assert_allclose(vector, expected, rtol=1e-3, atol=1e-4)


def test_the_head_matters(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "bert", "bert")
    vectors = [create(folder, 0, head).encode_queries(TEXTS[:1]).vectors for head in (0, 1)]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_a_saved_student_and_a_graph_give_the_same_vectors(tmp_path: Path) -> None:
    student = create(write_tiny_model(tmp_path / "bert", "bert"))
    expected = student.encode_queries(TEXTS[:3]).vectors
    for merge in (False, True):
        student.save(tmp_path / str(merge), merge=merge)
        loaded = Student.load(tmp_path / str(merge), device="cpu", dtype="float32")
        np.testing.assert_allclose(loaded.encode_queries(TEXTS[:3]).vectors, expected, rtol=1e-5, atol=1e-6)
    ids, mask = student.backbone.pad(student.backbone.tokenize(TEXTS[:3], "query").ids)
    with torch.inference_mode():
        graph = TextGraph(student.backbone, student.pooling, on_sphere=True)(ids, mask.long())[0].numpy()
    np.testing.assert_allclose(graph, expected, rtol=1e-5, atol=1e-6)


def test_a_head_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "bert", "bert")
    with pytest.raises(InputError, match=r"pooling.layer is 2, but .* has only 0 to 1"):
        create(folder, 2, 0)
    with pytest.raises(InputError, match=r"pooling.head is 4, but .* has only 0 to 3"):
        create(folder, 0, 4)
