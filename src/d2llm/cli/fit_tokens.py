"""The verb ``fit-tokens``: trains token embeddings for a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import DeviceOption, DtypeOption, JsonOption, in_existing_folder, input_path, known_student
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb


@verb("Distil")
def fit_tokens(
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
    from d2llm.core.errors import InputError
    from d2llm.data.open_data import open_data
    from d2llm.data.pairs import PairDataset
    from d2llm.models.student import Student
    from d2llm.recipe import TokensConfig
    from d2llm.training.fit_tokens import fit_tokens

    session = session_of(context)
    datasets = [open_data(path) for path in data]  # all splits: what dev and test ask about is left out
    for dataset in datasets:
        if isinstance(dataset, PairDataset):
            raise InputError(f"{dataset.name}: these are labelled pairs, which have no corpus; give queries with one")
    model = Student.load(student, device=device, dtype=dtype)
    settings = TokensConfig(dim=dim, epochs=epochs, max_queries=num_queries)
    corpora = [dataset for dataset in datasets if not isinstance(dataset, PairDataset)]
    report = fit_tokens(model, corpora, settings, seed=seed)
    model.save(out)
    queries = ", ".join(f"{count:,} of {name}" for name, count in report.queries.items())
    losses = " -> ".join(f"{loss:.3f}" for loss in report.losses)
    session.say(f"fit-tokens: {report.token_dim} dimensions, trained on {queries} (loss {losses}); in {out}")
    session.write_report(context, json_path, report)
