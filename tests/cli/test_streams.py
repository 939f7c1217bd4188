"""``-``, pipes and devices as files that verbs read and write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.test_help import COMMANDS
from d2llm.cli.main import app
from d2llm.cli.options import input_path, lasting_input_path, output_file, output_path
from d2llm.core.types import Passage
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.retrieval.index import Index
from e2e.command_line import fail, succeed
from fake_models import FakeStudent

FILES = {input_path, lasting_input_path, output_file, output_path}
DATA = {"DATA", "DATA...", "RECIPE", "CORPUS...", "[CORPUS]...", "DOCUMENTS...", "REPORT...", "FILE", "PATH"}
FOLDERS = {"FOLDER", "FOLDER...", "INDEX", "RUN_FOLDER", "[NAME=]FOLDER"}
QUERIES = '{"id": "a", "text": "cat"}\n{"id": "b", "text": "dog"}\n'


@pytest.fixture
def index(tmp_path: Path) -> Path:
    store = Index.create(tmp_path / "index", FakeStudent())
    store.upsert([Passage(f"p{n}", f"passage {n}") for n in range(4)])
    return tmp_path / "index"


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    store = LabelStore(tmp_path / "labels", teacher="T", prompt="P", dataset="D")
    store.write([QueryLabels("q1", ("p1", "p2"), np.array([1, -2], np.float32), None)])
    return tmp_path / "labels"


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "d2llm", *map(str, arguments)]
    return subprocess.run(command, capture_output="stdout" not in options, timeout=240, check=False, **options)


def file_parameters():
    """Arguments and options whose type is a path, or whose metavar is that of a file, without those of folders."""
    for path, command in COMMANDS.items():
        hints = get_type_hints(command.callback, include_extras=True) if command.callback else {}
        for parameter in command.params:
            is_path = "Path" in str(hints.get(parameter.name)) or parameter.metavar in DATA
            if is_path and parameter.metavar not in FOLDERS:
                yield pytest.param(parameter, id=" ".join([*path, parameter.name]))


@pytest.mark.parametrize("parameter", list(file_parameters()))
def test_every_file_of_every_verb_may_be_a_stream(parameter):
    assert getattr(parameter.callback, "__wrapped__", None) in FILES


@pytest.mark.parametrize("path", ["-", "/dev/stdout", "/dev/fd/1"])
def test_a_report_on_standard_output_stands_there_alone(index: Path, path: str):
    links = {each: Path(each).readlink() for each in ("/dev/stdout", "/dev/fd")}
    done = run("index", index, "stats", "--json", path, cwd=index.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["num_passages"] == 4
    assert b"passages" in done.stderr  # the table
    assert not (index.parent / "-").exists()
    assert {each: Path(each).readlink() for each in links} == links


def test_a_report_to_a_redirected_standard_output_is_complete(index: Path, tmp_path: Path):
    output = tmp_path / "output"
    with output.open("wb") as file:
        run("index", index, "stats", "--json", "/dev/stdout", stdout=file)
    assert json.loads(output.read_text())["verb"] == "stats"


def test_a_report_goes_into_a_named_pipe(index: Path, tmp_path: Path):
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: received.append(pipe.read_text()))
    thread.start()
    result = succeed("index", index, "stats", "--json", pipe)
    thread.join(20)
    assert json.loads(received[0])["verb"] == "stats"
    assert pipe.is_fifo()
    assert "passages" in result.stdout  # which is still there


def test_a_full_device_is_an_error_that_names_it(index: Path):
    fail("index", index, "stats", "--json", "/dev/full", containing=["/dev/full", "No space left"])


def test_only_one_file_goes_to_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    fail("leaderboard", tmp_path, "--json", "-", "--markdown", "/dev/stdout", containing=["standard output", "twice"])


@pytest.mark.parametrize("path", ["-", "/dev/stdout"])
def test_labels_are_exported_to_standard_output_as_json_lines(labels: Path, path: str):
    done = run("labels", "export", labels, "--out", path, cwd=labels.parent)
    assert [json.loads(line)["passage_id"] for line in done.stdout.splitlines()] == ["p1", "p2"]
    assert not (labels.parent / "-").exists()


def test_a_link_to_a_file_is_written_through(index: Path, tmp_path: Path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "link.json").symlink_to("reports/stats.json")
    succeed("index", index, "stats", "--json", tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "reports" / "stats.json").read_text())["verb"] == "stats"
    (tmp_path / "lost.json").symlink_to("no-folder/stats.json")
    fail("index", index, "stats", "--json", tmp_path / "lost.json", containing=["there is no folder"])


def test_ids_are_read_from_standard_input(index: Path):
    result = CliRunner().invoke(app, ["index", str(index), "delete", "--ids", "-", "--json", "-"], input="p1\np3\n")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["arguments"]["ids_file"] == "standard input"
    assert Index.open(index, FakeStudent()).list_passages() == ["p0", "p2"]


def test_a_pipe_of_the_shell_is_read(index: Path):
    command = f'exec "{sys.executable}" -m d2llm index "{index}" delete --ids <(printf "p0\\np2\\n")'
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert Index.open(index, FakeStudent()).list_passages() == ["p1", "p3"]


def test_standard_input_is_read_once(index: Path):
    result = CliRunner().invoke(app, ["search", str(index), "--queries", "-", "--json", "-"], input=QUERIES)
    assert "passages" not in result.stdout  # its student is unknown, which is said after the queries were read
    result = CliRunner().invoke(app, ["leaderboard", "-", "/dev/stdin"], input="{}")
    assert result.exit_code == 2
    assert "standard input is given twice" in result.stderr


def test_an_error_names_standard_input(index: Path):
    result = CliRunner().invoke(app, ["search", str(index), "--queries", "-"], input="a plain text\n")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: standard input:1: not valid JSON")


def test_what_is_read_again_later_is_no_stream(index: Path, tmp_path: Path):
    for arguments in (("index", index, "sync", "-"), ("init", "-"), ("keys", "/dev/stdin", "show")):
        fail(*arguments, containing=["read again later"])
    assert len(Index.open(index, FakeStudent())) == 4


def test_no_folder_is_called_minus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "text": "a cat"}\n')
    fail("encode", "corpus.jsonl", "--out", "-", containing=["-: a folder cannot be written"])
    fail("index", "-", "upsert", "corpus.jsonl", containing=["-: a folder cannot be written"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]
