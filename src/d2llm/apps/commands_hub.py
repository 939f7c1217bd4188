"""The verb that puts a student on the Hugging Face Hub: push."""

from __future__ import annotations

from typing import Annotated

import typer

from d2llm.apps.options import DISTIL, JsonOption
from d2llm.apps.session import session_of


def push(
    context: typer.Context,
    student: Annotated[
        str,
        typer.Argument(metavar="STUDENT", help="A student's folder, or the name of a shipped one.", show_default=False),
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Where on the Hub: owner/name.", show_default=False)
    ],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Who may read a repository that is made.", show_default="the account's default"
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="The branch to commit to.", show_default="main")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="NAME",
            help="Of the weights, as the Hub names it: apache-2.0, mit.",
            show_default="the card's",
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Put a student on the Hugging Face Hub.

    The account is that of `hf auth login`, or of the token in HF_TOKEN. The manifest goes along, and with it the
    recipe, paths of data sets included. Others then load it as owner/name.
    """
    from d2llm.models.hub import find_student, push_student
    from d2llm.models.model_card import card_licence, model_card
    from d2llm.models.student_files import read_student_manifest

    session = session_of(context)
    folder = find_student(student)
    if card_licence(model_card(folder, read_student_manifest(folder)[0], licence=licence)) is None:
        session.complain("warning", "no licence is named, so nobody may use the student; say --license")
    report = push_student(folder, repo_id, private=private, revision=revision, licence=licence)
    session.say(f"push: {report.num_files} files, {report.num_bytes / 1e6:,.1f} MB: {report.url}")
    session.write_report(context, json_path, report)


def register(app: typer.Typer) -> None:
    """Add this verb to the program."""
    app.command("push", rich_help_panel=DISTIL)(push)
