"""Pair files in the formats of the published Chinese data sets: split names, and tables with or without a header.

===========  ==================================================================================================
OCNLI        ``train.50k.json`` (and smaller parts of it), ``dev.json``, ``test.json``: JSON lines, ``sentence1``,
             ``sentence2``, ``label``; ``-`` if the annotators did not agree; test without labels
CMNLI        ``train.json``, ``dev.json``, ``test.json``: the same
AFQMC        the same, ``label`` "0" or "1"
LCQMC, BQ    ``train.tsv`` or ``LCQMC.train.data``: text, text, label; header ``text_a text_b label`` or no header
ATEC         ``atec_nlp_sim_train.csv`` and ``..._add.csv``: tabs, no header; line number, text, text, label
PAWS-X zh    ``translated_train.tsv``, ``dev_2k.tsv``, ``test_2k.tsv``: header ``id sentence1 sentence2 label``
STS-B zh     ``cnsd-sts-train.txt``: source||text||text||score; or tabs with a score from 0 to 5
===========  ==================================================================================================
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from d2llm.core.errors import DataFormatError
from d2llm.data.lines import Fields, read_lines

Target = Literal["label", "score"]
"""The meaning of the last column of a table without a header."""

LAYOUTS: dict[str, Target] = {
    "ocnli": "label",
    "cmnli": "label",
    "afqmc": "label",
    "lcqmc": "label",
    "bq": "label",
    "atec": "label",
    "pawsx": "label",
    "stsb": "score",
}
"""Layout names to pass if the files alone do not tell whether the last column is a class or a score."""

TEXT_FIELDS = (
    ("query", "document"),
    ("query", "passage"),
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("sent1", "sent2"),
)
"""Names of the two texts of a pair; the first pair of names that is present is used."""

_SPLIT_WORDS = {
    "train": "train",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "val": "dev",
    "test": "test",
}
_HEADERLESS: dict[int, tuple[str, ...]] = {
    2: ("sentence1", "sentence2"),
    3: ("sentence1", "sentence2", ""),
    4: ("line", "sentence1", "sentence2", ""),
}
_HEADER_WORDS = frozenset({"label", "labels", "score", "similarity", "gold_label"})


def split_of(name: str) -> str | None:
    """``train``, ``dev`` or ``test``, from the words of a file name (``LCQMC.valid.data``: dev), or None."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def sample_size(name: str) -> int | None:
    """The thousands in ``train.50k.json`` (each such file of OCNLI contains the smaller ones); None for other names."""
    match = re.search(r"\.(\d+)k\.", name)
    return int(match[1]) if match else None


def table_records(path: Path, *, target: Target | None = None) -> Iterator[tuple[int, Fields]]:
    """Numbered rows of a table separated by tabs, ``||`` or commas, as in its first line; blank lines are skipped.

    Without a header, two columns are texts, a third is the ``target``, and with four columns the first is a number or
    source and is ignored. ``target=None``: a score if the column holds numbers other than 0 and 1, else a label.

    Raises:
        DataFormatError: a row has too many or too few columns, or the header is not understood.
    """
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        return
    line, fields = first
    second = next(rows, None)
    rows = rows if second is None else itertools.chain([second], rows)
    names = _header(path, line, fields, fields if second is None else second[1])
    if names is None:
        names = _headerless_names(path, line, len(fields), target)
        rows = itertools.chain([first], rows)
    for line, fields in rows:
        if len(fields) != len(names):
            raise DataFormatError(
                path, f"expected {len(names)} columns ({', '.join(names)}), found {len(fields)}", line=line
            )
        yield line, dict(zip(names, fields, strict=True))


def _rows(path: Path) -> Iterator[tuple[int, Sequence[str]]]:
    lines = ((line_number, text) for line_number, text in read_lines(path) if text.strip())
    first = next(lines, None)
    if first is None:
        return
    lines = itertools.chain([first], lines)
    separator = next((mark for mark in ("\t", "||") if mark in first[1]), None)
    if separator is None:
        yield from _comma_rows(path)
        return
    for line_number, text in lines:  # no quoting: the texts of these sets contain unpaired quotation marks
        yield line_number, [field.strip() for field in text.split(separator)]


def _comma_rows(path: Path) -> Iterator[tuple[int, Sequence[str]]]:
    reader = csv.reader((text + "\n" for _, text in read_lines(path)), strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield reader.line_num, [field.strip() for field in fields]
    except csv.Error as error:
        raise DataFormatError(
            path, f"not valid comma-separated text ({error}); quote the texts, or use tabs", line=reader.line_num
        ) from error


def _header(path: Path, line: int, fields: Sequence[str], second: Sequence[str]) -> tuple[str, ...] | None:
    """The names of the columns; None if the first row has none, by what the second has."""
    names = tuple(field.lower() for field in fields)
    if any({first, second} <= set(names) for first, second in TEXT_FIELDS):
        return names
    are_words = all(name.isascii() and name.isidentifier() for name in names)
    if names[-1] in _HEADER_WORDS or are_words or (_is_number(second[-1]) and not _is_number(fields[-1])):
        known = ", ".join(f"{first}/{second}" for first, second in TEXT_FIELDS)
        raise DataFormatError(
            path,
            f"the header ({', '.join(names)}) does not name the two texts; rename them to one of {known}",
            line=line,
        )
    return None


def _headerless_names(path: Path, line: int, count: int, target: Target | None) -> tuple[str, ...]:
    if count not in _HEADERLESS:
        raise DataFormatError(
            path,
            f"{count} columns (between tabs, || or commas) and no header; without one there must be 3 (text, text, "
            "label) or 4 (number, text, text, label), with one the texts are sentence1 and sentence2",
            line=line,
        )
    names = _HEADERLESS[count]
    return names if count == 2 else (*names[:-1], target or _target_of(path))


def _target_of(path: Path) -> Target:
    others = {fields[-1] for _, fields in _rows(path)} - {"0", "1", "-", ""}
    return "score" if others and all(map(_is_number, others)) else "label"


def _is_number(text: str) -> bool:
    try:
        float(text if text not in {"-", ""} else 0)
    except ValueError:
        return False
    return True
