"""The verbs that make a student from another, or something else of it: what follows training, pruning, files."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from d2llm.cli.index_options import CorpusArgument, warn_of_skipped
from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    StudentArgument,
    TaskOption,
    in_existing_folder,
    input_path,
    known_student,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.core.names import counted
from d2llm.data.settings import ReadingSettings
from d2llm.training.settings import FitScoresSettings

if TYPE_CHECKING:
    from d2llm.data.beir import Dataset

_out_option = partial(typer.Option, metavar="FOLDER", callback=in_existing_folder)


@verb("Distil")
def distill_static(
    context: typer.Context,
    corpus: CorpusArgument,
    out: Annotated[Path, _out_option(help="Where the model goes; a new folder.")],
    files: ReadingSettings,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A model as in student.backbone.model of a recipe.")
    ] = "minilm",
    dim: Annotated[int | None, typer.Option(min=1, help="Principal components to keep.", show_default="all")] = None,
    smoothing: Annotated[float, typer.Option(help="The larger it is, the more frequent tokens count.")] = 1e-3,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Make a backbone that looks up one vector for each token.

    MODEL reads every token of its vocabulary alone, and how often each occurs in CORPUS decides its weight. In a
    recipe, set student.backbone.model to FOLDER and tuning to full (or frozen): the student encodes many times as
    fast, and is less accurate. The folder is also a model for model2vec and sentence-transformers.
    """
    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.models.backbone import Backbone
    from d2llm.recipe import BackboneConfig
    from d2llm.training.distill_static import distill_static

    session = session_of(context)
    texts = open_corpus(corpus, files)
    backbone = Backbone.load(BackboneConfig(model=model), device=device, dtype=dtype)
    passages = (passage.full_text for passage in texts.passages)
    report = distill_static(backbone, passages, out, dim=dim, smoothing=smoothing)
    report = replace(report, skipped=tuple(texts.skipped))
    session.say(
        f"distill-static: {report.num_vectors:,} vectors of {report.dim} numbers ({report.variance:.0%} of the "
        f"variance), weighted by {report.num_tokens:,} tokens of {report.num_passages:,} passages; in {out}"
    )
    warn_of_skipped(session, report.skipped, texts.links)
    session.write_report(context, json_path, report)


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
    out: Annotated[Path, _out_option(help="Where the student with tokens goes.")],
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
    out: Annotated[Path, _out_option(help="Where the fitted student goes.")],
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
    out: Annotated[Path, _out_option(help="Where the reader goes; a new folder.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The causal language model to tune.")] = "smollm2",
    layers: Annotated[int, typer.Option(min=1, help="Use only so many of its first layers.")] = 8,
    depth: Annotated[int, typer.Option(min=2, help="Passages of a list: the student's first ones.")] = 20,
    alignment: Annotated[
        int, typer.Option(min=0, help="Passages that the model first learns to repeat from their vectors.")
    ] = 0,
    texts: Annotated[
        bool, typer.Option("--texts", help="Learn from the passages' texts beside their vectors too: far slower.")
    ] = False,
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
    from d2llm.models.student import Student
    from d2llm.recipe import ReaderTuningConfig
    from d2llm.training.tune_reader import tune_reader

    session = session_of(context)
    if lists[0] < 1:
        raise InputError("--lists begins with those for the network alone, of which there must be at least one")
    corpora = _corpora(data)
    order = None if labels is None else str(labels)
    settings = ReaderTuningConfig(
        model=model, layers=layers, depth=depth, alignment=alignment, texts=texts, lists=lists, labels=order
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
    out: Annotated[Path, _out_option(help="Where the average goes.")],
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
    from d2llm.data.open_data import open_data
    from d2llm.data.pairs import PairDataset

    corpora: list[Dataset] = []
    for dataset in map(open_data, data):
        if isinstance(dataset, PairDataset):
            raise InputError(f"{dataset.name}: these are labelled pairs, which have no corpus; give queries with one")
        corpora.append(dataset)
    return corpora


_OutOption = Annotated[Path, _out_option(help="Where the smaller student goes.")]


@verb("Distil")
def prune_vocabulary(
    context: typer.Context,
    student: StudentArgument,
    corpus: CorpusArgument,
    out: _OutOption,
    files: ReadingSettings,
    check: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="CORPUS", callback=input_path, help="Texts of which to count what is lost, such as queries. Repeat."
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Leave out the tokens that a corpus does not have.

    Most weights of a multilingual student are embeddings of tokens of other languages. Vectors of texts with the
    tokens of CORPUS stay the same. Other words are cut into smaller pieces; characters that CORPUS lacks become
    unknown. Encode the index again: the smaller student is another one.
    """
    from d2llm.core.files import folder_bytes
    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.models.student import Student
    from d2llm.models.vocabulary import lost_tokens
    from d2llm.models.vocabulary import prune_vocabulary as prune

    session = session_of(context)
    texts = open_corpus(corpus, files)
    loaded = Student.load(student, device="cpu", dtype="float32")
    pruned = prune(loaded, (passage.full_text for passage in texts.passages))
    pruned.save(out)
    before, after = (len(model.backbone.tokenizer) for model in (loaded, pruned))
    num_bytes = folder_bytes(out)
    report: dict[str, object] = {"tokens": before, "kept": after, "bytes": num_bytes}
    session.say(f"prune-vocabulary: {after:,} of {before:,} tokens stay; {num_bytes:,} bytes in {out}")
    if check:
        checked = open_corpus(check, files)
        lost = lost_tokens(loaded, pruned, (passage.full_text for passage in checked.passages))
        session.say(
            f"prune-vocabulary: of {lost.num_texts:,} texts to check, {lost.num_changed:,} have other tokens now; "
            f"{lost.num_unknown:,} of {lost.num_tokens:,} tokens are unknown"
        )
        report["check"] = lost
    warn_of_skipped(session, texts.skipped, texts.links)
    session.write_report(context, json_path, report)


@verb("Distil")
def prune_neurons(
    context: typer.Context,
    student: StudentArgument,
    corpus: CorpusArgument,
    out: _OutOption,
    files: ReadingSettings,
    keep: Annotated[
        float, typer.Option(metavar="FRACTION", help="The fraction of the neurons of each layer that stays.")
    ] = 0.5,
    json_path: JsonOption = None,
) -> None:
    """Leave out neurons of the feed-forward layers.

    Those go that the others replace best in passages of CORPUS, of which it reads a thousand, and the others' weights
    make up for them. The smaller student is another one: train it further (training.start), or only fit its weights
    again (fit-scores), and encode the index again.
    """
    from d2llm.core.files import folder_bytes
    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.models.neurons import num_neurons
    from d2llm.models.neurons import prune_neurons as prune
    from d2llm.models.student import Student

    session = session_of(context)
    texts = open_corpus(corpus, files)
    loaded = Student.load(student, device="cpu", dtype="float32")
    pruned = prune(loaded, (passage.full_text for passage in texts.passages), keep)
    pruned.save(out)
    before, after = (num_neurons(model) for model in (loaded, pruned))
    num_bytes = folder_bytes(out)
    session.say(f"prune-neurons: {after:,} of {before:,} neurons of each layer stay; {num_bytes:,} bytes in {out}")
    warn_of_skipped(session, texts.skipped, texts.links)
    session.write_report(context, json_path, {"neurons": before, "kept": after, "bytes": num_bytes})


@verb("Distil")
def push(
    context: typer.Context,
    student: StudentArgument,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Name on the Hub: owner/name.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who may read a new repository.", show_default="the account's default"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch to commit to.", show_default="main")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="NAME",
            help="Licence of the weights, as the Hub names it: apache-2.0, mit.",
            show_default="the card's",
        ),
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--adapter",
            help="Push all weights of the backbone, or only what training changed.",
            show_default="all if sentence-transformers can then load it",
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Upload a student to the Hugging Face Hub.

    The account is that of `hf auth login`, or of the token in HF_TOKEN. The manifest is published too, including the
    recipe and its data set paths. Others can then load the student as owner/name; if its head and pooling allow,
    sentence-transformers loads it without d2llm.
    """
    from d2llm.models.export.sentence_transformers import why_not_plain
    from d2llm.models.hub import find_student, push_student
    from d2llm.models.model_card import card_licence, model_card
    from d2llm.models.student import merge_student
    from d2llm.models.student_files import BACKBONE_FOLDER, read_student_manifest

    session = session_of(context)
    folder = find_student(student)
    manifest, config = read_student_manifest(folder)
    if card_licence(model_card(folder, manifest, licence=licence)) is None:
        session.complain("warning", "no licence is named, so nobody may use the student; give --license")
    is_merged, plain = (folder / BACKBONE_FOLDER).is_dir(), why_not_plain(config) is None
    if merge is False and is_merged:
        raise InputError(f"{folder}: has all weights of its backbone and no adapter to push; leave out --adapter")
    with TemporaryDirectory() as temporary:
        if (plain if merge is None else merge) and not is_merged:
            merge_student(folder, Path(temporary) / "student")
            folder = Path(temporary) / "student"
        report = push_student(folder, repo_id, private=private, revision=revision, licence=licence)
    session.say(f"push: {counted(report.num_files, 'file')}, {report.num_bytes / 1e6:,.1f} MB: {report.url}")
    if report.needs_d2llm is None:
        session.say("push: sentence-transformers can load it without d2llm")
    else:
        session.say(f"push: sentence-transformers cannot load it without d2llm: {report.needs_d2llm}")
    session.write_report(context, json_path, report)


@verb("Tools")
def export(
    context: typer.Context,
    student: StudentArgument,
    to: Annotated[
        Literal[
            "onnx", "openvino", "numpy", "student", "sentence-transformers", "multi-vector-encoder", "pylate", "vespa"
        ],
        typer.Option(
            help="onnx, openvino: graphs from tokens to a vector and from vectors to scores; numpy: the head alone, as "
            "arrays and one Python file; student: a student's folder, for use with --depth, or of a model of "
            "sentence-transformers, untrained; sentence-transformers: one "
            "that this library alone can load; multi-vector-encoder, pylate: its token embeddings, for this library or "
            "PyLate; vespa: an application of Vespa."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Eight-bit products in the encoder: smaller, faster, less exact.")
    ] = False,
    depth: Annotated[
        int | None,
        typer.Option(
            metavar="LAYERS",
            help="Only the first layers of the backbone, for a student trained with nested_cross_entropy.layers.",
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Write a student as files for programs without d2llm.

    The files are float32, whatever this machine computes with; with --int8 the encoder uses eight-bit products.
    """
    from d2llm.models.export.export import export, report_of
    from d2llm.models.external import is_bi_encoder, write_untrained
    from d2llm.models.student import Student
    from d2llm.models.student_files import read_student_manifest

    session = session_of(context)
    if to == "student" and is_bi_encoder(student):
        if int8 or depth is not None:
            raise InputError(
                "a model of sentence-transformers becomes a student as it is; leave --int8 and --depth out"
            )
        manifest, _ = read_student_manifest(write_untrained(student, out))
        report = report_of(out, to, "float32", manifest["fingerprint"])
    else:
        loaded = Student.load(student, device="cpu", dtype="float32")
        report = export(loaded if depth is None else loaded.cut(depth), out, to, int8=int8)
    session.say(f"export: {', '.join(report.files)} in {out}, {report.num_bytes:,} bytes, {report.precision}")
    session.write_report(context, json_path, report)
