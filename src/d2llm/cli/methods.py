"""The verb ``methods``: what can be named in a recipe, what it needs, and who published it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from d2llm.cli.options import JsonOption
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb

if TYPE_CHECKING:
    from d2llm.recipe.losses import Loss


@verb("Distil")
def methods(context: typer.Context, json_path: JsonOption = None) -> None:
    """List the losses that a recipe can name, with their papers."""
    from d2llm.core.table import Column, Table
    from d2llm.recipe.losses import LOSSES

    session = session_of(context)
    table = Table(
        "loss",
        Column("what it teaches", align="left", max_width=60),
        Column("needs", align="left", max_width=20),
        Column("settings", align="left", max_width=24),
        Column("published", align="left", max_width=40),
    )
    found = {kind: _described(LOSSES.find(kind)) for kind in LOSSES.kinds}
    for kind, row in found.items():
        table.add_row(kind, row["what"], row["needs"], ", ".join(row["settings"]), row["paper"])
    session.show(table)
    session.write_report(context, json_path, found)


def _described(loss: type[Loss]) -> dict[str, Any]:
    return {
        "what": (loss.__doc__ or "").split("\n")[0],
        "needs": ", ".join(sorted(each.replace("_", " ") for each in loss.learns_from)),
        "settings": [name for name in loss.model_fields if name != "weight"],
        "paper": loss.paper,
        "module": loss.__module__,
    }
