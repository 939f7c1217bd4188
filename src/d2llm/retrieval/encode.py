"""The ``encode`` verb: make an index of a whole corpus in one run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.files import MANIFEST_NAME, check_replaceable, replace_folder
from d2llm.core.fingerprint import fingerprint_json, fingerprint_passages
from d2llm.core.settings import shows
from d2llm.core.types import EngineName, Passage
from d2llm.data.documents import SkippedFile
from d2llm.data.indexed_corpus import Corpus, open_corpus
from d2llm.data.python_records import PassageLike, passages_of
from d2llm.models.fitted_part import PassageQuality
from d2llm.models.protocols import SearchStudent, expansion_fingerprint, task_for
from d2llm.retrieval.index import Index
from d2llm.retrieval.open_index import settled
from d2llm.retrieval.reading import EncodedPassages, read_passages
from d2llm.retrieval.reading import load_student as load_named_student
from d2llm.retrieval.upserting import BLOCK_PASSAGES, DocumentsReport, UpsertReport
from d2llm.runners.placement import Load, find_runner, load_work
from d2llm.runners.runner import Runner, Workers
from d2llm.store.index_manifest import FORMAT_VERSION, KIND, SHARDED_KIND, Chunking
from d2llm.store.index_spec import IndexSpec
from d2llm.store.shards import Storage
from d2llm.store.vector_formats import make_format

_Readers: TypeAlias = AbstractContextManager[Workers[Sequence[Passage], EncodedPassages] | None]


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What ``encode`` did: ``num_documents`` texts became ``num_passages`` passages (equal if none was split).

    ``num_resumed`` passages were taken over from an interrupted run; tokens (without padding), ``seconds`` (including
    writing) and ``passages_per_second`` count this run alone. ``vector_bytes_per_passage`` is the size of one stored
    vector, ``bytes_per_passage`` the size of the whole index per passage. ``num_blank`` passages have only white space.
    ``skipped`` are files of a folder of documents that could not be read. ``num_pruned`` passages were encoded and then
    left out, because their quality was lowest; ``num_passages`` counts them too.
    """

    folder: Path
    num_documents: int
    num_passages: int
    num_resumed: int
    num_truncated: int
    num_tokens: int
    seconds: float
    passages_per_second: float
    vector_bytes_per_passage: int
    bytes_per_passage: float
    num_blank: int = 0
    skipped: tuple[SkippedFile, ...] = ()
    num_pruned: int = 0


@shows(IndexSpec)
def encode(
    corpus: str | Path | Corpus | Iterable[PassageLike] | PassageLike,
    student: SearchStudent,
    folder: str | Path,
    spec: IndexSpec | None = None,
    *,
    chunking: Chunking | None = None,
    prune: float = 0.0,
    student_source: str | None = None,
    overwrite: bool = False,
    runner: str | Runner = "local",
    device: str | None = None,
    dtype: str | None = None,
    engine: EngineName = "torch",
    load_student: Load | None = None,
    **changes: Any,
) -> EncodeReport:
    """Make the index of a corpus; it appears at ``folder`` when it is complete, and can be changed from then on.

    An interrupted run resumes when it is called again. A corpus file is read as a stream, never held in memory whole.

    Args:
        corpus: a ``corpus.jsonl[.gz]`` file, a folder that contains one, a folder of documents, or the passages
            themselves, which may be dictionaries (``Index.upsert``).
        student: makes the vectors; with a cluster, its workers' copies do.
        folder: the index's folder. Until the index is complete, it is in a hidden folder next to it.
        spec: what the index is to be.
        chunking: how long texts are split into passages; None makes each text a passage.
        prune: leave out this fraction of the passages, those that the student's quality (``models.fitted_part``) puts
            lowest.
        student_source: the folder or name that the student was loaded from, stored so that a search can load it again;
            by default the one that the student remembers.
        overwrite: replace an index at ``folder``, including its snapshots.
        runner: where the passages are encoded: by ``student`` in this process (``local``), or on the workers of a Ray
            cluster (``ray``, ``ray:ADDRESS``, or a ``RayRunner``). This process alone splits texts and writes the
            index, and the passages of a block are the same.
        device: for a cluster: where its workers compute; they load the student from ``student_source``.
        dtype: for a cluster: its workers' number format.
        engine: for a cluster: its workers' engine (``Student.load``).
        load_student: for a cluster: how its workers load the student, if not from ``student_source``; picklable.
        changes: override single fields of the spec.

    Raises:
        InputError: there are no passages, ``folder`` exists, a format is unknown, a vector is not finite, there is no
            such runner or cluster, or a cluster cannot know where the student is; ``prune`` is not a fraction, or the
            student has no quality.
        MismatchError: a worker has other versions than this process, or another student at this path.
        ModelError: workers end again and again.
        DataFormatError: the corpus file is missing or malformed (names file and line).
        DuplicateIdError: two passages share an id.
        IndexLockedError: after encoding, another process is writing to the index at ``folder``.

    Example:
        >>> from d2llm import Index, Student, encode
        >>> report = encode("DATA", Student.load("d2llm-minilm"), "data.index", vector_format="int8")
        >>> Index.open("data.index").spec.vector_format
        'int8'
    """
    folder = Path(folder)
    spec = IndexSpec.of(spec, **changes)
    spec = settled(spec, student, spec.task or task_for(student))  # its creation compares the task with the student's
    runner = find_runner(runner)
    student_source = student_source or getattr(student, "source", None)
    load = _find_load(runner, load_student, student_source, {"device": device, "dtype": dtype, "engine": engine})
    _check_folder(folder, spec, overwrite=overwrite)
    make_format(spec.vector_format, student.vector_dim)
    quality = _find_quality(student, prune)
    texts = _corpus_of(corpus)
    if texts.num_documents == 0:
        raise InputError(f"{folder}: there are no passages; an index needs at least one")
    pruning = None if quality is None else [prune, quality.model_dump()]
    key = _draft_key(student, texts.fingerprint, spec, chunking, pruning)
    draft = folder.parent / f".{folder.name}.work-{key}"
    begin = time.perf_counter()
    if (draft / MANIFEST_NAME).is_file():
        index = Index.open(draft, student)
    else:
        index = Index.create(draft, student, spec, student_source=student_source)
    readers = _readers(runner, index.storage, load, device=device)
    report = _fill(index, texts, chunking, readers, folder=folder)
    num_pruned = 0 if quality is None else _prune(index, quality, prune)
    facts = index.stats()
    with _no_other_writer(folder):
        replace_folder(draft, folder)
    seconds = time.perf_counter() - begin
    return EncodeReport(
        folder=folder,
        num_documents=report.num_documents if isinstance(report, DocumentsReport) else report.num_passages,
        num_passages=report.num_passages,
        num_resumed=report.num_unchanged,
        num_truncated=facts.num_truncated,
        num_tokens=report.num_tokens,
        seconds=seconds,
        passages_per_second=report.num_added / max(seconds, 1e-9),
        vector_bytes_per_passage=facts.vector_bytes,
        bytes_per_passage=facts.bytes_per_passage,
        num_blank=report.num_blank,
        skipped=tuple(texts.skipped),
        num_pruned=num_pruned,
    )


def _check_folder(folder: Path, spec: IndexSpec, *, overwrite: bool) -> None:
    """Refuse to replace what d2llm did not write, and an index without ``overwrite``."""
    check_replaceable(folder, KIND if spec.num_shards is None else SHARDED_KIND)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"{folder}: already holds an index; give another folder, or replace it (--overwrite; in Python, "
            "overwrite=True)"
        )


def _corpus_of(corpus: str | Path | Corpus | Iterable[PassageLike] | PassageLike) -> Corpus:
    if isinstance(corpus, str | Path):
        return open_corpus([Path(corpus)])
    if isinstance(corpus, Corpus):
        return corpus
    passages = list(passages_of(corpus, "corpus"))
    return Corpus(passages, len(passages), fingerprint_passages(passages))


def _fill(index: Index, corpus: Corpus, chunking: Chunking | None, readers: _Readers, *, folder: Path) -> UpsertReport:
    """Encode the texts of a corpus into an index; one that has none of them in the end is deleted."""
    lenient, num = corpus.from_files, corpus.num_documents
    try:
        with readers as workers:
            if chunking is None:
                report = index.upsert(corpus.passages, lenient_metadata=lenient, num_passages=num, readers=workers)
            else:
                report = index.upsert_documents(
                    corpus.passages, chunking, lenient_metadata=lenient, num_documents=num, readers=workers
                )
        if not len(index.storage):
            raise InputError(f"{folder}: no document could be read; the first: {corpus.skipped[0]}")
    except BaseException:
        if not len(index.storage):  # nothing that another call could resume
            shutil.rmtree(index.folder, ignore_errors=True)
        raise
    return report


def _find_quality(student: SearchStudent, prune: float) -> PassageQuality | None:
    """The quality by which passages are left out; None if none are."""
    if not 0 <= prune < 1:
        raise InputError(f"prune is {prune:g}, but must be a fraction of the passages: at least 0 and below 1")
    if not prune:
        return None
    if student.quality is None:
        raise InputError(
            "passages are pruned by their quality, which this student does not have; fit it on judged data sets "
            "(d2llm fit-scores --quality)"
        )
    return student.quality


def _prune(index: Index, quality: PassageQuality, fraction: float) -> int:
    """Delete the passages with the lowest quality from an index, ties by id, and free their space; how many."""
    view = index.view
    rows = view.live_rows()
    blocks = [rows[start : start + BLOCK_PASSAGES] for start in range(0, len(rows), BLOCK_PASSAGES)]
    qualities = np.concatenate([quality.of(view.vectors(block)) for block in blocks])
    ids = np.array(view.ids(rows))
    lowest = np.lexsort((ids, qualities))[: int(fraction * len(rows))]
    if len(lowest):
        index.delete(ids[lowest].tolist())
        index.compact(timedelta(0), dense=True)
    return len(lowest)


def _find_load(runner: Runner, load: Load | None, source: str | None, loading: Mapping[str, Any]) -> Load | None:
    """How workers load the student: as the caller says, else from its folder or name; None in this process."""
    if runner.is_local or load is not None:
        return load
    if source is None:
        raise InputError("the workers of a cluster load the student themselves; name its folder (student_source)")
    return partial(load_named_student, source, **loading)


def _draft_key(
    student: SearchStudent, corpus: str, spec: IndexSpec, chunking: Chunking | None, pruning: object | None
) -> str:
    """A different student, corpus or spec gets a different folder, so runs never mix."""
    tokens = student.token_fingerprint if spec.token_vectors is not None else None
    made_by = [student.fingerprint, tokens, expansion_fingerprint(student)]
    pieces = None if chunking is None else asdict(chunking)
    return fingerprint_json([FORMAT_VERSION, made_by, corpus, spec.model_dump(), pieces, pruning])


def _readers(runner: Runner, storage: Storage, load: Load | None, *, device: str | None) -> _Readers:
    """The workers of a cluster that encode passages for an index; None in this process, whose student does it."""
    if runner.is_local or load is None:
        return nullcontext()
    manifest = storage.manifest
    projection, expansion = manifest["token_projection"], manifest["document_expansion"]
    identity = _describe(manifest["student"], projection, expansion)
    identify = partial(_identify, tokens=projection is not None, words=expansion is not None)
    work = partial(read_passages, parts=tuple(storage.part_formats), expand=expansion is not None)
    return runner.workers(partial(load_work, load, identity, work, identify), device=device)


def _identify(student: SearchStudent, *, tokens: bool, words: bool) -> str:
    """The student's fingerprint with those of its projection of tokens and its document expansion, if they count."""
    projection = student.token_fingerprint if tokens else None
    return _describe(student.fingerprint, projection, expansion_fingerprint(student) if words else None)


def _describe(fingerprint: str, token_projection: str | None, document_expansion: str | None) -> str:
    named = {"projection": token_projection, "document expansion": document_expansion}
    descriptions = [f"{name} {value}" for name, value in named.items() if value is not None]
    return f"{fingerprint} with {' and '.join(descriptions)}" if descriptions else fingerprint


def _no_other_writer(folder: Path) -> AbstractContextManager[None]:
    """Hold the write lock of the index to be replaced, so that no partial write ends up in the new one."""
    try:
        return Storage.open(folder).locked()
    except InputError:  # there is no index, or none that can be written
        return nullcontext()
