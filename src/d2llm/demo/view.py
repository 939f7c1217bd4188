"""The output of the demo: panels and tables of at most 100 columns, readable without colours and in ASCII."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path

from rich import box
from rich.console import Console, Group, OverflowMethod, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table as Grid
from rich.text import Text

from d2llm.core.names import counted
from d2llm.core.table import Cell, Column, Table
from d2llm.demo.corpus import MIN_WORDS, Corpus
from d2llm.demo.report import (
    TOP_K,
    DemoAnswer,
    DemoReport,
    DemoResult,
    MessageReport,
    QuestionReport,
    ScoreReport,
    request_of,
)
from d2llm.ops.bm25_words import placed_terms, terms
from d2llm.retrieval.index import Index

MAX_WIDTH = 100
NUM_STEPS = 6
_SNIPPET = 110  # characters of a passage in a table
_MEGABYTE = 1_000_000

# Stop words, which are not highlighted.
_FUNCTION_WORDS = frozenset(
    terms(
        "a about all am an and are as at be by can did do does done for from had has have he how i if in into is it "
        "its itself my no not of on or other she should so some somebody that the their them then there these they "
        "this those to was we what when where which who why will with without would you your"
    )
)
_ASCII = str.maketrans({"▲": "^", "▼": "v", "✓": "*", "…": "~", "×": "x"})


class DemoView:
    """Shows the steps of the demo, on standard output by default."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        if console is None and not self._console.is_terminal:
            self._console.width = MAX_WIDTH  # a file has no width of its own
        self._width = min(MAX_WIDTH, self._console.width)
        self._overflow: OverflowMethod = "ellipsis" if self._plain("…") == "…" else "crop"
        self._step = 0

    def step(self, title: str) -> None:
        """Print the heading of the next step."""
        self._step += 1
        heading = f"Step {self._step} of {NUM_STEPS}. {title}"
        self._print(Panel(Text(self._plain(heading), style="bold"), width=self._width, border_style="cyan"))

    def corpus(self, corpus: Corpus, seconds: float) -> None:
        """Print the counts of the corpus."""
        self._say(
            f"Python {corpus.python}: {corpus.num_documented:,} documented modules, classes and functions were found "
            f"in {corpus.num_modules:,} modules, in {seconds:.1f} s. Long texts are split, which gives "
            f"{counted(len(corpus.passages), 'passage')}. Left out: {counted(corpus.num_duplicates, 'duplicate')}, and "
            f"{counted(corpus.num_tiny, 'text')} with fewer than {MIN_WORDS} words."
        )

    def announce_index(
        self, student: str, num_passages: int, num_whole: int, *, rate: float | None, seconds: float, folder: Path
    ) -> None:
        """Print what is encoded now, and why not all of it; ``rate`` is None if an earlier demo chose the part."""
        encoded = f"All {num_passages:,} passages are encoded by the student '{student}'."
        if num_passages < num_whole:
            reason = "An earlier demo chose this part."
            if rate is not None:
                reason = (
                    f"This machine encodes {rate:,.0f} passages per second now and would take "
                    f"{num_whole / rate:,.0f} s for all of them; the limit of the demo is {seconds:.0f} s."
                )
            encoded = (
                f"{num_passages:,} of the {num_whole:,} passages (the modules with an answer to the questions below, "
                f"and others at random) are encoded by the student '{student}'. {reason}"
            )
        self._say(f"{encoded} The index stays in {folder}, so a second demo starts at once.")

    def index(self, index: Index, seconds: float | None) -> None:
        """Print the size of the finished index; ``seconds`` is None if it already existed."""
        if seconds is None:
            self._say("Texts and student are the same as last time, so the existing index is used.")
            return
        num_truncated = index.stats().num_truncated
        truncated = f", {num_truncated:,} of them truncated to the length limit" if num_truncated else ""
        rate = len(index) / max(seconds, 1e-9)
        self._say(f"{counted(len(index), 'passage')}{truncated}, in {seconds:.1f} s ({rate:,.0f} passages/s).")

    def answers(self, report: QuestionReport, baseline: str, *, depth: int) -> None:
        """Print one table for each question, and how often a right passage was among the first."""
        top_k, num_questions = len(report.answers[0].d2llm), len(report.answers)
        self._say(
            "✓ marks a right answer, named before any system was run. D2LLM's other marks compare with BM25: = the "
            f"same rank, ▲2 two ranks higher, ▼1 one lower, new (9) ninth in BM25's ranking, so not in its top {top_k}."
            " The question's words are highlighted."
        )
        for index, answer in enumerate(report.answers, start=1):
            self._print(self._answer_table(f"{index}. {answer.question}", answer, ("BM25", "D2LLM"), depth))
        self._say(
            f"A right answer in the top {top_k}: BM25 {report.num_right_baseline}/{num_questions}, D2LLM "
            f"{report.num_right_d2llm}/{num_questions}; the cosine of untuned {baseline}, among the "
            f"{report.num_candidates:,} passages that the two rank first, {report.num_right_cosine}/{num_questions}. "
            f"{num_questions} questions show how search works, not how well; d2llm evaluate measures quality on many "
            "judged queries."
        )

    def score(self, report: ScoreReport, student: str) -> None:
        """Print the parts of the best passages' scores, and which parts count in this task."""
        self._say(
            "D2LLM's score of a passage is a sum of what different views of it say. These are its parts for the first "
            "answers to one of the questions:"
        )
        fields = {
            "inner product": "inner_product",
            "words": "words",
            "sentences": "windows",
            "tokens": "tokens",
            "interaction": "interaction",
        }
        shown = {
            name: field
            for name, field in fields.items()
            if any(getattr(result, field) is not None for result in report.passages)
        }
        columns = [Column(name, ".2f") for name in shown]
        table = Table("passage", Column("score", ".2f"), *columns, title=self._plain(report.question), framed=False)
        for result in report.passages:
            title = self._plain(f"✓ {result.title}" if result.right else result.title)
            table.add_row(title, Cell(result.score, "bold"), *(getattr(result, field) for field in shown.values()))
        self._print(table)
        meanings = {
            "inner product": "the passage's one vector",
            "words": "BM25 of the passage and of its best two sentences",
            "sentences": "the vector of its best two sentences",
            "tokens": "the vectors of its tokens, one for each token of the question",
        }
        counted = "; ".join(f"{name}: {meaning}" for name, meaning in meanings.items() if name in shown)
        self._say(f"{counted}. How much they count beside the inner product was chosen on the dev data of '{student}'.")
        if report.interaction_weight:
            self._say(f"The interaction has the weight {report.interaction_weight:.2g} here.")
        else:
            self._say(
                "The interaction has the weight 0 for questions and answers, which was best there; the next step shows "
                "it where it counts."
            )

    def messages(self, report: MessageReport, student: str, baseline: str) -> None:
        """Print how well each scorer finds messages with the same request, and what the interaction changes."""
        self._say(
            f"{report.num_messages} messages to a bank, {report.num_messages // report.num_requests} for each of "
            f"{report.num_requests} requests, written for this demo before any system had ranked them. Each message is "
            f"a query for the {TOP_K} others with its request. The untuned cosine is that of {baseline}."
        )
        precision, first = Column(f"same request in the first {TOP_K}", ".0%"), Column("in the first", ".0%")
        table = Table("", precision, first, framed=False)
        for system in report.systems:
            table.add_row(system.name, system.precision, system.first)
        self._print(table)
        if not report.interaction_weight:
            self._say(f"The interaction of '{student}' has the weight 0 here too, so it changes nothing.")
        elif report.p_value is None:
            self._say(f"'{student}' scores by its interaction alone, so there is no comparison without it.")
        else:
            self._say(
                f"The interaction (weight {report.interaction_weight:.2g}) improves the first {TOP_K} of "
                f"{report.num_better} messages and worsens those of {report.num_worse} (p = {report.p_value:.3f}). "
                "The largest improvements and deteriorations:"
            )
        for answer in report.examples:
            heading = f"{answer.question}  [{request_of(answer)}]"
            self._print(self._answer_table(heading, answer, ("D2LLM without its interaction", "D2LLM"), 0))

    def end(self, report: DemoReport) -> None:
        """Print times, sizes and the next commands."""
        table = Table("step", Column("seconds", ".1f"), framed=False)
        for step, seconds in report.seconds.items():
            table.add_row(step, seconds)
        table.add_row(Cell("total", "bold"), Cell(report.total_seconds, "bold"))
        self._print(table)
        sizes = report.sizes
        self._say(
            f"Index: {sizes.index / _MEGABYTE:.1f} MB, {sizes.per_passage:,.0f} bytes per passage, of which the vector "
            f"takes {sizes.vector_per_passage:,}. Student: {sizes.student / _MEGABYTE:.1f} MB."
        )
        self._print(Text("Next:", style="bold"))
        for purpose, command in report.next_commands:
            # Not wrapped, so that a command can be copied in one piece.
            self._print(Text.assemble("  # ", self._plain(purpose), "\n  ", (command, "bold cyan")))

    def _answer_table(self, heading: str, answer: DemoAnswer, systems: tuple[str, str], depth: int) -> Grid:
        title = Text(self._plain(heading), style="bold")
        table = Grid(title=title, title_justify="left", box=box.HORIZONTALS, width=self._width, pad_edge=False)
        for system in systems:
            table.add_column(system, ratio=1)
        words = set(terms(answer.question)) - _FUNCTION_WORDS
        for ours, theirs in zip_longest(answer.d2llm, answer.baseline):  # BM25 may find fewer
            left = self._result(theirs, "", words) if theirs else ""
            right = self._result(ours, _movement(ours, len(answer.d2llm), depth), words) if ours else ""
            table.add_row(left, right)
        return table

    def _result(self, result: DemoResult, movement: str, words: set[str]) -> RenderableType:
        title = Text(f"{result.rank} ", no_wrap=True, overflow=self._overflow)
        if result.right:
            title.append("✓ ", style="bold green")
        if movement:
            title.append(f"{movement} ", style="green" if "▲" in movement or "new" in movement else "dim")
        title.append_text(_highlighted(result.title, words, style="bold"))
        snippet = _highlighted(excerpt(result.text, words), words, style="")
        return Group(self._as_encodable(title), Padding(self._as_encodable(snippet), (0, 0, 0, 2)))

    def _say(self, text: str) -> None:
        self._console.print(Text(self._plain(text)), width=self._width, highlight=False)

    def _print(self, renderable: RenderableType) -> None:
        if isinstance(renderable, Table):  # for readers, in a file too
            renderable = renderable.to_terminal()
        is_text = isinstance(renderable, Text)
        self._console.print(renderable, highlight=False, soft_wrap=is_text, width=None if is_text else self._width)

    def _as_encodable(self, text: Text) -> Text:
        text.plain = self._plain(text.plain)  # same length, so the styles stay where they are
        return text

    def _plain(self, text: str) -> str:
        """The text with characters replaced that the output's encoding lacks."""
        encoding = self._console.encoding
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
        return text


def excerpt(text: str, words: set[str], length: int = _SNIPPET) -> str:
    """The beginning of a text, or a later part if it has at least two more of ``words`` (stems, see ``terms``)."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    starts = [0, *(match.end() for match in re.finditer(r"[.!?:;] ", text))]
    matches = {start: len(words & set(terms(text[start : start + length]))) for start in starts}
    best = max(starts, key=lambda start: (matches[start], -start))
    best = best if matches[best] >= matches[0] + 2 else 0
    part = text[best : best + length]
    if best + length < len(text):
        part = (part.rpartition(" ")[0] or part) + " …"
    return part if best == 0 else f"… {part}"


def _highlighted(text: str, words: set[str], *, style: str) -> Text:
    shown = Text(text, style=style)
    for span, term in placed_terms(text):
        if term in words:
            shown.stylize("bold yellow", *span)
    return shown


def _movement(result: DemoResult, top_k: int, depth: int) -> str:
    if result.other_rank is None:
        return f"new (>{depth})"
    if result.other_rank > top_k:
        return f"new ({result.other_rank})"
    moved = result.other_rank - result.rank
    return "=" if moved == 0 else f"▲{moved}" if moved > 0 else f"▼{-moved}"
