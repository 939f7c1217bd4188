"""Results with the passages around them, merged into consecutive parts of their documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from d2llm.core.types import Excerpt, Passage, RankedPassage

_LEAST_REPEATED = 8  # characters; a shorter repetition is more likely a coincidence than an overlap of passages


def merge_neighbours(results: Sequence[RankedPassage], *, overlapping: bool = False) -> list[Excerpt]:
    """Results with the passages before and after them as excerpts, in the order of their best results.

    Results of one document belong to the same excerpt if the passages around them overlap or follow each other
    directly, by position. A passage without a document is an excerpt of its own.

    Args:
        results: results of a search, best first, with their neighbours in ``before`` and ``after``.
        overlapping: whether a passage may begin with text that repeats the end of the one before (``chunk_overlap``);
            such text is kept once.
    """
    by_document: dict[str, list[RankedPassage]] = {}
    for result in results:
        passage = result.passage
        name = f"document {passage.document_id}" if passage.document_id else f"passage {passage.id}"
        by_document.setdefault(name, []).append(result)
    stretches = [stretch for parts in by_document.values() for stretch in _stretches(parts)]
    excerpts = [_excerpt(stretch, overlapping=overlapping) for stretch in stretches]
    return sorted(excerpts, key=lambda excerpt: excerpt.results[0].rank)


@dataclass(slots=True)
class _Stretch:
    """Results whose neighbourhoods touch, and the highest position that these reach."""

    results: list[RankedPassage]
    end: int


def _stretches(results: Sequence[RankedPassage]) -> list[_Stretch]:
    """The results of one document, grouped; in the order of the document."""
    spans = sorted((*_span(result), number) for number, result in enumerate(results))
    stretches: list[_Stretch] = []
    for start, end, number in spans:
        if stretches and start <= stretches[-1].end + 1:
            stretches[-1].results.append(results[number])
            stretches[-1].end = max(stretches[-1].end, end)
        else:
            stretches.append(_Stretch([results[number]], end))
    return stretches


def _span(result: RankedPassage) -> tuple[int, int]:
    """The first and the last position of a result and its neighbours."""
    positions = [passage.position for passage in (*result.before, result.passage, *result.after)]
    return min(positions), max(positions)


def _excerpt(stretch: _Stretch, *, overlapping: bool) -> Excerpt:
    results = sorted(stretch.results, key=lambda result: result.rank)
    neighbours = [passage for result in results for passage in (*result.before, *result.after)]
    # A result replaces the same passage among the neighbours of another: it may be shortened.
    by_id = {passage.id: passage for passage in [*neighbours, *(result.passage for result in results)]}
    passages = tuple(sorted(by_id.values(), key=lambda passage: (passage.position, passage.id)))
    return Excerpt(tuple(results), passages, _joined(passages, overlapping=overlapping))


def num_repeated(passages: Sequence[Passage]) -> list[int]:
    """How many characters at the start of each of some consecutive passages repeat the end of the one before it.

    Passages with different titles are of different sections, which do not overlap.
    """
    return [0] + [
        _num_repeated(before.text, passage.text) if passage.title == before.title else 0
        for before, passage in itertools.pairwise(passages)
    ]


def _joined(passages: Sequence[Passage], *, overlapping: bool) -> str:
    """The texts of consecutive passages, a line each; a new title begins a paragraph."""
    text = passages[0].text
    counts = num_repeated(passages) if overlapping else [0] * len(passages)
    for (before, passage), repeated in zip(itertools.pairwise(passages), counts[1:], strict=True):
        if passage.title != before.title:
            text = f"{text}\n\n{passage.title}\n{passage.text}" if passage.title else f"{text}\n\n{passage.text}"
            continue
        rest = passage.text[repeated:].lstrip() if repeated else passage.text
        text = f"{text}\n{rest}" if rest else text
    return text


def _num_repeated(before: str, after: str) -> int:
    """How many characters at the start of a text repeat the end of the one before it."""
    beginning = after[:_LEAST_REPEATED]
    start = before.find(beginning) if len(beginning) == _LEAST_REPEATED else -1
    while start >= 0 and not after.startswith(before[start:]):
        start = before.find(beginning, start + 1)
    return len(before) - start if start >= 0 else 0
