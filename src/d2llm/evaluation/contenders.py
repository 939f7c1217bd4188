"""The systems compared in an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from d2llm.core.errors import InputError
from d2llm.core.inputs import objects_of, strings_of
from d2llm.core.types import SystemKind, Task
from d2llm.data.trec import TrecRun
from d2llm.evaluation.report import EvaluationRow, MissingRow
from d2llm.models.plain_student import PlainStudent
from d2llm.models.protocols import SearchStudent, TextEncoder
from d2llm.models.teachers.pair_teacher import PairTeacher
from d2llm.retrieval.cosine import CosineStudent, DotStudent
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
