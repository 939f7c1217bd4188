"""The verb ``fit``: from documents to a search engine that has learnt them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    RecordedDataOption,
    RunnerOptions,
    WriterOptions,
    input_path,
    lasting_input_path,
    recorded_teacher_config,
    student_option,
    teacher_option,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.core.settings import shown_as
from d2llm.core.shipped import DEFAULT_WRITER
from d2llm.fitting.settings import FitSettings

if TYPE_CHECKING:
    from d2llm.recipe import WriterConfig


def _help_of(name: str) -> str | None:
    return FitSettings.model_fields[name].description


DocumentsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="DOCUMENTS...",
        help="Folders and files of documents, or a corpus.jsonl.",
        exists=True,
        allow_dash=True,
        callback=lasting_input_path,
    ),
]


@dataclass(frozen=True)
class PricedWriterOptions(WriterOptions):
    """Options that name a language model that writes, and what it costs."""

    prices: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="PROMPT WRITTEN", help="The endpoint's prices of a million tokens read, and written."),
    ] = None

    def priced(self, max_cost: float | None) -> WriterConfig:
        """The writer.

        Raises:
            InputError: there are prices without an endpoint, a maximum cost without prices, or as for ``config``.
        """
        if max_cost is not None and self.prices is None:
            raise InputError("--max-cost needs the endpoint's prices: add --prices, or give the budget as --max-tokens")
        if self.prices is None:
            return self.config(DEFAULT_WRITER)
        if self.endpoint is None:
            raise InputError("--prices are about an endpoint; give its address with --endpoint")
        read, written = self.prices
        return self.config(
            DEFAULT_WRITER, price_per_million_prompt_tokens=read, price_per_million_written_tokens=written
        )


@dataclass(frozen=True)
class DataOptions:
    """Options about what is learnt from besides the documents."""

    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"{_help_of('examples')} As lines 'passage<TAB>query'.",
            exists=True,
            allow_dash=True,
            callback=input_path,
        ),
    ] = None
    judged: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=_help_of("judged"), exists=True, allow_dash=True, callback=input_path),
    ] = None
    teacher: Annotated[str | None, teacher_option(help=_help_of("teacher"))] = None
    recorded: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            callback=lasting_input_path,
            help="Take a graded teacher's grades from these lists (JSON Lines).",
        ),
    ] = None
    data: RecordedDataOption = None

    def settings(self) -> dict[str, Any]:
        """The settings of the fit that they are."""
        from d2llm.fitting.training_data import read_examples

        return {
            "examples": () if self.examples is None else read_examples(self.examples),
            "judged": self.judged,
            "teacher": recorded_teacher_config(self.teacher, None, self.recorded, self.data),
        }


@verb("Distil")
def fit(
    context: typer.Context,
    documents: DocumentsArgument,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", file_okay=False, help="Where everything goes.", show_default="<documents>.search"
        ),
    ] = None,
    settings: Annotated[dict[str, Any], FitSettings],
    minutes: Annotated[float | None, typer.Option(help="--hours in minutes.", min=0, show_default=False)] = None,
    student: Annotated[
        str | None,
        student_option(
            help=_help_of("student"), show_default=shown_as(FitSettings.model_fields["student"]).default or True
        ),
    ] = None,
    writer: PricedWriterOptions,
    data: DataOptions,
    again: Annotated[bool, typer.Option("--again", help="Learn anew although an earlier call has finished.")] = False,
    workers: RunnerOptions,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Train a search engine on your documents alone.

    Nobody needs to write or judge queries: it indexes the documents, has a language model write queries, keeps the good
    ones, trains on them, and keeps the result if it is better on documents that were held out. Serve it with: d2llm
    serve FOLDER.search

    The same command continues after an interruption. When a fit is finished, it reads only what has changed in the
    documents; --again learns anew.
    """
    from d2llm.fitting.fit import Fit
    from d2llm.fitting.report import verdict_sentence
    from d2llm.reports.evaluation_tables import measure_table

    session = session_of(context)
    if minutes is not None:
        settings["hours"] = _hours(minutes, settings)
    settings["writer"] = writer.priced(settings.get("max_cost"))
    chosen = FitSettings(**settings, student=student, **data.settings())
    fitted = Fit(documents, output, chosen, device=device, dtype=dtype, runner=workers.find())
    report = fitted.finish(again=again)
    if report is None:
        session.say(f"{fitted.folder.index} is up to date")
        session.write_report(context, json_path, {"folder": str(fitted.folder.path), "up_to_date": True})
        return
    for name, set_report in report.reports.items():
        session.show(measure_table(set_report, set_report.rows, title=f"Held-out queries: {name}"))
    session.show(fitted.stages.table())
    session.say(verdict_sentence(report))
    session.say(f"Report: {fitted.folder.report_page}. Next: d2llm serve {fitted.folder.path}")
    session.write_report(context, json_path, report.to_json())


def _hours(minutes: float, settings: Mapping[str, Any]) -> float:
    if "hours" in settings:
        raise InputError("--hours and --minutes both say how long; give one of them")
    if minutes == 0:
        raise InputError("--minutes is 0, but must be above 0")
    return minutes / 60
