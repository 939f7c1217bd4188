"""The verbs ``fit-tokens``, ``fit-scores``, ``tune-reader`` and ``soup``: what follows a student's training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from d2llm.core.names import counted
from d2llm.training.settings import FitScoresSettings

if TYPE_CHECKING:
    from d2llm.data.beir import Dataset

_StudentArgument = Annotated[
    str, typer.Argument(metavar="STUDENT", help="A student's folder, or its name.", callback=known_student)
]
_TrainDataArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        callback=input_path,
        help="Data sets with a corpus and judged queries in their train split.",
    ),
]


@verb("Distil")
def fit_tokens(
    context: typer.Context,
    student: _StudentArgument,
    data: _TrainDataArgument,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="Where the student with tokens goes.")
    ],
    dim: Annotated[int, typer.Option(min=1, help="Width of a token's vector.")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the queries.")] = 2,
    num_queries: Annotated[int, typer.Option("--queries", min=1, help="Train queries of each data set, at most.")] = (
        2_000
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of queries, and of the training.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Train token embeddings for a student.

    They add late interaction (MaxSim) to the score: each token of a query counts its most similar token of a passage.
    The student's other weights do not change. Then fit the weight of the token embeddings with `d2llm fit-scores`; a
    new index of the student stores them.
    """
    from d2llm.models.student import Student
    from d2llm.recipe import TokensConfig
    from d2llm.training.fit_tokens import fit_tokens

    session = session_of(context)
    corpora = _corpora(data)
    model = Student.load(student, device=device, dtype=dtype)
    settings = TokensConfig(dim=dim, epochs=epochs, max_queries=num_queries)
    report = fit_tokens(model, corpora, settings, seed=seed)
    model.save(out)
    queries = ", ".join(f"{count:,} of {name}" for name, count in report.queries.items())
    losses = " -> ".join(f"{loss:.3f}" for loss in report.losses)
    session.say(f"fit-tokens: {report.token_dim} dimensions, trained on {queries} (loss {losses}); in {out}")
    session.write_report(context, json_path, report)


@verb("Distil")
def fit_scores(
    context: typer.Context,
    student: _StudentArgument,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            callback=input_path,
            help="Data sets with judged queries in their dev split, or with pairs of texts labelled yes or no.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="Where the fitted student goes.")
    ],
    *,
    task: TaskOption = None,
    settings: FitScoresSettings,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Fit a student's scores to your judged queries.

    Without training the student again, two things are fitted on dev: the weights of words (BM25), sentences and tokens
    in the score of a passage in an index, and the conversion of scores into probabilities. Vectors do not change, so an
    index of the old student can be searched with the new one (after --document-expansion, make a new one: the old one
    lacks the words). What was fitted for the other task is kept.
    """
    from d2llm.models.protocols import task_for
    from d2llm.models.student import Student
    from d2llm.training.fit_scores import fit_scores, read_judged
    from d2llm.training.sentences import describe_fit_scores

    datasets = read_judged(data, settings)
    model = Student.load(student, device=device, dtype=dtype)
    report = fit_scores(model, datasets, task_for(model, task), settings)
    model.save(out)
    session = session_of(context)
    session.say(f"fit-scores: {describe_fit_scores(report)}; in {out}")
    session.write_report(context, json_path, report)


@verb("Distil")
def tune_reader(
    context: typer.Context,
    student: _StudentArgument,
    data: _TrainDataArgument,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="Where the reader goes; a new folder.")
    ],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The causal language model to tune.")] = "smollm2",
    layers: Annotated[int, typer.Option(min=1, help="Use only so many of its first layers.")] = 8,
    depth: Annotated[int, typer.Option(min=2, help="Passages of a list: the student's first ones.")] = 20,
    alignment: Annotated[
        int, typer.Option(min=0, help="Passages that the model first learns to repeat from their vectors.")
    ] = 0,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="A teacher's labels (RUN/labels), whose order is learnt instead of the judgements'."
        ),
    ] = None,
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
    from d2llm.models.student import Student
    from d2llm.recipe import ReaderTuningConfig
    from d2llm.training.tune_reader import tune_reader

    session = session_of(context)
    if lists[0] < 1:
        raise InputError("--lists begins with those for the network alone, of which there must be at least one")
    corpora = _corpora(data)
    settings = ReaderTuningConfig(
        model=model,
        layers=layers,
        depth=depth,
        alignment=alignment,
        lists=lists,
        labels=None if labels is None else str(labels),
    )
    loaded = Student.load(student, device=device, dtype=dtype)
    report = tune_reader(loaded, corpora, out, config=settings, task=task, seed=seed, device=device, dtype=dtype)
    losses = ", ".join(f"{first:.3f} -> {last:.3f}" for first, last in report.losses)
    num_lists = ", ".join(f"{counted(count, 'list')} of {name}" for name, count in report.num_lists.items())
    session.say(f"tune-reader: {counted(report.steps, 'step')} on {num_lists} (loss {losses}); in {out}")
    for name, figures in report.dev.items():
        session.say(
            f"tune-reader: nDCG@10 on {counted(figures.num_queries, 'dev query')} of {name}: student "
            f"{figures.student:.3f}, first step {figures.first_step:.3f}, decoded order {figures.decoded:.3f}, random "
            f"order {figures.random:.3f}"
        )
    session.write_report(context, json_path, report)


@verb("Distil")
def soup(
    context: typer.Context,
    students: Annotated[
        list[str],
        typer.Argument(metavar="STUDENT...", help="Students of one recipe, two or more: folders or names."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="Where the average goes.")],
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", help="How much a student counts; once for each.", show_default="all the same"),
    ] = None,
    dev: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA",
            callback=input_path,
            help="A data set with a dev split: of the students, from the best on, only those stay that do not make the "
            "average worse there. Repeat for more.",
            show_default="all stay",
        ),
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="With --dev: queries of each data set, at most.")] = 200,
    task: TaskOption = None,
    device: DeviceOption = None,
    json_path: JsonOption = None,
) -> None:
    """Average the weights of students (a model soup).

    They were trained by one recipe, but for seed, learning rate, losses or data. The average takes no more time or
    memory than one of them. Then fit the weights of its score with `d2llm fit-scores`.
    """
    from d2llm.core.errors import InputError
    from d2llm.data.plan import TrainingPlan
    from d2llm.data.run_folder import training_source
    from d2llm.models.protocols import task_for
    from d2llm.models.student import Student
    from d2llm.recipe import DataConfig
    from d2llm.training.soup import greedy_soup
    from d2llm.training.soup import soup as average

    session = session_of(context)
    if dev and weights:
        raise InputError("--weight counts students that all stay, and --dev chooses some; leave one of them out")
    loaded = [Student.load(name, device=device, dtype="float32") for name in students]
    report: dict[str, object] = {"students": students, "weights": weights}
    if dev:
        chosen_task = task_for(loaded[0], task)
        sources = [training_source(DataConfig(path=path, task=chosen_task), TrainingPlan((), {})) for path in dev]
        found = greedy_soup(loaded, sources, num_queries=queries)
        averaged = found.student
        report |= {"kept": found.kept, "values": found.values, "value": found.value}
        for index, value in enumerate(found.values):
            stays = "kept" if index in found.kept else "left out"
            session.say(f"soup: {students[index]} has {value:.4f} on dev: {stays}")
        session.say(f"soup: the average of {len(found.kept)} has {found.value:.4f}")
    else:
        averaged = average(loaded, weights)
    averaged.save(out)
    session.say(f"soup: {len(students)} students in; the average is in {out}")
    session.write_report(context, json_path, report | {"fingerprint": averaged.fingerprint})


def _corpora(data: list[str]) -> list[Dataset]:
    """The data sets with all their splits: what dev and test ask about is left out of training."""
    from d2llm.core.errors import InputError
    from d2llm.data.open_data import open_data
    from d2llm.data.pairs import PairDataset

    corpora: list[Dataset] = []
    for dataset in map(open_data, data):
        if isinstance(dataset, PairDataset):
            raise InputError(f"{dataset.name}: these are labelled pairs, which have no corpus; give queries with one")
        corpora.append(dataset)
    return corpora
