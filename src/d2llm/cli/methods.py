"""The verb ``methods``: the kinds that a recipe can name, what they need, and who published them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from d2llm.cli.options import JsonOption
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb

if TYPE_CHECKING:
    from d2llm.core.registry import Registry
    from d2llm.recipe.kinds import SectionOfKind
    from d2llm.recipe.losses import Loss


@verb("Distil")
def methods(context: typer.Context, json_path: JsonOption = None) -> None:
    """List the methods that a recipe can name, with their papers.

    These are losses, pretrainings, teachers, writers and ways to draw negatives, also those of other packages.
    """
    from d2llm.core.table import Column, Table
    from d2llm.recipe import Pretraining, TeacherConfig, WriterConfig
    from d2llm.recipe.losses import LOSSES
    from d2llm.recipe.negatives import Sampling

    session = session_of(context)
    registries: dict[str, Registry[Any]] = {
        "losses": LOSSES,
        "training.pretraining": Pretraining.kinds,
        "mining.sampling": Sampling.kinds,
        "teacher": TeacherConfig.kinds,
        "writer": WriterConfig.kinds,
    }
    found: dict[str, dict[str, Any]] = {}
    for section, registry in registries.items():
        table = Table(
            registry.what,
            Column("what it is", align="left", max_width=60),
            *([Column("needs", align="left", max_width=20)] if registry is LOSSES else []),
            Column("settings", align="left", max_width=30),
            Column("published", align="left", max_width=40),
            title=section,
        )
        found[section] = {kind: _described(registry.find(kind)) for kind in registry.kinds}
        for kind, row in found[section].items():
            needs = [row["needs"]] if registry is LOSSES else []
            table.add_row(kind, row["what"], *needs, ", ".join(row["settings"]), row["paper"])
        session.show(table)
    session.write_report(context, json_path, found)


def _described(cls: type[Loss] | type[SectionOfKind]) -> dict[str, Any]:
    """One kind; its settings are those that not all kinds of this section have."""
    common = next((base for base in cls.__mro__ if "kinds" in vars(base)), None)
    shared = {"weight", *getattr(common, "model_fields", {})}
    needs = sorted(each.replace("_", " ") for each in getattr(cls, "learns_from", ()))
    return {
        "what": (cls.__doc__ or "").split("\n")[0],
        "needs": ", ".join(needs),
        "settings": [name for name in cls.model_fields if name not in shared],
        "paper": cls.paper,
        "module": cls.__module__,
    }
