"""``Index``: a durable, updatable store of passages together with the student that encodes and searches them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, cast, overload

from d2llm.core.errors import InputError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.inputs import check_count, check_kind, objects_of, path_of, strings_of
from d2llm.core.progress import progress_bar
from d2llm.core.settings import shows
from d2llm.core.types import (
    EngineName,
    Excerpt,
    Passage,
    Query,
    RankedPassage,
    Ranking,
    Task,
)
from d2llm.data.python_records import PassageLike, QueryLike, Record, Table, is_one_query, one_query_of, passages_of
from d2llm.models.protocols import SearchStudent, task_for
from d2llm.retrieval.open_index import OpenIndex, checked, known_source, settled, stored_spec
from d2llm.retrieval.settings import AnnSettings, ContextSettings, SearchSettings
from d2llm.store.index_manifest import Chunking, find_index
from d2llm.store.index_spec import IndexSpec
from d2llm.store.index_store import KEEP_VERSIONS, IndexStore
from d2llm.store.inspection import IndexStats, VerifyReport, stats_of_all
from d2llm.store.schema import MetadataSchema
from d2llm.store.shards import Storage

# Reading an index without searching it requires neither torch nor a student, so these are imported where they are used.
if TYPE_CHECKING:
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer

    from d2llm.models.student import Student
    from d2llm.models.teachers.pair_teacher import PairTeacher
    from d2llm.ops.rereading import StudentError
    from d2llm.retrieval.build_ann import AnnReport
    from d2llm.retrieval.chunking import Chunker
    from d2llm.retrieval.context import AnswerContext
    from d2llm.retrieval.expansion import Expansion
    from d2llm.retrieval.reading import EncodedPassages
    from d2llm.retrieval.reranker import RerankerLike
    from d2llm.retrieval.rewriting import History, Rewriter
    from d2llm.retrieval.scoring_corpus import IndexCorpus
    from d2llm.retrieval.upserting import DocumentsReport, UpsertReport
    from d2llm.runners.runner import Workers


class Index(OpenIndex):
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

    @classmethod
    @shows(IndexSpec)
    def create(
        cls,
        folder: str | Path,
        student: SearchStudent | SentenceTransformer | str | Path,
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
            student: the student that makes the vectors, its folder, or the name of a shipped one. Or a
                ``SentenceTransformer``, or the folder of one: a student with its vectors that was not trained
                (``models.external``) is saved beside the index, as ``FOLDER.student``.
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
        from d2llm.models.external import is_bi_encoder, untrained_beside

        folder, spec = path_of(folder, "folder"), IndexSpec.of(spec, **changes)
        make = partial(cls._create, folder, spec, exist_ok=exist_ok, device=device, dtype=dtype, engine=engine)
        if not is_bi_encoder(student):
            return make(cast("SearchStudent | str | Path", student), student_source)
        with untrained_beside(cast("SentenceTransformer", student), folder.with_name(f"{folder.name}.student")) as made:
            return make(made, f"../{made.name}")

    @classmethod
    def _create(
        cls,
        folder: Path,
        spec: IndexSpec,
        student: SearchStudent | str | Path,
        source: str | None,
        *,
        exist_ok: bool,
        **loading: Any,
    ) -> Index:
        from d2llm.models.student import Student

        loaded = Student.load(student, **loading) if isinstance(student, str | Path) else checked(student)
        task = task_for(loaded, spec.task)
        spec = settled(spec, loaded, task)
        if exist_ok and (folder / MANIFEST_NAME).is_file():
            index = cls(Storage.open(folder), loaded)
            index.storage.check_student(loaded.fingerprint)
            for name, given, actual in spec.differing(index.spec):
                raise InputError(
                    f"{folder}: already exists with {name}={actual!r}, not {given!r}; open it as it is with "
                    "Index.open, or give another folder"
                )
            return index
        stored = stored_spec(spec, loaded, source or known_source(student, folder))
        fields = MetadataSchema(spec.metadata or {})
        return cls(Storage.create(folder, stored, num_shards=spec.num_shards, metadata=fields), loaded)

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
        storage = Storage.open(find_index(path_of(folder, "folder")), allow_missing=allow_missing)
        return cls(storage, student, allow_missing=allow_missing, device=device, dtype=dtype, engine=engine, lean=lean)

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
            passages: passages, or dictionaries, dataclasses or rows with their fields, or one of them, or a table
                (``data.python_records``); consumed as a stream, never held in memory together.
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
            "Documents are split into passages: give long texts to Index.upsert_documents, or to `d2llm index upsert`",
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
        from d2llm.retrieval.upserting import upsert_documents

        student = self.student
        if isinstance(chunking, Chunker):
            chunker = chunking
        else:
            check_kind(chunking, "chunking", Chunking, Chunker, NoneType)
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
        check_kind(keep, "keep", timedelta)
        with self.storage.writing():
            sizes = [store.compact(keep, dense=dense) for store in self.storage.stores]
        self.refresh()
        return sum(before for before, _ in sizes), sum(after for _, after in sizes)

    def snapshot(self, name: str) -> Path:
        """Save the latest version under a name, as a folder that ``open`` accepts; it takes hardly any space."""
        return self.store.snapshot(name)

    @classmethod
    def from_snapshot(cls, snapshot: str | Path, folder: str | Path) -> Index:
        """Make an index in a new folder with the passages of a snapshot, whose folder is given, and open it.

        Raises:
            DataFormatError: there is no snapshot, or it is damaged.
            InputError: ``folder`` is not empty.
        """
        return cls.open(IndexStore.from_snapshot(path_of(snapshot, "snapshot"), path_of(folder, "folder")).folder)

    def restore(self, snapshot: str | Path) -> int:
        """Replace all passages by those of a snapshot (its name, or the folder of a copy); returns their number.

        Raises:
            IndexMismatchError: the copy is that of an index with other vectors.
        """
        num_passages = self.store.restore(snapshot)
        self.refresh()
        return num_passages

    # Reading -------------------------------------------------------------------------------------------------------

    def to_arrow(self, *, vectors: bool = False) -> pa.Table:  # pyright: ignore[reportUnknownParameterType] - PyArrow has no types
        """All passages with their metadata as a table of Arrow (``pl.from_arrow``, ``.to_pandas()``, DuckDB).

        Args:
            vectors: also a column ``vector``.
        """
        from d2llm.retrieval.arrow import passage_table

        return passage_table(self.view, vectors=vectors)

    @overload
    def search(
        self,
        queries: Query | str | Record,
        settings: SearchSettings | None = None,
        *,
        rerank: RerankerLike | None = None,
        expansion: Expansion | None = None,
        history: History = (),
        rewriter: Rewriter | None = None,
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
        queries: Iterable[QueryLike] | Table,
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
        history: History = (),
        rewriter: Rewriter | None = None,
        **changes: Any,
    ) -> Ranking | list[Ranking]:
        """Rank the passages for one query (a ranking) or for each of a list (a list of rankings).

        ``changes`` override single fields of the settings (``SearchSettings``). A query is a text, a ``Query``, or a
        dictionary, dataclass or row with ``text``.

        With ``rerank``, a second stage scores the candidates again: ``KIND``, ``KIND:MODEL``, a TOML file, settings of
        a reranker, or what ``retrieval.reranker.open_reranker`` has loaded for many searches. With an ``expansion``, a
        language model writes other queries, or passages that would answer them; each ranking says what it wrote.

        With a ``history``, earlier turns of a conversation (texts of the user, or dictionaries with ``role`` and
        ``content``), a ``Rewriter`` makes one query of them and the query: the ranking's ``query`` and ``rewriting``.

        Raises:
            InputError: a setting, a query or a turn is invalid, or a history is without a rewriter.
            FilterError: the filter cannot be parsed, or does not fit the metadata.
            RecipeError: there is no such reranker, or it has wrong settings.

        Example:
            >>> from d2llm import Index
            >>> with Index.create("years.index", "d2llm-minilm") as index:
            ...     _ = index.upsert([{"id": f"tea{year}", "text": "Tea.", "year": year} for year in (2023, 2025)])
            ...     [result.passage.id for result in index.search("tea", filter="year > 2024", top_k=5).passages]
            ['tea2025']
        """
        from d2llm.retrieval.reranker import open_reranker
        from d2llm.retrieval.rewriting import rewritten, with_rewriting
        from d2llm.retrieval.search import Searcher

        chosen = SearchSettings.of(settings, **changes)
        if chosen.task not in (None, self.view.task):
            task_for(self.student, chosen.task)  # warns
        searched, rewriting = rewritten(queries, history, rewriter)
        rankings = Searcher(
            self.view,
            self.student,
            chosen,
            cached=self._cached_bounds,
            rerank=None if rerank is None else open_reranker(rerank),
            expansion=expansion,
            allow_missing=self._allow_missing,
        ).rank(searched)
        rankings = with_rewriting(rankings, rewriting)
        return rankings[0] if is_one_query(queries) else rankings

    def scoring_corpus(self, student: SearchStudent, task: Task | None = None) -> IndexCorpus:
        """The latest version as the corpus of texts that are not in it (``Student.rank(..., index=index)``).

        Raises:
            IndexMismatchError: another student made the index.
        """
        from d2llm.retrieval.scoring_corpus import IndexCorpus

        return IndexCorpus(self.view, student, task, allow_missing=self._allow_missing)

    def around(self, results: Iterable[RankedPassage] | RankedPassage, distance: int = 1) -> list[Excerpt]:
        """Results with the passages around them in their documents, neighbouring ones merged (``merge_neighbours``).

        Args:
            results: entries of a ranking, best first.
            distance: how many positions before and after each result to include; 0 only merges neighbouring results.

        Raises:
            InputError: ``distance`` is below 0.
        """
        from d2llm.retrieval.results import merge_neighbours, with_neighbours

        check_count(distance, "distance", 0)
        ranked = objects_of(results, "results", RankedPassage)
        return merge_neighbours(with_neighbours(self.view, ranked, distance), overlapping=self.repeats_text)

    @shows(SearchSettings, ContextSettings)
    def context(
        self,
        query: QueryLike,
        settings: SearchSettings | None = None,
        *,
        tokenizer: str | None = None,
        rerank: RerankerLike | None = None,
        expansion: Expansion | None = None,
        history: History = (),
        rewriter: Rewriter | None = None,
        **changes: Any,
    ) -> AnswerContext:
        """The best passages for a query as one text with numbered sources, for a language model to answer from.

        The ``top_k`` results fill the text in order, with those ``neighbours`` that fit, and without near duplicates.

        Args:
            query: the query.
            settings: how to search.
            tokenizer: the model whose tokens count: a folder or a name; None: the student.
            rerank: a reranker, as in ``search``.
            expansion: a language model that expands the query, as in ``search``.
            history: earlier turns of the conversation that the query belongs to, as in ``search``.
            rewriter: makes one query of them, as in ``search``.
            changes: fields of ``ContextSettings``, and single fields of the settings, as in
                ``index.context(query, max_tokens=500, top_k=20, neighbours=1)``.

        Raises:
            InputError: a setting or the query is invalid.
            FilterError: the filter cannot be parsed, or does not fit the metadata.
            ModelNotFoundError: there is no such tokenizer.
        """
        from d2llm.retrieval.context import answering_sentences, build_context, context_settings, named_tokenizer

        asked = one_query_of(query, "a context")
        text = ContextSettings(**{name: changes.pop(name) for name in ContextSettings.model_fields if name in changes})
        chosen = context_settings(SearchSettings.of(settings, **changes))
        student = cast("Student", self.student)  # only a Student has a tokenizer to count with
        token_ends = student.backbone.token_ends if tokenizer is None else named_tokenizer(tokenizer)
        ranking = self.search(asked, chosen, rerank=rerank, expansion=expansion, history=history, rewriter=rewriter)
        ranking = answering_sentences(ranking, student, chosen.task or self.view.task, text.answering)
        return build_context(ranking, token_ends, text.max_tokens, order=text.order, overlapping=self.repeats_text)

    @shows(AnnSettings)
    def build_ann(
        self,
        settings: AnnSettings | None = None,
        *,
        queries: Iterable[QueryLike] | QueryLike | None = None,
        **changes: Any,
    ) -> AnnReport:
        """Build an approximate index for searches with ``sources=("ann",)``; see ``retrieval.build_ann.build_ann``."""
        from d2llm.retrieval.build_ann import build_ann

        report = build_ann(self.store, self.student, settings, queries=queries, **changes)
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
        from d2llm.retrieval.verify import verify_index

        report = verify_index(self.storage, lambda: self.student, repair=repair, drop_lost=drop_lost)
        self.refresh()
        return report
