"""MEXMA: the vectors of translations and what is predicted from them, by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from d2llm.core.errors import DataFormatError, InputError
from d2llm.methods.pretraining.mexma import koleo
from d2llm.methods.pretraining.retromae import sample
from d2llm.models.student import Student
from d2llm.recipe import Pretraining
from d2llm.training import pretrain
from methods.pretraining.test_condenser import PASSAGES, new_run
from tiny_models import TEXTS, tiny_student_config, write_tiny_model


def translations(folder: Path) -> str:
    """Labelled pairs of a text and another one that stands for its translation."""
    pairs = [{"query": text, "document": " ".join(reversed(text.split())), "score": 1} for text in PASSAGES]
    (folder / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return str(folder)


def test_spread_vectors_are_far_from_their_nearest_neighbours() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = [min(np.linalg.norm(unit[n] - unit[m]) for m in range(5) if m != n) for n in range(5)]
    assert float(koleo(torch.tensor(vectors))) == pytest.approx(-np.mean(np.log(nearest)), rel=1e-5)


def test_masked_tokens_are_predicted_from_the_vector_of_the_translation(tmp_path: Path) -> None:
    settings = {"translations": translations(tmp_path), "token_weight": 0.5, "spread_weight": 0.2}
    run = new_run(tmp_path, kind="mexma", **settings)
    task, backbone, rng, texts = run.task, run.backbone, random.Random(0), run.texts[:3]
    backbone.eval()
    task.decoder.eval()
    sides = [texts, [task.translated[tuple(ids)] for ids in texts]]
    assert sides[0] != sides[1]
    embeddings, missed = backbone.model.get_input_embeddings().weight, []

    def states_of(ids: list[int]) -> torch.Tensor:
        return backbone.model(input_ids=torch.tensor([ids])).last_hidden_state

    with torch.no_grad():
        (found,) = task.losses(texts, random.Random(0))
        vectors = torch.stack([torch.stack([states_of(ids)[0].mean(dim=0) for ids in side]) for side in sides])
        for side, of_translations in zip(sides, (vectors[1], vectors[0]), strict=True):
            words = [[place for place, token in enumerate(ids) if token not in task.special] for ids in side]
            masked, total = [sample(places, 0.4, rng) for places in words], 0.0
            for ids, places, vector in zip(side, masked, of_translations, strict=True):
                read = [task.mask_id if place in places else token for place, token in enumerate(ids)]
                states = torch.cat([vector[None, None], states_of(read)[:, 1:]], dim=1)
                for layer in task.decoder.layers.layers:
                    states = layer(states)
                logits = task.decoder.to_words(states[0, places]) @ embeddings.T
                total += float(functional.cross_entropy(logits, torch.tensor(ids)[places], reduction="sum"))
            missed.append(total / sum(map(len, masked)))
        spread = (float(koleo(vectors[0])) + float(koleo(vectors[1]))) / 2
    expected = float((vectors[0] - vectors[1]).square().mean()) + 0.5 * np.mean(missed) + 0.2 * spread
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_translations_get_nearer(tmp_path: Path) -> None:
    run = new_run(tmp_path, kind="mexma", translations=translations(tmp_path), epochs=6)

    def distance() -> float:
        with torch.no_grad():
            one, other = (
                functional.normalize(run.task.vectors_of(side), dim=1)
                for side in (run.texts, [run.task.translated[tuple(ids)] for ids in run.texts])
            )
        return float((one - other).square().sum(dim=1).mean() / torch.cdist(one, other).square().mean())

    before = distance()
    run.train()
    assert distance() < 0.5 * before


def test_translations_and_a_mask_are_needed(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError):
        new_run(tmp_path, kind="mexma", translations=str(tmp_path / "none"))
    student = Student.create(
        tiny_student_config(write_tiny_model(tmp_path / "model", "bert"), tuning="full"), device="cpu", dtype="float32"
    )
    config = Pretraining.of({"kind": "mexma", "translations": translations(tmp_path)})
    with pytest.raises(InputError, match="no token for masked text"):
        pretrain.pretrain_backbone(student, TEXTS, tmp_path / "run", config)
