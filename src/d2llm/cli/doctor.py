"""The verb ``doctor``: checks whether d2llm can work on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import DeviceOption, JsonOption
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.names import counted
from d2llm.core.settings import STUDENT_HELP
from d2llm.core.shipped import DEFAULT_STUDENT

EXIT_PROBLEM = 1


@verb("Tools")
def doctor(
    context: typer.Context,
    student: Annotated[
        str, typer.Option(metavar="NAME_OR_FOLDER", help=STUDENT_HELP)
    ] = DEFAULT_STUDENT,  # not StudentOption: a missing student is one of the findings
    index: Annotated[Path | None, typer.Option(metavar="INDEX", help="Also check an index, with its student.")] = None,
    warm: Annotated[
        bool,
        typer.Option(
            "--warm", help="Also compile the loops of searches and export the student's graph, once for this user."
        ),
    ] = False,
    device: DeviceOption = None,
    json_path: JsonOption = None,
) -> None:
    """Check packages, machine, student and index; say what to do.

    Ends with exit code 1 if there is a problem; notes do not count.
    """
    from d2llm.doctor.doctor import examine
    from d2llm.doctor.findings import findings_table

    session = session_of(context)
    findings = list(examine(student=student, index=index, device=device, warm=warm))
    problems = sum(finding.level == "problem" for finding in findings)
    session.show(findings_table(findings))
    session.write_report(context, json_path, {"findings": findings, "num_problems": problems})
    if problems:
        session.complain("warning", f"{counted(problems, 'problem')}: see the last column")
        raise typer.Exit(EXIT_PROBLEM)
