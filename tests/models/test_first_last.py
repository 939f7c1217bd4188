"""The pooling of the first and the last layer, against the model's own states; and whitened in fewer dimensions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, InteractionConfig, Pooling, StudentConfig
from tiny_models import TEXTS, write_tiny_model


def create(folder: Path, pooling: Pooling) -> Student:
    settings = {"model": str(folder), "tuning": "frozen", "max_passage_tokens": 64, "max_query_tokens": 64}
    config = StudentConfig(
        backbone=BackboneConfig.model_validate(settings),
        pooling=pooling,
        interaction=InteractionConfig(head="cosine"),
    )
    return Student.create(config, device="cpu", dtype="float32")


@pytest.mark.parametrize("architecture", ["bert", "llama", "modernbert", "t5"])
def test_vectors_are_means_of_two_layers(tmp_path: Path, architecture: str) -> None:
    student = create(write_tiny_model(tmp_path / architecture, architecture), Pooling(kind="first_last"))
    vectors = student.encode_passages(TEXTS[:4]).vectors  # of different lengths, so some are padded
    for text, vector in zip(TEXTS[:4], vectors, strict=True):
        ids = torch.tensor(student.backbone.tokenize([text], "passage").ids)
        with torch.inference_mode():
            output = student.backbone.model(input_ids=ids, output_hidden_states=True)
        first, last = (states[0].double().numpy() for states in (output.hidden_states[1], output.last_hidden_state))
        mean = (first.mean(axis=0) + last.mean(axis=0)) / 2
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean) * np.sqrt(len(mean)), rtol=1e-3, atol=1e-4)


def test_whitened_in_fewer_dimensions_and_saved(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "bert", "bert")
    student = create(model, Pooling(kind="whitening", dim=3, pooling="first_last"))
    student.fit_pooling(TEXTS)
    plain = create(model, Pooling(kind="first_last")).encode_passages(TEXTS).vectors.astype(np.float64)
    centred = plain - plain.mean(axis=0)
    _, lengths, directions = np.linalg.svd(centred)
    expected = centred @ directions[:3].T / lengths[:3]
    expected *= np.sqrt(3) / np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = student.encode_passages(TEXTS).vectors
    np.testing.assert_allclose(np.abs(vectors), np.abs(expected), rtol=1e-2, atol=1e-3)
    student.save(tmp_path / "saved")
    loaded = Student.load(tmp_path / "saved", device="cpu", dtype="float32")
    np.testing.assert_allclose(loaded.encode_passages(TEXTS).vectors, vectors, rtol=1e-5, atol=1e-6)


def test_more_dimensions_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pooling.dim is 32, but the vectors to whiten have only 32"):
        create(write_tiny_model(tmp_path / "bert", "bert"), Pooling(kind="whitening", dim=32))
