"""The words of an index on disk: segments of consecutive rows (``bm25.WordSegment``), beside the vectors of the rows.

words-<generation>-<first>-<end>.bin    the concatenated arrays of the segment of rows first to end
words-<generation>-<first>-<end>.json   position of each array, checksums of the file, and a checksum of this JSON

A segment is written before the commit that names its rows and never changed; small neighbours are joined into a new
segment and then removed. Segments are derived from the table, so missing or damaged ones are rebuilt from there. So are
those of another rule of words (``ops.words.rule_of_words``), which the JSON names: words by two rules are never mixed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.names import counted
from d2llm.ops.bm25_bounds import TermBounds
from d2llm.ops.words import rule_of_words
from d2llm.store.bm25 import WordIndex, bounds_of_segment
from d2llm.store.checksums import (
    BLOCK_BYTES,
    FileSums,
    problem_of,
    read_checked,
    sample_blocks,
    take_sums,
    write_checked,
)
from d2llm.store.word_segment import AddedWords, WordSegment

SegmentOf = Callable[[int, int], WordSegment]
"""The words of the rows in a range [first, end), from the table; none for rows that are not passages."""

SEGMENT_ROWS = 1 << 17
"""Maximum rows of a joined segment, which is read and rewritten as a whole."""
_NAME = "words"
_ALIGNMENT = 64
_OPENINGS = 5  # attempts to open: a writer may join segments while a reader opens them
_TYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "terms": "<u8",
        "starts": "<i8",
        "rows": "<u4",
        "counts": "<u2",
        "tokens": "<u4",
        "offsets": "<i8",
        "lengths": "<u4",
        "num_windows": "<u4",
        "window_lengths": "<u4",
    }.items()
}
_ADDED_TYPES = {
    name: np.dtype(kind) for name, kind in {"terms": "<u8", "starts": "<i8", "rows": "<u4", "hundredths": "<u2"}.items()
}
_ADDED = "added_"  # before the names of arrays of added words, which are there if a row has some
_BOUND_TYPES = {"bound_terms": np.dtype("<u4"), "bound_shares": np.dtype("u1")}


class _SegmentFile(NamedTuple):
    """A segment on disk."""

    first: int
    end: int
    path: Path

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")


class Coverage(NamedTuple):
    """The words of the rows from 0 on, and the problems for which some had to be read from the table again."""

    words: WordIndex
    problems: list[str]


def segment_bytes(num_rows: float, num_terms: float, num_postings: float, num_tokens: float) -> float:
    """The size of a segment's arrays in bytes, without the bounds of frequent terms (one per cent of it).

    Args:
        num_rows: number of rows.
        num_terms: number of distinct terms.
        num_postings: number of pairs of a term and a row that contains it.
        num_tokens: number of words and sentences of all rows.
    """
    lengths = {
        "terms": num_terms,
        "starts": num_terms + 1,
        "rows": num_postings,
        "counts": num_postings,
        "tokens": num_tokens,
        "offsets": num_rows + 1,
    }
    return sum(kind.itemsize * lengths.get(name, num_rows) for name, kind in _TYPES.items())


def files_of(folder: Path, generation: int) -> list[Path]:
    """The files of the segments of a generation."""
    return [
        path for segment_file in _segment_files(folder, generation) for path in (segment_file.path, segment_file.record)
    ]


def write_segment(folder: Path, generation: int, first: int, segment: WordSegment) -> None:
    """Write the words of the rows from ``first`` on, durably. Existing words of these and later rows are removed first.

    (Row numbers that no version names are reused after a vector file was rewritten.)

    Raises:
        OSError: the files cannot be written.
    """
    for segment_file in _segment_files(folder, generation):
        if segment_file.end > first:
            _remove(segment_file)
    if len(segment):
        _write(folder, generation, first, segment)


def open_words(folder: Path, generation: int, num_rows: int, segment_of: SegmentOf, *, whole: bool = False) -> Coverage:
    """The words of the first ``num_rows`` rows, and possibly of later ones.

    ``segment_of`` reads the words of rows whose files are missing or damaged. ``whole``: compare all bytes with their
    checksums, not only samples.
    """
    opened_files: dict[_SegmentFile, WordSegment | str] = {}
    for _ in range(_OPENINGS):
        files = _cover(_segment_files(folder, generation), num_rows)
        opened_files = {segment_file: _open(segment_file, whole=whole) for segment_file in files}
        if all(segment_file.record.exists() for segment_file in files):
            break
    segments: list[WordSegment] = []
    problems: list[str] = []
    at, missing = 0, 0

    def fill(end: int) -> None:
        nonlocal at, missing
        if at < end:
            segments.append(segment := segment_of(at, end))
            missing += int(np.count_nonzero(segment.lengths))
        at = max(at, end)

    for segment_file, opened in opened_files.items():
        if isinstance(opened, str):
            problems.append(f"{segment_file.path.name} {opened}")
            continue
        fill(segment_file.first)
        segments.append(opened)
        at = segment_file.end
    fill(num_rows)
    if missing:
        problems.append(f"the words of {counted(missing, 'passage is', 'passages are')} in no file")
    return Coverage(WordIndex(segments), problems)


def update_word_files(folder: Path, generation: int, num_rows: int, segment_of: SegmentOf) -> None:
    """Add missing words, and those of another rule, of all rows from the table, and join small neighbours.

    Requires the write lock.

    Raises:
        OSError: the files cannot be written.
    """
    for segment_file in _segment_files(folder, generation):
        if _has_other_rule(segment_file):
            _remove(segment_file)
    at = 0
    for segment_file in [*_cover(_segment_files(folder, generation), num_rows), None]:
        end = num_rows if segment_file is None else segment_file.first
        for first in range(at, end, SEGMENT_ROWS):
            last = min(first + SEGMENT_ROWS, end)
            _write(folder, generation, first, segment_of(first, last))
        at = end if segment_file is None else segment_file.end
    files = _cover(_segment_files(folder, generation), num_rows)
    for group in _groups(files):
        opened = [_open(segment_file, whole=True) for segment_file in group]
        segments = [segment for segment in opened if not isinstance(segment, str)]
        if len(segments) == len(group):  # damaged ones are left as they are until a repair
            _write(folder, generation, group[0].first, WordSegment.join(segments))
            for segment_file in group:
                _remove(segment_file)
    needed = set(_cover(_segment_files(folder, generation), num_rows))
    for segment_file in _segment_files(folder, generation):
        if segment_file not in needed:
            _remove(segment_file)


def remove_damaged(folder: Path, generation: int) -> None:
    """Remove damaged segments; ``update_word_files`` then reads their rows again."""
    for segment_file in _segment_files(folder, generation):
        if isinstance(_open(segment_file, whole=True), str):
            _remove(segment_file)


def sweep(folder: Path) -> None:
    """Remove what killed writers left."""
    for path in folder.glob(f".{_NAME}-*.new"):
        path.unlink()
    for path in folder.glob(f"{_NAME}-*.bin"):
        if not path.with_suffix(".json").exists():
            path.unlink()


def _segment_files(folder: Path, generation: int) -> list[_SegmentFile]:
    files: list[_SegmentFile] = []
    for record in folder.glob(f"{_NAME}-{generation}-*-*.json"):
        numbers = record.stem.split("-")[2:]
        if len(numbers) == 2 and all(map(str.isdecimal, numbers)):
            files.append(_SegmentFile(int(numbers[0]), int(numbers[1]), record.with_suffix(".bin")))
    return sorted(files, key=lambda segment_file: (segment_file.first, -segment_file.end))


def _cover(files: Sequence[_SegmentFile], num_rows: int) -> list[_SegmentFile]:
    """Non-overlapping segments: of those that overlap, the largest."""
    chosen: list[_SegmentFile] = []
    at = 0
    for segment_file in files:
        if at <= segment_file.first < num_rows and segment_file.first < segment_file.end:
            chosen.append(segment_file)
            at = segment_file.end
    return chosen


def _groups(files: Sequence[_SegmentFile]) -> Iterator[list[_SegmentFile]]:
    """Neighbours to join, so that each segment is at least twice as large as the next, up to the maximum size.

    A row is then rewritten once per doubling of the number of rows, not with each addition.
    """
    stack: list[list[_SegmentFile]] = []

    def size(group: list[_SegmentFile]) -> int:
        return group[-1].end - group[0].first

    for segment_file in files:
        stack.append([segment_file])
        while (
            len(stack) > 1
            and stack[-2][-1].end == stack[-1][0].first
            and size(stack[-2]) < 2 * size(stack[-1])
            and size(stack[-2]) + size(stack[-1]) <= SEGMENT_ROWS
        ):
            last = stack.pop()
            stack[-1] += last
    return (group for group in stack if len(group) > 1)


def _write(folder: Path, generation: int, first: int, segment: WordSegment) -> None:
    name = f"{_NAME}-{generation}-{first}-{first + len(segment)}"
    draft, path = folder / f".{name}.new", folder / f"{name}.bin"
    extents: dict[str, list[int]] = {}
    bounds = bounds_of_segment(segment)
    with draft.open("wb") as file:
        arrays = {name: np.ascontiguousarray(getattr(segment, name), kind) for name, kind in _TYPES.items()}
        arrays |= {"bound_terms": bounds.terms, "bound_shares": bounds.shares}
        if segment.added is not None:
            for name, kind in _ADDED_TYPES.items():
                arrays[_ADDED + name] = np.ascontiguousarray(getattr(segment.added, name), kind)
        for array_name, array in arrays.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            extents[array_name] = [file.tell(), len(array)]
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())
    sums = take_sums(draft)
    draft.replace(path)
    content = {
        "rule": rule_of_words(by_dictionary=segment.by_dictionary),
        "by_dictionary": segment.by_dictionary,
        "mean_length": bounds.mean_length,
        "arrays": extents,
        "num_bytes": sums.num_bytes,
        "block_bytes": BLOCK_BYTES,
        "checksums": sums.checksums,
    }
    write_checked(path.with_suffix(".json"), content)


def _open(segment_file: _SegmentFile, *, whole: bool) -> WordSegment | str:
    """A segment mapped into memory, or what is wrong with it."""
    try:
        record = read_checked(segment_file.record)
        if record["block_bytes"] != BLOCK_BYTES:
            return f"has blocks of {record['block_bytes']} bytes"
        if (problem := _other_rule(record)) is not None:
            return problem
        sums = FileSums(record["num_bytes"], record["checksums"])
        blocks = None if whole else sample_blocks({segment_file.path.name: sums})[segment_file.path.name]
        if (problem := problem_of(segment_file.path, sums, blocks)) is not None:
            return problem
        content = np.asarray(np.memmap(segment_file.path, np.uint8, "r"))  # slicing a memmap takes 5 times as long
        arrays: dict[str, NDArray[Any]] = {}
        types = _TYPES | _BOUND_TYPES | {_ADDED + name: kind for name, kind in _ADDED_TYPES.items()}
        for name, (start, length) in record["arrays"].items():
            arrays[name] = content[start : start + length * types[name].itemsize].view(types[name])
            if len(arrays[name]) != length:
                return f"does not hold its {name}"
        added = {name: array for name in _ADDED_TYPES if (array := arrays.pop(_ADDED + name, None)) is not None}
        bounds = TermBounds(arrays.pop("bound_terms"), arrays.pop("bound_shares"), record["mean_length"])
        if not bounds.fit(len(arrays["lengths"])):
            return "has bounds of other ranges"
        segment = WordSegment(
            **arrays,
            added=AddedWords(**added) if added else None,
            by_dictionary=record["by_dictionary"],
            bounds=bounds,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"cannot be used ({error})"
    return segment if len(segment) == segment_file.end - segment_file.first else f"holds {counted(len(segment), 'row')}"


def _other_rule(record: Mapping[str, Any]) -> str | None:
    """How the words of a segment differ from those that its texts have now; None if they do not."""
    stored, now = record["rule"], rule_of_words(by_dictionary=record["by_dictionary"])
    return None if stored == now else f"has words by rule {stored}, but this d2llm makes them by rule {now}"


def _has_other_rule(segment_file: _SegmentFile) -> bool:
    try:
        return _other_rule(read_checked(segment_file.record)) is not None
    except (OSError, ValueError, LookupError):
        return False  # it is damaged, and left as it is until a repair


def _remove(segment_file: _SegmentFile) -> None:
    segment_file.record.unlink(missing_ok=True)  # first: without its record, a segment does not count
    segment_file.path.unlink(missing_ok=True)
