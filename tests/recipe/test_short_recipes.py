"""Recipes say only how they differ from the defaults, which are the recommended settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2llm.core.shipped import shipped_recipes
from recipe_lines import superfluous_lines

FILES = [*shipped_recipes().values(), *sorted((Path(__file__).parents[2] / "benchmarks").rglob("*.toml"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_line_of_a_recipe_changes_it(file: Path) -> None:
    assert superfluous_lines(file.read_text(encoding="utf-8")) == []


def test_a_line_that_repeats_a_default_is_found() -> None:
    text = "seed = 0\n[training]\nnum_hard = 2\nnum_easy = 2\n[losses]\nlist_imitation = 0.0\nranknet = 1.0\n"
    assert superfluous_lines(text) == ["seed = 0", "num_hard = 2", "list_imitation = 0.0"]
