"""An index that is open: what is on disk, its student, and the version that is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, cast

from typing_extensions import Self

from d2llm.core.errors import D2LLMError, IndexMismatchError, InputError
from d2llm.core.inputs import shown, strings_of
from d2llm.core.manifest import source_of
from d2llm.core.names import counted
from d2llm.core.shipped import name_student
from d2llm.core.types import PartKind, Passage, Task
from d2llm.models.protocols import SearchStudent, expansion_fingerprint
from d2llm.retrieval.local_segment import LocalSegment, open_view
from d2llm.retrieval.segments import CachedBounds, IndexView
from d2llm.store.index_manifest import Chunking, read_chunking, repeats_text
from d2llm.store.index_spec import IndexSpec, StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.passage_table import PAGE_SIZE, ListedDocument
from d2llm.store.shards import Storage

_log = logging.getLogger(__name__)

PART_FORMATS: dict[PartKind, str] = {"window": "int3", "token": "int4"}
"""Default formats of window vectors and token embeddings (``store.vector_formats``)."""


def part_formats(
    student: SearchStudent, task: Task, *, window_vectors: str | None = "auto", token_vectors: str | None = "auto"
) -> dict[PartKind, str]:
    """The formats of the vectors of parts that a new index stores, by kind.

    None and "none" leave a kind out; "auto" stores it in the default format if the student's score counts it.

    Raises:
        InputError: token embeddings are wanted, but the student has none.
    """
    scored = student.feature_weights(task).part_kinds
    formats: dict[PartKind, str] = {}
    requests: dict[PartKind, str | None] = {"window": window_vectors, "token": token_vectors}
    for kind, requested in requests.items():
        if requested == "auto":
            requested = PART_FORMATS[kind] if kind in scored else None
        if requested not in {None, "none"}:
            formats[kind] = str(requested)
    if "token" in formats and not student.token_dim:
        raise InputError("this student has no token embeddings; train them with `d2llm fit-tokens`, or leave them out")
    return formats


def settled(spec: IndexSpec, student: SearchStudent, task: Task) -> IndexSpec:
    """The spec of an index of a student for a task, with formats in place of "auto"."""
    formats = part_formats(student, task, window_vectors=spec.window_vectors, token_vectors=spec.token_vectors)
    return spec.replace(task=task, window_vectors=formats.get("window"), token_vectors=formats.get("token"))


def check_parts(store: IndexStore, student: SearchStudent, task: Task) -> None:
    """Check that an index stores the token embeddings that a student's score counts, and the words that it adds.

    Raises:
        IndexMismatchError: it stores none, or those of another projection or document expansion.
    """
    if store.manifest["document_expansion"] != expansion_fingerprint(student):
        raise IndexMismatchError(f"{store.folder}: it lacks the words that the student adds to passages, or has others")
    if "token" in part_formats(student, task) and store.manifest["token_projection"] != student.token_fingerprint:
        raise IndexMismatchError(f"{store.folder}: it lacks the token embeddings that the student's score counts")


def find_source(source: object, folder: Path) -> str:
    """The folder or name of the student that is stored with an index; ``../NAME`` is a folder beside the index.

    Raises:
        InputError: none is stored, or the folder no longer exists.
    """
    if not isinstance(source, str):
        raise InputError(
            f"{folder}: the index does not say where its student is; give it with --student (in Python, "
            "Index.open(folder, student))"
        )
    if source.startswith("../"):
        source = str(folder.resolve() / source)
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise InputError(f"{folder}: its student was in {source}, which does not exist; give it with --student")
    return source


def known_source(student: SearchStudent | str | Path, folder: Path) -> str | None:
    """What an index stores about where its student can be loaded from; None, with a warning, if nobody knows."""
    if not isinstance(student, str | Path) and not hasattr(student, "source"):
        return None  # not one of ours
    source = source_of(student) if isinstance(student, str | Path) else getattr(student, "source", None)
    if isinstance(source, str) and not (Path(source).is_absolute() and not Path(source).is_dir()):
        return source
    _log.warning(
        "%s: the student was not loaded from a folder or by name, so that this index cannot find it again: give it "
        "whenever you open the index, as in Index.open(folder, student), or save it and name its folder here "
        "(student_source)",
        folder,
    )
    return None


def checked(student: SearchStudent) -> SearchStudent:
    """A student that was given as an object.

    Raises:
        InputError: it is something else.
    """
    if not hasattr(student, "fingerprint"):
        raise InputError(f"student is {shown(student)}, but must be a student, its folder, or a name")
    return student


def stored_spec(spec: IndexSpec, student: SearchStudent, source: str | None) -> StoredSpec:
    """What a new index stores of a settled spec and its student, which can be loaded from ``source``."""
    has_tokens = spec.token_vectors is not None
    assert spec.task is not None, "the spec is settled"
    return StoredSpec(
        student=student.fingerprint,
        student_config=student.config.model_dump(mode="json"),
        student_source=source,
        task=spec.task,
        dim=student.vector_dim,
        **spec.shape(),
        window_format=spec.window_vectors,
        token_format=spec.token_vectors,
        token_dim=student.token_dim if has_tokens else None,
        token_projection=student.token_fingerprint if has_tokens else None,
        document_expansion=expansion_fingerprint(student),
    )


class OpenIndex:
    """The life of an ``Index``: it is opened, read, refreshed and closed. Student and view are loaded when needed."""

    def __init__(
        self,
        storage: Storage,
        student: SearchStudent | str | Path | None = None,
        *,
        allow_missing: bool = False,
        **loading: Any,
    ) -> None:
        if not isinstance(cast("object", storage), Storage):
            raise InputError("an index is opened by Index.open(folder), and made by Index.create(folder, student)")
        self._storage = storage
        self._is_closed = False
        self._process = os.getpid()
        self._lock = RLock()
        self._allow_missing = allow_missing
        self._student_or_source = student
        self._loading = loading

    @property
    def spec(self) -> IndexSpec:
        """What this index was made to be."""
        storage = self.storage
        return StoredSpec.of_manifest(storage.manifest).as_asked(storage.metadata.fields, storage.num_shards)

    @property
    def chunking(self) -> Chunking | None:
        """How documents are split into passages; None if the index has no documents yet."""
        return read_chunking(self.storage.folder)

    @property
    def repeats_text(self) -> bool:
        """Whether passages may begin with text that repeats the end of the one before (``Chunking.chunk_overlap``)."""
        return repeats_text(self.storage.folder)

    def __repr__(self) -> str:
        """What it is, in one line; ``stats`` says more."""
        if self._is_closed:
            return f"Index({self.folder}, closed)"
        manifest = self.storage.manifest
        try:
            size = counted(len(self), "passage")
        except D2LLMError as error:
            size = f"cannot be read: {error}"
        student = name_student(manifest["student"], manifest["student_source"]).partition(" (")[0]
        task = "" if manifest["task"] == "asymmetric" else f", task {manifest['task']}"
        shards = "" if self.storage.num_shards is None else f", {counted(self.storage.num_shards, 'shard')}"
        return f"Index({self.folder}, {size}{shards}, student {student}{task})"

    @property
    def storage(self) -> Storage:
        """What is on disk.

        Raises:
            InputError: the index was closed, or opened before this process was forked.
        """
        if self._is_closed:
            raise InputError(f"{self.folder}: this Index was closed; open it again with Index.open")
        if self._process != os.getpid():
            raise InputError(
                f"{self.folder}: this Index was opened before the process was forked, and its database and threads "
                "stay with the first process; open it in this one, or start processes by "
                "multiprocessing.get_context('spawn'), to which an Index can be given"
            )
        return self._storage

    def close(self) -> None:
        """Let go of the files and the student. Everything written is on disk already; closing again does nothing.

        A ``with`` block does this at its end.

        Example::

            with Index.open("docs.index") as index:
                print(index.search("how hot should the water be?")[0].passage.text)
        """
        self._is_closed = True
        self._student_or_source = None
        for name in ("_view", "_student", "_cached_bounds"):
            self.__dict__.pop(name, None)

    def __enter__(self) -> Self:
        _ = self.storage  # refuses a closed one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """An index is copied and sent to other processes as its folder, and opened there at its latest version."""
        student = self._student_or_source
        if not isinstance(student, str | Path) and self.storage.manifest["student_source"] is not None:
            student = None  # it can be loaded there, too
        reopen = partial(cast("Any", type(self)).open, allow_missing=self._allow_missing, **self._loading)
        return reopen, (self.folder.resolve(), student)

    def __len__(self) -> int:
        return len(self.view)

    def __bool__(self) -> bool:
        return True  # an index without passages is an index, too

    @property
    def folder(self) -> Path:
        """Folder of the index."""
        return self._storage.folder

    @property
    def store(self) -> IndexStore:
        """The store of an index that is not sharded.

        Raises:
            InputError: it is sharded.
        """
        first = self.storage.stores[0]
        if self.storage.num_shards is not None:
            raise InputError(
                f"{self.folder}: this is not possible for a sharded index as a whole; do it for each of its "
                f"{self.storage.num_shards} shards, which are indexes too, such as {first.folder}"
            )
        return first

    @property
    def unsharded_view(self) -> LocalSegment:
        """The only segment of an index that is not sharded, for what needs all vectors in one file.

        Raises:
            InputError: it is sharded.
        """
        _ = self.store
        return cast("LocalSegment", self.view.segments[0])

    @property
    def student(self) -> SearchStudent:
        """The student that made the vectors.

        Raises:
            InputError: the index does not say where it is.
            IndexMismatchError: the loaded student did not make this index.
        """
        _ = self.storage  # refuses a closed one
        with self._lock:  # of several threads, one loads it
            return self._student

    @cached_property
    def _student(self) -> SearchStudent:
        source = self._student_or_source
        if source is None:
            source = find_source(self.storage.manifest["student_source"], self.folder)
        if isinstance(source, str | Path):
            from d2llm.models.engines.lean import load_to_search

            student: SearchStudent = load_to_search(source, **self._loading)
        else:
            student = checked(source)
        self.storage.check_student(student.fingerprint)
        return student

    @property
    def view(self) -> IndexView:
        """The version of the index that this object reads."""
        _ = self.storage  # refuses a closed one
        return self._view

    @cached_property
    def _view(self) -> IndexView:
        return open_view(self.storage)

    @cached_property
    def _cached_bounds(self) -> CachedBounds:
        return CachedBounds()

    def refresh(self, *, if_newer: bool = False) -> None:
        """Switch to the latest version; with ``if_newer``, only if there is a later one, which is quick to ask."""
        storage = self.storage  # refuses a closed one
        if if_newer and storage.version == self.view.version:
            return
        for name in ("_view", "_cached_bounds"):
            self.__dict__.pop(name, None)

    def get(self, ids: Iterable[str] | str) -> list[Passage]:
        """Passages with the given ids, in the same order; missing ids are skipped.

        Raises:
            InputError: an id is not valid text.
        """
        return self.view.get(strings_of(ids, "ids"))

    def get_document(self, document_id: str) -> list[Passage]:
        """The passages of a document, by position; empty if there is no such document.

        Raises:
            InputError: the id is not valid text.
        """
        return self.view.document(document_id)

    def list_passages(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[str]:
        """One page of passage ids, in order: the first ``limit`` ids after ``cursor``.

        Raises:
            InputError: ``cursor`` is not valid text, or ``limit`` is below 1.
        """
        return self.view.list_passages(cursor, limit)

    def list_documents(self, cursor: str = "", limit: int = PAGE_SIZE) -> list[ListedDocument]:
        """Like ``list_passages``, for documents with passage counts; a passage without a document counts as one."""
        return self.view.list_documents(cursor, limit)

    def missing(self, ids: Iterable[str] | str) -> list[str]:
        """Ids that are not in the latest version, in the given order, without duplicates.

        Raises:
            InputError: an id is not valid text.
        """
        distinct = list(dict.fromkeys(strings_of(ids, "ids")))
        present = {record["id"] for table in self.storage.tables() for record in table.by_ids(distinct, ["id"])}
        return [passage_id for passage_id in distinct if passage_id not in present]
