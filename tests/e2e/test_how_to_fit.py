"""The Python example of docs/how-to/fit.md runs as written, on 50 documents, with a writer on a local port.

A tiny student stands in for the shipped one, whose training would take half a minute.
"""

from __future__ import annotations

from pathlib import Path

from d2llm.fitting import served_index
from d2llm.models.student import Student
from how_to import python_blocks
from local_endpoint import local_endpoint
from tiny_fit import ask_about_passage, write_documents
from tiny_models import tiny_student_config, write_tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "fit.md"
OLLAMA = "http://127.0.0.1:11434/v1"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    model = write_tiny_model(tmp_path / "model", "bert")
    Student.create(tiny_student_config(model), device="cpu", dtype="float32").save(tmp_path / "student")
    monkeypatch.setattr(served_index, "student_for", lambda _: str(tmp_path / "student"))
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "docs", 50)
    [block] = python_blocks(PAGE)
    assert OLLAMA in block.code
    with local_endpoint(ask_about_passage) as endpoint:
        exec(compile(block.code.replace(OLLAMA, endpoint.url), str(PAGE), "exec"), {})
    first, *results = capsys.readouterr().out.splitlines()
    assert first.startswith(("fitted ", "start "))
    assert first.endswith(" queries")
    assert [line.split()[0] for line in results] == ["1", "2", "3"]
    assert (tmp_path / "docs.search" / "report.html").is_file()
