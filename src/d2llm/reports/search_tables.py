"""Output of the verbs ``search``, ``judge`` and ``index`` for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.styled import Styled
from rich.text import Text

from d2llm.core.names import counted
from d2llm.core.table import Cell, Column, Table
from d2llm.ops.bm25_words import placed_terms

if TYPE_CHECKING:
    from d2llm.core.types import Excerpt, Passage, RankedPassage, Ranking
    from d2llm.retrieval.build_ann import AnnReport
    from d2llm.retrieval.context import AnswerContext
    from d2llm.retrieval.encode import EncodeReport
    from d2llm.store.inspection import IndexStats

_SHOWN_CHARACTERS = 300
_SHOWN_VALUES = 10  # of a facet


def ranking_list(ranking: Ranking) -> RenderableType:
    """One query with its passages, best first: rank, score and id, and the start of the text; neighbours in grey.

    An id is never wrapped, however long it is, so that it can be copied. Words of the query are underlined.
    """
    width, terms = len(str(len(ranking.passages))), _terms(ranking)
    renderables: list[RenderableType] = [_unbroken(Text(ranking.query.text, style="bold"))]
    for result in ranking.passages:
        renderables += [part for passage in result.before for part in _neighbour(passage, width)]
        renderables += _result(result, width, terms)
        renderables += [part for passage in result.after for part in _neighbour(passage, width)]
    return Group(*renderables)


def excerpt_list(ranking: Ranking, excerpts: Sequence[Excerpt]) -> RenderableType:
    """The results of a query in the order of their documents, with neighbours in grey; a line before each excerpt."""
    width, terms = len(str(len(ranking.passages))), _terms(ranking)
    renderables: list[RenderableType] = [_unbroken(Text(ranking.query.text, style="bold"))]
    for excerpt in excerpts:
        results = {result.passage.id: result for result in excerpt.results}
        renderables.append(
            _unbroken(Text(excerpt.passages[0].document_id or excerpt.passages[0].id, style="bold cyan"))
        )
        for passage in excerpt.passages:
            result = results.get(passage.id)
            renderables += _neighbour(passage, width) if result is None else _result(result, width, terms)
    return Group(*renderables)


def context_remark(context: AnswerContext) -> str:
    """One line about the size of a context and what it leaves out."""
    sources = counted(len(context.sources), "source")
    remark = f"context: {context.num_tokens:,} of at most {context.max_tokens:,} tokens, {sources}"
    if context.truncated:
        remark += "; the best result alone is longer, and its end was cut off"
    if context.left_out:
        remark += f"; {counted(len(context.left_out), 'result')} did not fit"
    if context.num_neighbours_left_out:
        remark += f"; {counted(context.num_neighbours_left_out, 'neighbour')} of results did not fit"
    return remark


def _terms(ranking: Ranking) -> set[str]:
    return {term for _, term in placed_terms(ranking.query.text)}


def _result(result: RankedPassage, width: int, terms: Set[str]) -> list[RenderableType]:
    head = Text.assemble(f"{result.rank:{width}}  {result.score:.3f}  ", (result.passage.id, "cyan"))
    return [_unbroken(head), *_text_lines(result.passage, width, terms)]


def _neighbour(passage: Passage, width: int) -> list[RenderableType]:
    return [
        _unbroken(Text(" " * (width + 2) + passage.id, style="dim")),
        Styled(_indented(passage.text, width), "dim"),
    ]


def _text_lines(passage: Passage, width: int, terms: Set[str]) -> list[RenderableType]:
    """The title, if there is one, and the start of the text, each on lines of its own."""
    title = [Styled(_indented(passage.title, width, terms), "bold")] if passage.title else []
    return [*title, _indented(passage.text, width, terms)]


def _indented(text: str, width: int, terms: Set[str] = frozenset()) -> RenderableType:
    line = Text(_beginning(text))
    for (start, end), term in placed_terms(line.plain) if terms else ():
        if term in terms:
            line.stylize("underline", start, end)
    return Padding(line, (0, 0, 0, width + 2))


def _unbroken(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "ignore"
    return line


def explanation_table(ranking: Ranking) -> Table:
    """The parts of the score and the source ranks of each passage of a ranking."""
    table = Table(
        Column("rank"),
        Column("inner product", ".3f"),
        Column("words", "+.3f"),
        Column("best window", "+.3f"),
        Column("tokens", "+.3f"),
        Column("interaction", "+.3f"),
        "ranks of sources",
        "terms of the query",
        title="why",
        framed=False,
    )
    for result in ranking.passages:
        explanation = result.explanation
        if explanation is None:
            continue
        ranks = ", ".join(
            f"{name} {rank} ({explanation.source_scores[name]:.3f})" for name, rank in explanation.source_ranks.items()
        )
        terms = ", ".join(
            f"{term} {count}" for term, count in sorted(explanation.terms.items(), key=lambda item: -item[1])
        )
        table.add_row(
            result.rank,
            explanation.dot,
            explanation.lexical,
            explanation.windows,
            explanation.tokens,
            None if explanation.interaction is None else round(explanation.interaction, 3) or 0.0,  # no -0.000
            ranks or None,
            terms or None,
        )
    return table


def facet_table(ranking: Ranking) -> Table:
    """The most frequent values of each facet, and how many passages and candidates have them."""
    table = Table("field", "value", Column("passages", ",d"), Column("candidates", ",d"), title="facets", framed=False)
    for name, facet in ranking.facets.items():
        for one in facet.values[:_SHOWN_VALUES]:
            table.add_row(name, str(one.value), one.num_passages, one.num_candidates)
        if (num_more := facet.num_values - _SHOWN_VALUES) > 0:
            table.add_row(name, f"... {num_more:,} more", None, None)
        if facet.num_without:
            table.add_row(name, "(none)", facet.num_without, None)
    return table


def pair_table(query: str, passages: Sequence[str], log_odds: Sequence[float]) -> Table:
    """A teacher's score of each passage, in the order given: probability of yes, log-odds, text."""
    table = Table(Column("P(yes)", ".4f"), Column("log-odds", "+.3f"), "passage", title=query, framed=False)
    for passage, value in zip(passages, log_odds, strict=True):
        table.add_row(0.5 + 0.5 * math.tanh(value / 2), value, _beginning(passage))
    return table


def passage_lines(passage: Passage) -> RenderableType:
    """A passage with its metadata; the id is never wrapped, however long it is."""
    facts = {"document": f"{passage.document_id} [{passage.position}]"} if passage.document_id else {}
    facts |= {name: str(value) for name, value in passage.metadata.items()}
    lines = [_unbroken(Text(f"{name}: {value}", style="dim")) for name, value in facts.items()]
    body = "\n".join(part for part in (passage.title, passage.text) if part)
    return Group(_unbroken(Text(passage.id, style="cyan")), *lines, Text(body), "")


def stats_table(stats: IndexStats) -> Table:
    """The facts about an index, one per line."""
    fields = ", ".join(f"{name}: {kind}" for name, kind in stats.metadata.items())
    holes = stats.num_rows - stats.num_passages
    copies = "once" if stats.vector_copies == 1 else "twice"
    facts = {
        "passages": f"{stats.num_passages:,}, {stats.num_truncated:,} of them truncated",
        "documents": "none so far, only passages" if stats.chunking is None else f"split into {stats.chunking}",
        "vectors": f"{stats.dim} numbers as {stats.vector_format}, {stats.vector_bytes:,} bytes each, kept {copies}; "
        f"{holes:,} holes",
        "metadata": fields or "none",
        "student": f"{stats.student_name or stats.student}, task {stats.task}",
        "version": f"{stats.version:,}; {stats.num_versions:,} can still be read",
        "snapshots": ", ".join(stats.snapshots) or "none",
        "bytes": f"{stats.table_bytes:,} table, {stats.vector_file_bytes:,} vectors; {stats.bytes_per_passage:,.0f} "
        "per passage in all",
    }
    if stats.num_shards is not None:
        facts["shards"] = f"{stats.num_shards:,}"
    if stats.window_format is not None:
        facts["windows"] = f"vectors of windows as {stats.window_format}, {stats.window_bytes:,} bytes in all"
    if stats.token_format is not None:
        facts["tokens"] = f"token embeddings as {stats.token_format}, {stats.token_bytes:,} bytes in all"
    if stats.ann_passages:
        later = stats.num_passages - stats.ann_passages
        facts["approximate"] = (
            f"{counted(stats.ann_passages, 'passage')}, built to find {stats.ann_recall:.0%} of the candidates; with "
            f"it, {stats.first_ten:.0%} of the first ten of an exact search are found"
        )
        facts["approximate"] += f"; {later:,} more are scanned" if later > 0 else ""
    table = Table("", "", title=stats.folder, framed=False)
    for name, fact in facts.items():
        table.add_row(Cell(name, "cyan"), fact)
    return table


def encode_remark(report: EncodeReport) -> str:
    """One line with the size of a new index and how long it took."""
    pruned = f", of which {report.num_pruned:,} were left out for their quality" if report.num_pruned else ""
    return (
        f"encode: {counted(report.num_documents, 'text')} in {counted(report.num_passages, 'passage')}{pruned}, "
        f"{report.num_truncated:,} truncated; {report.seconds:,.1f} s, {report.bytes_per_passage:,.0f} bytes each "
        f"({report.vector_bytes_per_passage:,} of vector), in {report.folder}"
    )


def ann_remark(report: AnnReport) -> str:
    """One line with the size, recall and speed of a new approximate index."""
    recall = report.recalls[-1]
    queries = "given queries" if report.queries == "given" else "passages as queries"
    slower = "" if report.ms < report.exact_ms else "; the exact scan is faster here, so do not use this index"
    return (
        f"ann: {counted(report.num_passages, 'passage')}, {report.bytes_per_passage:,.0f} bytes "
        f"each, built in {report.seconds:,.1f} s. It finds {recall.recall:.4f} (at least {recall.at_least:.4f}) of the "
        f"first {recall.depth:,} by vectors, measured with {report.num_queries:,} {queries}; {report.ms:.2f} ms a "
        f"search, {report.exact_ms:.2f} ms exactly{slower}. A search by default finds {report.first_ten:.4f} of the "
        f"first ten of an exact one ({counted(report.num_ranked, 'query')})"
    )


def _beginning(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[: _SHOWN_CHARACTERS - 1] + "…"
