"""``Index``: a durable, updatable store of passages together with the student that encodes and searches them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError, IndexMismatchError, InputError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.inputs import objects_of, strings_of
from d2llm.core.manifest import source_of
from d2llm.core.progress import Advance, progress_bar
from d2llm.core.settings import shows
from d2llm.core.shipped import name_student
from d2llm.core.types import (
    DEFAULT_ANN_RECALL,
    DEFAULT_CONTEXT_TOKENS,
    DEFAULT_NUM_CANDIDATES,
    ContextOrder,
    EngineName,
    Excerpt,
    PartKind,
    Passage,
    Query,
    RankedPassage,
    Ranking,
    Task,
)
from d2llm.data.python_records import PassageLike, QueryLike, is_one_query, one_query_of, passages_of
from d2llm.retrieval.exact_search import CachedBounds
from d2llm.retrieval.local_segment import LocalSegment, open_view
from d2llm.retrieval.protocols import SearchStudent, expansion_fingerprint, task_for
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.index_manifest import find_index
from d2llm.store.index_spec import IndexSpec, StoredSpec
from d2llm.store.index_store import KEEP_VERSIONS, IndexStore
from d2llm.store.inspection import IndexStats, VerifyReport, stats_of_all, verify_all
from d2llm.store.part_vectors import EncodedParts
from d2llm.store.passage_table import PAGE_SIZE, ListedDocument
from d2llm.store.schema import MetadataSchema
from d2llm.store.shards import Storage
from d2llm.store.side_files import Chunking, read_chunking, repeats_text

# Reading an index without searching it requires neither torch nor a student, so these are imported where they are used.
if TYPE_CHECKING:
    from d2llm.models.student import Student
    from d2llm.models.teachers.pair_teacher import PairTeacher
    from d2llm.ops.rereading import StudentError
    from d2llm.retrieval.build_ann import AnnReport
    from d2llm.retrieval.chunking import Chunker
    from d2llm.retrieval.context import AnswerContext
    from d2llm.retrieval.expansion import Expansion
    from d2llm.retrieval.reading import EncodedPassages
    from d2llm.retrieval.reranker import RerankerLike
    from d2llm.retrieval.upserting import UpsertReport
    from d2llm.retrieval.upserting_documents import DocumentsReport
    from d2llm.runners.runner import Workers


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
    counted = student.feature_weights(task).part_kinds
    formats: dict[PartKind, str] = {}
    requests: dict[PartKind, str | None] = {"window": window_vectors, "token": token_vectors}
    for kind, requested in requests.items():
        if requested == "auto":
            requested = PART_FORMATS[kind] if kind in counted else None
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


def _known_source(student: SearchStudent | str | Path, folder: Path) -> str | None:
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


class Index:
    """A folder of passages that can be searched and changed. Make one with ``create``; open one with ``open``.

    All reads see one version of it until ``refresh``; a write through this object refreshes it.

    Example:
        >>> from d2llm import Index
        >>> index = Index.create("tea.index", "d2llm-minilm")
        >>> _ = index.upsert([{"id": "tea", "text": "Green tea is hot."}, {"id": "bees", "text": "Bees make honey."}])
        >>> index.search("what do bees make?", top_k=1)[0].passage.id
        'bees'
        >>> [len(ranking) for ranking in index.search(["bees", "tea"])]
        [2, 2]
        >>> index
        Index(tea.index, 2 passages, student d2llm-minilm)
        >>> index.close()
    """

    def __init__(
        self,
        storage: Storage,
        student: SearchStudent | str | Path | None,
        *,
        allow_missing: bool = False,
        **loading: Any,
    ) -> None:
        self._storage = storage
        self._is_closed = False
        self._allow_missing = allow_missing
        self._student_or_source = student
        self._loading = loading

    @classmethod
    @shows(IndexSpec)
    def create(
        cls,
        folder: str | Path,
        student: SearchStudent | str | Path,
        spec: IndexSpec | None = None,
        *,
        student_source: str | None = None,
        exist_ok: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        engine: EngineName = "auto",
        **changes: Any,
    ) -> Index:
        """Make an index without passages; with ``exist_ok``, or open the one that is there.

        Args:
            folder: must not exist, or be empty, unless ``exist_ok``.
            student: the student that makes the vectors, its folder, or the name of a shipped one.
            spec: what the index is to be.
            student_source: where ``open`` can load the student again; by default where it was loaded from or saved.
            exist_ok: open the index if there is one in the folder, which must be as these arguments describe it.
            device: device of the student, if it has to be loaded.
            dtype: its number format.
            engine: the engine that encodes texts; ``auto`` exports the student's graph once (``models.engines``).
            changes: override single fields of the spec, as in ``Index.create(folder, student, vector_format="int8")``.

        Raises:
            InputError: the folder is not empty, or a format, field or type is unknown; with ``exist_ok``, the index
                there is another one than these arguments describe.
            IndexMismatchError: with ``exist_ok``, another student made the index there.
            ModelError: the student cannot be loaded.
        """
        from d2llm.models.student import Student

        is_named = isinstance(student, str | Path)
        loaded = Student.load(student, device=device, dtype=dtype, engine=engine) if is_named else student
        spec = IndexSpec.of(spec, **changes)
        task = task_for(loaded, spec.task)
        spec = settled(spec, loaded, task)
        folder = Path(folder)
        if exist_ok and (folder / MANIFEST_NAME).is_file():
            index = cls(Storage.open(folder), loaded)
            index.storage.check_student(loaded.fingerprint)
            for name, given, actual in spec.differing(index.spec):
                raise InputError(
                    f"{folder}: already exists with {name}={actual!r}, not {given!r}; open it as it is with "
                    "Index.open, or give another folder"
                )
            return index
        tokens = loaded if spec.token_vectors is not None else None
        stored = StoredSpec(
            student=loaded.fingerprint,
            student_config=loaded.config.model_dump(mode="json"),
            student_source=_known_source(student, folder) if student_source is None or is_named else student_source,
            task=task,
            dim=loaded.vector_dim,
            **spec.shape(),
            window_format=spec.window_vectors,
            token_format=spec.token_vectors,
            token_dim=None if tokens is None else tokens.token_dim,
            token_projection=None if tokens is None else tokens.token_fingerprint,
            document_expansion=expansion_fingerprint(loaded),
        )
        fields = MetadataSchema(spec.metadata or {})
        return cls(Storage.create(folder, stored, num_shards=spec.num_shards, metadata=fields), loaded)

    @property
    def spec(self) -> IndexSpec:
        """What this index was made to be."""
        storage = self.storage
        return StoredSpec.of_manifest(storage.manifest).as_asked(storage.metadata.fields, storage.num_shards)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        student: SearchStudent | str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        engine: EngineName = "auto",
        lean: bool = False,
        allow_missing: bool = False,
    ) -> Index:
        """Open an existing index. Its student is loaded when it is first needed.

        Args:
            folder: folder of an index, sharded or not, of a snapshot, or of a fit (``fit``).
            student: the student that made the index, if it has been moved since.
            device: device of the student.
            dtype: its number format.
            engine: the engine that encodes texts; ``auto`` is torch if no graph was exported on this machine.
            lean: if the student allows it, read it without torch, in float32 on the CPU (``models.engines.lean``): much
                quicker for a few searches without changes.
            allow_missing: search a sharded index without the shards that cannot be read; rankings name them
                (``Ranking.missing_shards``).

        Raises:
            DataFormatError: there is no index, or it or one of its shards is missing or damaged.
            IndexMismatchError: a shard belongs to another index, or was made by another student.
            InputError: a shard in object storage cannot be read.
        """
        storage = Storage.open(find_index(Path(folder)), allow_missing=allow_missing)
        return cls(storage, student, allow_missing=allow_missing, device=device, dtype=dtype, engine=engine, lean=lean)

    def __repr__(self) -> str:
        """What it is, in one line; ``stats`` says more."""
        if self._is_closed:
            return f"Index({self.folder}, closed)"
        manifest = self.storage.manifest
        try:
            size = f"{len(self):,} passage{'' if len(self) == 1 else 's'}"
        except D2LLMError as error:
            size = f"cannot be read: {error}"
        student = name_student(manifest["student"], manifest["student_source"]).partition(" (")[0]
        task = "" if manifest["task"] == "asymmetric" else f", task {manifest['task']}"
        shards = "" if self.storage.num_shards is None else f", {self.storage.num_shards} shards"
        return f"Index({self.folder}, {size}{shards}, student {student}{task})"

    @property
    def storage(self) -> Storage:
        """What is on disk.

        Raises:
            InputError: the index was closed.
        """
        if self._is_closed:
            raise InputError(f"{self.folder}: this Index was closed; open it again with Index.open")
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
        for name in ("view", "student", "_cached_bounds"):
            self.__dict__.pop(name, None)

    def __enter__(self) -> Index:
        _ = self.storage  # refuses a closed one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.view)

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

    @cached_property
    def student(self) -> SearchStudent:
        """The student that made the vectors.

        Raises:
            InputError: the index does not say where it is.
            IndexMismatchError: the loaded student did not make this index.
        """
        source = self._student_or_source
        if source is None:
            source = find_source(self.storage.manifest["student_source"], self.folder)
        if isinstance(source, str | Path):
            from d2llm.models.engines.lean import load_to_search

            student: SearchStudent = load_to_search(source, **self._loading)
        else:
            student = source
        self.storage.check_student(student.fingerprint)
        return student

    @cached_property
    def view(self) -> IndexView:
        """The version of the index that this object reads."""
        return open_view(self.storage)

    @cached_property
    def _cached_bounds(self) -> CachedBounds:
        return CachedBounds()

    def refresh(self) -> None:
        """Switch to the latest version."""
        _ = self.storage  # refuses a closed one
        for name in ("view", "_cached_bounds"):
            self.__dict__.pop(name, None)

    # Changing ------------------------------------------------------------------------------------------------------

    def add(
        self,
        passages: Iterable[PassageLike] | PassageLike,
        *,
        lenient_metadata: bool = False,
        num_passages: int | None = None,
        readers: Workers[Sequence[Passage], EncodedPassages] | None = None,
    ) -> UpsertReport:
        """``upsert``, but for new passages only.

        Raises:
            DuplicateIdError: a passage already exists; blocks already written are kept.
        """
        return self.upsert(
            passages, only_new=True, lenient_metadata=lenient_metadata, num_passages=num_passages, readers=readers
        )

    def upsert(
        self,
        passages: Iterable[PassageLike] | PassageLike,
        *,
        only_new: bool = False,
        lenient_metadata: bool = False,
        num_passages: int | None = None,
        readers: Workers[Sequence[Passage], EncodedPassages] | None = None,
    ) -> UpsertReport:
        """Add passages, or update those whose id exists. Unchanged texts are not encoded again.

        A late chunk counts as unchanged if all of its document is. Passages are committed in blocks of 2,048. After an
        interruption, repeat the call to continue after the last commit.

        Args:
            passages: passages, or dictionaries or rows with their fields (``data.python_records``), or one of them;
                consumed as a stream, never held in memory together.
            only_new: refuse passages whose id exists.
            lenient_metadata: drop metadata values that do not fit, and count them.
            num_passages: number of passages, for the progress bar.
            readers: workers that encode the passages instead of this process's student; for ``encode``.

        Raises:
            DuplicateIdError: two passages share an id.
            InputError: a passage cannot be stored, its metadata does not fit, or its id is that of a document that was
                split; blocks already written are kept.
            IndexLockedError: another process is writing.
            StorageError: the index cannot be written; blocks already written are kept.
        """
        from d2llm.retrieval.upserting import upsert_passages, warn_of_truncation

        student = self.student
        try:
            with progress_bar("indexing", num_passages or 0) as advance:
                report = upsert_passages(
                    self.storage,
                    student,
                    passages_of(passages),
                    only_new=only_new,
                    lenient_metadata=lenient_metadata,
                    advance=advance,
                    readers=readers,
                )
        finally:
            self.refresh()
        warn_of_truncation(
            report,
            "Give long texts as documents, which are split into passages: with --chunk-tokens on the command line, "
            "upsert_documents in Python, /v1/documents over HTTP",
        )
        return report

    def upsert_documents(
        self,
        documents: Iterable[PassageLike] | PassageLike,
        chunking: Chunking | Chunker | None = None,
        *,
        only_new: bool = False,
        lenient_metadata: bool = False,
        num_documents: int | None = None,
        readers: Workers[Sequence[Passage], EncodedPassages] | None = None,
    ) -> DocumentsReport:
        """Add or update texts of any length; long ones are split, and passages that a document no longer has deleted.

        The index stores its chunking and refuses documents with a different one; ``chunking`` None uses the index's, or
        the default for its first documents. A ``Chunker`` splits them itself. Other arguments and errors are those of
        ``upsert``, for documents.

        Raises:
            InputError: the index has a different chunking, or as for ``upsert`` or ``Chunker``.
        """
        from d2llm.retrieval.chunking import Chunker, choose_chunking
        from d2llm.retrieval.upserting_documents import upsert_documents

        student = self.student
        if isinstance(chunking, Chunker):
            chunker = chunking
        else:
            counting = cast("Student", student)  # only a Student has a tokenizer to count with
            chunker = Chunker(counting, choose_chunking(self.folder, counting, chunking))
        try:
            return upsert_documents(
                self.storage,
                student,
                passages_of(documents, "documents"),
                chunker,
                only_new=only_new,
                lenient_metadata=lenient_metadata,
                num_documents=num_documents,
                readers=readers,
            )
        finally:
            self.refresh()

    @property
    def chunking(self) -> Chunking | None:
        """How documents are split into passages; None if the index has no documents yet."""
        return read_chunking(self.storage.folder)

    @property
    def repeats_text(self) -> bool:
        """Whether passages may begin with text that repeats the end of the one before (``Chunking.chunk_overlap``)."""
        return repeats_text(self.storage.folder)

    def delete(self, ids: Iterable[str] | str) -> int:
        """Delete passages, in one step from vectors, BM25 and results; returns their number.

        Raises:
            InputError: an id is not valid text.
            IndexLockedError: another process is writing.
        """
        num_deleted = self.storage.delete(strings_of(ids, "ids"))
        self.refresh()
        return num_deleted

    def delete_documents(self, ids: Iterable[str] | str) -> int:
        """Delete all passages of these documents; returns the number of passages.

        Raises:
            InputError: an id is not valid text.
            IndexLockedError: another process is writing.
        """
        documents = strings_of(ids, "ids")
        with self.storage.writing():
            pieces = [table.pieces_of(documents) for table in self.storage.tables()]
            passage_ids = [one for by_document in pieces for ids_of_one in by_document.values() for one in ids_of_one]
            return self.delete(passage_ids) if passage_ids else 0

    def compact(self, keep: timedelta = KEEP_VERSIONS, *, dense: bool | None = None) -> tuple[int, int]:
        """Free the space of deleted data; returns bytes before and after. Arguments: see ``IndexStore.compact``."""
        with self.storage.writing():
            sizes = [store.compact(keep, dense=dense) for store in self.storage.stores]
        self.refresh()
        return sum(before for before, _ in sizes), sum(after for _, after in sizes)

    def snapshot(self, name: str) -> Path:
        """Save the latest version under a name, as a folder that ``open`` accepts; it takes hardly any space."""
        return self.store.snapshot(name)

    def restore(self, name: str) -> int:
        """Replace the index's passages by a snapshot's; returns their number."""
        num_passages = self.store.restore(name)
        self.refresh()
        return num_passages

    # Reading -------------------------------------------------------------------------------------------------------

    def get(self, ids: Iterable[str] | str) -> list[Passage]:
        """The passages with these ids, in the order of the ids; missing ones are left out.

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
        """The ids that the latest version does not have, in their order, without repetitions.

        Raises:
            InputError: an id is not valid text.
        """
        distinct = list(dict.fromkeys(strings_of(ids, "ids")))
        present = {record["id"] for table in self.storage.tables() for record in table.by_ids(distinct, ["id"])}
        return [passage_id for passage_id in distinct if passage_id not in present]

    @overload
    def search(
        self,
        queries: Query | str,
        settings: SearchSettings | None = None,
        *,
        rerank: RerankerLike | None = None,
        expansion: Expansion | None = None,
        **changes: Any,
    ) -> Ranking: ...
    @overload
    def search(  # pyright: ignore[reportOverlappingOverload] - a dictionary is one query, or has queries by id
        self,
        queries: Mapping[str, Any],
        settings: SearchSettings | None = None,
        *,
        rerank: RerankerLike | None = None,
        expansion: Expansion | None = None,
        **changes: Any,
    ) -> Ranking | list[Ranking]: ...
    @overload
    def search(
        self,
        queries: Iterable[QueryLike],
        settings: SearchSettings | None = None,
        *,
        rerank: RerankerLike | None = None,
        expansion: Expansion | None = None,
        **changes: Any,
    ) -> list[Ranking]: ...
    @shows(SearchSettings)
    def search(
        self,
        queries: Iterable[QueryLike] | QueryLike,
        settings: SearchSettings | None = None,
        *,
        rerank: RerankerLike | None = None,
        expansion: Expansion | None = None,
        **changes: Any,
    ) -> Ranking | list[Ranking]:
        """Rank the passages for one query (a ranking) or for each of a list (a list of rankings).

        ``changes`` override single fields of the settings (``SearchSettings``). A query is a text, a ``Query``, or a
        dictionary or row with ``text``.

        With ``rerank``, a second stage scores the candidates again: ``KIND``, ``KIND:MODEL``, a TOML file, settings of
        a reranker, or what ``retrieval.reranker.open_reranker`` has loaded for many searches. With an ``expansion``, a
        language model writes other queries, or passages that would answer them; each ranking says what it wrote.

        Raises:
            InputError: a setting or query is invalid.
            FilterError: the filter cannot be parsed, or does not fit the metadata.
            RecipeError: there is no such reranker, or it has wrong settings.
        """
        from d2llm.retrieval.reranker import open_reranker
        from d2llm.retrieval.search import Searcher

        chosen = SearchSettings.of(settings, **changes)
        if chosen.task not in (None, self.view.task):
            task_for(self.student, chosen.task)  # warns
        rankings = Searcher(
            self.view,
            self.student,
            chosen,
            cached=self._cached_bounds,
            rerank=None if rerank is None else open_reranker(rerank),
            expansion=expansion,
            allow_missing=self._allow_missing,
        ).rank(queries)
        return rankings[0] if is_one_query(queries) else rankings

    def around(self, results: Iterable[RankedPassage] | RankedPassage, distance: int = 1) -> list[Excerpt]:
        """Results with the passages around them in their documents, neighbouring ones merged (``merge_neighbours``).

        Args:
            results: entries of a ranking, best first.
            distance: how many positions before and after each result to include; 0 only merges neighbouring results.

        Raises:
            InputError: ``distance`` is below 0.
        """
        from d2llm.retrieval.excerpts import merge_neighbours
        from d2llm.retrieval.results import with_neighbours

        if distance < 0:
            raise InputError(f"distance is {distance}, but counts positions: give 0 or more")
        ranked = objects_of(results, "results", RankedPassage)
        return merge_neighbours(with_neighbours(self.view, ranked, distance), overlapping=self.repeats_text)

    @shows(SearchSettings)
    def context(
        self,
        query: QueryLike,
        max_tokens: int = DEFAULT_CONTEXT_TOKENS,
        *,
        order: ContextOrder = "rank",
        tokenizer: str | None = None,
        settings: SearchSettings | None = None,
        rerank: RerankerLike | None = None,
        expansion: Expansion | None = None,
        **changes: Any,
    ) -> AnswerContext:
        """The best passages for a query as one text with numbered sources, for a language model to answer from.

        The results of a search, ``top_k`` of them, fill the text in their order; with ``neighbours``, each comes with
        those of its neighbours that fit. Near duplicates are left out, by default from a cosine of 0.95 on.

        Args:
            query: the query.
            max_tokens: maximum number of tokens of the text.
            order: ``rank``: the best source first; ``document``: sources of a document together, in its order.
            tokenizer: the model whose tokens count: a folder or a name; None: the student.
            settings: how to search.
            rerank: a reranker, as in ``search``.
            expansion: a language model that expands the query, as in ``search``.
            changes: override single fields of the settings, as in ``index.context(query, top_k=20, neighbours=1)``.

        Raises:
            InputError: a setting or the query is invalid, or ``max_tokens`` is below 1.
            FilterError: the filter cannot be parsed, or does not fit the metadata.
            ModelNotFoundError: there is no such tokenizer.
        """
        from d2llm.retrieval.context import build_context, context_settings, named_tokenizer

        asked = one_query_of(query, "a context")
        chosen = context_settings(SearchSettings.of(settings, **changes))
        student = cast("Student", self.student)  # only a Student has a tokenizer to count with
        token_ends = student.backbone.token_ends if tokenizer is None else named_tokenizer(tokenizer)
        (ranking,) = self.search([asked], chosen, rerank=rerank, expansion=expansion)
        return build_context(ranking, token_ends, max_tokens, order=order, overlapping=self.repeats_text)

    def build_ann(
        self,
        *,
        recall: float = DEFAULT_ANN_RECALL,
        depth: int = DEFAULT_NUM_CANDIDATES,
        queries: Iterable[QueryLike] | QueryLike | None = None,
    ) -> AnnReport:
        """Build an approximate index for searches with ``sources=("ann",)``; see ``retrieval.build_ann.build_ann``."""
        from d2llm.retrieval.build_ann import build_ann

        report = build_ann(self.store, self.student, recall=recall, depth=depth, queries=queries)
        self.refresh()
        return report

    def measure_error(
        self,
        teacher: PairTeacher,
        queries: Iterable[QueryLike] | QueryLike,
        *,
        task: Task | None = None,
        depth: int = 50,
        num_passages: int = 10,
    ) -> StudentError:
        """The student's error against a teacher, for rerankers; see ``retrieval.calibrate.measure_error``."""
        from d2llm.retrieval.calibrate import measure_error

        return measure_error(
            self.view, self.student, teacher, queries, task=task, depth=depth, num_passages=num_passages
        )

    def stats(self) -> IndexStats:
        """Contents of the latest version, and its size in bytes; of a sharded index, those of its shards together."""
        return stats_of_all(self.storage)

    def verify(self, *, repair: bool = False, drop_lost: bool = False) -> VerifyReport:
        """Check the integrity of the index; ``repair`` and ``drop_lost`` fix damage as in ``store.inspection.verify``.

        If only one copy of the vectors is stored, the student encodes lost ones again; after an interruption, repeat
        the call to continue. Vectors of parts are stored once: if some are damaged, all are encoded again.

        Of a sharded index, every shard is checked, and whether each passage is in the shard that it belongs in.

        Raises:
            IndexLockedError: something has to be repaired, but another process is writing.
            StorageError: a repaired file cannot be written.
        """
        with ExitStack() as stack:
            from d2llm.retrieval.reading import read_tokens, read_windows
            from d2llm.retrieval.upserting import check_projection

            @cache
            def bar(title: str) -> Advance:  # made when there is something to encode
                return stack.enter_context(progress_bar(title, None))

            def encode(passages: Sequence[Passage]) -> NDArray[np.float32]:
                advance = bar("encoding again")
                encoded = self.student.encode_passages([passage.full_text for passage in passages])
                advance(len(passages))
                return encoded.vectors

            def encode_parts(kind: PartKind, texts: Sequence[str]) -> EncodedParts:
                if kind == "token":
                    check_projection(self.storage, self.student)
                advance = bar(f"reading {kind}s again")
                parts = (read_windows if kind == "window" else read_tokens)(self.student, texts)
                advance(len(texts))
                return parts

            report = verify_all(
                self.storage, repair=repair, drop_lost=drop_lost, encode=encode, encode_parts=encode_parts
            )
        self.refresh()
        return report
