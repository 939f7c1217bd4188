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

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.manifest import FILE_NAME, read_any_manifest, write_manifest
from d2llm.store.index_manifest import FIT_KIND, INDEX_OF_FIT

FORMAT_VERSION = 1
SUFFIX = ".search"


class FitFolder:
    """The layout of one fit."""

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
