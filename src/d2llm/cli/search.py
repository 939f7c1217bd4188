"""The verb ``search``."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonLinesOption,
    JsonOption,
    WriterOptions,
    input_path,
    parse_assignments,
    student_option,
)
from d2llm.cli.session import Session, session_of
from d2llm.cli.verbs import verb
from d2llm.cli.word_order import check_quiet, is_index
from d2llm.core.errors import InputError
from d2llm.core.names import counted
from d2llm.core.toml import toml_value
from d2llm.core.types import Task
from d2llm.retrieval.settings import (
    ContextSettings,
    ConversationSettings,
    ExcerptSettings,
    ExpansionSettings,
    SearchSettings,
    Turn,
)

if TYPE_CHECKING:
    from d2llm.core.types import (
        Certificate,
        Excerpt,
        Query,
        QueryExpansion,
        QueryRewriting,
        Ranking,
        RerankReport,
        Selection,
    )
    from d2llm.models.protocols import SearchStudent
    from d2llm.models.student import Student
    from d2llm.retrieval.expansion import Expansion
    from d2llm.retrieval.index import Index
    from d2llm.retrieval.reranker import Reranker
    from d2llm.retrieval.rewriting import Rewriter


_NAMED = 5  # number of queries to list in a warning
_PATIENCE_MINUTES = 1.0  # with a writer's endpoint that fails: then the plain query is searched
_EXPANDING_WRITER = "smollm2"

HistoryOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=input_path,
        help=f"{ConversationSettings.model_fields['history'].description} A jsonl file with role and content; -: "
        "standard input. With --writer.",
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="With --context: the model whose tokens count, a folder or a name.",
        show_default="the student",
    ),
]


@dataclass(frozen=True)
class QueryOptions:
    """Options that give queries besides the words after the index."""

    query: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Also search for this; can be repeated (-q is --quiet)."),
    ] = None
    queries: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=input_path,
            help="Also search for each query of queries.jsonl or queries.jsonl.gz; -: standard input.",
        ),
    ] = None

    def read(self, session: Session, index: Path, words: list[str]) -> list[Query]:
        """The query of the words after the index, and those of the options.

        Raises:
            InputError: there is none, or the first word is no index, but another is, or -q stands among the words.
        """
        from d2llm.core.types import Query
        from d2llm.data.beir import read_queries

        if not is_index(index) and (named := next((word for word in words if is_index(Path(word))), None)) is not None:
            rest = [str(index), *(word for word in words if word != named)]
            raise InputError(
                f"{index}: is not an index; the index comes first; write: d2llm search {shlex.join([named, *rest])}"
            )
        check_quiet(session.given, words)
        texts = [*([" ".join(words)] if words else []), *(self.query or [])]
        if not texts and self.queries is None:
            raise InputError("there is no query; write one after the index, or give a file with --queries")
        if sum(" " in word for word in words) > 1:
            advice = "for several queries, repeat --query, or give a file (or -) with --queries"
            session.complain("warning", f"all words are one query; {advice}")
        typed = [Query(str(position), text) for position, text in enumerate(texts, start=1)]
        return typed + ([] if self.queries is None else list(read_queries(self.queries).values()))


def _load_writer(
    expansion: ExpansionSettings,
    history: Sequence[Turn],
    options: WriterOptions,
    *,
    device: str | None,
    dtype: str | None,
) -> tuple[Expansion | None, Rewriter | None]:
    """Load the writer, if queries are to be expanded or rewritten.

    Raises:
        InputError: an option is for --expand or --history, which are missing, or --history has no writer.
    """
    if expansion.expand is None and not history:
        for field in fields(options):
            if getattr(options, field.name) is not None:
                name = f"--{field.name}".replace("_", "-")
                raise InputError(f"{name} is for --expand or --history; add one of them, or leave {name} out")
        return None, None
    if history and options.writer is None:
        raise InputError(
            "--history needs a language model that rewrites the query: name one with --writer, and its --endpoint if "
            "it does not run here; or leave it out and give a query that can be understood alone"
        )
    from d2llm.models.writers.writer import load_writer
    from d2llm.retrieval.expansion import Expansion
    from d2llm.retrieval.rewriting import Rewriter

    remote = {} if options.endpoint is None else {"patience_minutes": _PATIENCE_MINUTES}
    writer = load_writer(options.config(_EXPANDING_WRITER, **remote), device=device, dtype=dtype)
    expanded = None if expansion.expand is None else Expansion(writer, expansion.expand, expansion.expansions)
    return expanded, Rewriter(writer) if history else None


def _read_history(file: Path | None, num_queries: int) -> tuple[Turn, ...]:
    """The turns of a conversation, one on each line of a file.

    Raises:
        InputError: a line is no turn, or there are several queries.
    """
    if file is None:
        return ()
    from d2llm.data.lines import read_records

    if num_queries > 1:
        raise InputError(f"--history is for one query, but there are {num_queries}; search for each by itself")
    turns = [dict(record) for _, record in read_records(file)]
    try:
        return ConversationSettings.of(history=turns).history
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


@dataclass(frozen=True)
class RerankerOptions:
    """Options that name a second stage."""

    reranker: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:MODEL",
            help="A second stage that scores the first passages again: KIND, KIND:MODEL, or a TOML file; kinds: "
            "`d2llm methods`.",
        ),
    ] = None
    reranker_set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A setting of the reranker, such as num_passages=10; may be given several times."
        ),
    ] = None

    def find(self) -> Reranker | None:
        """The settings of the reranker; None if none is named.

        Raises:
            InputError: a setting is given without a reranker.
            RecipeError: there is no such reranker, or it has wrong settings.
        """
        if self.reranker is None:
            if self.reranker_set:
                raise InputError("--reranker-set is for --reranker KIND; add it, or leave it out")
            return None
        from d2llm.retrieval.reranker import named_reranker

        changes = parse_assignments(self.reranker_set or [], "--reranker-set")
        return named_reranker(self.reranker, **{name: toml_value(value) for name, value in changes.items()})


def _for_context(
    context: Mapping[str, Any], tokenizer: str | None, settings: SearchSettings, excerpts: bool
) -> SearchSettings:
    """The settings of a search; those for a context, if its options are given.

    Raises:
        InputError: an option is for another one that is missing, or contradicts it.
    """
    given = {"--context-order": context.get("order"), "--answering": context.get("answering"), "--tokenizer": tokenizer}
    for name, value in given.items():
        if value is not None and "max_tokens" not in context:
            raise InputError(f"{name} is for --context TOKENS; add it, or leave {name} out")
    others = {
        "--excerpts": excerpts,
        "--explain": settings.explain,
        "--sort": settings.sort,
        "--facet": settings.facets,
    }
    if context and (name := next((option for option, value in others.items() if value), None)):
        raise InputError(f"--context prints one text instead of the results; leave out {name}")
    if not context:
        return settings
    from d2llm.retrieval.context import context_settings, named_tokenizer

    if tokenizer is not None:
        named_tokenizer(tokenizer)  # loaded now, so that a mistake is reported before the search
    return context_settings(settings)


@verb("Search", shows_answers=True)
def search(
    context: typer.Context,
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="A folder that index, encode or fit made, or a snapshot.")
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="QUERY", help="What to search for; all words are one query.")
    ] = None,
    *,
    more: QueryOptions,
    student: Annotated[
        str | None, student_option(help="The student that made the index, if it has moved since.")
    ] = None,
    settings: SearchSettings,
    around: ExcerptSettings,
    text: Annotated[dict[str, Any], ContextSettings],
    tokenizer: TokenizerOption = None,
    stage: RerankerOptions,
    expansion: ExpansionSettings,
    history: HistoryOption = None,
    writer: WriterOptions,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "auto",
    json_path: JsonOption = None,
    jsonl: JsonLinesOption = None,
) -> None:
    """Find the passages of an index that answer a query, best first."""
    from d2llm.models.protocols import task_for
    from d2llm.retrieval.index import Index
    from d2llm.retrieval.rewriting import rewritten, with_rewriting
    from d2llm.retrieval.search import Searcher

    session = session_of(context)
    all_queries = more.read(session, index, words or [])
    turns = _read_history(history, len(all_queries))
    settings = _for_context(text, tokenizer, settings, around.excerpts)
    second_stage = stage.find()
    lean = not (more.queries or "answering" in text)
    opened = Index.open(index, student, device=device, dtype=dtype, engine=engine, lean=lean)
    if not len(opened.view):
        raise InputError(f"{index}: holds no passages; add some with d2llm index {index} upsert CORPUS")
    task = settings.task or opened.view.task
    index_task = task if task == opened.view.task else task_for(opened.student, task)
    rerank = None if second_stage is None else second_stage.open(device=device, dtype=dtype)
    expanded, rewriter = _load_writer(expansion, turns, writer, device=device, dtype=dtype)
    searched, rewriting = rewritten(all_queries, turns, rewriter)
    rankings = Searcher(opened.view, opened.student, settings, rerank=rerank, expansion=expanded).rank(searched)
    rankings = with_rewriting(rankings, rewriting)
    report: dict[str, Any] = {"student": opened.student.fingerprint, "rankings": rankings}
    for ranking in rankings:
        kept = _answering(session, ranking, opened.student, index_task, text.get("answering"))
        shown = _show(session, opened, kept, text, tokenizer, is_one=len(rankings) == 1, excerpts=around.excerpts)
        for name, value in shown.items():
            report.setdefault(name, []).append(value)
        _explain(session, ranking, settings, opened.student, index_task)
    remarks = (_truncated_queries(rankings, opened.student, settings.instruction), _plain_queries(rankings))
    for remark in filter(None, remarks):
        session.complain("warning", remark)
    session.write_report(context, json_path, report)
    session.write_lines(jsonl, _rows(rankings))


def _rows(rankings: Iterable[Ranking]) -> Iterator[dict[str, object]]:
    """Each result with its query, for programs that read line by line."""
    for ranking in rankings:
        for result in ranking.passages:
            asked = {"query_id": ranking.query.id, "query": ranking.query.text, "rank": result.rank}
            yield {**asked, "score": result.score, **asdict(result.passage)}


def _show(
    session: Session,
    index: Index,
    ranking: Ranking,
    text: Mapping[str, Any],
    tokenizer: str | None,
    *,
    is_one: bool,
    excerpts: bool,
) -> dict[str, Any]:
    """Print a ranking as the options say; returns what a report has of it besides the ranking, by name."""
    from d2llm.reports.search_tables import ranking_list

    if text:
        if not is_one:
            session.write(ranking.query.text)
        return {"contexts": _show_context(session, index, ranking, ContextSettings(**text), tokenizer)}
    if excerpts:
        return {"excerpts": _show_excerpts(session, index, ranking)}
    session.show(ranking_list(ranking))
    return {}


def _show_context(
    session: Session, index: Index, ranking: Ranking, settings: ContextSettings, tokenizer: str | None
) -> dict[str, Any]:
    """Print the context that a ranking gives; returns its fields for a report, without the ranking."""
    from d2llm.reports.search_tables import context_remark
    from d2llm.retrieval.context import build_context, named_tokenizer

    context = build_context(
        ranking,
        cast("Student", index.student).backbone.token_ends if tokenizer is None else named_tokenizer(tokenizer),
        settings.max_tokens,
        order=settings.order,
        overlapping=index.repeats_text,
    )
    session.write(context.text)
    session.say(context_remark(context))
    return {field.name: getattr(context, field.name) for field in fields(context) if field.name != "ranking"}


def _answering(
    session: Session, ranking: Ranking, student: SearchStudent, task: Task, answering: float | None
) -> Ranking:
    """A ranking with the sentences that answer its query alone, if ``answering`` is given."""
    if answering is None:
        return ranking
    from d2llm.retrieval.context import answering_sentences  # imports much that most searches do not need

    kept = answering_sentences(ranking, cast("Student", student), task, answering)
    num_results, num_kept = len(ranking.passages), len(kept.passages)
    session.say(f"answering: {num_kept} of {num_results} results have a sentence that answers")
    return kept


def _show_excerpts(session: Session, index: Index, ranking: Ranking) -> list[Excerpt]:
    """Print the results of a ranking with the passages around them, as parts of their documents."""
    from d2llm.reports.search_tables import excerpt_list
    from d2llm.retrieval.results import merge_neighbours

    excerpts = merge_neighbours(ranking.passages, overlapping=index.repeats_text)
    session.show(excerpt_list(ranking, excerpts))
    return excerpts


def _explain(session: Session, ranking: Ranking, settings: SearchSettings, student: SearchStudent, task: Task) -> None:
    """Print the explanation of a ranking, how it was selected, its teacher's changes and its proof."""
    from d2llm.reports.search_tables import explanation_table, facet_table

    if not ranking.passages:
        session.complain("warning", f"no passage was found for {ranking.query.text!r}{_why_none(settings)}")
    if (rewriting := ranking.rewriting) is not None and rewriting.problem is None:
        session.say(_rewriting_line(rewriting))
    elif rewriting is not None:
        session.complain("warning", f"the query was searched as it is, without the conversation: {rewriting.problem}")
    if ranking.corrections:
        read = ", ".join(f"{word!r} as {other!r}" for word, other in ranking.corrections.items())
        session.say(f"search: read {read}; --no-typo-tolerance searches for the words as they are")
    if ranking.facets:
        session.show(facet_table(ranking))
    if settings.explain:
        session.show(explanation_table(ranking))
        if (reason := student.why_no_interaction(task)) is not None:
            session.say(f"search: {reason}")
    if ranking.expansion is not None and ranking.expansion.texts:
        session.say(_expansion_lines(ranking.expansion))
    if ranking.reranking is not None:
        session.say(_reranking_line(ranking.reranking))
    selection = ranking.selection
    if ranking.certificate is not None:
        num_results = len(ranking.passages) if selection is None else selection.selected_from
        session.say(_proof(ranking.certificate, num_results))
    if selection is not None:
        session.say(_selection_line(selection, settings, is_proved=ranking.certificate is not None))


def _expansion_lines(expansion: QueryExpansion) -> str:
    """What a language model added to a query: a line about it, and one for each text."""
    noun = "other query" if expansion.method == "multi" else "hypothetical passage"
    line = f"expansion: {counted(len(expansion.texts), noun)}, written in {expansion.seconds:,.1f} s"
    if expansion.num_dropped:
        line += f"; {expansion.num_dropped} more parts of the answer were of no use"
    if expansion.truncated:
        line += "; the writer did not read the end of the query"
    if expansion.num_truncated:
        line += f"; the student did not read the end of {expansion.num_truncated}"
    return "\n".join([line, *(f"  {text}" for text in expansion.texts)])


def _rewriting_line(rewriting: QueryRewriting) -> str:
    """How the query was made of a conversation, in one line."""
    line = f"conversation: {rewriting.asked!r} was searched as {rewriting.text!r}, in {rewriting.seconds:,.1f} s"
    if rewriting.num_dropped:
        line += f"; {rewriting.num_dropped} more parts of the answer were of no use"
    if rewriting.num_turns_left_out:
        line += f"; the writer did not read the first {rewriting.num_turns_left_out} turns"
    if rewriting.truncated:
        line += "; it did not read the end of a turn or of the query"
    return line


def _plain_queries(rankings: list[Ranking]) -> str | None:
    """A warning about queries that could not be expanded; None if there are none."""
    problems = {
        ranking.query.id: ranking.expansion.problem
        for ranking in rankings
        if ranking.expansion is not None and ranking.expansion.problem is not None
    }
    if not problems:
        return None
    names = ", ".join(map(repr, list(problems)[:_NAMED])) + (", ..." if len(problems) > _NAMED else "")
    return (
        f"{len(problems):,} of {len(rankings):,} queries ({names}) were searched as they are, without expansion; the "
        f"first because: {next(iter(problems.values()))}"
    )


def _reranking_line(report: RerankReport) -> str:
    """What a reranker changed in a ranking, in one line."""
    unsure = f"the student was unsure of {counted(len(report.unsure), 'passage')}; " if report.unsure else ""
    read = counted(len(report.read), *(("was", "were") if unsure else ("passage was", "passages were")))
    cut = f", {report.num_truncated} of them in part" if report.num_truncated else ""
    cut += ", until its time was up" if report.out_of_time else ""
    moves = ", ".join(f"{before} -> {now}" for before, now in report.moved)
    return (
        f"{report.kind}: {unsure}{read} read{cut}, in "
        f"{1e3 * report.seconds:,.0f} ms; {f'places: {moves}' if moves else 'no place changed'}"
    )


def _selection_line(selection: Selection, settings: SearchSettings, *, is_proved: bool) -> str:
    """How the results were selected, in one line."""
    num_shown = len(selection.ranks)
    line = f"selection: {num_shown} of the first {counted(selection.selected_from, 'result')}"
    if settings.mmr is not None:
        line += f", diversified with weight {settings.mmr:g} for the score"
    if settings.near_duplicates is not None:
        line += f"; {counted(selection.num_near_duplicates, 'near duplicate')} left out"
    if num_shown < min(settings.top_k, selection.selected_from):
        line += f", so {counted(settings.top_k - num_shown, 'place')} left empty (a larger --select-from may fill them)"
    return line + ("; this selection is not the proved order" if is_proved else "")


def _truncated_queries(rankings: list[Ranking], student: SearchStudent, instruction: str | None) -> str | None:
    """A warning about truncated queries; None if there are none."""
    truncated = [ranking.query for ranking in rankings if ranking.truncated]
    if not truncated:
        return None
    limit = getattr(student, "max_query_tokens", None)
    length = "the student reads" if limit is None else f"the {limit} tokens that the student reads"
    names = ", ".join(repr(query.id) for query in truncated[:_NAMED]) + (", ..." if len(truncated) > _NAMED else "")
    count = f"{len(truncated):,} of {len(rankings):,} queries {'is' if len(truncated) == 1 else 'are'}"
    longer, remedy = "longer", "Ask a shorter question, or several"
    if instruction is not None:
        longer, remedy = "with the instruction longer", f"{remedy}, or shorten the instruction"
    return f"{count} {longer} than {length} ({names}): the rest does not affect the student's scores. {remedy}"


def _why_none(settings: SearchSettings) -> str:
    if settings.filter is not None:
        return ": no passage matches the filter" + (" and has a word of it" if settings.sources == ("bm25",) else "")
    return ": no passage has a word of it" if settings.sources == ("bm25",) else ""


def _proof(certificate: Certificate, num_results: int) -> str:
    num_passages = certificate.num_scored + certificate.num_left
    proved = "all" if certificate.proved == num_results else f"the first {certificate.proved}"
    return (
        f"exact: {proved} of {num_results} places are proved; {certificate.num_scored:,} of {num_passages:,} passages "
        f"got the full score"
        + (f", none of the others can score above {certificate.highest_bound_left:.3f}" if certificate.num_left else "")
    )
