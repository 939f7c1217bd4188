"""The systems that an evaluation compares, loaded by name or folder; a missing one becomes a row with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError, ModelNotFoundError
from d2llm.core.inputs import objects_of, paths_of, strings_of
from d2llm.core.manifest import read_manifest
from d2llm.core.shipped import shipped_models
from d2llm.core.types import SystemKind, Task
from d2llm.data.run_folder import RunFolder, companion, is_finished
from d2llm.data.trec import TrecRun, read_run
from d2llm.evaluation.report import EvaluationRow, MissingRow
from d2llm.models.external import ExternalBiEncoder, load_external
from d2llm.models.protocols import PlainStudent, SearchStudent, TextEncoder
from d2llm.models.sources import is_student
from d2llm.models.student import Student, find_student
from d2llm.models.student_files import FORMAT_VERSION, KIND
from d2llm.models.teachers.pair_teacher import PairTeacher, asks_endpoint, identify_teacher, load_teacher
from d2llm.recipe import StudentConfig, TeacherConfig, untuned_config
from d2llm.retrieval.cosine import CosineStudent, DotStudent
from d2llm.retrieval.reading import create_student, encoder_loads, load_student
from d2llm.runners.placement import Load

NAME_BM25 = "BM25"
NAME_UNTUNED = "cosine, untuned"
NAME_TUNED = "cosine, tuned"
NAME_PAPER = "D2LLM, paper head"
NAME_DOT = "cosine, D2LLM vectors"
NAME_D2LLM = "D2LLM"
OWN_NAMES = (NAME_BM25, NAME_UNTUNED, NAME_TUNED, NAME_PAPER, NAME_DOT, NAME_D2LLM)
_BASELINES: tuple[SystemKind, ...] = ("cosine_tuned", "cosine_untuned", "bm25")


@dataclass(frozen=True, slots=True)
class Contender:
    """A system that scores by vectors; ``num_candidates`` passages get its full score."""

    name: str
    kind: SystemKind
    model: SearchStudent
    num_candidates: int


@dataclass(frozen=True)
class Contenders:
    """The systems of an evaluation besides BM25 and the fusions, which need no model.

    If a system is None, its row is left out, and ``why_missing`` says why and how to add it. ``untuned`` is the encoder
    that the student was trained from; ``tuned_cosine`` and ``paper_head`` are students trained on the same data for the
    same steps. The keys of ``bi_encoders`` and ``cross_encoders`` name their rows. ``provenance`` describes in the
    report how the systems were made.

    Raises:
        InputError: two systems have the same name, or one has the name of a row that every report has.
    """

    student: SearchStudent
    untuned: TextEncoder | None = None
    tuned_cosine: SearchStudent | None = None
    paper_head: SearchStudent | None = None
    teacher: PairTeacher | None = None
    bi_encoders: Mapping[str, SearchStudent] = field(default_factory=dict[str, SearchStudent])
    cross_encoders: Mapping[str, PairTeacher] = field(default_factory=dict[str, PairTeacher])
    runs: Sequence[TrecRun] = ()
    why_missing: Mapping[SystemKind, str] = field(default_factory=dict[SystemKind, str])
    provenance: Mapping[str, object] = field(default_factory=dict[str, object])
    notes: tuple[str, ...] = ()
    """Remarks for the report on how the student was made."""
    trained_on: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """Names of the data sets that students were trained on, by the students' rows."""
    loads: Mapping[str, Load | None] = field(default_factory=dict[str, Load | None])
    """For a cluster: how its workers load each model (``Placement.loads``)."""
    gpus: Mapping[str, int] = field(default_factory=dict[str, int])
    """For a cluster: how many GPUs a model needs, by fingerprint, if it is more than one (``Placement.gpus``)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", objects_of(self.runs, "runs", TrecRun))
        object.__setattr__(self, "notes", tuple(strings_of(self.notes, "notes")))
        seen = {name: strings_of(datasets, f"trained_on[{name!r}]") for name, datasets in self.trained_on.items()}
        object.__setattr__(self, "trained_on", seen)
        names = [*self.bi_encoders, *self.cross_encoders, *(run.name for run in self.runs)]
        shared = sorted({name for name in names if name in OWN_NAMES or names.count(name) > 1})
        if shared:
            raise InputError(
                f"two systems have the same name, which their rows would share: {', '.join(shared)}; rename one (a run "
                "by the last column of its file)"
            )

    def students(self, num_candidates: int, top_k: int) -> list[Contender]:
        """The systems that score by vectors, in the report's order.

        Only students, whose score is more than a cosine, score more candidates than they rank.
        """
        rows: list[tuple[str, SystemKind, SearchStudent | None, int]] = [
            (NAME_UNTUNED, "cosine_untuned", CosineStudent(self.untuned) if self.untuned is not None else None, top_k),
            (NAME_TUNED, "cosine_tuned", self.tuned_cosine, top_k),
            (NAME_PAPER, "paper_head", self.paper_head, top_k),
            (NAME_DOT, "dot", DotStudent(self.student) if self.student.has_dot else None, top_k),
            (NAME_D2LLM, "d2llm", self.student, num_candidates),
            *(
                (name, "external", model, top_k if isinstance(model, PlainStudent) else num_candidates)
                for name, model in self.bi_encoders.items()
            ),
        ]
        return [Contender(name, kind, model, depth) for name, kind, model, depth in rows if model is not None]

    def notes_on(self, dataset: str, task: Task) -> tuple[str, ...]:
        """``notes``, why the student has no interaction in a task, and which were trained on a set with this name."""
        notes = [*self.notes, *filter(None, [self.student.why_no_interaction(task)])]
        if seen := [name for name, datasets in self.trained_on.items() if dataset in datasets]:
            were = "was" if len(seen) == 1 else "were"
            notes.append(f"{' and '.join(seen)} {were} trained on other queries of {dataset}, which makes it easier")
        return tuple(notes)

    def teachers(self, teacher_depth: int | None) -> list[tuple[str, SystemKind, PairTeacher]]:
        """The systems that encode query and passage together."""
        teachers: list[tuple[str, SystemKind, PairTeacher]] = []
        if self.teacher is not None:
            teachers.append((teacher_name(teacher_depth), "teacher", self.teacher))
        return teachers + [(name, "external", teacher) for name, teacher in self.cross_encoders.items()]

    def missing_rows(self, teacher_depth: int | None) -> list[MissingRow]:
        """The standard rows that this report does not have, each with the reason."""
        rows: list[tuple[str, SystemKind, object, str]] = [
            (NAME_UNTUNED, "cosine_untuned", self.untuned, "no untuned encoder was given"),
            (NAME_TUNED, "cosine_tuned", self.tuned_cosine, "no tuned cosine was given"),
            (NAME_PAPER, "paper_head", self.paper_head, "no student with the paper's head was given"),
            (NAME_DOT, "dot", self.student.has_dot or None, "the student's head has no inner-product part"),
            (teacher_name(teacher_depth), "teacher", self.teacher, "no teacher was given"),
        ]
        return [
            MissingRow(name, kind, self.why_missing.get(kind, reason))
            for name, kind, model, reason in rows
            if model is None
        ]


def teacher_name(depth: int | None) -> str:
    """Name of the teacher's row, which reranks ``depth`` passages per query (None: it does not rank)."""
    return "teacher" if depth is None else f"teacher (reranking {depth} of {NAME_BM25} and {NAME_D2LLM})"


def check_baseline(contenders: Contenders, baseline: SystemKind | None, besides: Sequence[SystemKind]) -> None:
    """Raise an ``InputError``, before anything is measured, if no row will be of the baseline's kind.

    ``besides`` are the kinds of rows that need no model.
    """
    kinds = {
        *besides,
        *(row.kind for row in contenders.students(1, 1)),
        *(kind for _, kind, _ in contenders.teachers(1)),
    }
    if baseline is not None and baseline not in kinds:
        raise InputError(f"the baseline '{baseline}' is not among the rows of this report: {', '.join(sorted(kinds))}")


def choose_baseline(rows: Sequence[EvaluationRow], baseline: SystemKind | None) -> str:
    """Name of the row that the others are compared with; ``check_baseline`` ensures that it exists."""
    names = {row.kind: row.name for row in reversed(rows)}
    return next(names[kind] for kind in ((baseline,) if baseline is not None else _BASELINES) if kind in names)


TUNED_COSINE, PAPER_HEAD = "cosine", "paper"
"""The variants (``recipe.variants``) that every report has a row for."""


def load_contenders(
    student: str | Path,
    *,
    tuned_cosine: str | Path | None = None,
    paper_head: str | Path | None = None,
    teacher: TeacherConfig | None = None,
    with_teacher: bool = True,
    models: Sequence[str] | str = (),
    runs: Sequence[str | Path] | str | Path = (),
    device: str | None = None,
    dtype: str | None = None,
) -> Contenders:
    """Load a student and the systems to compare it with.

    Args:
        student: folder, or name of a shipped student.
        tuned_cosine: the variant ``cosine`` of the student; by default the one beside it (``<student>-cosine``).
        paper_head: the variant ``paper``; by default ``<student>-paper``.
        teacher: by default the teacher whose labels the student was trained on: ``teacher`` beside the student, or a
            shipped one.
        with_teacher: False leaves the teacher out.
        models: other students, and bi-encoders and cross-encoders for sentence-transformers, as names or folders.
        runs: TREC run files.
        device: where to compute; by default the best device available.
        dtype: number format of d2llm's models; by default the fastest on that device. Other models are float32.

    Raises:
        ModelNotFoundError: one of the named systems does not exist.
        InputError: two systems have the same name, or a run file cannot be read.
    """
    folder = find_student(student)
    manifest = read_manifest(folder, KIND, FORMAT_VERSION)
    loader = _Loader(device, dtype)
    model = loader.encoder(partial(load_student, folder, device=device, dtype=dtype))
    untuned = loader.untuned(model.config)
    cosine = loader.companion("cosine_tuned", folder, TUNED_COSINE, tuned_cosine)
    paper = loader.companion("paper_head", folder, PAPER_HEAD, paper_head)
    pair_teacher: PairTeacher | None = None
    if not with_teacher:
        loader.why["teacher"] = "it was left out"
    elif (config := teacher or _own_teacher(folder, manifest.get("teacher"))) is None:
        loader.why["teacher"] = "the teacher that the student was trained with was not found; name one"
    else:
        pair_teacher = loader.teacher(config)
    names = strings_of(models, "models")
    bi_encoders, cross_encoders = loader.others(names)
    trained_on = {NAME_D2LLM: _trained_on(folder)}
    trained_on |= {Path(name).name: _trained_on(find_student(name)) for name in names if is_student(Path(name))}
    beside = {"tuned_cosine": cosine, "paper_head": paper, "teacher": pair_teacher}
    return Contenders(
        student=model,
        untuned=untuned,
        tuned_cosine=cosine,
        paper_head=paper,
        teacher=pair_teacher,
        bi_encoders=bi_encoders,
        cross_encoders=cross_encoders,
        runs=[_named(read_run(path)) for path in paths_of(runs, "runs")],
        why_missing=loader.why,
        provenance={
            "student": _provenance(folder.name, manifest),
            **{name: None if system is None else system.fingerprint for name, system in beside.items()},
        },
        notes=_gate_notes(manifest),
        trained_on=trained_on,
        loads=loader.loads,
        gpus=loader.gpus,
    )


@dataclass
class _Loader:
    """Loads systems.

    Attributes:
        loads: how a worker loads each, by its fingerprint; None if it cannot.
        gpus: how many GPUs the teacher needs, by its fingerprint.
        why: why a system is missing.
    """

    device: str | None
    dtype: str | None
    loads: dict[str, Load | None] = field(default_factory=dict[str, "Load | None"])
    gpus: dict[str, int] = field(default_factory=dict[str, int])
    why: dict[SystemKind, str] = field(default_factory=dict[SystemKind, str])

    def encoder(self, load: Callable[[], Student]) -> Student:
        encoder = load()
        self.loads.update(encoder_loads(encoder, load))
        return encoder

    def untuned(self, config: StudentConfig) -> Student | None:
        """The backbone before training, if it can be had."""
        untuned = untuned_config(config)
        try:
            return self.encoder(partial(create_student, untuned, device=self.device, dtype=self.dtype))
        except ModelNotFoundError as error:
            self.why["cosine_untuned"] = str(error)
        return None

    def companion(self, kind: SystemKind, student: Path, variant: str, named: str | Path | None) -> Student | None:
        """A variant of a student: the named one, or that beside it, if there is one."""
        folder = companion(student, variant) if named is None else find_student(named)
        if is_finished(folder):
            return self.encoder(partial(load_student, folder, device=self.device, dtype=self.dtype))
        self.why[kind] = f"{folder.name} is not beside the student; train it: d2llm distill RECIPE --variant {variant}"
        return None

    def teacher(self, config: TeacherConfig) -> PairTeacher:
        load = partial(load_teacher, config, device=self.device, dtype=self.dtype)
        teacher = load()
        self.loads[teacher.fingerprint] = None if asks_endpoint(config) else load
        self.gpus[teacher.fingerprint] = config.num_gpus
        return teacher

    def others(self, models: Sequence[str]) -> tuple[dict[str, SearchStudent], dict[str, PairTeacher]]:
        """Other bi-encoders and cross-encoders, by the names of their rows."""
        bi_encoders: dict[str, SearchStudent] = {}
        cross_encoders: dict[str, PairTeacher] = {}
        for name in models:
            if is_student(Path(name)):
                load = partial(load_student, find_student(name), device=self.device, dtype=self.dtype)
            else:
                load = partial(load_external, name, device=self.device)
            loaded = load()
            self.loads[loaded.fingerprint] = load
            label = Path(name).name
            if label in bi_encoders or label in cross_encoders:
                raise InputError(f"two models are called '{label}', which their rows would share; rename one folder")
            if isinstance(loaded, Student | ExternalBiEncoder):
                bi_encoders[label] = loaded
            else:
                cross_encoders[label] = loaded
        return bi_encoders, cross_encoders


def _own_teacher(student: Path, fingerprint: str | None) -> TeacherConfig | None:
    """The teacher with this fingerprint: that of the student's run, or a shipped one."""
    run = RunFolder(student.parent)
    beside = [str(folder) for folder in (run.teacher, run.ensemble) if is_finished(folder)]
    configs = [TeacherConfig(model=model) for model in (*beside, *shipped_models("teachers"))]
    return next((config for config in configs if identify_teacher(config).fingerprint == fingerprint), None)


def _named(run: TrecRun) -> TrecRun:
    """Rename a run that has the name of a standard row, because an earlier report saved it from that row."""
    return replace(run, name=f"{run.name} (run)") if run.name in OWN_NAMES else run


def _trained_on(student: Path) -> tuple[str, ...]:
    """Names of the data sets that a student was trained on, as its manifest has them."""
    recipe: Mapping[str, Any] = read_manifest(student, KIND, FORMAT_VERSION).get("recipe") or {}
    return tuple(Path(data["path"]).name for data in recipe.get("data", ()))


def _provenance(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the student was made, from its manifest."""
    names = ("fingerprint", "base_fingerprint", "teacher", "recipe", "interaction_weights", "packages")
    optional = ("closed_gates", "fraction_kept")
    return {"name": name, **{key: manifest[key] for key in (*names, *optional) if key in manifest}}


def _gate_notes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Remarks on how the student was trained: closed gates, and the fraction kept."""
    notes: list[str] = []
    if closed := manifest.get("closed_gates"):
        notes.append(
            f"the teacher's gate was closed for {', '.join(closed)}: there the student was trained on the data set's "
            "own judgements"
        )
    if (fraction := manifest.get("fraction_kept", 1.0)) < 1:
        limit = manifest["recipe"]["training"]["max_interpolation"]
        why = "the recipe's maximum" if fraction == limit else "a larger fraction was no better on dev"
        notes.append(f"{fraction:.0%} of the change of weights in training was kept: {why}")
    return tuple(notes)
