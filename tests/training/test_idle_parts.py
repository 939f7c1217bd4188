"""Which parts of a trained student dev says help, and which leave its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2llm.models.student import Student
from d2llm.recipe import Pooling, StudentConfig
from d2llm.training.choose_weights import make_idle_gates_constant
from d2llm.training.dev_sets import evaluate_dev, make_dev_set
from tiny_data import topics, write_rule_labels
from tiny_distill import Workspace
from tiny_models import randomise, tiny_student_config


def with_gates(config: StudentConfig) -> StudentConfig:
    return config.model_copy(update={"interaction": config.interaction.model_copy(update={"gates": True})})


def test_idle_parts_are_not_in_a_distilled_student(workspace: Workspace) -> None:
    report = workspace.run(workspace.folder / "idle", student=with_gates(tiny_student_config(workspace.model)))
    manifest = json.loads((workspace.folder / "idle" / "manifest.json").read_text(encoding="utf-8"))
    names = {*load_file(workspace.folder / "idle" / "head.safetensors")}
    assert manifest["fingerprint"] == report.fingerprint
    assert manifest["config"]["pooling"] == {"kind": "auto"}
    assert not any(".pma." in name or "_gate" in name for name in names)
    assert not any("branches.symmetric" in name for name in names)  # no data set was symmetric
    counts = report.interaction_weights["asymmetric"] > 0
    assert any("branches.asymmetric" in name for name in names) == counts
    student = Student.load(workspace.folder / "idle", device="cpu", dtype="float32")
    assert student.interaction.has_interaction("asymmetric") == counts
    dev_set = make_dev_set(workspace.source, num_queries=50, num_passages=100, seed=0)
    measured = evaluate_dev(student, [dev_set])["tiny"].values
    assert measured[report.interaction_weights["asymmetric"]] == pytest.approx(report.dev["tiny"]["kept"])


def test_an_idle_student_can_be_trained_further(workspace: Workspace, tmp_path: Path) -> None:
    """The start lacks parts that the recipe has: they are added, untrained."""
    config = with_gates(tiny_student_config(workspace.model))
    start = Student.create(config, device="cpu", dtype="float32")
    start.drop_idle_parts()
    start.save(tmp_path / "start")
    report = workspace.run(tmp_path / "more", student=config, start=str(tmp_path / "start"))
    assert report.steps == 8
    assert report.dev["tiny"]["start"] == pytest.approx(
        evaluate_dev(start, [make_dev_set(workspace.source, num_queries=50, num_passages=100, seed=0)])["tiny"].values[
            0.0
        ]
    )


def test_pma_stays_where_dev_is_worse_without_it(workspace: Workspace, tmp_path: Path) -> None:
    """The own pooling is that of the first token; PMA, made to be the mean of all tokens, ranks better."""
    source = topics(shift=0, num_dev=64)
    write_rule_labels(tmp_path / "labels", [source], workspace.teacher)
    config = tiny_student_config(
        workspace.model, pooling=Pooling(kind="pma", num_heads=4, pooling="first"), tuning="frozen"
    )
    start = Student.create(config, device="cpu", dtype="float32")
    pma = start.pooling.pma
    with torch.no_grad():
        for weight in (pma.seeds, pma.key.weight, pma.feedforward[2].weight):
            weight.zero_()
        for linear in (pma.value, pma.output):
            torch.nn.init.eye_(linear.weight)
            linear.bias.zero_()
        start.pooling.gate.fill_(5.0)
    start.save(tmp_path / "start")
    settings = {"start": str(tmp_path / "start"), "learning_rate": 1e-6, "head_learning_rate": 1e-6}
    workspace.run(tmp_path / "kept", student=config, source=source, labels=tmp_path / "labels", **settings)
    loaded = Student.load(tmp_path / "kept", device="cpu", dtype="float32")
    assert loaded.config.pooling.kind == "pma"
    assert float(loaded.pooling.gate) == pytest.approx(5.0, abs=0.01)


@pytest.mark.parametrize("useful", [False, True])
def test_gates_that_do_not_tighten_the_bound_become_constant(workspace: Workspace, useful: bool) -> None:
    student = Student.create(with_gates(tiny_student_config(workspace.model)), device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    student.eval()
    head = student.interaction
    dev_set = make_dev_set(workspace.source, num_queries=50, num_passages=100, seed=0)
    passages = torch.from_numpy(student.encode_passages([*dev_set.passages.values()]).vectors)
    with torch.no_grad():
        for dot in head.dots.values():
            dot.log_scale.sub_(3)
        for gate in (head.query_gate, head.passage_gate):
            gate.weight.mul_(1e-4)
        if useful:  # open for half of the passages, closed for the others
            direction = torch.linalg.svd(passages - passages.mean(0), full_matrices=False)[2][0]
            head.passage_gate.weight.copy_(50 * direction[None])
            head.passage_gate.bias.copy_(-50 * (passages @ direction).median()[None])
    before = head.passage_gate.weight.detach().clone()
    assert make_idle_gates_constant(student, [dev_set], seed=0) != useful
    if useful:
        assert torch.equal(head.passage_gate.weight, before)
        assert student.drop_idle_parts() == ()
    else:
        bound = head.passage_bound(passages).detach().numpy()
        assert np.ptp(bound) == 0
        assert student.drop_idle_parts() == ("gates of the bound",)
