"""The notebooks of docs/notebooks print what is stored in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from repository_scripts import load_script

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def runner() -> Any:
    return load_script("run_notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_stored_in_it(path: Path, tmp_path: Path, runner: Any):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    printed = runner.outputs(notebook, tmp_path)
    assert any(printed)
    assert printed == runner.stored_outputs(notebook)
    assert runner.store(notebook, printed) == text


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


def test_another_output_is_stored_and_found(tmp_path: Path, runner: Any):
    cell = {"cell_type": "code", "source": ["print(1 + 1)"], "execution_count": None, "outputs": []}
    notebook = {"cells": [{"cell_type": "markdown", "source": ["# Sum"]}, cell]}
    assert runner.outputs(notebook, tmp_path) == ["2\n"]
    assert runner.stored_outputs(notebook) == [""]
    assert runner.stored_outputs(json.loads(runner.store(notebook, ["2\n"]))) == ["2\n"]
