"""Options of the verbs that create an index: ``encode``, and ``add`` and ``upsert`` of ``index``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.cli.options import input_path, option_name
from d2llm.core.errors import InputError
from d2llm.retrieval.settings import ChunkingSettings
from d2llm.store.index_spec import IndexSpec

if TYPE_CHECKING:
    from d2llm.cli.session import Session
    from d2llm.data.documents import SkippedFile
    from d2llm.models.student import Student
    from d2llm.retrieval.index import Index
    from d2llm.store.index_manifest import Chunking

_NAMED = 5  # number of reasons to list

CorpusArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="CORPUS...",
        callback=input_path,
        help="corpus.jsonl or corpus.jsonl.gz, or a folder that holds one; or documents and folders of documents (PDF, "
        "HTML, Markdown, Word, PowerPoint, Excel, EPUB, text, tables, source code, scans). -: standard input.",
    ),
]


def check_fits(spec: IndexSpec, index: Index) -> None:
    """Check that an existing index is as the options for a new one describe it.

    Raises:
        InputError: it is not.
    """
    for name, given, actual in spec.differing(index.spec, only_given=True):
        field = IndexSpec.model_fields.get(name)
        option = option_name(name, field) if field else f"--field {name.removeprefix('metadata.')}"
        there = actual or ("none" if field else "no such field")
        raise InputError(
            f"{index.folder}: exists already with {there}, and {option} ({given}) is for a new index; leave "
            "it out, or make another index"
        )


def chunking_of(settings: ChunkingSettings, student: Student, folder: Path | None = None) -> Chunking | None:
    """The chunking of the index in ``folder``, or the default, changed by these settings; None if none is given.

    Raises:
        InputError: the student cannot read such passages.
    """
    from d2llm.retrieval.chunking import Chunker, Chunking, changed_chunking

    if settings.whole:
        return Chunking(None)
    changes = {name: value for name, value in settings if value is not None and value is not False}
    return Chunker(student, changed_chunking(folder, student, **changes)).chunking if changes else None


def warn_of_skipped(session: Session, skipped: Sequence[SkippedFile], links: Sequence[str] = ()) -> None:
    """Warn of files that could not be read, of parts of files that were left out, and of links not followed.

    One is named for each reason, the rarest reasons first.
    """
    from d2llm.data.documents import skipped_by_kind

    for what, files in skipped_by_kind(skipped):
        session.complain("warning", f"{what}: {_examples(files)}")
    if links:
        named = ", ".join(links[:_NAMED]) + (", ..." if len(links) > _NAMED else "")
        session.complain("warning", f"{len(links):,} symbolic links were not followed: {named}")


def _examples(skipped: Sequence[SkippedFile]) -> str:
    counts = Counter(file.reason for file in skipped)
    examples: dict[str, SkippedFile] = {}
    for file in skipped:
        examples.setdefault(file.reason, file)
    reasons = sorted(examples, key=lambda reason: counts[reason])
    named = [f"{examples[reason]}{_and_others(counts[reason] - 1)}" for reason in reasons[:_NAMED]]
    num_left = sum(counts[reason] for reason in reasons[_NAMED:])
    rest = f"; and {num_left:,} more, which --json lists" if num_left else ""
    return f"{'; '.join(named)}{rest}"


def _and_others(count: int) -> str:
    return f", like {count:,} other{'s' if count > 1 else ''}" if count else ""
