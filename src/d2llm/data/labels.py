"""The label store: teachers' scores of query-passage pairs, keyed by id, in Parquet shards.

Each ``write`` creates one shard: a file in ``labels/`` and a file of the same name in ``grams/``. A shard counts only
if both exist, so a process may be killed at any moment: a query is either complete or absent. One store may hold labels
of several teachers and prompts.
"""

from __future__ import annotations

import functools
import logging
import operator
import secrets
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError, InputError, LabelMismatchError, ModelError
from d2llm.core.files import write_bytes
from d2llm.core.manifest import FILE_NAME, read_manifest, write_manifest

_log = logging.getLogger(__name__)
KIND = "labels"
_FORMAT_VERSION = 3
_KEY_FIELDS = ["teacher", "prompt", "dataset"]
_KEY = [(name, pa.string()) for name in (*_KEY_FIELDS, "query_id")]
_LABELS = pa.schema([*_KEY, ("passage_id", pa.string()), ("log_odds", pa.float32()), ("grade", pa.float32())])
_GRAMS = pa.schema([*_KEY, ("passage_ids", pa.list_(pa.string())), ("gram", pa.list_(pa.float32()))])


@dataclass(frozen=True, order=True, slots=True)
class LabelKey:
    """What the labels of a set have in common: teacher and prompt (both by fingerprint) and the data set's name."""

    teacher: str
    prompt: str
    dataset: str

    def __str__(self) -> str:
        return f"teacher {self.teacher}, prompt {self.prompt}, data set {self.dataset}"


@dataclass(frozen=True, eq=False)
class QueryLabels:
    """A teacher's scores of the passages of one query.

    ``log_odds`` [n] belongs to ``passage_ids``; ``gram`` [m, m] holds the cosines between the teacher's features of the
    first m passages (feature imitation), or is None. ``grades`` [n] are those from which a graded teacher's log-odds
    were made, 0 to 100, NaN for a passage without one.
    """

    query_id: str
    passage_ids: tuple[str, ...]
    log_odds: Float32[np.ndarray, " n"]
    gram: Float32[np.ndarray, "m m"] | None = None
    grades: Float32[np.ndarray, " n"] | None = None

    def __post_init__(self) -> None:
        count = len(self.passage_ids)
        if len(set(self.passage_ids)) != count:
            raise ValueError(f"query '{self.query_id}': a passage id occurs twice")
        if self.log_odds.shape != (count,):
            raise ValueError(f"query '{self.query_id}': {count} passages, but log_odds of shape {self.log_odds.shape}")
        if self.grades is not None and self.grades.shape != (count,):
            raise ValueError(f"query '{self.query_id}': {count} passages, but grades of shape {self.grades.shape}")
        if self.gram is None:
            return
        if self.gram.ndim != 2 or self.gram.shape[0] != self.gram.shape[1] or len(self.gram) > count:
            raise ValueError(f"query '{self.query_id}': {count} passages, but a gram of shape {self.gram.shape}")

    @property
    def gram_passage_ids(self) -> tuple[str, ...]:
        """The passages that the rows and columns of ``gram`` stand for."""
        return () if self.gram is None else self.passage_ids[: len(self.gram)]


class _Ids:
    """Ids in the order in which they first occurred, each as a number."""

    def __init__(self) -> None:
        self.index_of: dict[str, int] = {}

    def encode(self, ids: Sequence[str]) -> NDArray[np.int32]:
        """The numbers of ids [n]; new ids get the next ones."""
        index_of = self.index_of
        return np.fromiter((index_of.setdefault(one, len(index_of)) for one in ids), np.int32, len(ids))


class _Texts:
    """Many short texts in one piece of memory."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode() for text in texts]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._content = b"".join(encoded)

    def take(self, positions: Iterable[int]) -> list[str]:
        """The texts at these positions."""
        return [self._content[self._ends[index] : self._ends[index + 1]].decode() for index in positions]


class _StoredLabels:
    """The labels that were in a store when it was opened, in arrays: a dozen bytes for each pair and each cosine."""

    def __init__(self) -> None:
        self._queries, self._passages = _Ids(), _Ids()
        self._pairs: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]] = []
        self._grams: dict[str, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}

    def add(
        self,
        query_ids: Sequence[str],
        passage_ids: Sequence[str],
        log_odds: NDArray[np.float32],
        grades: NDArray[np.float32],
    ) -> None:
        """Add labelled pairs [n], in the order in which they were written."""
        self._pairs.append((self._queries.encode(query_ids), self._passages.encode(passage_ids), log_odds, grades))

    def add_gram(self, query_id: str, passage_ids: Sequence[str], values: NDArray[np.float32]) -> None:
        """Add the Gram matrix [m * m] of some passages of a query; the last of a query counts."""
        self._grams[query_id] = (self._passages.encode(passage_ids), values)

    def finish(self) -> None:
        """Sort the pairs by query, and keep the last label of each; nothing is added afterwards."""
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32))
        queries, passages, values, grades = (
            np.concatenate(column) for column in zip(nothing, *self._pairs, strict=True)
        )
        pairs = queries.astype(np.int64) * max(len(self._passages.index_of), 1) + passages
        order = np.argsort(pairs, kind="stable")  # the labels of a pair together, those written last at the end
        is_first = np.diff(pairs[order], prepend=-1) != 0
        firsts, lasts = order[is_first], order[np.append(is_first[1:], np.True_)[: len(order)]]
        by_query = np.lexsort((firsts, queries[firsts]))  # passages in the order in which they were first written
        firsts, lasts = firsts[by_query], lasts[by_query]
        self._names, self._values, self._grades = passages[firsts], values[lasts], grades[lasts]
        self._ends = np.cumsum(np.bincount(queries[firsts], minlength=len(self._queries.index_of)))
        self.num_duplicates = len(order) - len(firsts)
        self._passage_ids = _Texts(self._passages.index_of)
        self._pairs, self._passages = [], _Ids()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._values)

    @property
    def query_ids(self) -> Set[str]:
        """The queries with labels."""
        return self._queries.index_of.keys()

    def log_odds(self, query_id: str) -> dict[str, float]:
        """Log-odds by passage id; empty for a query without labels."""
        return self._of_query(query_id, self._values)

    def grades(self, query_id: str) -> dict[str, float]:
        """Grades by passage id, NaN where there is none; empty for a query without labels."""
        return self._of_query(query_id, self._grades)

    def _of_query(self, query_id: str, values: NDArray[np.float32]) -> dict[str, float]:
        index = self._queries.index_of.get(query_id)
        if index is None:
            return {}
        rows = slice(self._ends[index - 1] if index else 0, self._ends[index])
        names = self._passage_ids.take(self._names[rows].tolist())
        return dict(zip(names, values[rows].tolist(), strict=True))

    def gram(self, query_id: str) -> tuple[tuple[str, ...], NDArray[np.float32]] | None:
        """The passage ids and the matrix of a query, if there is one."""
        if query_id not in self._grams:
            return None
        names, values = self._grams[query_id]
        return tuple(self._passage_ids.take(names.tolist())), values.reshape(len(names), len(names))


class LabelStore:
    """The labels of one data set by one teacher with one prompt (both by fingerprint). Opening reads them all.

    ``write`` creates the folder if needed.

    Raises:
        DataFormatError: a shard is damaged; the message says which files to delete.
    """

    def __init__(self, folder: Path, *, teacher: str, prompt: str, dataset: str) -> None:
        self.folder = Path(folder)
        self.teacher = teacher
        self.prompt = prompt
        self.dataset = dataset
        self.num_duplicates = 0
        """Number of pairs that were labelled more than once; the label written last is used."""
        self._log_odds: dict[str, dict[str, float]] = {}  # written since the store was opened
        self._grades: dict[str, dict[str, float]] = {}
        self._grams: dict[str, tuple[tuple[str, ...], NDArray[np.float32]]] = {}
        self._others: set[LabelKey] = set()
        if (self.folder / FILE_NAME).exists():
            read_manifest(self.folder, KIND, _FORMAT_VERSION)
        self._stored = _StoredLabels()
        for name in shards(self.folder):
            self._read_labels(name)
            self._read_grams(name)
        self._stored.finish()
        self.num_duplicates += self._stored.num_duplicates
        if self.num_duplicates:
            _log.warning("%s: %d pairs are labelled more than once; the last counts", folder, self.num_duplicates)

    @classmethod
    def of(cls, folder: Path, key: LabelKey) -> LabelStore:
        """The labels of a set that ``label_keys`` named."""
        return cls(folder, **asdict(key))

    @classmethod
    def open_for_reading(
        cls, folder: Path, *, teacher: str, prompt: str, dataset: str, other_sets_suffice: bool = False
    ) -> LabelStore:
        """Open a store that must hold labels of this data set by this teacher and prompt.

        With ``other_sets_suffice``, a data set without any labels is fine if this teacher has labelled others.

        Raises:
            DataFormatError: there are no labels at all, or a shard is damaged.
            LabelMismatchError: there are labels, but only of other teachers, prompts or data sets (which the message
                names).
        """
        store = cls(folder, teacher=teacher, prompt=prompt, dataset=dataset)
        others = store._others
        is_other_set = teacher in {key.teacher for key in others} and dataset not in {key.dataset for key in others}
        if len(store) > 0 or (other_sets_suffice and is_other_set):
            return store
        if not others:
            raise DataFormatError(folder, "holds no teacher labels; make them first (d2llm label)")
        raise LabelMismatchError(
            f"{folder}: has no labels of teacher {teacher}, prompt {prompt}, data set {dataset}, only of "
            f"{'; '.join(map(str, sorted(others)))}. Use the teacher and prompt that made the labels, or label again "
            "with these"
        )

    def read_again(self) -> LabelStore:
        """The store read again, including labels that other processes have written since."""
        return LabelStore.of(self.folder, self.key)

    def __len__(self) -> int:
        """Number of queries with labels."""
        return len(self._stored.query_ids | self._log_odds.keys())

    @property
    def num_pairs(self) -> int:
        """Number of labelled pairs."""
        added = sum(
            len(labelled.keys() - self._stored.log_odds(query_id).keys())
            for query_id, labelled in self._log_odds.items()
        )
        return len(self._stored) + added

    @property
    def query_ids(self) -> tuple[str, ...]:
        """The queries with labels, sorted by id."""
        return tuple(sorted(self._stored.query_ids | self._log_odds.keys()))

    def missing(self, query_id: str, passage_ids: Iterable[str]) -> list[str]:
        """Those of ``passage_ids`` that have no label for the query, each once, in the given order."""
        labelled = self.log_odds(query_id)
        return [passage_id for passage_id in dict.fromkeys(passage_ids) if passage_id not in labelled]

    def missing_cosines(self, query_id: str, passage_ids: Iterable[str]) -> list[str]:
        """Those of ``passage_ids`` that the query's Gram matrix does not cover, each once, in the given order."""
        stored = self.gram(query_id)
        covered = frozenset(stored[0]) if stored else frozenset[str]()
        return [passage_id for passage_id in dict.fromkeys(passage_ids) if passage_id not in covered]

    def log_odds(self, query_id: str) -> dict[str, float]:
        """logit(yes) - logit(no) by passage id; empty for a query without labels."""
        return self._stored.log_odds(query_id) | self._log_odds.get(query_id, {})

    def grades(self, query_id: str) -> dict[str, float]:
        """Grades, 0 to 100, by passage id, of those passages that a graded teacher graded."""
        grades = self._stored.grades(query_id) | self._grades.get(query_id, {})
        return {name: grade for name, grade in grades.items() if grade == grade}

    def gram(self, query_id: str) -> tuple[tuple[str, ...], Float32[np.ndarray, "m m"]] | None:
        """Passage ids and the matrix of cosines between the teacher's features of them; None if there is none."""
        return self._grams.get(query_id) or self._stored.gram(query_id)

    def write(self, labels: Sequence[QueryLabels], *, remember: bool = True) -> None:
        """Add labels as one shard, atomically; they are on disk when this returns. An empty list writes nothing.

        ``remember=False``: they are not kept in memory, so they become visible only when the store is opened again.

        Raises:
            ModelError: a log-odds or a cosine is NaN or infinite; nothing is written.
        """
        if not labels:
            return
        for item in labels:
            _refuse_nonfinite(item)
        if not (self.folder / FILE_NAME).exists():
            write_manifest(self.folder, KIND, _FORMAT_VERSION, {})
        name = self._next_name()
        _write_table(self.folder / "grams" / name, _GRAMS, self._gram_rows(labels))
        _write_table(self.folder / "labels" / name, _LABELS, self._label_rows(labels))
        for item in labels if remember else ():
            self.num_duplicates += len(self.log_odds(item.query_id).keys() & {*item.passage_ids})
            added = zip(item.passage_ids, item.log_odds.tolist(), strict=True)
            self._log_odds.setdefault(item.query_id, {}).update(added)
            grades = zip(item.passage_ids, _grades_of(item), strict=True)
            self._grades.setdefault(item.query_id, {}).update(grades)
            if item.gram is not None:
                self._grams[item.query_id] = (item.gram_passage_ids, item.gram.astype(np.float32))

    def _next_name(self) -> str:
        """Later shards sort later; the random part prevents name clashes of concurrent writers."""
        used = [path.name for kind in ("labels", "grams") for path in (self.folder / kind).glob("[0-9]*.parquet")]
        next_number = max((int(name.partition("-")[0]) for name in used), default=0) + 1
        return f"{next_number:010d}-{secrets.token_hex(4)}.parquet"

    def _label_rows(self, labels: Sequence[QueryLabels]) -> Iterator[tuple[Any, ...]]:
        for item in labels:
            for passage_id, value, grade in zip(
                item.passage_ids, item.log_odds.tolist(), _grades_of(item), strict=True
            ):
                yield *astuple(self.key), item.query_id, passage_id, value, None if grade != grade else grade

    def _gram_rows(self, labels: Sequence[QueryLabels]) -> Iterator[tuple[Any, ...]]:
        for item in labels:
            if item.gram is not None:
                values = item.gram.astype(np.float32).ravel()
                yield *astuple(self.key), item.query_id, list(item.gram_passage_ids), values

    def _read_labels(self, name: str) -> None:
        table = self._own_rows(_read_table(self.folder, "labels", name, _LABELS))
        query_ids, passage_ids = (table[column].to_pylist() for column in ("query_id", "passage_id"))
        grades = np.array(table["grade"].fill_null(np.nan), np.float32)
        self._stored.add(query_ids, passage_ids, np.array(table["log_odds"], np.float32), grades)

    def _read_grams(self, name: str) -> None:
        table = self._own_rows(_read_table(self.folder, "grams", name, _GRAMS))
        for query_id, passage_ids, gram in zip(
            table["query_id"].to_pylist(), table["passage_ids"].to_pylist(), table["gram"], strict=True
        ):
            values: NDArray[np.float32] = np.array(gram.values, np.float32)
            if len(values) != len(passage_ids) ** 2:
                problem = f"query '{query_id}' has {len(values)} cosines of {len(passage_ids)} passages"
                raise _damaged(self.folder, "grams", name, problem)
            self._stored.add_gram(query_id, passage_ids, values)

    def _own_rows(self, table: Any) -> Any:
        """The rows of this teacher, prompt and data set; ``_others`` records the keys of other rows."""
        self._others |= _keys_in(table) - {self.key}
        conditions = (pc.field(name) == value for name, value in asdict(self.key).items())
        return table.filter(functools.reduce(operator.and_, conditions))

    @property
    def key(self) -> LabelKey:
        """The set that this store reads and writes."""
        return LabelKey(self.teacher, self.prompt, self.dataset)


def shards(folder: Path) -> list[str]:
    """Names of the complete shards of a store, oldest first."""
    # Labels are listed first because they are written last: a shard that another process finishes in between is seen
    # completely or not at all.
    labels = {path.name for path in (folder / "labels").glob("[0-9]*.parquet")}
    grams = {path.name for path in (folder / "grams").glob("[0-9]*.parquet")}
    return sorted(labels & grams)


def only_labels(folder: Path, dataset: str) -> LabelStore | None:
    """The labels of a data set in a folder where one teacher made them; None if there are none.

    Raises:
        InputError: there are those of two teachers or prompts.
        DataFormatError: there are no labels at all, or they are damaged.
    """
    of_set = [key for key in label_keys(folder) if key.dataset == dataset]
    if len(of_set) > 1:
        made = "; ".join(map(str, of_set))
        raise InputError(f"{folder}: has labels of several teachers or prompts: {made}; name a folder with one")
    return LabelStore.of(folder, of_set[0]) if of_set else None


def label_keys(folder: Path) -> list[LabelKey]:
    """The sets of labels in a store.

    Raises:
        DataFormatError: the folder has no labels, or a shard is damaged.
    """
    if (folder / FILE_NAME).exists() or not folder.is_dir():
        read_manifest(folder, KIND, _FORMAT_VERSION)
    keys: set[LabelKey] = set()
    for name in shards(folder):
        keys |= _keys_in(_read_table(folder, "labels", name, _LABELS, columns=_KEY_FIELDS))
    if not keys:
        raise DataFormatError(folder, "holds no teacher labels; make them first (d2llm label)")
    return sorted(keys)


def _grades_of(labels: QueryLabels) -> list[float]:
    """A grade for each passage, NaN where there is none."""
    return [np.nan] * len(labels.passage_ids) if labels.grades is None else labels.grades.tolist()


def _keys_in(table: Any) -> set[LabelKey]:
    return {LabelKey(**key) for key in table.group_by(_KEY_FIELDS).aggregate([]).to_pylist()}


def _refuse_nonfinite(labels: QueryLabels) -> None:
    remedy = "nothing of this batch was stored; load the teacher in bfloat16 or float32"
    wrong = np.flatnonzero(~np.isfinite(labels.log_odds))
    if len(wrong):
        passage_id, value = labels.passage_ids[wrong[0]], labels.log_odds[wrong[0]]
        raise ModelError(
            f"the teacher's log-odds of query '{labels.query_id}' and passage '{passage_id}' are {value}; {remedy}"
        )
    if labels.gram is not None and not np.isfinite(labels.gram).all():
        raise ModelError(f"the teacher's features for query '{labels.query_id}' are not finite numbers; {remedy}")


def _write_table(path: Path, schema: Any, rows: Iterable[tuple[Any, ...]]) -> None:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer, compression="zstd", write_page_checksum=True)
    write_bytes(path, buffer.getvalue().to_pybytes())


def _read_table(folder: Path, kind: str, name: str, schema: Any, *, columns: list[str] | None = None) -> Any:
    try:
        with pq.ParquetFile(folder / kind / name, page_checksum_verification=True) as file:
            actual, table = file.schema_arrow, file.read(columns=columns)
    except MemoryError:  # Arrow has an error that is one of its own, too; the file may be whole
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(folder, kind, name, str(error).splitlines()[0]) from error
    if not actual.equals(schema):
        raise _damaged(folder, kind, name, f"has the columns {actual.names}, expected {schema.names}")
    for column in table.column_names:
        chunks = table[column].chunks
        if pa.types.is_list(table[column].type):
            chunks = [*chunks, *(chunk.flatten() for chunk in chunks)]
        if column != "grade" and any(chunk.null_count for chunk in chunks):
            raise _damaged(folder, kind, name, f"lacks values of {column}")
    return table


def _damaged(folder: Path, kind: str, name: str, problem: str) -> DataFormatError:
    return DataFormatError(
        folder / kind / name, f"damaged label shard ({problem}); delete this file: its labels are then made again"
    )
