"""A corpus written into an index: the index is made where there is none, texts are split as it splits them."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from d2llm.cli.session import session_of
from d2llm.core.errors import InputError
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.types import EngineName, Task

if TYPE_CHECKING:
    from d2llm.models.student import Student
    from d2llm.retrieval.index import Index
    from d2llm.store.side_files import Chunking
    from d2llm.store.stored_vectors import VectorCopies


@dataclass(frozen=True, slots=True)
class Loading:
    """Which student, and how it computes."""

    student: str | None
    device: str | None
    dtype: str | None
    engine: EngineName


@dataclass(frozen=True, slots=True)
class Making:
    """What an index is told when it is made, and never after."""

    task: Task
    vector_format: str
    vector_copies: int
    window_vectors: str
    fields: Sequence[str]

    def check_not_given(self, folder: Path) -> None:
        """For an index that is there.

        Raises:
            InputError: an option differs from what it is when it is left out.
        """
        given = {
            "--field": bool(self.fields),
            "--vectors": self.vector_format != "bfloat16",
            "--vector-copies": self.vector_copies != 2,
            "--window-vectors": self.window_vectors != "auto",
            "--task": self.task != "asymmetric",
        }
        for option, is_given in given.items():
            if is_given:
                raise InputError(f"{folder}: is there already, and {option} is for a new index; leave it out")


@dataclass(frozen=True, slots=True)
class Splitting:
    """The options that say how texts are split.

    Raises:
        InputError: they do not go together.
    """

    chunk_tokens: int | None
    chunk_overlap: int | None
    late: bool
    late_window: int | None
    whole: bool

    def __post_init__(self) -> None:
        numbers = (self.chunk_tokens, self.chunk_overlap, self.late_window)
        if self.whole and (self.late or any(number is not None for number in numbers)):
            raise InputError(
                "--whole splits nothing; leave out --chunk-tokens, --chunk-overlap, --late and --late-window"
            )
        if self.late_window is not None and not self.late:
            raise InputError("--late-window is for --late; give both, or leave it out")

    def chunking(self, student: Student) -> Chunking | None:
        """What they ask for; None where nothing is asked for.

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


def write_corpus(
    context: typer.Context,
    folder: Path,
    corpus: Path,
    *,
    making: Making,
    splitting: Splitting,
    loading: Loading,
    only_new: bool,
    no_metadata: bool,
    lenient_metadata: bool,
    json_path: Path | None,
) -> None:
    """Upsert the texts of a corpus, or add them, and say what became of them."""
    from d2llm.data.indexed_corpus import check_corpus, iter_corpus

    session = session_of(context)
    num_documents = check_corpus(corpus, with_metadata=not no_metadata)  # before an index is made for it
    with _opened(folder, making, loading) as index:
        report = index.upsert_documents(
            iter_corpus(corpus, with_metadata=not no_metadata),
            splitting.chunking(cast("Student", index.student)),
            only_new=only_new,
            lenient_metadata=lenient_metadata,
            num_documents=num_documents,
            show_progress=session.show_progress,
        )
    session.say(
        f"index: {report.num_documents:,} texts in {report.num_passages:,} passages ({index.chunking}): "
        f"{report.num_added:,} added, {report.num_updated:,} with another text, {report.num_metadata:,} with other "
        f"metadata, {report.num_unchanged:,} as they were, {report.num_deleted:,} deleted; {report.num_truncated:,} "
        "truncated; "
        + (f"read in {report.num_windows:,} windows; " if report.num_windows else "")
        + f"{report.seconds:,.1f} s, in {folder}"
    )
    session.write_report(context, json_path, report)


@contextmanager
def _opened(folder: Path, making: Making, loading: Loading) -> Generator[Index]:
    """The index in a folder, made where there is none; then it goes again where nothing came to be in it."""
    from d2llm.core.files import MANIFEST_NAME
    from d2llm.retrieval.index import Index
    from d2llm.store.schema import MetadataSchema

    if (folder / MANIFEST_NAME).is_file():
        making.check_not_given(folder)
        yield Index.open(folder, loading.student, device=loading.device, dtype=loading.dtype, engine=loading.engine)
        return
    index = Index.create(
        folder,
        loading.student or DEFAULT_STUDENT,
        task=making.task,
        vector_format=making.vector_format,
        vector_copies=cast("VectorCopies", making.vector_copies),
        window_vectors=making.window_vectors,
        metadata=MetadataSchema.parse(making.fields).fields,
        device=loading.device,
        dtype=loading.dtype,
        engine=loading.engine,
    )
    try:
        yield index
    except BaseException:
        if not len(index.store.table()):
            shutil.rmtree(folder, ignore_errors=True)
        raise
