"""``d2llm index INDEX project``: its messages, the files it writes, and unchanged search results."""

from __future__ import annotations

import json

import pytest

from d2llm.models.student import Student
from e2e.command_line import fail, succeed, succeed_with_report, write_lines
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model


def save_student(folder, features):
    config = tiny_student_config(write_tiny_model(folder / "llama"))
    interaction = config.interaction.model_copy(update={"head": "paper", "features": features})
    student = Student.create(config.model_copy(update={"interaction": interaction}), device="cpu", dtype="float32")
    randomise(student.interaction, scale=0.5)
    student.save(folder / features)
    return folder / features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an index by a 'concat' student, and a corpus with two more passages than the index."""
    folder = tmp_path_factory.mktemp("project")
    lines = [{"_id": f"p{n}", "text": text} for n, text in enumerate(TEXTS)]
    write_lines(folder / "corpus.jsonl", lines[:6])
    write_lines(folder / "more.jsonl", lines)
    succeed("index", folder / "i", "upsert", folder / "corpus.jsonl", "--student", save_student(folder, "concat"))
    return folder


def test_projections_are_stored_and_keep_rankings(folder):
    index = folder / "i"
    before = succeed_with_report("search", index, "rain in the mountains", "--top-k", "4", folder=folder)[1]
    result = succeed("index", index, "project", "--json", folder / "project.json")
    assert "project: 6 rows added, 0 existed already, 16 numbers and 32 bytes each" in result.stderr
    assert json.loads((folder / "project.json").read_text())["result"]["num_rows"] == 6
    assert (index / "projections-0.bin").stat().st_size == 6 * 32
    assert "of 6 rows, 32 bytes each" in succeed("index", index, "stats").stdout
    after = succeed_with_report("search", index, "rain in the mountains", "--top-k", "4", folder=folder)[1]
    rankings = [
        [hit["passage"]["id"] for hit in report["result"]["rankings"][0]["passages"]] for report in (before, after)
    ]
    assert rankings[0] == rankings[1]
    succeed("index", index, "upsert", folder / "more.jsonl")
    assert "0 rows added, 8 existed already" in succeed("index", index, "project").stderr
    assert "0 problems" in succeed("index", index, "verify").stderr


def test_a_head_that_gains_nothing_is_rejected(folder):
    student = save_student(folder, "rich")
    succeed("index", folder / "rich-index", "upsert", folder / "corpus.jsonl", "--student", student)
    fail("index", folder / "rich-index", "project", containing=["the features 'rich'", "nothing is gained", "'concat'"])
