"""The verb ``ablate``: what each part of a recipe is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import RunOptions, in_existing_folder, output_path, recipe_argument
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError


@verb("Measure")
def ablate(
    context: typer.Context,
    options: RunOptions,
    recipe: Annotated[str | None, recipe_argument] = None,
    variants: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Variants to train beside the recipe.", show_default="all")
    ] = None,
    list_variants: Annotated[bool, typer.Option("--list", help="List the variants and exit.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, for intervals.")] = 3,
    max_queries: Annotated[
        int | None, typer.Option(min=1, help="Train on a random sample of each plan.", show_default="all")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each run.", show_default="the recipe's")] = None,
    halving: Annotated[
        bool,
        typer.Option("--halving", help="Train the better half again with twice the epochs, until one is left."),
    ] = False,
    budget_minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Start no run after this many minutes; the same command continues later. 0 shows the results so far.",
            show_default="no limit",
        ),
    ] = None,
    markdown_path: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="PATH", dir_okay=False, callback=output_path, help="Also write Markdown."),
    ] = None,
    html_path: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="PATH", dir_okay=False, callback=output_path, help="Also write one HTML page with a plot."
        ),
    ] = None,
) -> None:
    """Train a recipe with parts left out or exchanged, and compare.

    Run it after mine and label. Finished runs are skipped, so the same command continues after an interruption.
    """
    from d2llm.recipe.recipe_file import load_recipe
    from d2llm.reports.ablation import ablation_document, ablation_table, listed, variants_table

    session = session_of(context)
    if list_variants:
        in_existing_folder(options.json_path)
        session.show(variants_table(load_recipe(recipe) if recipe else None))
        session.write_report(context, options.json_path, listed())
        return
    if recipe is None:
        raise InputError("RECIPE is missing: give a TOML file or the name of a recipe; --list needs none")
    names = None if variants is None else [name.strip() for name in variants.split(",")]
    run = options.open(recipe, files=[markdown_path, html_path])
    report = run.ablate(
        names,
        num_seeds=seeds,
        max_queries=max_queries,
        epochs=epochs,
        halving=halving,
        budget_minutes=budget_minutes,
    )
    session.show(ablation_table(report))
    session.write_report(context, options.json_path, report)
    session.write_document(ablation_document(report), markdown_path, html_path)
