"""The verb ``index ... project``: what the student's first layer makes of each passage, stored beside its vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from d2llm.cli.index import MakerOption, folder_of, index_app
from d2llm.cli.options import DeviceOption, DtypeOption, JsonOption
from d2llm.cli.session import session_of

if TYPE_CHECKING:
    from d2llm.retrieval.project import ProjectReport


def project(
    context: typer.Context,
    student: MakerOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Store W_p b of each passage, for quicker scores (concat heads).

    The first layer of such a head is a sum of a query's and a passage's part. With the passage's part stored, a score
    skips the largest product; it takes two bytes for each number of the hidden layer. Later upserts keep it up to date.
    """
    from d2llm.retrieval.index import Index
    from d2llm.retrieval.project import project as store_projections

    session = session_of(context)
    index = Index.open(folder_of(context), student, device=device, dtype=dtype)
    report = store_projections(index.store, index.student, show_progress=session.show_progress)
    session.say(_remark(report))
    session.write_report(context, json_path, report)


def register(app: typer.Typer) -> None:
    """Add this verb to those of an index."""
    del app
    index_app.command("project")(project)


def _remark(report: ProjectReport) -> str:
    before = report.num_rows - report.num_added
    return (
        f"project: {report.num_added:,} rows added, {before:,} were there, {report.width} numbers and "
        f"{report.bytes_per_row:,} bytes each; {report.seconds:,.1f} s, in {report.folder}"
    )
