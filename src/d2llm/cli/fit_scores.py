"""The verb ``fit-scores``: fits the weights of words in a student's scores, and the probabilities of scores."""

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
def fit_scores(
    context: typer.Context,
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="A student's folder, or its name.", callback=known_student)
    ],
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
    task: TaskOption = None,
    num_queries: Annotated[int, typer.Option("--queries", min=1, help="Dev queries of each data set, at most.")] = 200,
    words: Annotated[
        bool, typer.Option("--words/--no-words", help="Also fit the weight of words (BM25) in the score of an index.")
    ] = True,
    words_factor: Annotated[
        bool | None,
        typer.Option(
            "--words-factor/--no-words-factor",
            help="With --words: their weight depends on how many words a query has, how rare they are, and how near "
            "the nearest passage is.",
            show_default="if that is better on dev",
        ),
    ] = None,
    window_vectors: Annotated[
        bool,
        typer.Option(
            "--window-vectors/--no-window-vectors",
            help="With --words: also fit the weight of vectors of each two sentences; indexing then takes longer.",
        ),
    ] = True,
    token_vectors: Annotated[
        bool | None,
        typer.Option(
            "--token-vectors/--no-token-vectors",
            help="With --words: also fit the weight of the token embeddings.",
            show_default="if the student has them",
        ),
    ] = None,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality", help="Also fit which passages answer queries at all, on train judgements, for encode --prune."
        ),
    ] = False,
    term_weights: Annotated[
        bool,
        typer.Option(
            "--term-weights", help="First fit how much each word of a query counts in BM25, on train judgements."
        ),
    ] = False,
    document_expansion: Annotated[
        bool,
        typer.Option(
            "--document-expansion",
            help="First fit, on train judgements, which words passages lack that queries for them have; new indexes "
            "add the likeliest ones to each passage, for BM25 alone.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of queries and passages.")] = 0,
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
    from d2llm.data.open_data import open_source
    from d2llm.data.pairs import PairSource
    from d2llm.models.student import Student
    from d2llm.retrieval.protocols import task_for
    from d2llm.training.fit_scores import fit_scores
    from d2llm.training.sentences import describe_calibration, describe_score_features

    session = session_of(context)
    splits = None if quality or term_weights or document_expansion else ["dev"]
    sources = [open_source(path, splits=splits) for path in data]
    # Of pairs, the passages of all splits are the corpus.
    datasets = [
        (open_source(path) if isinstance(source, PairSource) else source).load()
        for path, source in zip(data, sources, strict=True)
    ]
    model = Student.load(student, device=device, dtype=dtype)
    chosen = task_for(model, task)
    report = fit_scores(
        model,
        datasets,
        chosen,
        words=words,
        words_factor=words_factor,
        window_vectors=window_vectors,
        token_vectors=token_vectors,
        quality=quality,
        term_weights=term_weights,
        document_expansion=document_expansion,
        num_queries=num_queries,
        seed=seed,
    )
    model.save(out)
    score_features = (
        describe_score_features({chosen: report.score_features}) if report.score_features else "words were not fitted"
    )
    probabilities = describe_calibration({chosen: report.probabilities} if report.probabilities else {})
    added = ""
    for name, measure, fitted in (
        ("quality", "auc", report.quality),
        ("words", "explained", report.term_weights),
        ("document expansion", "explained", report.document_expansion),
    ):
        if fitted is not None:
            added += f"; {name}: " + ", ".join(
                f"{measure} {value:.3f} on {on}" for on, value in fitted[measure].items()
            )
    session.say(f"fit-scores: {score_features}; probabilities: {probabilities}{added}; in {out}")
    session.write_report(context, json_path, report)
