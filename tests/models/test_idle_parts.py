"""Parts that add nothing leave a student, and come back untrained; vectors and scores stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2llm.core.errors import InputError
from d2llm.core.shipped import shipped_models
from d2llm.core.types import TASKS
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig, StudentConfig
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

QUERIES, PASSAGES = TEXTS[:3], TEXTS[2:]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "bert", "bert")


def trained(base, **interaction) -> Student:
    """A student all of whose parts count, with gates of the bound."""
    config = tiny_student_config(base)
    config = config.model_copy(
        update={"interaction": config.interaction.model_copy(update={"gates": True} | interaction)}
    )
    student = Student.create(config, device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    return student.eval()


def outputs(student: Student) -> list[np.ndarray]:
    """Vectors of queries and passages, and the scores of each task."""
    queries, passages = student.encode_queries(QUERIES).vectors, student.encode_passages(PASSAGES).vectors
    scores = [np.stack([student.score(query, passages, task) for query in queries]) for task in TASKS]
    return [queries, passages, *scores]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def close_gate(student: Student) -> None:
    with torch.no_grad():
        student.pooling.gate.zero_()


def make_constant(student: Student) -> None:
    with torch.no_grad():
        for gate in (student.interaction.query_gate, student.interaction.passage_gate):
            gate.weight.zero_()


CASES = {
    "pma": (close_gate, ("PMA",)),
    "one task": (
        lambda student: student.interaction.interaction_weight("asymmetric").zero_(),
        ("the asymmetric interaction",),
    ),
    "both tasks": (
        lambda student: [student.interaction.interaction_weight(task).zero_() for task in TASKS],
        ("the symmetric interaction", "the asymmetric interaction"),
    ),
    "gates": (make_constant, ("gates of the bound",)),
}


@pytest.mark.parametrize(
    ("branches", "features"), [("per_task", "rich"), ("shared", "rich"), ("per_task", "generated")]
)
@pytest.mark.parametrize("case", CASES)
def test_idle_parts_leave_the_files_and_nothing_else_changes(base, tmp_path, case, branches, features):
    student, (make_idle, dropped) = trained(base, branches=branches, features=features), CASES[case]
    make_idle(student)
    student.save(tmp_path / "before")
    expected, before = outputs(student), student.fingerprint
    assert student.drop_idle_parts() == dropped
    assert student.drop_idle_parts() == ()
    assert student.fingerprint != before
    assert_same(outputs(student), expected)
    student.save(tmp_path / "after")
    loaded = Student.load(tmp_path / "after", device="cpu", dtype="float32")
    assert loaded.fingerprint == student.fingerprint
    assert loaded.config == student.config
    assert_same(outputs(loaded), expected)
    names = {each: {*load_file(tmp_path / each / "head.safetensors")} for each in ("before", "after")}
    gone = names["before"] - names["after"]
    assert gone
    assert not names["after"] - names["before"]
    if case == "pma":
        assert not any(".pma." in name for name in names["after"])
    if case == "both tasks":
        assert all(name.startswith(("pooling.", "interaction.dots.")) for name in names["after"])
    if case == "one task" and branches == "per_task":
        assert not any("branches.asymmetric" in name for name in names["after"])
        assert any("branches.symmetric" in name for name in names["after"])


@pytest.mark.parametrize("name", shipped_models("students"))
def test_no_student_ships_with_idle_parts(name):
    assert Student.load(name, device="cpu", dtype="float32").drop_idle_parts() == ()


def test_parts_that_count_stay(base):
    student = trained(base)
    before = student.fingerprint
    assert student.drop_idle_parts() == ()
    assert student.fingerprint == before
    paper = trained(base, head="paper", gates=False)
    with torch.no_grad():
        paper.interaction.output.weight.zero_()
        paper.interaction.output.bias.zero_()
    assert paper.drop_idle_parts() == ()  # its score has no other part


def test_an_untrained_student_is_its_backbones_cosine(base, tmp_path):
    student = Student.create(tiny_student_config(base), device="cpu", dtype="float32")
    expected = outputs(student)
    assert student.drop_idle_parts() == ("PMA", "the symmetric interaction", "the asymmetric interaction")
    assert_same(outputs(student), expected)
    assert student.interaction.bound("symmetric") == 0
    student.save(tmp_path / "student", merge=True)
    assert (tmp_path / "student" / "modules.json").is_file()


def test_what_was_fitted_remains(base, tmp_path):
    student = trained(base)
    close_gate(student)
    fitted = TaskFeatureWeights(weights={"window_bm25": 0.5}, dev={}, num_queries={})
    student.score_features = ScoreFeatures(tasks={"asymmetric": fitted})
    student.save(tmp_path / "before")
    loaded = Student.load(tmp_path / "before", device="cpu", dtype="float32")
    before = loaded.fingerprint
    loaded.drop_idle_parts()
    loaded.save(tmp_path / "after")
    after = Student.load(tmp_path / "after", device="cpu", dtype="float32")
    assert after.score_features.weights("asymmetric").terms == {"window_bm25": 0.5}
    assert f'"reduced_from": "{before}"' in (tmp_path / "after" / "manifest.json").read_text()


def test_a_compiled_student_is_refused(base):
    student = trained(base)
    student._engine = lambda ids: ids
    with pytest.raises(InputError, match="engine='torch'"):
        student.drop_idle_parts()


def test_missing_parts_come_back_untrained_and_change_nothing(base):
    student = trained(base)
    wanted = student.config
    close_gate(student)
    make_constant(student)
    student.interaction.interaction_weight("asymmetric").zero_()
    assert len(student.drop_idle_parts()) == 3
    expected = outputs(student)
    student.add_missing_parts(wanted)
    assert student.config == wanted
    assert_same(outputs(student), expected)
    assert student.pooling.pma is not None
    student.interaction.interaction_weight("asymmetric").fill_(1.0)
    loss = (
        student.interaction(torch.from_numpy(expected[0]), torch.from_numpy(expected[1]), "asymmetric")
        .logits.square()
        .sum()
    )
    loss.backward()
    last = student.interaction.branches["asymmetric"][-1]
    assert last.weight.grad.abs().max() > 0  # the new branch can be trained


def test_a_recipe_may_leave_out_the_interaction_of_a_task(base):
    config = StudentConfig(interaction=InteractionConfig(tasks=("asymmetric", "symmetric")))
    assert config == StudentConfig()  # the order does not matter
    with pytest.raises(InputError, match="scores by its interaction alone"):
        InteractionConfig(head="paper", tasks=("symmetric",))
    student = trained(base, tasks=("symmetric",))
    queries, passages, symmetric, asymmetric = outputs(student)
    dots = {task: student.query_vectors(queries, task) @ passages.T for task in TASKS}
    np.testing.assert_allclose(asymmetric, dots["asymmetric"], rtol=1e-4)
    assert np.abs(symmetric - dots["symmetric"]).max() > 1e-3
