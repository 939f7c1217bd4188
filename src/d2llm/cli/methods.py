"""The verb ``methods``: the kinds that a recipe, index or search can name, what they need, what they brought."""

from __future__ import annotations

from typing import Annotated

import typer

from d2llm.cli.options import JsonOption
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb


@verb("Distil")
def methods(
    context: typer.Context,
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND", help="Show this one in full, with its settings, or all of a section: losses, backbones."
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """List methods by kind: papers, needs, what they measured.

    These are poolings, losses, pretrainings, teachers, writers, rerankers and so on, also those of other packages.
    """
    from d2llm.core.errors import InputError
    from d2llm.core.names import suggestion
    from d2llm.reports.methods import SECTIONS, describe_methods, facts_table, methods_table, settings_table

    session, sections = session_of(context), describe_methods()
    names = {name: {name, name.rpartition(".")[2], *_words(registry.what)} for name, registry in SECTIONS.items()}
    listed = [section for section in sections if kind is None or kind in names[section]]
    if kind is None or listed:
        sections = {section: sections[section] for section in listed}
        for section, found in sections.items():
            session.show(methods_table(section, found))
    else:
        known = [name for found in sections.values() for name in found] + sorted(set().union(*names.values()))
        sections = {section: {kind: found[kind]} for section, found in sections.items() if kind in found}
        if not sections:
            raise InputError(f"no method or section '{kind}'; {suggestion(kind, dict.fromkeys(known), 'there are')}")
        for section, found in sections.items():
            session.show(facts_table(section, kind, found[kind]))
            if found[kind].settings:
                session.show(settings_table(found[kind]))
    session.write_report(context, json_path, sections)


def _words(what: str) -> set[str]:
    """What things are called, one or many: loss, losses."""
    word = what.removeprefix("kind of ")
    return {word, f"{word}es" if word.endswith("s") else f"{word}s"}
