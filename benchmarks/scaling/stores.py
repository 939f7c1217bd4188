"""Other stores on the same vectors: LanceDB's own vector search, and Chroma as a server if it is installed."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2llm import Student
from d2llm.core.files import folder_bytes
from d2llm.core.types import PartKind, Passage, Task
from d2llm.retrieval.index import Index
from d2llm.store.blocks import record_of
from d2llm.store.index_manifest import VectorCopies
from d2llm.store.index_store import IndexStore
from d2llm.store.part_vectors import PartVectors
from d2llm.store.schema import MetadataSchema
from d2llm.store.view import PassageView
from scaling.corpus import BLOCK, Corpus, KnownVectors, Queries, with_noise
from scaling.searches import PROBES, TOP_K, Search

_ADDED_AT_ONCE = 2_000


def build(
    folder: Path,
    corpus: Corpus,
    student: KnownVectors,
    vector_format: str,
    vector_copies: VectorCopies = 2,
    window_vectors: str | None = None,
    token_vectors: str | None = None,
    num_written: int | None = None,
) -> dict[str, float]:
    """Write a corpus as a user does (``Index.add``), without encoding; its times and sizes.

    With ``num_written``, only so many passages are written that way, and times are theirs. The others are copies of
    them (``append_copies``), which takes a twentieth of the time.
    """
    written = corpus.first(num_written or corpus.size)
    index = Index.create(
        folder,
        student,
        vector_format=vector_format,
        vector_copies=vector_copies,
        window_vectors=window_vectors,
        token_vectors=token_vectors,
    )
    wall, processor = time.perf_counter(), time.process_time()
    text_bytes = 0

    def passages() -> Iterator[Passage]:
        nonlocal text_bytes
        for passage in student.passages_of(written):
            text_bytes += len(passage.full_text.encode())
            yield passage

    index.add(passages())
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    if written.size < corpus.size:
        append_copies(IndexStore.open(folder), corpus.size)
    after_build = folder_bytes(folder)
    begin = time.process_time()
    index.compact(timedelta(0))
    facts = IndexStore.open(folder), index.stats()
    size = corpus.size
    return {
        "rows": size,
        "seconds": wall,
        "cpu_seconds": processor,
        "rows_per_cpu_second": written.size / processor,
        "compact_cpu_seconds": time.process_time() - begin,
        "bytes_before_compact": after_build / size,
        "vector_copies": vector_copies,
        "vector_bytes": facts[0].format.code_size,
        "table_bytes": facts[1].table_bytes / size,
        "vector_file_bytes": facts[1].vector_file_bytes / size,
        "word_bytes": facts[1].word_bytes / size,
        "window_bytes": facts[1].window_bytes / size,
        "token_bytes": facts[1].token_bytes / size,
        "bytes": folder_bytes(folder) / size,
        "text_bytes": text_bytes / written.size,
    }


def append_copies(store: IndexStore, num_passages: int) -> None:
    """Fill an index up to ``num_passages`` with copies of its passages, under other ids and with noise in the vectors.

    Texts, words, windows and tokens of a copy are those of its original; as in ``retrieval.shard``, nothing is read.
    """
    view, random = PassageView(store), np.random.default_rng(0)
    rows = view.live_rows()
    step = min(BLOCK, len(rows))
    for number, start in enumerate(range(len(rows), num_passages, step)):
        chosen = np.sort(np.roll(rows, -number * step)[: num_passages - start][:step])
        stored = view.vectors(chosen)
        norms = np.linalg.norm(stored, axis=1, keepdims=True)
        vectors = norms * with_noise(stored / norms, random.standard_normal(stored.shape, np.float32))
        passages = [
            replace(passage, id=f"copy-{row:07}") for row, passage in enumerate(view.passages(chosen), start=start)
        ]
        codes = store.format.encode(vectors, [passage.id for passage in passages])
        has_vectors = store.vector_copies == 2
        block = [
            record_of(
                passage,
                MetadataSchema({}),
                0,
                {"d2_truncated": False, "d2_words": "", "d2_vector": code.tobytes() if has_vectors else None},
            )
            for passage, code in zip(passages, codes, strict=True)
        ]
        parts: dict[PartKind, PartVectors | None] = {"window": view.windows, "token": view.tokens}
        taken: dict[PartKind, Any] = {kind: part.take(chosen) for kind, part in parts.items() if part is not None}
        store.append_rows(block, codes, view.own_words.take(chosen), taken)


def lance_searches(
    folder: Path, vectors: NDArray[np.float32], student: Student, task_queries: Queries, task: Task
) -> tuple[dict[str, Search], dict[str, float]]:
    """A LanceDB table of the vectors in float32: flat, then with an IVF-PQ index. Also the processor time to build."""
    import lancedb  # here, because it loads slowly, and the tests of what is measured do without it

    dot_queries = student.query_vectors(task_queries.vectors, task)
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.process_time()
    schema = pa.schema({"row": pa.int64(), "vector": pa.list_(pa.float32(), vectors.shape[1])})

    def batches() -> Generator[pa.RecordBatch]:
        for start in range(0, len(vectors), BLOCK):
            part = vectors[start : start + BLOCK]
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1])
            yield pa.record_batch([pa.array(np.arange(start, start + len(part))), column], schema=schema)

    database = lancedb.connect(folder)
    flat: Any = database.create_table("flat", pa.RecordBatchReader.from_batches(schema, batches()))
    inverted: Any = database.create_table("ivf", pa.RecordBatchReader.from_batches(schema, batches()))
    written = time.process_time() - begin
    begin = time.process_time()
    inverted.create_index(metric="dot", index_type="IVF_PQ", num_sub_vectors=48, vector_column_name="vector")
    times = {"write": written / 2, "ivf_pq": time.process_time() - begin}

    def rows_of(query: Any) -> list[int]:
        return query.limit(TOP_K).select(["row", "_distance"]).to_arrow()["row"].to_pylist()

    searches: dict[str, Search] = {
        "LanceDB flat": lambda number: rows_of(flat.search(dot_queries[number]).distance_type("dot"))
    }
    for probes in PROBES[1:]:
        searches[f"LanceDB IVF-PQ, {probes} probes, re-ranked"] = lambda number, probes=probes: rows_of(
            inverted.search(dot_queries[number]).distance_type("dot").nprobes(probes).refine_factor(10)
        )
    return searches, times


@contextmanager
def chroma_search(
    folder: Path, python: str | None, vectors: NDArray[np.float32], student: Student, task_queries: Queries, task: Task
) -> Generator[tuple[dict[str, Search], dict[str, Any]]]:
    """Chroma's server on this machine, searched over HTTP; if it is not installed, nothing and the reason.

    ``python``: one that has ``chromadb``, if this one does not; its site-packages are appended to the path.
    """
    dot_queries = student.query_vectors(task_queries.vectors, task)
    program = Path(python or sys.executable).parent / "chroma"
    if python is not None:
        sys.path += [str(path) for path in Path(python).parents[1].glob("lib/python*/site-packages")]
    if importlib.util.find_spec("chromadb") is None or not program.is_file():
        yield {}, {"skipped": "chromadb is not installed (pip install chromadb)"}
        return
    import chromadb  # pyright: ignore[reportMissingImports]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.rmtree(folder, ignore_errors=True)
    server = subprocess.Popen(
        [str(program), "run", "--path", str(folder), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client = _wait(lambda: chromadb.HttpClient("127.0.0.1", port))
        begin = time.perf_counter()
        collection = client.create_collection("scale", metadata={"hnsw:space": "ip"})
        for start in range(0, len(vectors), _ADDED_AT_ONCE):
            part = vectors[start : start + _ADDED_AT_ONCE]
            collection.add(ids=[str(start + index) for index in range(len(part))], embeddings=part)
        seconds = time.perf_counter() - begin

        def search(number: int) -> list[int]:
            answer = collection.query(
                query_embeddings=dot_queries[number][None], n_results=TOP_K, include=["distances"]
            )
            return [int(row) for row in answer["ids"][0]]

        yield {"Chroma server (HNSW)": search}, {"build_seconds": seconds, "version": chromadb.__version__}
    finally:
        server.terminate()
        server.wait()


def _wait(connect: Any) -> Any:
    for _ in range(100):
        try:
            return connect()
        except ValueError:
            time.sleep(0.2)
    raise RuntimeError("the server did not come up within 20 seconds")
