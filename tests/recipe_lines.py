"""Lines of a recipe that say what it would be without them."""

from __future__ import annotations

import re

from d2llm.core.errors import RecipeError
from d2llm.recipe import Recipe
from d2llm.recipe.recipe import load_recipe_text

_SETTING = re.compile(r"[\w.]+ = ")


def superfluous_lines(text: str) -> list[str]:
    """The lines of settings without which the recipe is the same."""
    lines = text.splitlines()
    recipe = _read(lines)
    assert recipe is not None
    return [
        line
        for index, line in enumerate(lines)
        if _SETTING.match(line) and _read(lines[:index] + lines[index + 1 :]) == recipe
    ]


def _read(lines: list[str]) -> Recipe | None:
    try:
        return load_recipe_text("\n".join(lines), where="recipe.toml")
    except RecipeError:
        return None
