"""A folder that holds an encoded corpus: vectors and texts, both memory-mapped, and what made them.

vectors.npy      [count, dim]; bfloat16 is stored as uint16 because .npy has no such type
passages.arrow   Arrow IPC file with the columns id, title, text, in the rows' order
manifest.json    kind "index": student, dtype, sizes, content hash
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError, DuplicateIdError, IndexMismatchError, InputError
from d2llm.core.files import new_folder
from d2llm.core.manifest import FILE_NAME, read_manifest, write_manifest
from d2llm.core.types import Passage, Task
from d2llm.index.vectors import STORED_AS, VectorDtype, check_dtype, compress, expand
from d2llm.ops.selection import top_rows

KIND = "index"
FORMAT_VERSION = 1
VECTORS_FILE = "vectors.npy"
PASSAGES_FILE = "passages.arrow"

_MANIFEST_FIELDS = {
    "student": str,
    "task": str,
    "count": int,
    "num_truncated": int,
    "dim": int,
    "content_hash": str,
    "bytes_per_passage": dict,
}
_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "title", "text")])
_TEXT_BLOCK = 16_384  # passages in one Arrow record batch
_PRODUCT_NUMBERS = 1 << 21  # numbers per block of the scan: 8 MB of float32 stays in the cache (measured best)


class CandidateRows(NamedTuple):
    """Proposed rows of an index, best first, with their inner products: int64 [k] and float32 [k]."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class FolderIndex:
    """An index on disk, opened for reading. Make one with ``write``, open it with ``open``."""

    live = None
    version = None

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], vectors: NDArray[Any], columns: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._stored = vectors
        self._columns = columns
        self._scan_view = torch.from_numpy(vectors.view(np.int16) if self.dtype == "bfloat16" else vectors)
        if self.dtype == "bfloat16":
            self._scan_view = self._scan_view.view(torch.bfloat16)

    @classmethod
    def write(
        cls,
        folder: Path,
        passages: Sequence[Passage],
        vectors: NDArray[np.float32] | Iterable[NDArray[np.float32]],
        *,
        student_fingerprint: str,
        student_config: Mapping[str, Any] | None = None,
        student_source: str | None = None,
        task: Task = "asymmetric",
        dtype: VectorDtype = "bfloat16",
        num_truncated: int = 0,
        overwrite: bool = False,
    ) -> FolderIndex:
        """Write an index; it appears at ``folder`` when it is complete.

        Args:
            folder: where; must not exist, or be empty, or (with ``overwrite``) be an index.
            passages: at least one, ids distinct.
            vectors: [n, dim], or blocks [b, dim] in the passages' order.
            student_fingerprint: of the student that made the vectors.
            student_config: its configuration, kept in the manifest for people to read.
            student_source: the folder or name that it was loaded from, so that a search can find it again.
            task: what a search on this index does unless told otherwise.
            dtype: how the vectors are stored.
            num_truncated: passages that the student read in part, kept in the manifest.
            overwrite: allow an index to be replaced; anything else is never replaced.

        Raises:
            InputError: no passages, a folder in the way, or vectors that do not fit the passages or are not finite.
            DuplicateIdError: two passages share an id.
        """
        check_target(folder, overwrite=overwrite)
        check_passages(passages, where=folder)
        check_dtype(dtype)
        blocks = iter([vectors] if isinstance(vectors, np.ndarray) else vectors)
        with new_folder(folder, kind=KIND) as draft:
            dim = _write_vectors(draft / VECTORS_FILE, blocks, passages, dtype)
            text_bytes = _write_passages(draft / PASSAGES_FILE, passages)
            content = {
                "student": student_fingerprint,
                "student_config": dict(student_config or {}),
                "student_source": student_source,
                "task": task,
                "count": len(passages),
                "num_truncated": num_truncated,
                "dim": dim,
                "dtype": dtype,
                "content_hash": content_hash(passages),
                "bytes_per_passage": {
                    "vectors": dim * STORED_AS[dtype].itemsize,
                    "texts": round(text_bytes / len(passages), 1),
                },
            }
            write_manifest(draft, KIND, FORMAT_VERSION, content)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, *, student_fingerprint: str | None = None) -> FolderIndex:
        """Open an index; vectors and texts stay on disk until they are read.

        Raises:
            DataFormatError: not an index, or a damaged one (a file is missing or not of the size in the manifest).
            IndexMismatchError: ``student_fingerprint`` is given and is not the one that made this index.
        """
        manifest = read_manifest(folder, KIND, FORMAT_VERSION)
        for key, kind in _MANIFEST_FIELDS.items():
            if not isinstance(manifest.get(key), kind):
                raise DataFormatError(folder / FILE_NAME, f"has no valid '{key}'; encode the corpus again")
        if manifest.get("dtype") not in STORED_AS:
            raise DataFormatError(folder / FILE_NAME, f"has an unknown dtype {manifest.get('dtype')!r}; update d2llm")
        vectors = _map_vectors(folder / VECTORS_FILE, manifest)
        columns = _map_passages(folder / PASSAGES_FILE, manifest["count"])
        index = cls(folder, manifest, vectors, columns)
        if student_fingerprint is not None:
            index.check_student(student_fingerprint)
        return index

    def check_student(self, fingerprint: str) -> None:
        """Make sure that the vectors are of the student with this fingerprint.

        Raises:
            IndexMismatchError: they are another student's.
        """
        if fingerprint != self.student_fingerprint:
            raise IndexMismatchError(
                f"{self.folder}: the index was made by student {self.student_fingerprint}, but the student given is "
                f"{fingerprint}; search with the student that made it, or encode the corpus again with this one"
            )

    def __len__(self) -> int:
        return cast(int, self.manifest["count"])

    @property
    def capacity(self) -> int:
        """Rows; every one is a passage (``live`` is None)."""
        return len(self)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return cast(int, self.manifest["dim"])

    @property
    def dtype(self) -> VectorDtype:
        """How the vectors are stored."""
        return cast(VectorDtype, self.manifest["dtype"])

    @property
    def student_fingerprint(self) -> str:
        """Fingerprint of the student that made the vectors."""
        return cast(str, self.manifest["student"])

    @property
    def student_source(self) -> str | None:
        """The folder or name that the student was loaded from, if the index knows it."""
        return cast("str | None", self.manifest.get("student_source"))

    @property
    def task(self) -> Task:
        """The task of a search that does not name one."""
        return cast(Task, self.manifest["task"])

    @property
    def content_hash(self) -> str:
        """Hash of the ids, titles and texts, in order."""
        return cast(str, self.manifest["content_hash"])

    @property
    def num_truncated(self) -> int:
        """Passages that were too long for the student and were read in part."""
        return cast(int, self.manifest["num_truncated"])

    @property
    def vector_bytes_per_passage(self) -> int:
        """Bytes of one stored vector."""
        return self.dim * self._stored.itemsize

    @cached_property
    def all_ids(self) -> Sequence[str]:
        """All passage ids, in the rows' order (read once, then kept)."""
        return cast(list[str], self._columns["id"].to_pylist())

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """The passage ids of some rows, in their order."""
        return [self.id(int(row)) for row in rows]

    def id(self, row: int) -> str:
        """The passage id of one row."""
        return cast(str, self._columns["id"][row].as_py())

    def passage(self, row: int) -> Passage:
        """The passage of one row."""
        return Passage(**{name: column[row].as_py() for name, column in self._columns.items()})

    def passages(self, rows: Iterable[int]) -> list[Passage]:
        """The passages of several rows, in their order."""
        return [self.passage(int(row)) for row in rows]

    def vectors(self, rows: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float32]:
        """The vectors of several rows, float32 [len(rows), dim]."""
        return expand(np.asarray(self._stored[np.asarray(rows, np.int64)]), self.dtype)

    def block(self, start: int, end: int) -> NDArray[np.float32]:
        """The vectors of the rows from ``start`` to ``end``, float32 [end - start, dim]."""
        return expand(np.asarray(self._stored[start:end]), self.dtype)

    def scan(self, query: NDArray[np.float32], top_k: int, allowed: NDArray[np.bool_] | None = None) -> CandidateRows:
        """The rows with the highest inner product with ``query`` [dim]; ties by passage id.

        The scan is exact: every product is taken in float32 of the stored values.

        Raises:
            InputError: the query has another width than the index, or ``top_k`` < 1.
        """
        if query.shape != (self.dim,):
            raise InputError(f"the query vector has shape {query.shape}, but the index holds [{self.dim}]")
        if top_k < 1:
            raise InputError(f"top_k is {top_k}, but must be at least 1")
        scores = self._inner_products(query)
        rows = np.arange(len(self)) if allowed is None else np.flatnonzero(allowed)
        best = rows[top_rows(scores[rows], top_k, lambda places: self.ids(rows[places]))]
        return CandidateRows(best, scores[best])

    def scan_together(
        self, queries: NDArray[np.float32], top_k: int, allowed: NDArray[np.bool_] | None = None
    ) -> list[CandidateRows]:
        """``scan`` for each of several queries [q, dim]."""
        return [self.scan(query, top_k, allowed) for query in queries]

    def match(self, text: str, top_k: int, filter: str | None = None) -> CandidateRows:  # noqa: A002, ARG002
        """Not to be had: an index that ``encode`` made has no BM25.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self.folder}: an index made by `d2llm encode` has no BM25; make one with `d2llm index`")

    def select(self, filter: str | None) -> NDArray[np.bool_] | None:  # noqa: A002
        """None without a filter.

        Raises:
            InputError: there is a filter; an index that ``encode`` made has no metadata.
        """
        if filter is None:
            return None
        raise InputError(f"{self.folder}: an index made by `d2llm encode` has no metadata; make one with `d2llm index`")

    def _inner_products(self, anchor_query: NDArray[np.float32]) -> NDArray[np.float32]:
        query = torch.from_numpy(np.array(anchor_query, dtype=np.float32))
        scores = torch.empty(len(self), dtype=torch.float32)
        step = max(1, _PRODUCT_NUMBERS // self.dim)
        widened = torch.empty(min(step, len(self)), self.dim, dtype=torch.float32)
        for start in range(0, len(self), step):
            end = min(len(self), start + step)
            block = widened[: end - start].copy_(self._scan_view[start:end])
            torch.mv(block, query, out=scores[start:end])
        return scores.numpy()


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Make sure that an index may be written at ``folder``.

    Raises:
        InputError: something is there that must not be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        read_manifest(folder, KIND, FORMAT_VERSION)
    except (DataFormatError, OSError) as error:
        raise InputError(f"{folder} exists and is not a d2llm index; choose another folder or remove it") from error
    if not overwrite:
        raise InputError(f"{folder} already holds an index; choose another folder or allow overwriting it")


def check_passages(passages: Sequence[Passage], *, where: Path) -> None:
    """Make sure that there are passages and that their ids are distinct; ``where`` names them in the error.

    Raises:
        InputError: there are none.
        DuplicateIdError: two share an id.
    """
    if not passages:
        raise InputError(f"{where}: there are no passages; an index needs at least one")
    seen: dict[str, int] = {}
    for position, passage in enumerate(passages, start=1):
        first = seen.setdefault(passage.id, position)
        if first != position:
            problem = f"passages {first} and {position} share the id {passage.id!r}; give each passage its own"
            raise DuplicateIdError(where, problem)


def content_hash(passages: Iterable[Passage]) -> str:
    """Hash of ids, titles and texts, in order."""
    digest = hashlib.sha256()
    for passage in passages:
        for field in (passage.id, passage.title, passage.text):
            content = field.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def _write_vectors(
    path: Path, blocks: Iterator[NDArray[np.float32]], passages: Sequence[Passage], dtype: VectorDtype
) -> int:
    target: NDArray[Any] | None = None
    start = 0
    for block in blocks:
        if target is None:
            shape = (len(passages), block.shape[-1])
            target = np.lib.format.open_memmap(path, mode="w+", dtype=STORED_AS[dtype], shape=shape)
        if block.ndim != 2 or block.shape[1] != target.shape[1] or start + len(block) > len(passages):
            raise InputError(f"vectors {block.shape} from row {start} do not fit an index of shape {target.shape}")
        end = start + len(block)
        target[start:end] = compress(block, dtype, [passage.id for passage in passages[start:end]])
        start = end
    if target is None or start != len(passages):
        raise InputError(f"{start} vectors for {len(passages)} passages; give one vector per passage")
    cast("np.memmap[Any, Any]", target).flush()
    return target.shape[1]


def _write_passages(path: Path, passages: Sequence[Passage]) -> int:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for start in range(0, len(passages), _TEXT_BLOCK):
            block = passages[start : start + _TEXT_BLOCK]
            columns = ([p.id for p in block], [p.title for p in block], [p.text for p in block])
            writer.write_batch(pa.record_batch([pa.array(c, pa.string()) for c in columns], schema=_SCHEMA))
    return path.stat().st_size


def _map_vectors(path: Path, manifest: Mapping[str, Any]) -> NDArray[Any]:
    try:
        # "c" (copy on write) is read-only for the file and spares torch's warning about arrays it must not write to.
        vectors = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataFormatError(path, f"cannot be read ({error}); encode the corpus again") from error
    expected = (manifest["count"], manifest["dim"])
    if vectors.shape != expected or vectors.dtype != STORED_AS[manifest["dtype"]]:
        raise DataFormatError(
            path,
            f"holds {vectors.dtype} {vectors.shape}, but the manifest says {manifest['dtype']} {expected}; "
            "encode the corpus again",
        )
    return vectors


def _map_passages(path: Path, count: int) -> dict[str, Any]:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataFormatError(path, f"cannot be read ({error}); encode the corpus again") from error
    if table.schema != _SCHEMA or table.num_rows != count:
        raise DataFormatError(
            path, f"holds {table.num_rows} passages, but the manifest says {count}; encode the corpus again"
        )
    return {name: table.column(name) for name in _SCHEMA.names}
