"""Options of the verbs that make an index: ``encode``, and ``add`` and ``upsert`` of ``index``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.core.errors import InputError
from d2llm.core.types import Task

if TYPE_CHECKING:
    from d2llm.models.student import Student
    from d2llm.store.side_files import Chunking

CorpusArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CORPUS", help="corpus.jsonl or corpus.jsonl.gz, or a folder that holds one.", show_default=False
    ),
]


@dataclass(frozen=True)
class VectorOptions:
    """What is decided when an index is made, and cannot be changed after."""

    task: Annotated[
        Task,
        typer.Option(
            "--task",
            help="For a new index: searches look for passages that answer (asymmetric) or say the same (symmetric).",
        ),
    ] = "asymmetric"
    vectors: Annotated[
        str,
        typer.Option(
            "--vectors",
            metavar="FORMAT",
            help="For a new index: float32, bfloat16, float16, int8, int3 or binary vectors.",
        ),
    ] = "bfloat16"
    vector_copies: Annotated[
        int,
        typer.Option(
            "--vector-copies",
            metavar="N",
            min=1,
            max=2,
            help="For a new index: 1 keeps vectors once, in less space; damaged ones must then be encoded again.",
        ),
    ] = 2
    window_vectors: Annotated[
        str,
        typer.Option(
            "--window-vectors",
            metavar="FORMAT",
            help="For a new index: also keep a vector of each two neighbouring sentences, for example as int3; or "
            "none.",
            show_default="int3 where the student's score counts them",
        ),
    ] = "auto"


@dataclass(frozen=True)
class NewIndexOptions(VectorOptions):
    """``VectorOptions`` of an index that can have metadata fields."""

    field: Annotated[
        list[str] | None,
        typer.Option(
            "--field",
            metavar="NAME:TYPE",
            help="For a new index: a metadata field (string, integer, number, boolean, timestamp); repeat for more.",
            show_default="by the first values",
        ),
    ] = None

    def check_unused(self, folder: Path) -> None:
        """Check that none is given for an index that exists.

        Raises:
            InputError: an option differs from its default.
        """
        is_given = {
            "--field": bool(self.field),
            "--vectors": self.vectors != "bfloat16",
            "--vector-copies": self.vector_copies != 2,
            "--window-vectors": self.window_vectors != "auto",
            "--task": self.task != "asymmetric",
        }
        for option in (name for name, given in is_given.items() if given):
            raise InputError(f"{folder}: exists already, and {option} is for a new index; leave it out")


@dataclass(frozen=True)
class ChunkingOptions:
    """How texts are split into passages.

    Raises:
        InputError: the options contradict each other.
    """

    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            "--chunk-tokens",
            metavar="N",
            min=1,
            help="Split texts into passages of at most N tokens, title included; search --group ranks whole texts.",
            show_default="the index's; 128 for a new one",
        ),
    ] = None
    chunk_overlap: Annotated[
        int | None,
        typer.Option(
            "--chunk-overlap",
            metavar="N",
            min=0,
            help="Tokens of the passage before that a passage repeats.",
            show_default="the index's; none for a new one",
        ),
    ] = None
    late: Annotated[
        bool, typer.Option("--late", help="Read each text whole, and pool its passages from it (late chunking).")
    ] = False
    late_window: Annotated[
        int | None,
        typer.Option(
            "--late-window",
            metavar="N",
            min=1,
            help="Tokens read at once for --late.",
            show_default="as many as the backbone can",
        ),
    ] = None
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Split nothing: each text is one passage, cut where the student stops reading."),
    ] = False

    def __post_init__(self) -> None:
        numbers = (self.chunk_tokens, self.chunk_overlap, self.late_window)
        if self.whole and (self.late or any(number is not None for number in numbers)):
            raise InputError(
                "--whole splits nothing; leave out --chunk-tokens, --chunk-overlap, --late and --late-window"
            )
        if self.late_window is not None and not self.late:
            raise InputError("--late-window is for --late; give both, or leave it out")

    def chunking(self, student: Student) -> Chunking | None:
        """The chunking that they describe; None if none was given.

        Raises:
            InputError: the student cannot read such passages.
        """
        from d2llm.retrieval.chunking import Chunker, Chunking, default_chunking

        if self.whole:
            return Chunking(None)
        if not self.late and self.chunk_tokens is None and self.chunk_overlap is None:
            return None
        tokens = self.chunk_tokens or default_chunking(student).chunk_tokens
        return Chunker(student, Chunking(tokens, self.chunk_overlap or 0, self.late, self.late_window)).chunking
