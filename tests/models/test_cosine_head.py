"""The student that is a plain bi-encoder: head ``cosine``, the backbone's own pooling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2llm.core.types import TASKS
from d2llm.models.interaction import CosineHead, make_head
from d2llm.models.pooling import WeightlessPooling
from d2llm.models.scorer import QueryScorer
from d2llm.models.student import Student
from d2llm.recipe import AutoPooling, InteractionConfig, Pooling, StudentConfig, untuned_config
from d2llm.recipe.variants import VARIANTS
from d2llm.retrieval.cosine import CosineStudent, DotStudent
from fake_models import FakeStudent
from tiny_data import tiny_recipe
from tiny_distill import LEARNING, Workspace
from tiny_models import DIM, TEXTS, randomise, tiny_student_config

QUERIES = TEXTS[:3]
COSINE = {"pooling": AutoPooling(), "interaction": InteractionConfig(head="cosine")}


def create(model, **changes) -> Student:
    config = tiny_student_config(model).model_copy(update=COSINE | changes)
    return Student.create(config, device="cpu", dtype="float32")


def trained(model, **changes) -> Student:
    student = create(model, **changes)
    student.prepare_training()
    randomise(student, seed=3, scale=0.05)
    return student.eval()


def scores(student, task="asymmetric"):
    queries, passages = student.encode_queries(QUERIES).vectors, student.encode_passages(TEXTS).vectors
    return np.stack([student.score(query, passages, task) for query in queries])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def mean_pooled(student, texts):
    """Mean of the last states of each text, encoded alone by the backbone's own model."""
    rows = []
    for ids in student.tokenize(texts, "passage").ids:
        with torch.inference_mode():
            rows.append(student.backbone.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().mean(0))
    return torch.stack(rows).numpy()


# --- the score --------------------------------------------------------------------------------------------------------


def test_the_head_by_hand():
    head = CosineHead(4)
    queries = torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])  # norm sqrt(dim)
    passages = torch.tensor([[0.0, 2.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 1.0, 1.0]])
    cosines = torch.tensor([[0.0, 1.0, -0.5], [0.5, 0.5, 0.5]])
    for task in TASKS:
        output = head(queries, passages, task)
        torch.testing.assert_close(output.logits, 20 * cosines)
        assert output.features is None
        assert torch.equal(output.dot, output.logits)
        search_scores = QueryScorer(head, None, queries[1], task, 2)(passages)
        torch.testing.assert_close(torch.from_numpy(search_scores), 20 * cosines[1])
        torch.testing.assert_close(head.query_vectors(queries, task) @ passages.T, 20 * cosines)
    with torch.no_grad():
        head.log_scale.fill_(np.log(7))
    torch.testing.assert_close(head(queries, passages, "symmetric").logits, 7 * cosines)
    assert head.has_dot


def test_scores_stay_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    queries, passages = (torch.randn(n, DIM, generator=generator) for n in (3, 5))
    expected = CosineHead(DIM)(queries, passages, "symmetric").logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CosineHead(DIM)(queries, passages, "symmetric").logits, expected)


def test_the_configuration_chooses_the_head():
    assert isinstance(make_head(InteractionConfig(head="cosine"), 8), CosineHead)
    assert not isinstance(make_head(InteractionConfig(head="paper", hidden_dim=4, feature_dim=4), 8), CosineHead)


@pytest.mark.parametrize("task", TASKS)
def test_untrained_scores_are_twenty_times_the_cosine(bert, task):
    student = create(bert)
    pooled = unit(mean_pooled(student, TEXTS))
    np.testing.assert_allclose(scores(student, task), 20 * pooled[:3] @ pooled.T, rtol=0, atol=1e-4)
    assert student.has_dot
    lengths = np.linalg.norm(student.encode_passages(TEXTS).vectors, axis=1)
    np.testing.assert_allclose(lengths, DIM**0.5, rtol=1e-5)


def test_trained_scores_are_the_scale_times_the_cosine(bert):
    student = trained(bert)
    with torch.no_grad():
        student.interaction.log_scale.fill_(np.log(11))
    queries, passages = unit(student.encode_queries(QUERIES).vectors), unit(student.encode_passages(TEXTS).vectors)
    np.testing.assert_allclose(scores(student), 11 * queries @ passages.T, rtol=0, atol=1e-4)
    assert np.abs(scores(student) - 11 / 20 * scores(create(bert))).max() > 0.1  # training changed the backbone
    vectors = student.encode_queries(QUERIES).vectors
    inner_products = student.query_vectors(vectors) @ student.encode_passages(TEXTS).vectors.T
    np.testing.assert_allclose(inner_products, scores(student), rtol=0, atol=1e-4)


def test_vectors_pooled_by_pma_are_normalised_too(bert):
    student = create(bert, pooling=Pooling(kind="pma", num_heads=4))
    with torch.no_grad():
        student.pooling.gate.fill_(0.7)
    vectors = student.encode_passages(TEXTS).vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), DIM**0.5, rtol=1e-5)
    np.testing.assert_allclose(
        scores(student), 20 * unit(student.encode_queries(QUERIES).vectors) @ unit(vectors).T, rtol=0, atol=1e-4
    )


def test_a_pooling_without_weights_is_normalised():
    pooling = WeightlessPooling(Pooling(kind="first"), 4)
    assert list(pooling.parameters()) == []
    states = torch.randn(2, 3, 4)
    states[:, 0] = torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.0, -0.5, 0.0, 0.0]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(pooling(states, mask), torch.tensor([[1.2, 0.0, 1.6, 0.0], [0.0, -2.0, 0.0, 0.0]]))
    assert pooling(states.bfloat16(), mask).dtype == torch.float32


# --- on disk, and trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_save_and_load(bert, tmp_path, merge):
    student = trained(bert)
    student.save(tmp_path / "student", merge=merge)
    assert set(load_file(tmp_path / "student" / "head.safetensors")) == {"interaction.log_scale"}
    loaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert loaded.fingerprint == student.fingerprint
    assert isinstance(loaded.interaction, CosineHead)
    np.testing.assert_allclose(scores(loaded), scores(student), rtol=0, atol=2e-4)


def test_the_scale_is_in_the_fingerprint(bert):
    student = create(bert)
    before = student.fingerprint
    with torch.no_grad():
        student.interaction.log_scale.add_(0.1)
    assert student.fingerprint != before
    assert before != create(bert, interaction=InteractionConfig(head="paper", hidden_dim=4, feature_dim=4)).fingerprint


def test_the_cosine_variant_trains_only_backbone_and_scale(tmp_path):
    workspace = Workspace(tmp_path)
    recipe = VARIANTS["cosine"].apply(tiny_recipe(tiny_student_config(workspace.model), **LEARNING, epochs=1))
    trained_names = set()

    def remember(optimizer, parameters, **options):
        trained_names.update(name for name, parameter in parameters.items() if parameter.grad is not None)
        return original(optimizer, parameters, **options)

    with pytest.MonkeyPatch.context() as patch:
        from d2llm.training import trainer as verb

        original = verb.optimizer_step
        patch.setattr(verb, "optimizer_step", remember)
        report = workspace.run(tmp_path / "cosine", recipe=recipe, labels=tmp_path / "no labels are needed")
    assert "interaction.log_scale" in trained_names
    others = trained_names - {"interaction.log_scale"}
    assert others
    assert all(name.startswith("backbone.") and "lora" in name for name in others)
    student = Student.load(tmp_path / "cosine", device="cpu", dtype="float32")
    assert student.fingerprint == report.fingerprint
    assert set(load_file(tmp_path / "cosine" / "head.safetensors")) == {"interaction.log_scale"}
    assert student.interaction.log_scale.exp().item() != pytest.approx(20, abs=1e-4)
    untrained = Student.create(student.config, device="cpu", dtype="float32")
    assert np.abs(scores(student) - scores(untrained)).max() > 0.1
    factor = student.interaction.log_scale.exp().item()
    queries, passages = unit(student.encode_queries(QUERIES).vectors), unit(student.encode_passages(TEXTS).vectors)
    np.testing.assert_allclose(scores(student), factor * queries @ passages.T, rtol=0, atol=1e-4)


# --- the untuned baseline ---------------------------------------------------------------------------------------------


def test_the_untuned_baseline_is_the_backbone_before_training(bert):
    config = trained(bert, pooling=Pooling(kind="pma", num_heads=4), interaction=InteractionConfig()).config
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"max_query_tokens": 63})})
    baseline = untuned_config(config)
    assert isinstance(baseline, StudentConfig)
    assert (baseline.backbone.tuning.kind, baseline.pooling.kind, baseline.interaction.head) == (
        "frozen",
        "auto",
        "cosine",
    )
    assert baseline.backbone.max_query_tokens == 63
    untuned = Student.create(baseline, device="cpu", dtype="float32")
    pooled = unit(mean_pooled(untuned, TEXTS))
    np.testing.assert_allclose(untuned.encode_passages(TEXTS).vectors, DIM**0.5 * pooled, rtol=0, atol=1e-4)
    wrapped = CosineStudent(untuned)
    vectors = wrapped.encode_passages(TEXTS).vectors
    np.testing.assert_allclose(vectors, pooled, rtol=0, atol=1e-5)
    query = wrapped.encode_queries([TEXTS[0]]).vectors[0]
    np.testing.assert_allclose(wrapped.score(query, vectors, "symmetric"), pooled[0] @ pooled.T, rtol=0, atol=1e-5)
    assert wrapped.fingerprint != untuned.fingerprint


def test_a_zero_vector_has_cosine_zero():
    wrapped = CosineStudent(FakeStudent())
    vectors = wrapped.encode_passages(["", "cat"]).vectors
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([0, 1])
    assert wrapped.score(vectors[1], vectors, "symmetric") == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_dot_student_scores_by_the_inner_product_alone(task):
    student = FakeStudent()
    dot = DotStudent(student)
    query, passages = student.encode_queries(["cat dog"]).vectors[0], student.encode_passages(TEXTS).vectors
    np.testing.assert_allclose(dot.score(query, passages, task), 2 * passages @ query, rtol=1e-5)
    assert np.array_equal(dot.query_vectors(query[None], task), student.query_vectors(query[None], task))
    assert dot.fingerprint == student.fingerprint
    assert dot.config is student.config
