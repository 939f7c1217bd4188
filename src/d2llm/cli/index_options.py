"""Arguments and options of the verb ``index``. Only light imports: ``d2llm --help`` reads this file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import known_student
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.types import Task

CorpusArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CORPUS", help="corpus.jsonl or corpus.jsonl.gz, or a folder that holds one.", show_default=False
    ),
]
IdsArgument = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids of passages.", show_default=False)]
IdsFileOption = Annotated[
    Path | None,
    typer.Option("--ids", metavar="FILE", help="A file with one id per line.", show_default=False),
]
MakerOption = Annotated[
    str | None,
    typer.Option(
        "--student",
        metavar="NAME_OR_FOLDER",
        callback=known_student,
        help="The student whose vectors it holds.",
        show_default=f"the index's own; of a new one {DEFAULT_STUDENT}",
    ),
]
NewTaskOption = Annotated[
    Task,
    typer.Option(
        "--task", help="Of a new index: what searches ask, an answer (asymmetric) or the same said (symmetric)."
    ),
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--vectors", metavar="FORMAT", help="Of a new index: float32, bfloat16, float16, int8, int3 or binary vectors."
    ),
]
CopiesOption = Annotated[
    int,
    typer.Option(
        "--vector-copies",
        metavar="N",
        min=1,
        max=2,
        help="Of a new index: 1 keeps vectors once, in less space; those damaged must then be encoded again.",
    ),
]
WindowVectorsOption = Annotated[
    str,
    typer.Option(
        "--window-vectors",
        metavar="FORMAT",
        help="Of a new index: also keep a vector of each two neighbouring sentences, as int3, say; or none.",
        show_default="int3 where the student's score counts them",
    ),
]
FieldOption = Annotated[
    list[str] | None,
    typer.Option(
        "--field",
        metavar="NAME:TYPE",
        help="Of a new index: a metadata field (string, integer, number, boolean, timestamp); repeat for more.",
        show_default="by the first values",
    ),
]
ChunkOption = Annotated[
    int | None,
    typer.Option(
        "--chunk-tokens",
        metavar="N",
        min=1,
        help="Split texts into passages of at most N tokens, title included; search --group ranks whole texts.",
        show_default="as the index does; a new one 128",
    ),
]
OverlapOption = Annotated[
    int | None,
    typer.Option(
        "--chunk-overlap",
        metavar="N",
        min=0,
        help="Tokens that a passage repeats of the one before.",
        show_default="as the index does; a new one none",
    ),
]
WholeOption = Annotated[
    bool,
    typer.Option("--whole", help="Split nothing: each text is one passage, cut where the student stops reading."),
]
PlainOption = Annotated[bool, typer.Option("--no-metadata", help="Read id, title and text alone.")]
LenientOption = Annotated[
    bool,
    typer.Option("--lenient-metadata", help="Leave out metadata values that do not fit, and count them."),
]
DocumentsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--document", metavar="ID", help="All passages of a document; may be given several times.", show_default=False
    ),
]
LateOption = Annotated[
    bool,
    typer.Option("--late", help="Read each text whole, and pool its passages from it (late chunking)."),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--late-window",
        metavar="N",
        min=1,
        help="Tokens read at once for --late.",
        show_default="as many as the backbone can",
    ),
]
