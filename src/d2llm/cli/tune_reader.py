"""The verb ``tune-reader``: trains a language model to rank passages that it reads as vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    TaskOption,
    in_existing_folder,
    input_path,
    known_student,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb


@verb("Distil")
def tune_reader(
    context: typer.Context,
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="A student's folder, or its name.", callback=known_student)
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            callback=input_path,
            help="Data sets with a corpus and judged queries in their train split.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="Where the reader goes; a new folder.")
    ],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The causal language model to tune.")] = "smollm2",
    layers: Annotated[int, typer.Option(min=1, help="Use only so many of its first layers.")] = 8,
    depth: Annotated[int, typer.Option(min=2, help="Passages of a list: the student's first ones.")] = 20,
    lists: Annotated[
        tuple[int, int],
        typer.Option(min=0, metavar="N N", help="Lists to read in training: for the network alone, then with LoRA."),
    ] = (2_000, 4_000),
    task: TaskOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first weights and the order of lists.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Train a language model to rank passages by their vectors.

    It reads the query's text and STUDENT's vectors of the first passages of a search, and ranks these (PE-Rank).
    Then `d2llm search INDEX QUERY --reranker listwise:FOLDER` uses it. The report compares it with the student's order
    on dev queries. Run the same command again to continue an interrupted training.
    """
    from d2llm.core.errors import InputError
    from d2llm.data.open_data import open_data
    from d2llm.data.pairs import PairDataset
    from d2llm.models.student import Student
    from d2llm.recipe import ReaderTuningConfig
    from d2llm.training.tune_reader import tune_reader

    session = session_of(context)
    if lists[0] < 1:
        raise InputError("--lists begins with those for the network alone, of which there must be at least one")
    datasets = [open_data(path) for path in data]  # all splits: what dev and test ask about is left out
    for dataset in datasets:
        if isinstance(dataset, PairDataset):
            raise InputError(f"{dataset.name}: these are labelled pairs, which have no corpus; give queries with one")
    corpora = [dataset for dataset in datasets if not isinstance(dataset, PairDataset)]
    settings = ReaderTuningConfig(model=model, layers=layers, depth=depth, lists=lists)
    loaded = Student.load(student, device=device, dtype=dtype)
    report = tune_reader(loaded, corpora, out, config=settings, task=task, seed=seed, device=device, dtype=dtype)
    losses = ", ".join(f"{first:.3f} -> {last:.3f}" for first, last in report.losses)
    num_lists = ", ".join(f"{count:,} lists of {name}" for name, count in report.num_lists.items())
    session.say(f"tune-reader: {report.steps:,} steps on {num_lists} (loss {losses}); in {out}")
    for name, figures in report.dev.items():
        session.say(
            f"tune-reader: nDCG@10 on {figures.num_queries:,} dev queries of {name}: student {figures.student:.3f}, "
            f"first step {figures.first_step:.3f}, decoded order {figures.decoded:.3f}, random order "
            f"{figures.random:.3f}"
        )
    session.write_report(context, json_path, report)
