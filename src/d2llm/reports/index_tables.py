"""What the verb ``index`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from d2llm.core.types import Passage
    from d2llm.retrieval.build_ann import AnnReport
    from d2llm.store.inspection import IndexStats


def stats_table(stats: IndexStats) -> Table:
    """The facts about an index, one per line."""
    table = Table(title=Text(stats.folder), title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(style="cyan")
    table.add_column()
    fields = ", ".join(f"{name}: {kind}" for name, kind in stats.metadata.items())
    holes = stats.num_rows - stats.num_passages
    copies = "once" if stats.vector_copies == 1 else "twice"
    rows = {
        "passages": f"{stats.num_passages:,}, {stats.num_truncated:,} of them read in part",
        "documents": "none so far; passages alone" if stats.chunking is None else f"cut into {stats.chunking}",
        "vectors": f"{stats.dim} numbers as {stats.vector_format}, {stats.vector_bytes:,} bytes each, kept {copies}; "
        f"{holes:,} holes",
        "metadata": fields or "none",
        "student": f"{stats.student_name or stats.student}, task {stats.task}",
        "version": f"{stats.version:,}; {stats.num_versions:,} can still be read",
        "snapshots": ", ".join(stats.snapshots) or "none",
        "bytes": f"{stats.table_bytes:,} table, {stats.vector_file_bytes:,} vectors; {stats.bytes_per_passage:,.0f} "
        "per passage in all",
    }
    if stats.window_format is not None:
        rows["windows"] = f"vectors of windows as {stats.window_format}, {stats.window_bytes:,} bytes in all"
    if not stats.checksums:
        rows["checksums"] = "none; the next write, or verify --repair, takes them"
    if stats.num_projections:
        rows["projections"] = f"of {stats.num_projections:,} rows, {stats.projection_bytes:,} bytes each"
    if stats.ann_passages:
        later = stats.num_passages - stats.ann_passages
        rows["approximate"] = f"{stats.ann_passages:,} passages, made to find {stats.ann_recall:.0%} of the candidates"
        rows["approximate"] += f"; {later:,} more are scanned" if later > 0 else ""
    if stats.unindexed:
        lag = ", ".join(f"{name} {count:,}" for name, count in stats.unindexed.items())
        rows["not indexed"] = f"{lag} (searched all the same, more slowly; compact brings the indices up to date)"
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def passage_lines(passage: Passage) -> RenderableType:
    """A passage with all that is known of it, its id on a line of its own, however long it is."""
    about = {**({"document": f"{passage.document_id} [{passage.position}]"} if passage.document_id else {})}
    about |= {name: str(value) for name, value in passage.metadata.items()}
    facts = [Text(f"{name}: {value}", style="dim", no_wrap=True, overflow="ignore") for name, value in about.items()]
    body = "\n".join(part for part in (passage.title, passage.text) if part)
    return Group(Text(passage.id, style="cyan", no_wrap=True, overflow="ignore"), *facts, Text(body), "")


def ann_remark(report: AnnReport) -> str:
    """What was built, and how good and how quick it is."""
    found = report.recalls[-1]
    asked = "given queries" if report.queries == "given" else "passages asked as queries"
    slower = "" if report.ms < report.exact_ms else "; the exact scan is quicker here, leave this out"
    return (
        f"ann: {report.num_passages:,} passages in {report.num_lists:,} lists, {report.bytes_per_passage:,.0f} bytes "
        f"each, built in {report.seconds:,.1f} s. It finds {found.recall:.4f} (at least {found.at_least:.4f}) of the "
        f"first {found.depth:,} and {report.first_ten:.4f} of the first ten, measured with {report.num_queries:,} "
        f"{asked}; {report.ms:.2f} ms a search, {report.exact_ms:.2f} ms exactly{slower}"
    )
