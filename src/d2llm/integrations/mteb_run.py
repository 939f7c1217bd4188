"""Runs a student on tasks of mteb, which it downloads, or on data sets on disk, and sums up what it scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.extras import require
from d2llm.core.fingerprint import fingerprint_files
from d2llm.core.inputs import strings_of
from d2llm.core.names import counted, did_you_mean
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.table import Column, Table
from d2llm.data.beir import Dataset
from d2llm.data.lines import read_records, string_field
from d2llm.data.open_data import open_data
from d2llm.data.pairs import PairDataset, as_retrieval
from d2llm.integrations.mteb import load_mteb_model, scores_with_interaction
from d2llm.ops.words import is_mostly_han

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


@dataclass(frozen=True, slots=True)
class MtebRow:
    """One task: its name and type, mteb's main measure, its value, and the value by the student's own score.

    The two values differ in pair tasks alone (``mteb.scores_with_interaction``).
    """

    task: str
    type: str
    measure: str
    value: float
    by_own_score: float
    seconds: float


@dataclass(frozen=True, slots=True)
class MtebReport:
    """What a student scored on some tasks; ``results`` is the folder of mteb's files, ``revision`` its fingerprint."""

    student: str
    revision: str
    mteb: str
    results: str
    rows: tuple[MtebRow, ...]


def run_mteb(
    student: str | Path = DEFAULT_STUDENT,
    *,
    tasks: Sequence[str] | str = (),
    benchmark: str | None = None,
    out: str | Path,
    split: str = "test",
    language: str | None = None,
    symmetric: Sequence[str] | str = (),
    device: str | None = None,
) -> MtebReport:
    """Measure a student on tasks of mteb with its whole score; results are written to ``out`` as mteb writes them.

    An interrupted run goes on with the next task. Data sets on disk need no network.

    Args:
        student: a folder that ``d2llm distill`` wrote, or the name of a shipped student.
        tasks: names of mteb's tasks, data sets on disk, or ``KIND=FOLDER`` (``TaskKind``).
        benchmark: the name of a benchmark of mteb, all of whose tasks are added.
        out: the folder of the results.
        split: of data sets on disk, what is measured.
        language: of data sets on disk (``task_of_data``).
        symmetric: names of tasks whose queries look for texts that mean the same (``mteb.branch_of``).
        device: None means the best one available.

    Raises:
        MissingExtraError: mteb is not installed.
        ModelNotFoundError: there is no such student.
        InputError: no task is given, a name is unknown, or a data set cannot be downloaded.
        DataFormatError: a data set cannot be read.

    Example:
        >>> from d2llm.integrations.mteb_run import run_mteb
        >>> report = run_mteb("d2llm-minilm", tasks=["DATA"], split="dev", out="results")
        >>> report.rows[0].type
        'Retrieval'
    """
    mteb = require("mteb", extra="mteb", purpose="measuring by mteb")
    symmetric = strings_of(symmetric, "symmetric")
    chosen = [
        *_tasks(mteb, strings_of(tasks, "tasks"), split, language),
        *(_benchmark(mteb, benchmark) if benchmark else ()),
    ]
    if not chosen:
        raise InputError("no tasks: name tasks of mteb, data sets on disk, or a benchmark")
    names = [task.metadata.name for task in chosen]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two of the tasks are called {name!r}, and mteb keeps results by name: rename one")
    unknown = [name for name in symmetric if name not in names]
    if unknown:
        raise InputError(f"{unknown[0]!r} is not among the tasks{did_you_mean(unknown[0], names)}")
    model = load_mteb_model(student, device=device, tasks=dict.fromkeys(symmetric, "symmetric"))
    try:
        results = mteb.evaluate(
            model,
            chosen,
            cache=mteb.ResultCache(Path(out)),
            co2_tracker=False,
            encode_kwargs={"show_progress_bar": False},
            show_progress_bar=False,
        )
    except ConnectionError as error:
        remedy = "mteb's own tasks are downloaded once: connect, or name data sets on disk"
        raise InputError(f"{error}; {remedy}") from error
    by_own_score = scores_with_interaction(results, chosen)
    described = {task.metadata.name: task.metadata for task in chosen}
    rows = [
        MtebRow(
            result.task_name,
            described[result.task_name].type,
            described[result.task_name].main_score,
            float(result.get_score()),
            by_own_score[result.task_name],
            float(result.evaluation_time or 0.0),
        )
        for result in results.task_results
    ]
    return MtebReport(str(student), model.mteb_model_meta.revision or "", version("mteb"), str(out), tuple(rows))


def mteb_table(report: MtebReport) -> Table:
    """One line for each task."""
    table = Table(
        "task",
        "type",
        "measure",
        Column("value", ".4f"),
        Column("by the student's score", ".4f"),
        Column("s", ".1f"),
        title=f"{report.student} on {counted(len(report.rows), 'task')}, by mteb {report.mteb}",
        caption=(
            "Value: mteb's main measure, as on its leaderboard. Of pairs it counts the cosine, or the best of five "
            "similarities; beside it is the same measure by the student's own score."
        ),
    )
    for row in report.rows:
        table.add_row(row.task, row.type, row.measure, row.value, row.by_own_score, row.seconds)
    return table


def _tasks(mteb: Any, names: Sequence[str], split: str, language: str | None) -> list[Any]:
    tasks: list[Any] = []
    for name in names:
        parsed = parse_task(name)
        if parsed is not None:
            kind, path = parsed
            tasks.append(task_of_data(path, kind=kind, split=split, language=language))
            continue
        try:
            tasks.append(mteb.get_task(name))
        except KeyError:
            known = [task.metadata.name for task in mteb.get_tasks()]
            raise InputError(
                f"{name!r} is neither a data set on disk nor a task of mteb{did_you_mean(name, known)}"
            ) from None
    return tasks


def _benchmark(mteb: Any, name: str) -> Sequence[Any]:
    try:
        return mteb.get_benchmark(name).tasks
    except KeyError:
        known = [benchmark.name for benchmark in mteb.get_benchmarks()]
        raise InputError(f"mteb has no benchmark {name!r}{did_you_mean(name, known)}") from None


TaskKind = Literal["Retrieval", "Reranking", "PairClassification", "STS", "Classification", "Clustering"]
"""The types of mteb's tasks that a data set can be."""

MAIN_SCORES: Mapping[TaskKind, str] = {
    "Retrieval": "ndcg_at_10",
    "Reranking": "map_at_1000",
    "PairClassification": "max_ap",
    "STS": "cosine_spearman",
    "Classification": "accuracy",
    "Clustering": "v_measure",
}
"""Type of a task -> its main measure in mteb's own benchmarks."""

_TRAIN = "train"  # where mteb's classifiers get their examples
_SAMPLED = 200  # texts by which the language is told

Split = dict[str, Any]
"""The columns, or for retrieval the tables, of one split, as mteb's tasks have them."""


def task_of_data(
    path: str | Path, *, kind: TaskKind | None = None, split: str = "test", language: str | None = None
) -> AbsTask:
    """A data set on disk as a task of mteb; its name is the folder's, with a type that is not the default's.

    Args:
        path: a data set of any layout that ``open_data`` reads, or a folder with ``SPLIT.jsonl`` files of ``text`` and
            ``label``.
        kind: the type of the task. By default Retrieval, PairClassification (yes or no), STS (scores) or
            Classification (texts with labels). Reranking is for yes-or-no pairs and judged passages, Clustering for
            texts with labels.
        split: what is measured. Classification learns from the split "train".
        language: as mteb writes it, such as "eng-Latn"; by default "zho-Hans" if most texts are Chinese, or else
            "eng-Latn".

    Raises:
        MissingExtraError: mteb is not installed.
        DataFormatError: no such data, or it cannot be a task of this type.

    Example:
        >>> from d2llm.integrations.mteb_run import task_of_data
        >>> task = task_of_data("DATA", split="dev")
        >>> task.metadata.type, task.metadata.main_score
        ('Retrieval', 'ndcg_at_10')
    """
    path = Path(path)
    labelled = _labelled_texts(path)
    if labelled is not None:
        usual: TaskKind = "Classification"
        splits = _texts(path, labelled, kind or usual, split)
    else:
        data = open_data(path, splits=split)
        usual = _kind_of(data)
        splits = {split: _of_dataset(data, kind or usual, split)}
    name = path.resolve().name + ("" if kind in (None, usual) else f"-{kind}")
    return _task(path, name, kind or usual, split, splits, language or _language(splits[split]))


def _task(path: Path, name: str, kind: TaskKind, split: str, splits: dict[str, Split], language: str) -> AbsTask:
    abstasks = require("mteb.abstasks", extra="mteb", purpose="tasks of mteb")
    metadata = require("mteb.abstasks.task_metadata", extra="mteb", purpose="tasks of mteb")
    is_ranking = kind in ("Retrieval", "Reranking")
    described = metadata.TaskMetadata(
        name=name,
        type=kind,
        dataset={"path": path.resolve().name, "revision": fingerprint_files(filter(Path.is_file, path.rglob("*")))},
        description="A data set on disk, read by d2llm.",
        reference=None,
        eval_splits=[split],
        eval_langs=[language],
        main_score=MAIN_SCORES[kind],
    )

    def load_data(self: Any, num_proc: int | None = None, **kwargs: Any) -> None:  # noqa: ARG001 - mteb's signature
        self.dataset = {"default": splits} if is_ranking else _dataset_dict(splits)
        self.data_loaded = True

    base = abstasks.AbsTaskRetrieval if is_ranking else getattr(abstasks, f"AbsTask{kind}")
    members: dict[str, Any] = {"metadata": described, "load_data": load_data}
    if kind == "Clustering":
        members["max_fraction_of_documents_to_embed"] = None
    return type(described.name, (base,), members)()


def _kind_of(data: Dataset | PairDataset) -> TaskKind:
    if isinstance(data, Dataset):
        return "Retrieval"
    return "STS" if data.kind == "scores" else "PairClassification"


def _of_dataset(data: Dataset | PairDataset, kind: TaskKind, split: str) -> Split:
    """One split of a data set; ``DataFormatError`` if it cannot be a task of this type."""
    makers: dict[tuple[type, TaskKind], Callable[[Any, str], Split]] = {
        (Dataset, "Retrieval"): _retrieval,
        (Dataset, "Reranking"): _reranking,
        (PairDataset, "Reranking"): lambda pairs, split: _reranking(as_retrieval(pairs, split), split),
        (PairDataset, "PairClassification"): _pair_labels,
        (PairDataset, "STS"): _pair_scores,
    }
    make = makers.get((type(data), kind))
    if make is None:
        usable = [name for layout, name in makers if layout is type(data)]
        raise DataFormatError(data.path, f"cannot be a task of type {kind}; it can be {' or '.join(usable)}")
    return make(data, split)


def _retrieval(data: Dataset, split: str) -> Split:
    qrels = data.qrels.get(split)
    if not qrels:
        raise DataFormatError(data.path, f"has no judgements in the split '{split}'; choose another with --split")
    datasets = require("datasets", extra="mteb", purpose="tasks of mteb")
    passages = [{"id": one.id, "title": one.title, "text": one.text} for one in data.passages.values()]
    return {
        "corpus": datasets.Dataset.from_list(passages),
        "queries": datasets.Dataset.from_list([{"id": name, "text": data.queries[name].text} for name in qrels]),
        "relevant_docs": {name: dict(judged) for name, judged in qrels.items()},
        "top_ranked": None,
    }


def _reranking(data: Dataset, split: str) -> Split:
    """The judged passages of each query are what is ranked."""
    columns = _retrieval(data, split)
    judged: Mapping[str, Mapping[str, int]] = columns["relevant_docs"]
    if all(grade for grades in judged.values() for grade in grades.values()):
        raise DataFormatError(
            data.path, "has no passages that were judged not to answer (grade 0), so there is nothing to rerank"
        )
    return columns | {"top_ranked": {name: list(grades) for name, grades in judged.items()}}


def _pair_labels(data: PairDataset, split: str) -> Split:
    labels = [int(positive) for positive in data.positives(split)]
    return _sentences(data, split) | {"labels": labels}


def _pair_scores(data: PairDataset, split: str) -> Split:
    if data.kind != "scores":
        raise DataFormatError(data.path, "has classes, not scores; a task of type STS needs scores")
    return _sentences(data, split) | {"score": [pair.score for pair in data.pairs(split)]}


def _sentences(data: PairDataset, split: str) -> Split:
    pairs = data.pairs(split)
    return {"sentence1": [pair.query for pair in pairs], "sentence2": [pair.passage for pair in pairs]}


def _labelled_texts(path: Path) -> dict[str, Path] | None:
    """The files of texts with labels, by split; None if the path is no folder of such files."""
    files = {file.name.split(".")[0]: file for file in sorted(path.glob("*.jsonl*"))} if path.is_dir() else {}
    first = next((record for file in files.values() for _, record in read_records(file)), {})
    return files if {"text", "label"} <= first.keys() else None


def _texts(path: Path, files: Mapping[str, Path], kind: TaskKind, split: str) -> dict[str, Split]:
    """The splits that a classification or a clustering needs."""
    if kind not in ("Classification", "Clustering"):
        raise DataFormatError(path, f"cannot be a task of type {kind}; it can be Classification or Clustering")
    needed = dict.fromkeys([_TRAIN, split] if kind == "Classification" else [split])
    missing = [name for name in needed if name not in files]
    if missing:
        raise DataFormatError(path, f"has no {missing[0]}.jsonl, which a task of type {kind} needs")
    rows = {
        name: [(string_field(files[name], line, one, "text"), str(one.get("label"))) for line, one in records]
        for name, records in ((name, list(read_records(files[name]))) for name in needed)
    }
    numbers = {label: index for index, label in enumerate(sorted({label for one in rows.values() for _, label in one}))}
    text, label = ("text", "label") if kind == "Classification" else ("sentences", "labels")
    return {
        name: {text: [row[0] for row in one], label: [numbers[row[1]] for row in one]} for name, one in rows.items()
    }


def _language(columns: Split) -> str:
    texts: Sequence[str] = next(
        ([row["text"] for row in rows] if name == "queries" else rows)
        for name, rows in columns.items()
        if name in ("queries", "sentence1", "text", "sentences")
    )[:_SAMPLED]
    return "zho-Hans" if is_mostly_han(" ".join(texts)) else "eng-Latn"


def _dataset_dict(splits: Mapping[str, Split]) -> Any:
    datasets = require("datasets", extra="mteb", purpose="tasks of mteb")
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()})


def parse_task(name: str) -> tuple[TaskKind | None, Path] | None:
    """A data set on disk as the command line names it, FOLDER or KIND=FOLDER; None for the name of a task of mteb."""
    kind, _, folder = name.rpartition("=")
    if kind in get_args(TaskKind):
        return cast(TaskKind, kind), Path(folder)
    return (None, Path(name)) if Path(name).exists() else None
