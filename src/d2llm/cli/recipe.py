"""The verb ``recipe``: what a recipe says, whether it is valid, and its schema for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from d2llm.cli.options import input_path, output_path
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb_group

recipe_app = verb_group("recipe", "Check recipes, and describe them to editors.", heading="Distil")
_RECIPES = typer.Argument(metavar="RECIPE...", callback=input_path, help="TOML files, or names of shipped recipes.")


@recipe_app.command("check")
def check(context: typer.Context, recipes: Annotated[list[str], _RECIPES]) -> None:
    """Read recipes as every verb would, and show the settings that differ from their defaults.

    Warns of data sets, models, students and files that it names and that are not on this machine.
    """
    from d2llm.core.table import Column, Table
    from d2llm.data.run_folder import require_distinct_data
    from d2llm.recipe import Recipe
    from d2llm.recipe.losses import RECOMMENDED
    from d2llm.recipe.recipe_file import load_recipe
    from d2llm.training.open_run import is_absent
    from d2llm.training.recipe_inputs import absent_inputs, check_backbone

    session, defaults = session_of(context), dict(_settings(Recipe().model_dump(mode="json")))
    for source in recipes:
        recipe = load_recipe(source)
        if recipe.data:
            require_distinct_data(recipe, where=source)
        value_column = Column("value", align="left", max_width=60)
        table = Table("setting", value_column, "default", title=f"{source}: {recipe.name}")
        left_out = {f"losses.{kind}": 0.0 for kind in RECOMMENDED if not recipe.losses.weight(kind)}
        for name, value in (dict(_settings(recipe.model_dump(mode="json"))) | left_out).items():
            if value != defaults.get(name) and name != "name" and not name.startswith("data"):
                table.add_row(name, _text(value), _text(defaults.get(name)))
        if table.rows:
            session.show(table)
        sets = ", ".join(f"{one.path} ({one.task})" for one in recipe.data) or "none"
        missing, remote = absent_inputs(recipe)
        check_backbone(recipe)
        missing += [f"data: {one.path}: not here; give --data to a run" for one in recipe.data if is_absent(one)]
        for problem in missing:
            session.complain("warning", f"{source}: {problem}")
        if remote:
            session.say(f"{source}: taken from the Hub or its cache, so not checked: {', '.join(remote)}")
        session.say(f"{source} is valid; data sets: {sets}")


@recipe_app.command("schema")
def schema(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=output_path,
            help="Write it there, for a line '#:schema FILE' at the top of recipes; by default to standard output.",
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of recipes, with which editors of TOML complete, explain and check settings."""
    from d2llm.core.files import write_json
    from d2llm.recipe import Recipe

    described = {"$schema": "http://json-schema.org/draft-07/schema#", **Recipe.model_json_schema()}
    if out is None:
        session_of(context).write(json.dumps(described, indent=2, ensure_ascii=False))
    else:
        write_json(out, described)


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings by their path; a list counts as one."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _settings(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
