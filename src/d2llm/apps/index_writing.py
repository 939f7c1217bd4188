"""A corpus written into an index, passage by passage or split into passages, and what to say of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from d2llm.apps.session import session_of

if TYPE_CHECKING:
    from d2llm.pipeline.chunking import Chunker
    from d2llm.pipeline.index import Index


def write_passages(
    context: typer.Context, index: Index, corpus: Path, *, only_new: bool, no_metadata: bool, json_path: Path | None
) -> None:
    """Upsert the passages of a corpus, or add them."""
    from d2llm.data.indexed_corpus import check_corpus, iter_corpus

    session = session_of(context)
    num_passages = check_corpus(corpus, with_metadata=not no_metadata)
    report = index.upsert(
        iter_corpus(corpus, with_metadata=not no_metadata),
        only_new=only_new,
        num_passages=num_passages,
        show_progress=session.show_progress,
    )
    session.say(
        f"index: {report.num_added:,} passages added, {report.num_updated:,} with another text, "
        f"{report.num_metadata:,} with other metadata, {report.num_unchanged:,} as they were; {report.num_truncated:,} "
        f"truncated; {report.seconds:,.1f} s, in {index.folder}"
    )
    session.write_report(context, json_path, report)


def write_documents(
    context: typer.Context, index: Index, corpus: Path, chunker: Chunker, *, no_metadata: bool, json_path: Path | None
) -> None:
    """Split the documents of a corpus and upsert their passages."""
    from d2llm.data.indexed_corpus import check_corpus, iter_corpus
    from d2llm.pipeline.chunking import upsert_documents

    session = session_of(context)
    check_corpus(corpus, with_metadata=not no_metadata)
    documents = iter_corpus(corpus, with_metadata=not no_metadata)
    report = upsert_documents(index, documents, chunker, show_progress=session.show_progress)
    made = report.passages
    session.say(
        f"index: {report.num_documents:,} documents in {made.num_passages:,} passages: {made.num_added:,} added, "
        f"{made.num_updated:,} with another text, {made.num_metadata:,} with other metadata, "
        f"{made.num_unchanged:,} as they were, {report.num_deleted:,} deleted; {made.num_truncated:,} truncated; "
        + (f"read in {made.num_windows:,} windows; " if chunker.late else "")
        + f"{made.seconds:,.1f} s, in {index.folder}"
    )
    session.write_report(context, json_path, report)
