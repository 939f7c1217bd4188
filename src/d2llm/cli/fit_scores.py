"""The verb ``fit-scores``: fits the weights of words in a student's scores, and the probabilities of scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    TaskOption,
    in_existing_folder,
    input_path,
    known_student,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.training.settings import FitScoresSettings


@verb("Distil")
def fit_scores(
    context: typer.Context,
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="A student's folder, or its name.", callback=known_student)
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            callback=input_path,
            help="Data sets with judged queries in their dev split, or with pairs of texts labelled yes or no.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="Where the fitted student goes.")
    ],
    *,
    task: TaskOption = None,
    settings: FitScoresSettings,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Fit a student's scores to your judged queries.

    Without training the student again, two things are fitted on dev: the weights of words (BM25), sentences and tokens
    in the score of a passage in an index, and the conversion of scores into probabilities. Vectors do not change, so an
    index of the old student can be searched with the new one (after --document-expansion, make a new one: the old one
    lacks the words). What was fitted for the other task is kept.
    """
    from d2llm.models.student import Student
    from d2llm.retrieval.protocols import task_for
    from d2llm.training.fit_scores import fit_scores, read_judged
    from d2llm.training.sentences import describe_fit_scores

    datasets = read_judged(data, settings)
    model = Student.load(student, device=device, dtype=dtype)
    report = fit_scores(model, datasets, task_for(model, task), settings)
    model.save(out)
    session = session_of(context)
    session.say(f"fit-scores: {describe_fit_scores(report)}; in {out}")
    session.write_report(context, json_path, report)
