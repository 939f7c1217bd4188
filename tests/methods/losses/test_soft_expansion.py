"""Hypothetical passages of training queries: their file, the vectors with them, the loss, and a run that uses it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.core.errors import DataFormatError, InputError
from d2llm.data.collation import LabelledSource, collate, epoch_batches
from d2llm.data.labels import LabelStore
from d2llm.methods.losses import soft_expansion as module
from d2llm.methods.losses.soft_expansion import expanded_vectors, read_expansions, soft_expansion, write_expansions
from d2llm.models.student import Student
from d2llm.models.writers.writer import Assignment, WrittenQueries
from d2llm.recipe import Recipe
from d2llm.recipe.losses import Objective
from d2llm.training.losses import batch_tokens
from tiny_data import JUDGEMENTS, tiny_recipe
from tiny_distill import LEARNING, Workspace, log_of, losses_of, score_batch
from tiny_models import TEXTS, tiny_student_config

ALONE = {"in_batch_cross_entropy": 0.0, "dot_cross_entropy": 0.0}


class RecordingWriter:
    """Answers a query with its own text backwards; "silent" ones not at all; breaks off after ``limit`` calls."""

    fingerprint = "recording"

    def __init__(self, limit: int = 99) -> None:
        self.limit, self.queries = limit, []

    def write(self, assignments: list[Assignment], *, advance: object = None) -> list[WrittenQueries]:
        if self.limit == 0:
            raise KeyboardInterrupt
        self.limit -= 1
        assert {each.kind for each in assignments} == {"answer"}
        self.queries += [each.passage for each in assignments]
        texts = [() if each.passage == "silent" else (each.passage[::-1],) for each in assignments]
        return [WrittenQueries(each, 1, 1) for each in texts]


def recipe(workspace: Workspace, file: Path, *, writer: object = None, **training: object) -> Recipe:
    expansion = {"passages": str(file), "weight": 3.0, "writer": writer}
    weights = Objective(JUDGEMENTS | ALONE | {"soft_expansion": expansion})
    return tiny_recipe(tiny_student_config(workspace.model), losses=weights, **(LEARNING | training))


def write_answers(file: Path, workspace: Workspace, *, without: str | None = None) -> None:
    """A text about another topic for each training query; ``without``: the id of a query that gets none."""
    entries = workspace.source.plan.entries
    lines = [
        {
            "query": workspace.source.query_text(entry.query_id),
            "passages": [] if entry.query_id == without else [TEXTS[n % 8]],
        }
        for n, entry in enumerate(entries)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class TestFile:
    def test_each_query_is_answered_once(self, tmp_path: Path) -> None:
        file, writer = tmp_path / "new" / "expansions.jsonl", RecordingWriter()
        write_expansions(file, ["ab", "silent", "ab"], writer)
        write_expansions(file, ["silent", "xyz", "ab"], writer)
        assert writer.queries == ["ab", "silent", "xyz"]
        assert read_expansions(file) == {"ab": ("ba",), "silent": (), "xyz": ("zyx",)}

    def test_an_interrupted_writer_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        file, queries = tmp_path / "expansions.jsonl", [f"query {n}" for n in range(150)]
        with pytest.raises(KeyboardInterrupt):
            write_expansions(file, queries, RecordingWriter(limit=1))
        assert list(read_expansions(file)) == queries[:64]
        with file.open("ab") as stream:
            stream.write(b'{"query": "query 64", "pass')
        assert list(read_expansions(file)) == queries[:64]
        writer = RecordingWriter()
        write_expansions(file, queries, writer)
        assert writer.queries == queries[64:]
        assert read_expansions(file) == {query: (query[::-1],) for query in queries}

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('{"query": "a"}', "needs a query and its passages"),
            ("[1]", "needs a query and its passages"),
            ("{", "needs a query and its passages"),
            ('{"query": "a", "passages": "b"}', "must be a text and 'passages' a list of texts"),
        ],
    )
    def test_a_line_of_another_form_is_an_error(self, tmp_path: Path, line: str, problem: str) -> None:
        file = tmp_path / "expansions.jsonl"
        file.write_text('{"query": "a", "passages": ["b"]}\n' + line + "\n", encoding="utf-8")
        with pytest.raises(DataFormatError, match=problem) as caught:
            read_expansions(file)
        assert caught.value.line == 2


def test_the_loss_is_the_mean_square_of_the_differences() -> None:
    queries = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]], requires_grad=True)
    expanded = torch.tensor([[1.0, 4.0], [3.0, 1.0], [torch.nan, torch.nan]])
    loss = soft_expansion(queries, expanded)
    assert loss.item() == pytest.approx((4 / 2 + 10 / 2) / 2)
    loss.backward()
    # d/dy of |y - e|^2 / dim, half of it for each of two queries
    assert queries.grad is not None
    assert queries.grad.tolist() == [[0.0, -1.0], [-1.5, -0.5], [0.0, 0.0]]
    assert soft_expansion(queries, torch.full((3, 2), torch.nan)).item() == 0


def test_expanded_vectors_are_means_of_the_query_and_its_passages(workspace: Workspace) -> None:
    student = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    first, second = (entry.query_id for entry in workspace.source.plan.entries[:2])
    texts = {workspace.source.query_text(first): TEXTS[:2], workspace.source.query_text(second): []}
    vectors = expanded_vectors(student, workspace.source, [first, second], texts)
    query = student.encode_queries([workspace.source.query_text(first)]).vectors[0].astype(np.float64)
    mean = (query + student.encode_passages(TEXTS[:2]).vectors.sum(axis=0)) / 3
    expected = mean / np.linalg.norm(mean) * np.linalg.norm(query)
    assert list(vectors) == [first]
    np.testing.assert_allclose(vectors[first], expected, rtol=1e-4, atol=1e-5)


def test_a_batch_compares_each_query_with_its_own_vector(workspace: Workspace, tmp_path: Path) -> None:
    store = LabelStore(tmp_path, teacher="none", prompt="none", dataset=workspace.source.dataset.name)
    labelled = LabelledSource.join(workspace.source, store, keep_unlabelled=True)
    rng = np.random.default_rng(0)
    student = Student.create(tiny_student_config(workspace.model), device="cpu", dtype="float32")
    dim = student.vector_dim
    targets = {entry.query_id: rng.normal(size=dim).astype(np.float32) for entry in labelled.entries[:10]}
    labelled = replace(labelled, query_inputs={"soft_expansion": targets})
    for each, draws in epoch_batches([labelled], epoch=0, batch_queries=4, num_hard=2, num_easy=1, seed=0):
        batch = collate(each, draws)
        vectors = torch.from_numpy(rng.normal(size=(len(batch_tokens(student, batch)), dim)).astype(np.float32))
        known = [row for row, query_id in enumerate(batch.query_ids) if query_id in targets]
        squares = [((vectors[row].numpy() - targets[batch.query_ids[row]]) ** 2).mean() for row in known]
        scores = score_batch(student, batch)
        weights = Objective(JUDGEMENTS | ALONE | {"soft_expansion": {"passages": "any.jsonl"}})
        value = losses_of(scores, batch, weights, vectors=vectors)["soft_expansion"].item()
        assert value == pytest.approx(np.mean(squares) if squares else 0, rel=1e-5)
        assert losses_of(scores, replace(batch, query_inputs={}), weights, vectors=vectors) == {}


def test_a_run_moves_queries_to_their_expanded_vectors(workspace, tmp_path, caplog):
    file = tmp_path / "expansions.jsonl"
    left_out = workspace.source.plan.entries[0].query_id
    write_answers(file, workspace, without=left_out)
    with caplog.at_level(logging.WARNING):
        workspace.run(tmp_path / "student", recipe=recipe(workspace, file, epochs=2, learning_rate=1e-2))
    assert "1 of 16 queries have no hypothetical passages" in caplog.text
    values = [row["soft_expansion"] for row in log_of(tmp_path / "student") if "soft_expansion" in row]
    assert np.mean(values[-4:]) < 0.8 * np.mean(values[:4])


def test_missing_passages_are_written_or_refused(workspace, tmp_path, monkeypatch):
    file = tmp_path / "expansions.jsonl"
    with pytest.raises(InputError, match=r"16 of 16 training queries have no line.*losses\.soft_expansion\.writer"):
        workspace.run(tmp_path / "student", recipe=recipe(workspace, file))
    monkeypatch.setattr(module, "load_writer", lambda *_, **__: RecordingWriter())
    workspace.run(tmp_path / "student", recipe=recipe(workspace, file, writer={"model": "any"}, epochs=1))
    texts = {workspace.source.query_text(entry.query_id) for entry in workspace.source.plan.entries}
    assert read_expansions(file) == {text: (text[::-1],) for text in texts}
