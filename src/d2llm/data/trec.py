"""Reading and writing rankings in the TREC run format: lines of ``query-id Q0 passage-id rank score tag``."""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from d2llm.core.errors import DataFormatError, DuplicateIdError, InputError
from d2llm.core.files import write_bytes
from d2llm.data.lines import read_lines, whole_number

_COLUMNS = ("query-id", "Q0", "passage-id", "rank", "score", "tag")


@dataclass(frozen=True)
class TrecRun:
    """The rankings of one system.

    ``name`` is the tag, or the file name if the lines have different tags. ``rankings`` holds passage ids as trec_eval
    orders them: by descending score (of 32 bits), equal ones by descending id; it ignores ranks and the order of lines.
    ``scores`` is query_id -> passage_id -> score in file order. ``issues`` lists irregularities that are not errors,
    with counts.
    """

    name: str
    rankings: dict[str, tuple[str, ...]]
    scores: dict[str, dict[str, float]]
    issues: tuple[str, ...] = ()


def read_run(path: Path) -> TrecRun:
    """Read a run file, plain or ``.gz``; columns are separated by spaces or tabs.

    Raises:
        DataFormatError: the file is missing, empty, not UTF-8 or damaged gzip, or a line does not have six columns, a
            whole-number rank and a finite score (the message names file and line).
        DuplicateIdError: a passage occurs twice for a query.
    """
    path = Path(path)
    scores: dict[str, dict[str, float]] = {}
    ranks: dict[str, dict[str, int]] = {}
    tags: dict[str, None] = {}
    for line, text in read_lines(path):
        fields = text.split()
        if not fields:
            continue
        if len(fields) != len(_COLUMNS):
            raise DataFormatError(
                path, f"expected 6 columns ({' '.join(_COLUMNS)}), found {len(fields)}: {text[:80]!r}", line=line
            )
        query_id, _, passage_id, rank, score, tag = fields
        if passage_id in scores.setdefault(query_id, {}):
            raise DuplicateIdError(
                path, f"passage '{passage_id}' is ranked twice for query '{query_id}'; keep one line", line=line
            )
        scores[query_id][passage_id] = _score(path, line, score)
        ranks.setdefault(query_id, {})[passage_id] = whole_number(path, line, "the rank", rank)
        tags[tag] = None
    if not scores:
        raise DataFormatError(path, f"holds no ranking; each line must be: {' '.join(_COLUMNS)}")
    rankings = {query_id: _ranking(by_passage) for query_id, by_passage in scores.items()}
    disordered = [query_id for query_id in scores if not _ranks_follow(scores[query_id], ranks[query_id])]
    issues: list[str] = []
    if disordered:
        issues.append(
            f"the ranks of {len(disordered)} of {len(scores)} queries do not follow the scores; the scores are used "
            f"(first: {', '.join(disordered[:5])})"
        )
    if len(tags) > 1:
        issues.append(f"{len(tags)} different tags ({', '.join(list(tags)[:5])}); read as one run")
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    return TrecRun(next(iter(tags)) if len(tags) == 1 else stem, rankings, scores, tuple(issues))


def write_run(path: Path, name: str, scored: Mapping[str, Sequence[tuple[str, float]]]) -> None:
    """Write rankings (query_id -> passages with scores, best first) as a run file, atomically; ``name`` is the tag.

    It is gzipped if ``path`` ends in ``.gz``. trec_eval compares scores of 32 bits: one that is not below that of the
    rank before becomes the next smaller number, so that every program ranks the passages in this order.

    Raises:
        InputError: a name or id is empty or contains white space, which the format does not allow, or a score is not
            finite.
    """
    _check_word("the name", name)
    lines: list[str] = []
    for query_id, passages in scored.items():
        _check_word("query id", query_id)
        before = np.float32(np.inf)
        for rank, (passage_id, score) in enumerate(passages, start=1):
            _check_word("passage id", passage_id)
            if not math.isfinite(score):
                raise InputError(f"query '{query_id}', passage '{passage_id}': the score {score} cannot be ranked")
            written = float(score) if np.float32(score) < before else float(np.nextafter(before, np.float32(-np.inf)))
            before = np.float32(written)
            lines.append(f"{query_id} Q0 {passage_id} {rank} {written!r} {name}\n")
    content = "".join(lines).encode()
    path = Path(path)
    write_bytes(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _ranking(scores: Mapping[str, float]) -> tuple[str, ...]:
    order = sorted(((np.float32(score), passage_id) for passage_id, score in scores.items()), reverse=True)
    return tuple(passage_id for _, passage_id in order)


def _score(path: Path, line: int, text: str) -> float:
    try:
        score = float(text)
    except ValueError as error:
        raise DataFormatError(path, f"the score must be a number, found {text!r}", line=line) from error
    if not math.isfinite(score):
        raise DataFormatError(path, f"the score is {text}, which cannot be ranked; check the system", line=line)
    return score


def _ranks_follow(scores: Mapping[str, float], ranks: Mapping[str, int]) -> bool:
    by_rank = [scores[passage_id] for passage_id in sorted(scores, key=ranks.__getitem__)]
    return all(first >= second for first, second in pairwise(by_rank))


def _check_word(label: str, text: str) -> None:
    if text.split() != [text]:
        raise InputError(f"{label} {text!r} is empty or contains white space, which a TREC run cannot hold; rename it")
