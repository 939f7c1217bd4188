"""Options that let a teacher or a listwise reader read the top of a student's ranking again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.cli.options import PromptOption, teacher_config, teacher_option
from d2llm.core.errors import InputError
from d2llm.core.types import DEFAULT_READER_PASSAGES, DEFAULT_TEACHER_PASSAGES, Task

if TYPE_CHECKING:
    from d2llm.retrieval.cascade import Rereader
    from d2llm.retrieval.index import Index


@dataclass(frozen=True)
class RereadingOptions:
    """Which model reads passages again, and how many."""

    teacher: Annotated[
        str | None,
        teacher_option(
            help="Teacher that reranks passages the student is unsure of; run `d2llm index INDEX calibrate` first. "
            "One of kind listwise reorders the first passages."
        ),
    ] = None
    teacher_passages: Annotated[
        int | None,
        typer.Option(
            min=0, help="Maximum number of passages it reads per query.", show_default=f"{DEFAULT_TEACHER_PASSAGES}"
        ),
    ] = None
    teacher_ms: Annotated[float | None, typer.Option(min=0, help="Maximum time it reads per query.")] = None
    prompt: PromptOption = None
    reader: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A language model that reads the first passages as vectors and ranks them, from d2llm tune-reader.",
        ),
    ] = None
    reader_passages: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --reader: how many passages it reads.", show_default=f"{DEFAULT_READER_PASSAGES}"
        ),
    ] = None

    def check(self) -> None:
        """Check the combination.

        Raises:
            InputError: an option is for another one that is missing, or contradicts it.
        """
        of_teacher = {
            "--teacher-ms": self.teacher_ms,
            "--teacher-passages": self.teacher_passages,
            "--prompt": self.prompt,
        }
        for name, value in of_teacher.items():
            if self.teacher is None and value is not None:
                raise InputError(f"{name} is for a teacher; name one with --teacher, or leave it out")
        if self.reader is None and self.reader_passages is not None:
            raise InputError("--reader-passages is for --reader FOLDER; add it, or leave it out")
        if self.reader is not None and self.teacher is not None:
            raise InputError("--teacher and --reader both reorder the student's ranking: leave out one of them")

    def load(self, index: Index, task: Task, *, device: str | None, dtype: str | None) -> Rereader | None:
        """Load the model that reads again, if there is one: a cascade with the measured error, or a reader.

        A teacher that ranks lists reorders the first passages, whether the student is sure of them or not.
        """
        if self.reader is not None:
            from d2llm.models.listwise_reader import ListwiseReader
            from d2llm.retrieval.cascade import ListwiseReading

            reader = ListwiseReader.load(self.reader, device=device, dtype=dtype)
            return ListwiseReading(reader, self.reader_passages or DEFAULT_READER_PASSAGES)
        if self.teacher is None:
            return None
        from d2llm.models.teachers.judge import load_judge, ranks_lists
        from d2llm.retrieval.calibrate import read_error
        from d2llm.retrieval.cascade import Cascade, TeacherReading
        from d2llm.retrieval.row_evidence import weights_for

        judge = load_judge(teacher_config(self.teacher, self.prompt), device=device, dtype=dtype)
        num_read = DEFAULT_TEACHER_PASSAGES if self.teacher_passages is None else self.teacher_passages
        if ranks_lists(judge):
            return TeacherReading(judge, num_read, self.teacher_ms)
        error = read_error(index.folder, judge, task, weights_for(index.view, index.student, task))
        return Cascade(judge, error, num_read, self.teacher_ms)
