"""The passages of a fit, the index of them that it serves, and the indexes that other students make of them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.core.errors import IndexMismatchError, InputError, MissingExtraError
from d2llm.core.files import new_folder, replace_folder
from d2llm.core.fingerprint import fingerprint_json, fingerprint_passages
from d2llm.core.manifest import FILE_NAME, read_any_manifest, write_manifest
from d2llm.core.names import counted
from d2llm.core.shipped import DEFAULT_STUDENT, MULTILINGUAL_STUDENT
from d2llm.core.types import Passage, Task
from d2llm.data.check import guess_languages
from d2llm.data.documents import SkippedFile, skipped_by_kind
from d2llm.data.indexed_corpus import Corpus, is_corpus_file, open_corpus
from d2llm.data.run_folder import is_finished
from d2llm.data.settings import ReadingSettings
from d2llm.fitting.settings import FitSettings
from d2llm.models.protocols import expansion_fingerprint, task_for
from d2llm.retrieval.reading import load_student
from d2llm.runners.runner import Runner
from d2llm.store.index_manifest import FIT_KIND, INDEX_OF_FIT, Chunking, write_chunking

if TYPE_CHECKING:
    from d2llm.models.student import Student
    from d2llm.retrieval.encode import EncodeReport
    from d2llm.retrieval.index import Index


FORMAT_VERSION = 1
SUFFIX = ".search"
_STUDENT_SOURCE = "../student"
_SAMPLED, _SAMPLED_CHARACTERS = 30, 2_000  # documents whose language is guessed, and how much of each is read
_LISTED_AT_ONCE = 1_000


class ServedIndex:
    """The documents of a fit as an index. ``read`` makes it, or brings it up to date."""

    def __init__(
        self,
        documents: Sequence[Path],
        folder: FitFolder,
        settings: FitSettings,
        *,
        runner: Runner,
        device: str | None,
        dtype: str | None,
        note: Callable[[str], None],
    ) -> None:
        """Prepare; nothing is read. ``note`` gets what was left out of the documents, in words."""
        self.documents, self.folder, self.settings = documents, folder, settings
        self.runner, self.device, self.dtype = runner, device, dtype
        self._note = note
        self.encoding_rate: float | None = None
        """Passages that a cluster encodes per second, if this call has made the index."""

    @cached_property
    def start(self) -> str:
        """The student to start from: as set, as in an earlier call, or by the language of the documents."""
        if self.settings.student is not None:
            return self.settings.student
        if "start" in self.folder.manifest:
            return str(self.folder.manifest["start"])
        passages = islice(self._open_corpus().passages, _SAMPLED)
        return student_for([passage.text[:_SAMPLED_CHARACTERS] for passage in passages])

    @cached_property
    def task(self) -> Task:
        """What makes a passage relevant: as set, or what the student to start from was trained for."""
        return task_for(self.load(self.start), self.settings.task)

    @cached_property
    def index(self) -> Index:
        """The index that is served."""
        from d2llm.retrieval.index import Index

        return Index.open(self.folder.index, device=self.device, dtype=self.dtype)

    @cached_property
    def passages(self) -> list[Passage]:
        """Every passage of the index, by id."""
        ids: list[str] = []
        while block := self.index.list_passages(ids[-1] if ids else "", _LISTED_AT_ONCE):
            ids += block
        return sorted(self.index.get(ids), key=lambda passage: passage.id)

    @property
    def key(self) -> str:
        """Identifies the passages."""
        return fingerprint_passages(self.passages)

    @cached_property
    def is_of_start(self) -> bool:
        """Whether the student to start from made the index, so that mining need not encode the passages again."""
        return self.index.student.fingerprint == self.load(self.start).fingerprint

    def sample(self, count: int) -> list[Passage]:
        """Some passages, drawn at random."""
        return random.Random(self.settings.seed).sample(self.passages, min(count, len(self.passages)))

    def load(self, student: str | Path) -> Student:
        """A student, by name or folder."""
        return self.loader(student)()

    def loader(self, student: str | Path) -> Callable[[], Student]:
        """How workers load a student too; a folder by its whole path, since they may work elsewhere."""
        source = student.resolve() if isinstance(student, Path) else student
        return partial(load_student, source, device=self.device, dtype=self.dtype)

    def read(self) -> str:
        """Read the documents into the index, or bring it up to date; returns what was done, in words."""
        outcome = self._update() if is_finished(self.folder.index) else self._create()
        self._forget()
        return outcome

    def _create(self) -> str:
        from d2llm.retrieval.chunking import default_chunking

        student = self.load(self.start)
        student.save(self.folder.student)
        encoded = self._encode(
            self._open_corpus(),
            student,
            self.folder.index,
            None if is_corpus_file(self.documents) else self.settings.chunking or default_chunking(student),
            source=self.start,
        )
        self.encoding_rate = None if self.runner.is_local else encoded.passages_per_second or None
        return f"{counted(encoded.num_documents, 'document')}, {counted(encoded.num_passages, 'passage')}"

    def _update(self) -> str:
        from d2llm.retrieval.chunking import default_chunking
        from d2llm.retrieval.sync import sync_documents

        self._replace(self.index_of(self.folder.student))  # if a call ended after replacing only one of the two
        index = self.index
        if is_corpus_file(self.documents):
            passages = list(open_corpus(self.documents).passages)
            written = index.upsert(passages, num_passages=len(passages))
            gone = {passage.id for passage in self.passages} - {passage.id for passage in passages}
            index.delete(gone)
            return f"{counted(written.num_added + written.num_updated, 'passage')} changed, {len(gone):,} gone"
        chunking = index.chunking or self.settings.chunking or default_chunking(self.load(self.folder.student))
        report = sync_documents(index, self.documents, self._reading, chunking=chunking)
        self._note_skipped(report.skipped)
        changed = report.num_files - report.num_unchanged
        return f"{changed:,} of {report.num_files:,} files had changed, {len(report.gone):,} were gone"

    def index_of(self, student: Path) -> Path:
        """An index of the passages that a student made: the served one, or a new one that can be served."""
        loaded, chunking = self.load(student), self.index.chunking
        folder = self._folder_of(loaded)
        if folder != self.folder.index:
            if not is_finished(folder):
                is_late = chunking is not None and chunking.late  # needs what stands around each passage
                corpus = self._open_corpus() if is_late else self.passages
                self._encode(corpus, loaded, folder, chunking if is_late else None, source=student)
            write_chunking(folder, chunking)
        return folder

    def lacks_index_of(self, student: Path) -> bool:
        """Whether ``index_of`` has to encode the passages."""
        return not is_finished(self._folder_of(self.load(student)))

    def serve(self, student: Path) -> None:
        """Make the served index that of a student; it replaces the earlier one when it is complete."""
        index = self.index_of(student)
        with new_folder(self.folder.student, kind="student") as temporary:
            shutil.copytree(student, temporary, dirs_exist_ok=True)
            self._replace(index)

    def _encode(
        self,
        corpus: Corpus | Sequence[Passage],
        student: Student,
        folder: Path,
        chunking: Chunking | None,
        *,
        source: str | Path,
    ) -> EncodeReport:
        """Make an index that can be served; ``source`` is where the student was loaded from."""
        from d2llm.retrieval.encode import encode

        report = encode(
            corpus,
            student,
            folder,
            task=self.task,
            window_vectors=None,
            chunking=chunking,
            student_source=_STUDENT_SOURCE,
            runner=self.runner,
            device=self.device,
            load_student=self.loader(source),
        )
        self._note_skipped(report.skipped)
        return report

    def _folder_of(self, student: Student) -> Path:
        """Where an index of the passages that a student made is, or will be made."""
        from d2llm.retrieval.open_index import check_parts

        try:
            self.index.store.check_student(student.fingerprint)
            check_parts(self.index.store, student, self.task)
        except IndexMismatchError:
            made_with = [student.fingerprint, student.token_fingerprint if student.token_dim else None]
            if (expansion := expansion_fingerprint(student)) is not None:
                made_with.append(expansion)
            return self.folder.work / f"index-{fingerprint_json([*made_with, self.key])}"
        return self.folder.index

    def _replace(self, index: Path) -> None:
        """Serve an index that was made for it."""
        if index != self.folder.index:
            with self.index.store.locked():
                replace_folder(index, self.folder.index)
            self._forget()

    def _forget(self) -> None:
        """Read index and passages again when they are next needed."""
        for name in ("index", "passages", "is_of_start"):
            self.__dict__.pop(name, None)

    def _open_corpus(self) -> Corpus:
        return open_corpus(self.documents, self._reading)

    @property
    def _reading(self) -> ReadingSettings:
        """How to read the documents: without what the settings say, and this fit's own folder."""
        fit_folder = self.folder.path.resolve()
        inside = [
            fit_folder.relative_to(path.resolve())
            for path in self.documents
            if fit_folder.is_relative_to(path.resolve())
        ]
        return ReadingSettings(exclude=(*self.settings.exclude, *(f"/{path.as_posix()}/" for path in inside)))

    def _note_skipped(self, skipped: Sequence[SkippedFile]) -> None:
        for what, files in skipped_by_kind(skipped):
            self._note(f"{what}, such as {files[0]}")


def student_for(texts: Sequence[str]) -> str:
    """The shipped student for the language of some texts: English, or any other.

    Without py3langid (extra ``check``), texts in which a tenth of the letters are not ASCII are taken for another
    language.
    """
    try:
        languages = guess_languages("documents", texts)
    except MissingExtraError:
        letters = [letter for text in texts for letter in text if letter.isalpha()]
        is_english = sum(letter.isascii() for letter in letters) >= 0.9 * len(letters)
    else:
        is_english = languages is None or next(iter(languages.counts)) == "en"
    return DEFAULT_STUDENT if is_english else MULTILINGUAL_STUDENT


class FitFolder:
    """The folder of a fit: what is served, what is shown, and what a later call needs in order to continue.

    docs.search/
    manifest.json   what made it, and the verdict
    index/          what is served
    student/        the student of the index
    report.html     who was compared with whom, on queries that were held out
    audit.html      which queries were kept, and which were not and why
    progress.html   the stages, while they run
    work/           written queries, data sets, runs and measurements; may be deleted when the fit is finished
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index, self.student = path / INDEX_OF_FIT, path / "student"
        self.report_page, self.audit_page = path / "report.html", path / "audit.html"
        self.report, self.progress_page = path / "report.json", path / "progress.html"
        self.work = path / "work"
        self.drafts, self.finished_writing = self.work / "drafts", self.work / "written.json"
        self.written, self.users = self.work / "data" / "written", self.work / "data" / "users"
        self.labels, self.measured = self.work / "labels", self.work / "measured"

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What an earlier call has stored: the documents, the student to start from, and the one that it kept."""
        return read_any_manifest(self.path) if (self.path / FILE_NAME).is_file() else {}

    @property
    def is_finished(self) -> bool:
        """Whether an earlier call has finished this fit."""
        return self.manifest.get("kept") is not None

    def write_manifest(self, documents: Sequence[Path], start: str, *, kept: str | None = None) -> None:
        """Store what a call learns from; ``kept`` is for one that has finished."""
        self.path.mkdir(parents=True, exist_ok=True)  # only now: documents without text leave no folder behind
        content = {"documents": [str(path.resolve()) for path in documents], "start": start, "kept": kept}
        write_manifest(self.path, FIT_KIND, FORMAT_VERSION, content)

    def run(self, key: str) -> Path:
        """The run folder of one training; ``key`` stands for everything that it learns from."""
        return self.work / f"run-{key}"

    def base(self, key: str) -> Path:
        """The student that training starts from, with weights fitted on the dev queries that ``key`` stands for."""
        return self.work / f"base-{key}"


def default_folder(documents: Path) -> Path:
    """Where the fit of a folder or file of documents goes: beside it, as ``<name>.search``."""
    resolved = documents.resolve()
    return resolved.with_name(resolved.name + SUFFIX)


def require_fit_folder(path: Path) -> FitFolder:
    """The folder of a fit that exists already, or of a new one.

    Raises:
        InputError: the folder holds something else.
    """
    folder = FitFolder(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return folder
    if path.is_dir() and folder.manifest.get("kind") == FIT_KIND:
        return folder
    raise InputError(f"{path}: holds something else than a fit; give another folder (--output)")
