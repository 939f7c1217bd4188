"""Condenser: what its head reads, by hand, and that it learns to use the vector."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.methods.pretraining.retromae import sample
from d2llm.models.student import Student
from d2llm.recipe import Pretraining
from d2llm.training import pretrain
from tiny_models import TEXTS, tiny_student_config, write_tiny_model

PASSAGES = [f"{one} {other}" for one in TEXTS for other in TEXTS if one != other]


def new_run(tmp_path: Path, kind: str = "condenser", **settings: object) -> pretrain._Pretraining:
    model = write_tiny_model(tmp_path / "bert", "bert")
    student = Student.create(tiny_student_config(model, tuning="full"), device="cpu", dtype="float32")
    student.backbone.tokenizer.mask_token = "<unk>"
    config = Pretraining.of({"kind": kind, "batch_texts": 8, "epochs": 1, "learning_rate": 1e-2, **settings})
    return pretrain._Pretraining(student, PASSAGES, [], tmp_path / "run", config, 0)


def test_the_loss_is_that_of_the_late_vector_with_early_states(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    task, backbone = run.task, run.backbone
    backbone.eval()
    task.decoder.eval()
    ids, rng = run.texts[0], random.Random(0)
    special = {*map(int, backbone.tokenizer.all_special_ids)}
    masked = sample([place for place, token in enumerate(ids) if token not in special], 0.15, rng)
    read = torch.tensor([[task.mask_id if place in masked else token for place, token in enumerate(ids)]])
    mask = torch.ones_like(read, dtype=torch.bool)
    with torch.no_grad():
        output = backbone.model(input_ids=read, attention_mask=mask.long(), output_hidden_states=True)
        early, late = output.hidden_states[len(output.hidden_states) // 2], output.hidden_states[-1]
        states = torch.cat([backbone.own_pooling.pool(late, mask)[:, None], early[:, 1:]], dim=1)
        for layer in task.decoder.layers.layers:
            attended, _ = layer.self_attn(states, states, states)
            states = layer.norm1(states + attended)
            states = layer.norm2(states + layer.linear2(functional.gelu(layer.linear1(states))))
        embeddings = backbone.model.get_input_embeddings().weight
        expected = sum(
            -float((task.decoder.to_words(values[0, place]) @ embeddings.T).log_softmax(0)[ids[place]]) / len(masked)
            for values in (late, states)
            for place in masked
        )
        hooks = task.hooks()
        found = sum(float(loss) for loss in task.losses([ids], random.Random(0)))
    for hook in hooks:
        hook.remove()
    assert found == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(found)


def test_it_is_trained_and_leaves_no_hooks(tmp_path: Path) -> None:
    run = new_run(tmp_path, epochs=12)
    run.train()
    first, last = run.trainer.mean_losses
    assert last < 0.93 * first
    assert not any(module._forward_hooks for module in run.backbone.model.modules())


def test_a_mask_is_needed(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "bert")
    student = Student.create(tiny_student_config(model, tuning="full"), device="cpu", dtype="float32")
    with pytest.raises(InputError, match="use an encoder such as minilm"):
        pretrain.pretrain_backbone(student, TEXTS, tmp_path / "run", Pretraining.of("condenser"))
