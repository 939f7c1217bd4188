"""Reconstructing texts from their vectors (RetroMAE): the decoder by a formula of its own, and what is seen."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.methods.pretraining.retromae import EnhancedDecoder, visible
from d2llm.models.student import Student
from d2llm.recipe import Pretraining
from d2llm.training import pretrain
from tiny_models import TEXTS, tiny_student_config, write_tiny_model


def normal(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + 1e-5)


def test_the_decoder_attends_to_what_each_token_sees() -> None:
    torch.manual_seed(0)
    decoder, (tokens, dim, heads) = EnhancedDecoder(8, 2).double(), (5, 8, 2)
    queries, keys = torch.randn(2, 1, tokens, dim, dtype=torch.float64)
    seen = visible(4, [1, 2], 0.5, tokens, random.Random(0))
    with torch.no_grad():
        found = decoder(queries, keys, seen[None])[0].numpy()
    weights = {name: value.detach().numpy() for name, value in decoder.named_parameters()}
    q, k, v = (
        (rows[0].numpy() @ matrix.T + bias).reshape(tokens, heads, dim // heads)
        for rows, matrix, bias in zip(
            (queries, keys, keys),
            np.split(weights["attention.in_proj_weight"], 3),
            np.split(weights["attention.in_proj_bias"], 3),
            strict=True,
        )
    )
    attended = np.zeros((tokens, heads, dim // heads))
    for token in range(tokens):
        columns = np.flatnonzero(seen[token].numpy())
        for head in range(heads):
            scores = np.exp(k[columns, head] @ q[token, head] / np.sqrt(dim // heads))
            attended[token, head] = scores / scores.sum() @ v[columns, head]
    out = attended.reshape(tokens, dim) @ weights["attention.out_proj.weight"].T + weights["attention.out_proj.bias"]
    states = normal(queries[0].numpy() + out)
    inner = torch.nn.functional.gelu(
        torch.tensor(states @ weights["feed_forward.0.weight"].T + weights["feed_forward.0.bias"])
    ).numpy()
    expected = normal(states + inner @ weights["feed_forward.2.weight"].T + weights["feed_forward.2.bias"])
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_token_sees_the_vector_and_half_of_the_others() -> None:
    words, rows = [1, 2, 3, 4, 5, 6], set[tuple[bool, ...]]()
    seen = visible(8, words, 0.5, 10, random.Random(0))
    assert seen[:, 0].all()
    assert not seen[:, 8:].any()
    for word in words:
        assert not seen[word, word]
        assert seen[word, 7]
        assert int(seen[word, words].sum()) in (2, 3)  # itself may be one of the three that are hidden
        rows.add(tuple(seen[word].tolist()))
    assert len(rows) > 3  # others for each token


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_texts_are_reconstructed_from_their_vectors(tuning: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "bert", "bert")
    student = Student.create(tiny_student_config(model, tuning=tuning), device="cpu", dtype="float32")
    student.backbone.tokenizer.mask_token = "<unk>"
    passages = [f"{one} {other}" for one in TEXTS for other in TEXTS if one != other]
    config = Pretraining.of({"kind": "retromae", "batch_texts": 8, "epochs": 4, "learning_rate": 1e-2})
    run = pretrain._Pretraining(student, passages, [], tmp_path / "run", config, 0)

    def loss(vectors_count: bool = True) -> float:
        pool = student.backbone.own_pooling.pool
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            if not vectors_count:
                patch.setattr(type(student.backbone), "pool", lambda _, *args: pool(*args).mean(0).expand(8, -1))
            return sum(float(part) for part in run.task.losses(run.texts[:8], random.Random(0)))

    before = loss()
    run.train()
    assert loss() < 0.9 * before, (before, loss(), loss(False))
    assert loss() < loss(vectors_count=False)  # the decoder reads the vector of the text, not only its tokens


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_mask_and_vectors_of_positions_are_needed(architecture: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", architecture)
    student = Student.create(tiny_student_config(model, tuning="full"), device="cpu", dtype="float32")
    if architecture == "llama":
        student.backbone.tokenizer.mask_token = "<unk>"
    with pytest.raises(InputError, match="use an encoder such as minilm"):
        pretrain.pretrain_backbone(student, TEXTS, tmp_path / "run", Pretraining.of("retromae"))
