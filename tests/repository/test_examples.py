"""The examples in docstrings run, each in a folder of its own that has a data set (DATA) and documents (docs).

Every public name has one.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import d2llm
from e2e.command_line import write_data

SOURCE = Path(d2llm.__file__).parent


def modules_with_examples() -> list[str]:
    names: list[str] = []
    for path in sorted(SOURCE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(SOURCE.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = (finder.find(importlib.import_module(name), name) for name in modules_with_examples())
    return [test for tests in found for test in tests if test.examples]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path / "DATA")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tea.md").write_text("# Tea\n\nGreen tea is hot.\n", encoding="utf-8")
    (tmp_path / "docs" / "bees.md").write_text("# Bees\n\nBees make honey.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("example", examples(), ids=lambda test: test.name)
@pytest.mark.usefixtures("folder")
def test_an_example_gives_what_it_says(example: doctest.DocTest):
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert runner.run(example, out=output.append).failed == 0, "".join(output)


def of_name(name: str) -> Any:
    value = getattr(d2llm, name)
    return inspect.getdoc(value) or ""


@pytest.mark.parametrize("name", d2llm._HOME_OF)
def test_every_public_name_has_an_example_that_imports_it(name: str):
    text = of_name(name)
    assert "Example" in text
    if name != "Loss":  # its example is a class of one's own, which tests/recipe/test_losses.py has too
        assert ">>> " in text
        assert f" {name}" in text.partition("Example:")[2]


def test_a_wrong_example_fails(folder: Path):
    del folder
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda _: None).failed == 1


def test_help_has_a_line_for_each_name():
    listed = re.findall(r"^    (\w+)  +\w", d2llm.__doc__ or "", flags=re.MULTILINE)
    assert sorted([*listed, "__version__"]) == dir(d2llm)
    assert 20 <= len(listed) <= 30
