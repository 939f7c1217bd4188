"""The memory of a training that was computed from a shape, beside that of a real one."""

from __future__ import annotations

import pytest

from d2llm.core.errors import InputError
from d2llm.models.student import Student
from d2llm.recipe import Lora, Recipe
from d2llm.sizing.training_memory import training_memory
from d2llm.training.checkpoints import adamw, trainable
from d2llm.training.gradient_cache import ALLOCATED, graph_bytes
from tiny_data import tiny_recipe
from tiny_models import tiny_student_config, write_tiny_model

TEXTS, LENGTH = 4, 64
QLORA = Lora(rank=4, alpha=8.0, quantization="4bit")


def measured(recipe: Recipe) -> dict[str, float]:
    """Bytes of tensors in a step with four texts of 64 tokens."""
    student = Student.create(recipe.student, device="cpu")
    student.prepare_training(gradient_checkpointing=recipe.training.gradient_checkpointing)
    student.train()
    weights = sum(weight.nbytes for weight in student.parameters())
    ids = [[5] * LENGTH] * TEXTS
    with graph_bytes(student) as num_bytes:
        vectors = student(*student.backbone.pad(ids))
        kept = num_bytes()
    (vectors.sum() + sum(weight.sum() for weight in student.interaction.parameters())).backward()
    parameters = trainable(student)
    optimizer = adamw([([*parameters.values()], 1e-3, 0.0)])
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    return {
        "weights": weights,
        "gradients": sum(weight.grad.nbytes for weight in parameters.values() if weight.grad is not None),
        "states of the optimiser": sum(tensor.nbytes for tensor in moments),
        "activations of a pass": kept,
    }


@pytest.mark.parametrize("architecture", ["llama", "bert", "modernbert"])
@pytest.mark.parametrize("tuning", [Lora(rank=4, alpha=8.0), QLORA, "full"], ids=["lora", "qlora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_has_the_bytes_of_a_real_step(tmp_path, architecture, tuning, checkpointing):
    if tuning is QLORA:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'd2llm[large]'")
    model = write_tiny_model(tmp_path / "model", architecture, num_hidden_layers=6)
    training = {"gradient_checkpointing": checkpointing, "part_tokens": TEXTS * LENGTH}
    recipe = tiny_recipe(tiny_student_config(model, tuning=tuning), **training)
    plan = {part.part: part.memory for part in training_memory(recipe).items}
    for part, expected in measured(recipe).items():
        factor = ALLOCATED["cpu"] if "activations" in part else 1
        assert plan[part] / factor == pytest.approx(expected, rel=0.25), part
    assert plan["trained weights at the start"] == plan["gradients"]


def test_a_backbone_of_an_unknown_shape_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    recipe = Recipe.model_validate({"student": {"backbone": {"model": str(tmp_path)}}})
    with pytest.raises(InputError, match="has no shape that transformers knows"):
        training_memory(recipe)
