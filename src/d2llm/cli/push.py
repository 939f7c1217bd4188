"""The verb ``push``: uploads a student to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from d2llm.cli.options import JsonOption, StudentArgument
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.core.names import counted


@verb("Distil")
def push(
    context: typer.Context,
    student: StudentArgument,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Name on the Hub: owner/name.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who may read a new repository.", show_default="the account's default"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch to commit to.", show_default="main")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="NAME",
            help="Licence of the weights, as the Hub names it: apache-2.0, mit.",
            show_default="the card's",
        ),
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--adapter",
            help="Push all weights of the backbone, or only what training changed.",
            show_default="all if sentence-transformers can then load it",
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Upload a student to the Hugging Face Hub.

    The account is that of `hf auth login`, or of the token in HF_TOKEN. The manifest is published too, including the
    recipe and its data set paths. Others can then load the student as owner/name; if its head and pooling allow,
    sentence-transformers loads it without d2llm.
    """
    from d2llm.models.export.sentence_transformers import why_not_plain
    from d2llm.models.hub import find_student, push_student
    from d2llm.models.model_card import card_licence, model_card
    from d2llm.models.student import merge_student
    from d2llm.models.student_files import BACKBONE_FOLDER, read_student_manifest

    session = session_of(context)
    folder = find_student(student)
    manifest, config = read_student_manifest(folder)
    if card_licence(model_card(folder, manifest, licence=licence)) is None:
        session.complain("warning", "no licence is named, so nobody may use the student; give --license")
    is_merged, plain = (folder / BACKBONE_FOLDER).is_dir(), why_not_plain(config) is None
    if merge is False and is_merged:
        raise InputError(f"{folder}: has all weights of its backbone and no adapter to push; leave out --adapter")
    with TemporaryDirectory() as temporary:
        if (plain if merge is None else merge) and not is_merged:
            merge_student(folder, Path(temporary) / "student")
            folder = Path(temporary) / "student"
        report = push_student(folder, repo_id, private=private, revision=revision, licence=licence)
    session.say(f"push: {counted(report.num_files, 'file')}, {report.num_bytes / 1e6:,.1f} MB: {report.url}")
    if report.needs_d2llm is None:
        session.say("push: sentence-transformers can load it without d2llm")
    else:
        session.say(f"push: sentence-transformers cannot load it without d2llm: {report.needs_d2llm}")
    session.write_report(context, json_path, report)
