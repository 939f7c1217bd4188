"""Pages can be read: no long lines of prose; the tables that scripts write are as the scripts write them."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_LINE = 200
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "src/**/*.md", "packages/**/*.md")
    for page in ROOT.glob(pattern)
    if not re.fullmatch(r"\d{4}-\d\d", page.stem)  # a month of the log keeps its entries as they were written
)


def long_lines(text: str) -> list[str]:
    """Lines of prose above the limit. Addresses of links do not count, nor do tables and blocks of code."""
    prose, fence = [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        mark = re.match(r" *(```+|~~~+)", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = ""
        elif not fence and not line.lstrip().startswith("|"):
            prose.append((number, re.sub(r"\]\([^)]*\)", "]", line)))
    return [f"{number}: {len(line)} characters: {line[:60]}" for number, line in prose if len(line) > LONGEST_LINE]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_are_short(page):
    assert long_lines(page.read_text(encoding="utf-8")) == []


def long_cells(text: str) -> list[str]:
    """Cells of tables that are longer than a line of prose may be: what does not fit is a note below the table."""
    rows = [
        (number, re.sub(r"\]\([^)]*\)", "]", line))
        for number, line in enumerate(text.splitlines(), start=1)
        if line.lstrip().startswith("|")
    ]
    cells = [(number, cell.strip()) for number, row in rows for cell in re.split(r"(?<!\\)\|", row)]
    return [f"{number}: {len(cell)} characters: {cell[:60]}" for number, cell in cells if len(cell) > LONGEST_LINE]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_cells_of_tables_are_short(page):
    assert long_cells(page.read_text(encoding="utf-8")) == []


def test_what_counts_as_a_long_cell():
    assert long_cells("| a | " + "word " * 39 + "words |") == []
    assert len(long_cells("| a | " + "word " * 40 + "words | b |")) == 1
    assert long_cells("| " + "word | " * 60) == []
    assert long_cells("| [the log](log/2026-11.md#" + "a-heading-" * 30 + ") |") == []
    assert len(long_cells("| " + "a \\| b " * 30 + "|")) == 1


def test_all_pages_are_read():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/index.md"} <= names
    assert {"docs/how-to/serve.md", "docs/log/README.md", "benchmarks/judgements/README.md"} <= names
    assert "packages/d2llm-models-minilm/src/d2llm_models/students/d2llm-minilm/README.md" in names


@pytest.mark.parametrize(
    ("text", "long"),
    [
        ("word " * 39 + "words", False),
        ("word " * 40 + "words", True),
        ("- " + "word " * 40, True),
        ("| " + "word " * 60 + "|", False),
        ("```\n" + "word " * 60 + "\n```", False),
        ("```\ncode\n```\n" + "word " * 60, True),
        ("````\n```\n" + "word " * 60 + "\n````", False),
        ("see [the entry](log/2026-11.md#" + "a-long-heading-" * 20 + ")", False),
    ],
)
def test_what_counts_as_a_long_line(text, long):
    assert bool(long_lines(text)) == long


@pytest.mark.parametrize("script", ["quality_tables.py", "recipe_tables.py"])
def test_the_tables_of_pages_are_as_the_scripts_write_them(tmp_path, monkeypatch, script):
    """The script runs beside copies of the pages and of the results, and changes none of the pages."""
    for folder in ("docs", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
    for card in ROOT.glob("packages/*/src/d2llm_models/students/*/README.md"):
        copied = tmp_path / card.relative_to(ROOT)
        copied.parent.mkdir(parents=True)
        shutil.copy(card, copied)
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.md")}
    monkeypatch.setattr(sys, "path", [str(tmp_path / "scripts"), *sys.path])
    monkeypatch.delitem(sys.modules, "prose", raising=False)
    runpy.run_path(str(tmp_path / "scripts" / script), run_name="__main__")
    changed = [str(page.relative_to(tmp_path)) for page, text in pages.items() if page.read_text("utf-8") != text]
    assert changed == []
    touched = "quality.md" if script == "quality_tables.py" else "recipes.md"
    (tmp_path / "docs" / touched).write_text(
        re.sub(r"\| 0\.\d\d\d \|", "| 9.999 |", pages[tmp_path / "docs" / touched], count=1), encoding="utf-8"
    )
    runpy.run_path(str(tmp_path / "scripts" / script), run_name="__main__")
    assert (tmp_path / "docs" / touched).read_text(encoding="utf-8") == pages[tmp_path / "docs" / touched]
