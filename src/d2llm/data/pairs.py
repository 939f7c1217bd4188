"""Reads labelled pairs: two texts, and a class or a score that describes their relation."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from d2llm.core.errors import DataFormatError, DuplicateIdError, InputError
from d2llm.core.inputs import strings_of
from d2llm.core.names import counted
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset, Rows
from d2llm.data.chinese_pairs import LAYOUTS, TEXT_FIELDS, Target, sample_size, split_of, table_records
from d2llm.data.lines import Fields, parquet_rows, read_records, string_field, type_name

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")

PairKind = Literal["binary", "classes", "scores"]
"""``binary``: yes or no. ``classes``: any other set of classes. ``scores``: numbers to sort by."""

_BINARY = (("0", "1"), ("no", "yes"), ("false", "true"), ("not_entailment", "entailment"))
_POSITIVE = frozenset(positive for _, positive in _BINARY)
_DECIMAL = re.compile(r"\s*[+-]?\d+\.\d*\s*")  # of a label in a table, where all values are texts
_LABEL_FIELDS = ("label", "gold_label")
_SCORE_FIELDS = ("score", "similarity_score")
_ID_FIELDS = ("id", "_id")
_NO_LABEL = frozenset({"", "-", "-1"})
_MAX_CLASSES = 50  # more than this means that texts or numbers were read as classes
_SPLIT_ORDER = ("train", "dev", "test")
_JSON, _TABLES = frozenset({".jsonl", ".json"}), frozenset({".tsv", ".csv", ".txt", ".data"})
WITHOUT_LABEL, EMPTY_TEXT = "without an agreed label, left out", "without text"
"""Irregularities that are counted while pairs are read."""


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Two texts and their judgement: ``label`` in a set of classes, ``score`` in a set of scores.

    ``id`` comes from the file, or is ``<split>-<line number>`` if the file has no ids; it is unique within its split.
    """

    id: str
    query: str
    passage: str
    label: str | None
    score: float | None


@dataclass(frozen=True)
class PairDataset:
    """The pairs of one data set by split (train, dev, test, then others), in file order.

    ``classes`` are sorted; empty for scores. ``issues`` lists irregularities that are not errors, with counts.
    """

    name: str
    path: Path
    kind: PairKind
    classes: tuple[str, ...]
    splits: dict[str, tuple[LabelledPair, ...]]
    issues: tuple[str, ...]

    def __repr__(self) -> str:
        """What it is, in one line."""
        counts = ", ".join(f"{counted(len(pairs), 'pair')} in {split}" for split, pairs in self.splits.items())
        return f"PairDataset({self.name!r}, {self.kind}: {counts or 'no pairs'})"

    def positives(self, split: str) -> list[bool]:
        """Whether each pair of ``split`` is a yes: class 1, yes, true or entailment (the other: 0, no, ...).

        Raises:
            DataFormatError: the set is not binary, or was read without that split.
        """
        if self.kind != "binary":
            raise DataFormatError(self.path, f"has {self.kind}, not a yes or no for each pair")
        return [self.is_yes(pair) for pair in self.pairs(split)]

    @staticmethod
    def is_yes(pair: LabelledPair) -> bool:
        """Whether a pair of a binary set is a yes."""
        return (pair.label or "").lower() in _POSITIVE

    def pairs(self, split: str) -> tuple[LabelledPair, ...]:
        """The pairs of one split; ``DataFormatError`` if the set was read without it."""
        if split not in self.splits:
            raise DataFormatError(self.path, f"split '{split}' was not read; read: {', '.join(self.splits) or 'none'}")
        return self.splits[split]


def as_retrieval(dataset: PairDataset, split: str) -> Dataset:
    """Yes-or-no pairs as a retrieval set: each query text of ``split`` that has a yes is to find its passages.

    The corpus holds the passages of all splits that were read, equal texts once. A pair judged no has grade 0; if it
    was judged twice, the yes counts.

    Raises:
        DataFormatError: the set is not binary, or was read without that split.
    """
    is_positive = dataset.positives(split)
    id_of: dict[str, str] = {}
    for pairs in dataset.splits.values():
        for pair in pairs:
            id_of.setdefault(pair.passage, f"passage-{len(id_of)}")
    grades: dict[str, dict[str, int]] = {}
    for pair, positive in zip(dataset.pairs(split), is_positive, strict=True):
        judged = grades.setdefault(pair.query, {})
        judged[id_of[pair.passage]] = max(int(positive), judged.get(id_of[pair.passage], 0))
    relevant = {text: judged for text, judged in grades.items() if any(judged.values())}
    queries = {f"query-{index}": Query(f"query-{index}", text) for index, text in enumerate(relevant)}
    return Dataset(
        dataset.name,
        dataset.path,
        {passage_id: Passage(passage_id, text) for text, passage_id in id_of.items()},
        queries,
        {split: {query.id: relevant[query.text] for query in queries.values()}},
    )


@dataclass(frozen=True)
class PairSource:
    """Where the rows of a pair set come from: for each split, the paths that errors name and functions that read rows.

    ``target`` overrides whether the last column is a class or a score; None means that its name decides. ``issues`` are
    those known before any rows are read.
    """

    name: str
    path: Path
    splits: dict[str, tuple[tuple[Path, Callable[[], Rows]], ...]]
    target: Target | None = None
    issues: tuple[str, ...] = ()

    def iter_pairs(self, split: str, counts: Counter[str]) -> Iterator[LabelledPair]:
        """The pairs of one split; only ids are kept in memory. Irregularities are counted in ``counts`` by kind.

        Errors as for ``read_pairs``.
        """
        ids: set[str] = set()
        classes: set[str] = set()
        offset = last = 0
        has_scores: bool | None = None
        for path, rows in self.splits[split]:
            offset += last  # line numbers continue across the files of a split
            columns: _Columns | None = None
            last = 0
            for last, record in rows():
                columns = columns or _columns_of(path, last, record, self.target)
                pair = _pair_of(path, last, record, columns, f"{split}-{offset + last}")
                if columns.identifier is not None:
                    if pair.id in ids:
                        raise DuplicateIdError(path, f"id '{pair.id}' is used twice in '{split}'", line=last)
                    ids.add(pair.id)
                if pair.label is None and pair.score is None:
                    counts[WITHOUT_LABEL] += 1
                    continue
                counts[EMPTY_TEXT] += not (pair.query.strip() and pair.passage.strip())
                if has_scores not in (None, pair.score is not None):
                    raise DataFormatError(
                        path,
                        f"classes and scores are mixed (here {pair.label or pair.score}); for scores name the field "
                        "'score' and let every line have a number",
                        line=last,
                    )
                has_scores = pair.score is not None
                if pair.label is not None:
                    classes.add(pair.label)
                    _refuse_many_classes(path, last, classes)
                yield pair

    def load(self) -> PairDataset:
        """The whole data set in memory; irregularities are counted in ``issues`` and logged.

        Errors as for ``read_pairs``.
        """
        splits: dict[str, tuple[LabelledPair, ...]] = {}
        issues = list(self.issues)
        for split in self.splits:
            counts: Counter[str] = Counter()
            splits[split] = tuple(self.iter_pairs(split, counts))
            issues += [f"{split}: {counted(count, 'pair')} {what}" for what, count in counts.items() if count]
        classes_of = {split: {pair.label for pair in pairs} for split, pairs in splits.items() if pairs}
        kind, classes = kind_of(self.path, classes_of)
        issues += unseen_classes(classes_of)
        for issue in issues:
            _log.warning("%s: %s", self.path, issue)
        return PairDataset(self.name, self.path, kind, classes, {s: p for s, p in splits.items() if p}, tuple(issues))


def read_pairs(
    path: str | Path, *, splits: Sequence[str] | str | None = None, layout: str | None = None
) -> PairDataset:
    """Read labelled pairs from a folder with a file for each split, or from one file.

    Files: JSON lines, tables (tabs, ``||``, commas; with or without header) and Parquet, the first two also ``.gz``.
    The file name determines the split (see ``chinese_pairs.split_of``); a single file of another name is the split
    ``all``. Fields: two texts (``query`` and ``document``, ``sentence1`` and ``sentence2``, ...) and ``label`` or
    ``score``. A label ``-``, ``-1``, null or empty means that there is none: such pairs are counted and left out, and
    so is a split in which no pair has a label. A label with a fractional part is a score.

    Args:
        path: folder or file.
        splits: which splits to read; None reads all.
        layout: name of a published set (see ``chinese_pairs.LAYOUTS``), if the files do not tell class from score.

    Raises:
        DataFormatError: nothing to read, a malformed line, or classes mixed with scores (the message names file and
            line).
        DuplicateIdError: an id occurs twice in a split.
        InputError: an unknown layout.
    """
    return pair_source(path, splits=splits, layout=layout).load()


def pair_source(
    path: str | Path, *, splits: Sequence[str] | str | None = None, layout: str | None = None
) -> PairSource:
    """The rows of pair files, read one by one; arguments and errors as for ``read_pairs``."""
    path, splits = Path(path), None if splits is None else strings_of(splits, "splits")
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"unknown layout '{layout}'; known: {', '.join(LAYOUTS)}")
    target = LAYOUTS[layout] if layout else None
    files, issues = _files_of(path)
    sources = {split: tuple((file, _reader(file, target)) for file in files[split]) for split in in_order(files)}
    name = path.resolve().name.split(".")[0] if path.is_file() else path.resolve().name
    return PairSource(name, path, choose_splits(path, sources, splits), target, issues)


def in_order(splits: Iterable[str]) -> list[str]:
    """Names of splits: train, dev, test, then the others in the given order."""
    known = [split for split in _SPLIT_ORDER if split in (splits := list(splits))]
    return known + [split for split in splits if split not in known]


def choose_splits(path: Path, available: dict[str, _Value], requested: Sequence[str] | None) -> dict[str, _Value]:
    """The requested splits, or all for None; ``DataFormatError`` if one does not exist."""
    for split in requested or ():
        if split not in available:
            raise DataFormatError(path, f"no split '{split}'; splits found: {', '.join(available) or 'none'}")
    return available if requested is None else {split: available[split] for split in requested}


def kind_of(path: Path, classes_of: dict[str, set[str | None]]) -> tuple[PairKind, tuple[str, ...]]:
    """The kind of a set and its sorted classes, from the classes of each split (``{None}`` for scores).

    Without labelled pairs, or with both classes and scores, there is a ``DataFormatError``.
    """
    if not classes_of:
        raise DataFormatError(path, "holds no labelled pairs; each line needs two texts and a label or score")
    scored = [split for split, classes in classes_of.items() if None in classes]
    if scored and len(scored) < len(classes_of):
        raise DataFormatError(
            path, f"split '{scored[0]}' has scores and others have classes; keep them in two folders, or read one split"
        )
    if scored:
        return "scores", ()
    classes = tuple(sorted({label for labels in classes_of.values() for label in labels if label is not None}))
    is_binary = any({label.lower() for label in classes} <= set(names) for names in _BINARY)
    return ("binary" if is_binary else "classes"), classes


def unseen_classes(classes_of: dict[str, set[str | None]]) -> list[str]:
    """Issues for classes of other splits that do not occur in train."""
    if "train" not in classes_of:
        return []
    unseen = {split: classes - classes_of["train"] for split, classes in classes_of.items()}
    return [
        f"{split}: {', '.join(sorted(str(label) for label in labels))}: no such class in train"
        for split, labels in unseen.items()
        if labels
    ]


@dataclass(frozen=True, slots=True)
class _Columns:
    identifier: str | None
    query: str
    passage: str
    target: str | None  # None: this file has no labels
    is_score: bool


def _columns_of(path: Path, line: int, record: Fields, target: Target | None) -> _Columns:
    """The roles of the fields, from the first record of a file."""
    texts = next(((first, second) for first, second in TEXT_FIELDS if first in record and second in record), None)
    if texts is None:
        known = ", ".join(f"{first}/{second}" for first, second in TEXT_FIELDS)
        names = ", ".join(f"'{field}'" for field in list(record)[:8]) or "none"
        raise DataFormatError(path, f"no two texts: looked for {known}; fields found: {names}", line=line)
    label = next((field for field in _LABEL_FIELDS if field in record), None)
    score = next((field for field in _SCORE_FIELDS if field in record), None)
    if label and score and target is None:
        raise DataFormatError(
            path, f"has both '{label}' and '{score}', but a set has only one; keep one, or give a layout", line=line
        )
    chosen = (score or label) if target == "score" else (label or score)
    is_score = target == "score" or (target is None and score is not None)
    return _Columns(next((field for field in _ID_FIELDS if field in record), None), *texts, chosen, is_score)


def _pair_of(path: Path, line: int, record: Fields, columns: _Columns, fallback: str) -> LabelledPair:
    query, passage = (string_field(path, line, record, field) for field in (columns.query, columns.passage))
    identifier = fallback
    if columns.identifier is not None:
        raw_id = record.get(columns.identifier)
        if isinstance(raw_id, bool) or not isinstance(raw_id, str | int) or raw_id == "":
            raise DataFormatError(
                path, f"field '{columns.identifier}' must be a text or whole number, found {raw_id!r}", line=line
            )
        identifier = str(raw_id)
    if columns.target is None:
        for field in (*_LABEL_FIELDS, *_SCORE_FIELDS):
            if field in record:
                raise DataFormatError(
                    path, f"has a '{field}', but lines before it have none; label all lines or none", line=line
                )
        return LabelledPair(identifier, query, passage, None, None)
    if columns.target not in record:
        keys = ", ".join(f"'{key}'" for key in list(record)[:8])
        raise DataFormatError(path, f"field '{columns.target}' is missing; fields found: {keys}", line=line)
    value: object = record[columns.target]
    if value is None or (isinstance(value, str | int) and str(value).strip() in _NO_LABEL and not columns.is_score):
        return LabelledPair(identifier, query, passage, None, None)
    if columns.is_score or isinstance(value, float) or (isinstance(value, str) and _DECIMAL.fullmatch(value)):
        return LabelledPair(identifier, query, passage, None, _score(path, line, columns.target, value))
    if isinstance(value, bool):
        return LabelledPair(identifier, query, passage, str(int(value)), None)
    if not isinstance(value, str | int):
        raise DataFormatError(
            path, f"field '{columns.target}' must be a class or a number, found {type_name(value)}", line=line
        )
    return LabelledPair(identifier, query, passage, str(value).strip(), None)


def _score(path: Path, line: int, field: str, value: object) -> float:
    score = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            score = float(value)
        except ValueError:
            score = math.nan
    if not math.isfinite(score):
        raise DataFormatError(path, f"field '{field}' must be a finite number, found {value!r}", line=line)
    return score


def _refuse_many_classes(path: Path, line: int, classes: set[str]) -> None:
    if len(classes) > _MAX_CLASSES:
        shown = ", ".join(sorted(classes)[:3])
        raise DataFormatError(
            path, f"more than {_MAX_CLASSES} classes ({shown}, ...); is the label column the right one?", line=line
        )


def _reader(path: Path, target: Target | None) -> Callable[[], Rows]:
    kind = _format_of(path)
    if kind in _JSON:
        return lambda: read_records(path)
    if kind in _TABLES:
        return lambda: table_records(path, target=target)
    return lambda: parquet_rows([path])


def _format_of(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _files_of(path: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """The files of each split, and issues for files that were skipped."""
    readable = _JSON | _TABLES | {".parquet"}
    if path.is_file():
        if _format_of(path) not in readable:
            raise DataFormatError(path, f"unknown kind of file; supported are {', '.join(sorted(readable))}")
        return {split_of(path.name) or "all": [path]}, ()
    if not path.is_dir():
        raise DataFormatError(path, "no such file or folder; check the path")
    files_by_split: dict[str, list[Path]] = {}
    ignored: list[str] = []
    for file in sorted(path.iterdir()):
        if file.is_file() and _format_of(file) in readable and not file.name.startswith("."):
            split = split_of(file.name)
            if split is None:
                ignored.append(file.name)
            else:
                files_by_split.setdefault(split, []).append(file)
    if not files_by_split:
        raise DataFormatError(
            path,
            "looked for files of pairs named train, dev or test (.jsonl, .json, .tsv, ..., .parquet); found none, and "
            "no corpus.jsonl either, which a retrieval set has; check the path",
        )
    for split, files in files_by_split.items():
        formats = {_format_of(file) for file in files}
        if len(formats) > 1:
            names = ", ".join(file.name for file in files)
            raise DataFormatError(path, f"split '{split}' has files of several formats ({names}); keep one of them")
        files_by_split[split], smaller = _largest_sample(files)
        ignored += smaller
    return files_by_split, ((f"files that were not read: {', '.join(ignored)}",) if ignored else ())


def _largest_sample(files: list[Path]) -> tuple[list[Path], list[str]]:
    """OCNLI publishes its training set in five nested sizes: the largest is read."""
    sizes = [sample_size(file.name) for file in files]
    numbers = [size for size in sizes if size is not None]
    if len(numbers) < 2:
        return files, []
    largest = [file for file, size in zip(files, sizes, strict=True) if size is None or size == max(numbers)]
    return largest, [file.name for file in files if file not in largest]
