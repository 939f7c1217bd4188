"""The context for an answer: the best passages for a query as one text of limited length, with numbered sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple, get_args

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_choice, check_count, path_of
from d2llm.core.short_repr import short_repr
from d2llm.core.types import (
    ContextOrder,
    Excerpt,
    MetadataValue,
    Passage,
    RankedPassage,
    Ranking,
    Task,
)
from d2llm.models.length_limit import cut_pair
from d2llm.models.sources import find_model, load_tokenizer
from d2llm.models.tokens import token_ends
from d2llm.ops.bm25_words import sentences
from d2llm.retrieval.chunking import HEADING_SEPARATOR
from d2llm.retrieval.results import merge_neighbours
from d2llm.retrieval.settings import SearchSettings

if TYPE_CHECKING:
    from d2llm.models.student import Student

NEAR_DUPLICATES = 0.95
"""Cosine from which a context leaves out a passage that says nothing new, unless the settings say another."""

TokenEnds = Callable[[str], Sequence[int]]
"""Where the tokens of a text end, in characters, without special tokens."""

_SEPARATOR = "\n\n"  # between sources
_CHARACTERS_OF_TOKEN = 16  # seldom more


@dataclass(frozen=True, slots=True)
class ContextSource:
    """A source of a context: a passage, or consecutive passages of a document.

    Attributes:
        number: from 1, as in the text.
        header: the line before its text: number, title, pages and path, as far as known.
        text: its text in the context, without the header.
        title: title of its first passage, with the headings above it.
        pages: pages of its passages, in order.
        path: path of its document.
        document_id: its document; empty if the passage belongs to none.
        passage_ids: its passages, in the order of the document.
        ranks: ranks of the results among them, best first.
        score: score of the best of these.
        metadata: metadata of this best one.
    """

    number: int
    header: str
    text: str
    title: str
    pages: tuple[int, ...]
    path: str
    document_id: str
    passage_ids: tuple[str, ...]
    ranks: tuple[int, ...]
    score: float
    metadata: Mapping[str, MetadataValue]


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """Passages that a language model may answer a query from.

    Attributes:
        text: the sources, each after its header; empty if there are none.
        sources: the sources, in the order of the text.
        num_tokens: number of tokens of the text, at most ``max_tokens``.
        max_tokens: the limit.
        left_out: ids of results that did not fit, best first.
        num_neighbours_left_out: how many neighbours of results did not fit.
        truncated: whether the best result alone was longer than the limit, so that its end is missing. Nothing else is
            ever cut.
        ranking: the results that the context was made from.
    """

    text: str
    sources: tuple[ContextSource, ...]
    num_tokens: int
    max_tokens: int
    left_out: tuple[str, ...]
    num_neighbours_left_out: int
    truncated: bool
    ranking: Ranking

    __repr__ = short_repr


def context_settings(settings: SearchSettings) -> SearchSettings:
    """The settings of the search for a context: near duplicates are left out from ``NEAR_DUPLICATES`` on by default.

    Raises:
        InputError: the settings rank documents.
    """
    if settings.group != "passage":
        raise InputError(f"a context is made from passages, but group is {settings.group!r}; leave it out")
    return settings if settings.near_duplicates is not None else settings.replace(near_duplicates=NEAR_DUPLICATES)


@cache
def named_tokenizer(name: str) -> TokenEnds:
    """The tokenizer of a model: its folder (weights are not needed), or a name as for a backbone.

    Raises:
        ModelNotFoundError: there is no such model, or it has no tokenizer.
    """
    location = name if path_of(name, "tokenizer").is_dir() else find_model(name)
    return partial(token_ends, load_tokenizer(location))


def build_context(
    ranking: Ranking,
    token_ends: TokenEnds,
    max_tokens: int,
    *,
    order: ContextOrder = "rank",
    overlapping: bool = False,
) -> AnswerContext:
    """Fill a context with the results of a ranking, best first, each with as many of its neighbours as fit.

    A result that does not fit is left out, and a shorter one after it may still fit. Passages are never cut, with one
    exception: if the best result alone is longer than the limit, it keeps its first tokens, as a text that is too long
    for a model does (``models.length_limit``).

    Args:
        ranking: results of a search for passages, with neighbours if wanted.
        token_ends: the tokenizer that counts.
        max_tokens: maximum number of tokens of the text, headers included, at least 1.
        order: the order of the sources.
        overlapping: whether passages of a document may repeat each other's text (``merge_neighbours``).

    Raises:
        InputError: ``max_tokens`` is below 1, or there is no such order.
    """
    check_choice(order, "order", get_args(ContextOrder))
    check_count(max_tokens, "max_tokens")
    packer = _Packer(token_ends, max_tokens, order, overlapping)
    for result in ranking.passages:
        packer.add(result)
    sources, text, num_tokens = packer.finish()
    included = {name for source in sources for name in source.passage_ids}
    neighbours = {p.id for result in ranking.passages for p in (*result.before, *result.after)}
    left_out = tuple(result.passage.id for result in ranking.passages if result.passage.id not in included)
    return AnswerContext(
        text=text,
        sources=sources,
        num_tokens=num_tokens,
        max_tokens=max_tokens,
        left_out=left_out,
        num_neighbours_left_out=len(neighbours - included - set(left_out)),
        truncated=packer.truncated,
        ranking=ranking,
    )


def answering_sentences(ranking: Ranking, student: Student, task: Task, least: float | None) -> Ranking:
    """A ranking whose passages have only the sentences that answer its query with a probability of at least ``least``.

    Results without such a sentence are left out, and all neighbours; the others keep their ranks and scores. A sentence
    is read alone, and its probability is that of the score of the vectors. None: the ranking as it is.

    After the extractive compressor of Xu et al., "RECOMP: Improving Retrieval-Augmented LMs with Compression and
    Selective Augmentation", ICLR 2024 (arXiv 2310.04408), section 3.1, an encoder trained for it that keeps a fixed
    number of sentences. The empty answer is that of its other, abstractive one.

    Raises:
        InputError: the student is not calibrated for this task.
    """
    if least is None:
        return ranking
    texts = [[one.passage.text[start:end] for start, end in sentences(one.passage.text)] for one in ranking.passages]
    pairs = [(ranking.query.text, sentence) for found in texts for sentence in found]
    scores = student.predict(pairs, task=task, with_features=False) if pairs else ()
    answers = iter(student.calibration.probabilities(scores, task) >= least)
    kept = [" ".join([sentence for sentence in found if next(answers)]) for found in texts]
    shorter = [
        replace(result, passage=replace(result.passage, text=text), before=(), after=())
        for result, text in zip(ranking.passages, kept, strict=True)
        if text
    ]
    return replace(ranking, passages=tuple(shorter))


class _Labels(NamedTuple):
    """What a header says about an excerpt."""

    title: str
    pages: tuple[int, ...]
    path: str


class _Piece(NamedTuple):
    """A source without its number, and the numbers of tokens of its text: if another follows, and if it is the last."""

    excerpt: Excerpt
    heading: str
    inner_tokens: int
    last_tokens: int


class _Packer:
    """Collects results as long as their text fits; ``truncated``: the first of them was cut.

    While results are added, lengths are sums over lines, which are counted once each. A tokenizer may join what is on
    both sides of a line's end, so ``finish`` counts the whole text. A result changes only the pieces that it joins and
    the numbers of those after it; that of a new document comes last.
    """

    def __init__(self, token_ends: TokenEnds, max_tokens: int, order: ContextOrder, overlapping: bool) -> None:
        self._token_ends = token_ends
        self._max_tokens = max_tokens
        self._order: ContextOrder = order
        self._overlapping = overlapping
        self._lines: dict[str, int] = {}  # number of tokens of each line
        self._chosen: list[RankedPassage] = []
        self._pieces: dict[str, list[_Piece]] = {}  # of each document
        self._num_pieces = 0
        self._inner_tokens = 0  # of all pieces, if another follows
        self.truncated = False

    def add(self, result: RankedPassage) -> None:
        """Include a result with the neighbours that fit, if it fits itself; nothing after a result that was cut."""
        if self.truncated:
            return
        name = _document_name(result.passage)
        fitting = None
        for candidate in _with_more_neighbours(result):
            pieces = self._pieces_with(name, candidate)
            num_pieces, inner_tokens, last = self._sum_with(name, pieces)
            if inner_tokens - last.inner_tokens + last.last_tokens > self._max_tokens:
                break
            fitting = candidate, pieces, num_pieces, inner_tokens
        if fitting is not None:
            candidate, self._pieces[name], self._num_pieces, self._inner_tokens = fitting
            self._chosen.append(candidate)
        elif not self._chosen:
            self._cut(replace(result, before=(), after=()))

    def _pieces_with(self, name: str, result: RankedPassage) -> list[_Piece]:
        """The pieces of a document with one more result, which joins those that its neighbourhood touches."""
        positions = [passage.position for passage in (*result.before, result.passage, *result.after)]
        apart: list[_Piece] = []
        joined = [result]
        for piece in self._pieces.get(name, []):
            passages = piece.excerpt.passages
            if passages[-1].position < min(positions) - 1 or passages[0].position > max(positions) + 1:
                apart.append(piece)
            else:
                joined += piece.excerpt.results
        return [*apart, *self._pieces_of(joined)]

    def _sum_with(self, name: str, pieces: list[_Piece]) -> tuple[int, int, _Piece]:
        """With these pieces of a document: the number of all, their tokens if another follows, and the last of them."""
        if name not in self._pieces:
            first, before = self._num_pieces + 1, self._inner_tokens
        else:
            every = {**self._pieces, name: pieces}
            pieces, first, before = self._arranged([one for some in every.values() for one in some]), 1, 0
        headers = (
            self._count_line(f"{_header(position, one.heading)}\n") for position, one in enumerate(pieces, first)
        )
        inner_tokens = before + sum(headers) + sum(one.inner_tokens for one in pieces)
        return first - 1 + len(pieces), inner_tokens, pieces[-1]

    def finish(self) -> tuple[tuple[ContextSource, ...], str, int]:
        """The sources, their text, and its number of tokens."""
        while True:
            sources = self._sources(self._chosen)
            text = _text_of(sources)
            if (num_tokens := len(self._ends(text))) <= self._max_tokens:
                return sources, text, num_tokens
            self._chosen.pop()

    def _ends(self, text: str) -> Sequence[int]:
        """Where the tokens of a text end; if the beginning of a long text has too many, those of the beginning."""
        beginning = text[: _CHARACTERS_OF_TOKEN * self._max_tokens]
        ends = self._token_ends(beginning)
        return ends if len(beginning) == len(text) or len(ends) > 2 * self._max_tokens else self._token_ends(text)

    def _length(self, text: str) -> int:
        num_tokens = 0
        for line in text.splitlines(keepends=True):
            num_tokens += self._count_line(line)
            if num_tokens > 2 * self._max_tokens:  # too many in any case
                break
        return num_tokens

    def _count_line(self, line: str) -> int:
        if line not in self._lines:
            self._lines[line] = len(self._ends(line))
        return self._lines[line]

    def _cut(self, result: RankedPassage) -> None:
        """Include the first tokens of a result that is too long, if the header leaves room for any."""
        text = result.passage.text
        ends = self._ends(text)
        (source,) = self._sources([result])
        for room in range(self._max_tokens - self._count_line(f"{source.header}\n"), 0, -1):
            _, kept = cut_pair(("", text), ((), ends), room)
            shorter = replace(result, passage=replace(result.passage, text=kept))
            if len(self._ends(_text_of(self._sources([shorter])))) <= self._max_tokens:
                self._chosen, self.truncated = [shorter], True
                return

    def _sources(self, results: Sequence[RankedPassage]) -> tuple[ContextSource, ...]:
        pieces = self._arranged(self._pieces_of(results))
        return tuple(_source(position, piece) for position, piece in enumerate(pieces, start=1))

    def _pieces_of(self, results: Sequence[RankedPassage]) -> list[_Piece]:
        return [
            _Piece(one, _heading(one), self._length(f"{one.text}{_SEPARATOR}"), self._length(one.text))
            for one in merge_neighbours(results, overlapping=self._overlapping)
        ]

    def _arranged(self, pieces: list[_Piece]) -> list[_Piece]:
        """The pieces of all documents in the order of the text."""
        arranged = sorted(pieces, key=lambda piece: piece.excerpt.results[0].rank)
        if self._order == "document":
            first: dict[str, int] = {}
            for position, piece in enumerate(arranged):
                first.setdefault(_document_name(piece.excerpt.passages[0]), position)
            arranged.sort(
                key=lambda piece: (
                    first[_document_name(piece.excerpt.passages[0])],
                    piece.excerpt.passages[0].position,
                )
            )
        return arranged


def _text_of(sources: Sequence[ContextSource]) -> str:
    return _SEPARATOR.join(f"{source.header}\n{source.text}" for source in sources)


def _with_more_neighbours(result: RankedPassage) -> list[RankedPassage]:
    """A result alone, then with its nearest neighbours, and so on, then with all of them."""
    at = result.passage.position
    distances = sorted({abs(passage.position - at) for passage in (*result.before, *result.after)} | {0})
    return [
        replace(
            result,
            before=tuple(passage for passage in result.before if at - passage.position <= distance),
            after=tuple(passage for passage in result.after if passage.position - at <= distance),
        )
        for distance in distances
    ]


def _document_name(passage: Passage) -> str:
    return passage.document_id or passage.id


def _heading(excerpt: Excerpt) -> str:
    """The header of a source without its number."""
    labels = _labels(excerpt)
    pages = f"page{'s' if len(labels.pages) > 1 else ''} {_ranges(labels.pages)}" if labels.pages else ""
    path = labels.path if labels.title and labels.path != labels.title else ""
    name = labels.title or labels.path or _document_name(excerpt.passages[0])
    return " ".join(", ".join([name, *(part for part in (pages, path) if part)]).split())


def _header(position: int, heading: str) -> str:
    return f"[{position}] {heading}".rstrip()


def _source(position: int, piece: _Piece) -> ContextSource:
    excerpt, labels, best = piece.excerpt, _labels(piece.excerpt), piece.excerpt.results[0]
    return ContextSource(
        number=position,
        header=_header(position, piece.heading),
        text=excerpt.text,
        title=labels.title,
        pages=labels.pages,
        path=labels.path,
        document_id=best.passage.document_id,
        passage_ids=tuple(passage.id for passage in excerpt.passages),
        ranks=tuple(result.rank for result in excerpt.results),
        score=best.score,
        metadata=best.passage.metadata,
    )


def _labels(excerpt: Excerpt) -> _Labels:
    first = excerpt.passages[0]
    heading = str(first.metadata.get("heading") or "")
    headings = [first.title, "" if first.title.endswith(heading) else heading]
    pages = {passage.metadata.get("page") for passage in excerpt.passages}
    return _Labels(
        title=HEADING_SEPARATOR.join(part for part in headings if part),
        pages=tuple(sorted(page for page in pages if isinstance(page, int))),
        path=str(first.metadata.get("path") or ""),
    )


def _ranges(pages: Sequence[int]) -> str:
    """Numbers as text, neighbouring ones as a range: 3-5, 8."""
    ranges: list[list[int]] = []
    for page in pages:
        if ranges and page == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], page]
        else:
            ranges.append([page])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)
