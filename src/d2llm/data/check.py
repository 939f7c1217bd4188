"""Checks a data set in a single pass that keeps only ids, 64-bit hashes and samples of the texts.

Queries that occur in two splits have the same letters and digits, or are near duplicates found by MinHash.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, Literal

import numpy as np

from d2llm.core.extras import require
from d2llm.core.names import counted
from d2llm.data.beir import RetrievalSource, unknown_id_issues
from d2llm.data.lines import first_few, refuse_duplicate
from d2llm.data.pairs import LabelledPair, PairSource, in_order, kind_of, unseen_classes
from d2llm.data.same_text import comparable, comparable_shingles, hash64, jaccard

LeakKind = Literal["same query", "near query", "same pair"]
"""``same``: equal letters and digits. ``near``: near duplicates found by MinHash. ``same pair``: in either order."""


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """One split. ``num_items`` counts judgements or pairs, ``values`` by grade or class (empty for scores).

    ``score_range`` is (minimum, mean, maximum) for a set of scores.
    """

    name: str
    num_queries: int
    num_passages: int
    num_items: int
    values: Mapping[str, int]
    score_range: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Repeats:
    """Texts that occur more than once: ``count`` excludes the first of each; ``examples`` are ids."""

    label: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Leak:
    """``count`` queries or pairs of split ``second`` are in ``first`` too; ``examples`` are (second, first) ids."""

    kind: LeakKind
    first: str
    second: str
    count: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SharedPositives:
    """``count`` of the ``total`` relevant passage texts of split ``second`` are relevant in ``first`` too."""

    first: str
    second: str
    count: int
    total: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens, including special tokens. ``bars`` are (upper bound, fraction); the last bar has no bound.

    ``num_texts`` of ``num_all`` were measured. ``fraction_over`` is the fraction of texts with more than ``limit``
    tokens.
    """

    label: str
    num_texts: int
    num_all: int
    percentiles: Mapping[int, int]
    limit: int
    fraction_over: float
    bars: tuple[tuple[int | None, float], ...]


@dataclass(frozen=True, slots=True)
class Languages:
    """ISO 639-1 codes with the number of texts guessed to be in them, most frequent first, of ``num_texts`` sampled."""

    label: str
    num_texts: int
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DataReport:
    """The result of ``check_data``.

    ``leaks`` are errors unless they are allowed; everything else is for the reader to judge. ``num_passages`` and
    ``num_queries`` count everything in the files, whether or not a split uses it. ``data.check.read_through`` leaves
    lengths, languages and settings to ``check_data``.
    """

    name: str
    path: str
    kind: Literal["retrieval", "binary", "classes", "scores"]
    num_queries: int
    num_passages: int
    splits: tuple[SplitCounts, ...]
    repeats: tuple[Repeats, ...]
    leaks: tuple[Leak, ...]
    shared_positives: tuple[SharedPositives, ...]
    lengths: tuple[Lengths, ...] = ()
    languages: tuple[Languages, ...] = ()
    issues: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict[str, object])

    @property
    def num_leaks(self) -> int:
        """Number of queries and pairs that are in two splits, each kind counted separately."""
        return sum(leak.count for leak in self.leaks)


_NUM_EXAMPLES = 5
_PERCENTILES = (50, 75, 90, 95, 99, 100)
_NUM_BARS = 8
_BATCH_TEXTS = 512

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Texts -> number of tokens of each, including special tokens."""


class Sample:
    """Up to ``size`` texts drawn uniformly from a stream of ``num_seen`` texts (reservoir sampling)."""

    def __init__(self, size: int, *, seed: int = 0) -> None:
        self.texts: list[str] = []
        self.num_seen = 0
        self._size = size
        self._random = random.Random(seed)

    def add(self, text: str) -> None:
        """Process the next text of the stream."""
        self.num_seen += 1
        if len(self.texts) < self._size:
            self.texts.append(text)
        elif (index := self._random.randrange(self.num_seen)) < self._size:
            self.texts[index] = text


def measure_lengths(
    label: str, sample: Sample, count_tokens: CountTokens, limit: int, advance: Callable[[int], None]
) -> Lengths | None:
    """Token lengths of the sampled texts; None if there are none. ``advance`` is called with each batch's size."""
    lengths: list[int] = []
    for start in range(0, len(sample.texts), _BATCH_TEXTS):
        batch = sample.texts[start : start + _BATCH_TEXTS]
        lengths += count_tokens(batch)
        advance(len(batch))
    if not lengths:
        return None
    values = np.array(lengths)
    # method: the length of an actual text, not an interpolated value
    percentiles = {p: int(np.percentile(values, p, method="inverted_cdf")) for p in _PERCENTILES}
    # Bars of equal width up to the limit, and one for longer texts.
    bounds = sorted({-(-limit * index // _NUM_BARS) for index in range(1, _NUM_BARS + 1)})
    bar_indices = np.searchsorted(bounds, values)  # the first bar whose upper bound is not below the value
    fractions = np.bincount(bar_indices, minlength=len(bounds) + 1) / len(values)
    bars = tuple(zip([*bounds, None], fractions.tolist(), strict=True))
    fraction_over = float((values > limit).mean())
    return Lengths(label, len(lengths), sample.num_seen, percentiles, limit, fraction_over, bars)


def guess_languages(label: str, texts: Sequence[str]) -> Languages | None:
    """Guessed languages of ``texts``; None if there are no texts. Guesses for short texts are often wrong.

    Without py3langid there is a ``MissingExtraError``.
    """
    if not texts:
        return None
    langid = require("py3langid", extra="check", purpose="telling languages")
    counts = Counter(str(langid.classify(text)[0]) for text in texts)
    return Languages(label, len(texts), dict(counts.most_common()))


_NUM_HASHES = 128
_MIN_DETECTION_RATE = 0.99

Texts = Callable[[], Iterator[tuple[str, str]]]
"""A fresh stream of (id, text)."""


def same_keys(kind: LeakKind, ids_of: Mapping[str, Mapping[int, str]]) -> list[Leak]:
    """Leaks between any two splits: keys that both have. ``ids_of``: split -> key -> the first id with that key."""
    leaks: list[Leak] = []
    for first, second in combinations(ids_of, 2):
        pairs = [(name, ids_of[first][key]) for key, name in ids_of[second].items() if key in ids_of[first]]
        if pairs:
            leaks.append(Leak(kind, first, second, len(pairs), tuple(pairs[:_NUM_EXAMPLES])))
    return leaks


def near_queries(
    texts_of: Mapping[str, Texts],
    ids_of: Mapping[str, Mapping[int, str]],
    threshold: float,
    advance: Callable[[int], None],
) -> list[Leak]:
    """Queries that are similar but not identical in two splits, by Jaccard similarity of their character trigrams.

    MinHash LSH proposes candidates and the exact similarity decides, so every reported leak is real, but a few may be
    missed (fewer than one in a hundred at the threshold itself). The largest split is only looked up, never indexed, so
    memory grows only with the other splits. ``texts_of`` is in the order in which leaks name splits; a text whose
    ``hash64`` is in ``ids_of`` of both splits is not a near leak. ``threshold`` is the minimum similarity, from 0 to 1.

    Raises:
        MissingExtraError: datasketch is not installed.
    """
    splits = [split for split in texts_of if ids_of[split]]
    if len(splits) < 2:
        return []
    largest = max(splits, key=lambda split: len(ids_of[split]))
    index = _TextSketches(threshold)
    leaks: dict[tuple[str, str], dict[str, str]] = {pair: {} for pair in combinations(splits, 2)}
    for split in [*(name for name in splits if name != largest), largest]:
        keys: set[int] = set()
        for identifier, text in texts_of[split]():
            text = comparable(text)
            key = hash64(text)
            if not text or key in keys:
                advance(1)
                continue
            keys.add(key)
            shingles = comparable_shingles(text)
            sketch = index.sketch(shingles)
            for other, other_id, other_text in index.alike(sketch, shingles):
                if other == split or key in ids_of[other] or hash64(other_text) in ids_of[split]:
                    continue
                pair, ids = ((other, split), (identifier, other_id))
                if pair not in leaks:
                    pair, ids = (split, other), (other_id, identifier)
                leaks[pair].setdefault(*ids)
            if split != largest:
                index.add(split, identifier, text, sketch)
            advance(1)
    return [
        Leak("near query", first, second, len(ids), tuple(ids.items())[:_NUM_EXAMPLES])
        for (first, second), ids in leaks.items()
        if ids
    ]


class _TextSketches:
    """A MinHash index of texts; it keeps the texts too, which are smaller than their sketches, for the exact check."""

    def __init__(self, threshold: float) -> None:
        library = require("datasketch", extra="check", purpose="finding near duplicates")
        self._empty: Any = library.MinHash(_NUM_HASHES, hashfunc=zlib.crc32)  # copied, because creating one is slow
        self._threshold = threshold
        self._lsh: Any = library.MinHashLSH(num_perm=_NUM_HASHES, params=_bands(threshold))
        self._texts: list[tuple[str, str, str]] = []

    def sketch(self, shingles: frozenset[str]) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles])
        return sketch

    def alike(self, sketch: Any, shingles: frozenset[str]) -> Iterator[tuple[str, str, str]]:
        for index in sorted(self._lsh.query(sketch)):
            if jaccard(shingles, comparable_shingles(self._texts[index][2])) >= self._threshold:
                yield self._texts[index]

    def add(self, split: str, identifier: str, text: str, sketch: Any) -> None:
        self._lsh.insert(len(self._texts), sketch)
        self._texts.append((split, identifier, text))


def _bands(threshold: float) -> tuple[int, int]:
    """Number and width of the bands: the widest that miss fewer than one text in a hundred at the threshold.

    Two texts of similarity s share a band of r hashes with probability s^r (Leskovec, Rajaraman and Ullman, Mining of
    Massive Datasets, 3.4.2). The library's own choice penalises false positives, which here cost only a comparison.
    """
    for width in range(_NUM_HASHES // 2, 1, -1):
        num_bands = _NUM_HASHES // width
        if 1 - (1 - threshold**width) ** num_bands >= _MIN_DETECTION_RATE:
            return num_bands, width
    return _NUM_HASHES, 1


@dataclass
class Findings:
    """Results of one pass, with what the rest of the check needs.

    ``ids_of``: split -> hash of a query's comparable text -> the first id with that hash. ``texts_of`` reads the
    queries of a split again. ``queries`` and ``passages`` are samples of the texts.
    """

    report: DataReport
    ids_of: dict[str, dict[int, str]]
    texts_of: dict[str, Texts]
    queries: Sample
    passages: Sample


def read_through(source: RetrievalSource | PairSource, *, sample_size: int, seed: int = 0) -> Findings:
    """Read a data set once and count its contents; near-duplicate leaks are not checked here.

    Memory: for a retrieval set, an id and a hash per passage and query, and the judgements; for pairs, a few hashes
    per pair. Up to ``sample_size`` texts of each kind are kept. Errors as for ``open_data``.
    """
    queries, passages = Sample(sample_size, seed=seed), Sample(sample_size, seed=seed)
    if isinstance(source, RetrievalSource):
        return _read_retrieval(source, queries, passages)
    return _read_pairs(source, queries, passages)


@dataclass
class _Occurrences:
    """Occurrences of one irregularity: how many, and the first few ids."""

    count: int = 0
    examples: list[str] = field(default_factory=list[str])

    def add(self, identifier: str) -> None:
        self.count += 1
        if len(self.examples) < _NUM_EXAMPLES:
            self.examples.append(identifier)

    def as_repeats(self, label: str) -> list[Repeats]:
        return [Repeats(label, self.count, tuple(self.examples))] if self.count else []

    def as_issue(self, noun: str, problem: str) -> list[str]:
        return [f"{counted(self.count, noun)} {problem}, {first_few(self.examples)}"] if self.count else []


def _read_retrieval(source: RetrievalSource, queries: Sample, passages: Sample) -> Findings:
    qrels = source.qrels()
    qrels = {split: qrels[split] for split in in_order(qrels)}
    lines, hashes, empty_passages = _read_passages(source, passages)
    ids_of: dict[str, dict[int, str]] = {split: {} for split in qrels}
    repeats = {split: _Occurrences() for split in qrels}
    empty, unjudged = _Occurrences(), _Occurrences()
    query_lines: dict[str, int] = {}
    for line, query in source.iter_queries():
        refuse_duplicate(source.queries_path, line, query.id, query_lines)
        queries.add(query.text)
        if not query.text.strip():
            empty.add(query.id)
        text = comparable(query.text)
        key = hash64(text)
        splits = [split for split, judged in qrels.items() if query.id in judged]
        if not splits:
            unjudged.add(query.id)
        for split in splits:
            if text and ids_of[split].setdefault(key, query.id) != query.id:
                repeats[split].add(query.id)
    issues = [
        *unknown_id_issues(qrels, query_lines, lines),
        *empty_passages.as_issue("passage", "without text"),
        *empty.as_issue("query", "without text"),
        *unjudged.as_issue("query", "judged in no split"),
    ]
    for split, judged in qrels.items():
        without_positive = _Occurrences()
        for query_id, grades in judged.items():
            if not any(grade > 0 for grade in grades.values()):
                without_positive.add(query_id)
        issues += [f"{split}: {issue}" for issue in without_positive.as_issue("query", "without a relevant passage")]
    index_of = dict(zip(lines, range(len(lines)), strict=True))
    repeated = _repeated_passages(list(lines), hashes)
    for split, occurrences in repeats.items():
        repeated += occurrences.as_repeats(f"{split}: queries with the same text as another")
    report = DataReport(
        source.name,
        str(source.path),
        "retrieval",
        len(query_lines),
        len(lines),
        tuple(_count_judgements(split, judged) for split, judged in qrels.items()),
        tuple(repeated),
        tuple(same_keys("same query", ids_of)),
        _shared_positives(qrels, index_of, hashes),
        issues=tuple(issues),
    )

    def queries_of(split: str) -> Iterator[tuple[str, str]]:
        return ((query.id, query.text) for _, query in source.iter_queries() if query.id in qrels[split])

    texts_of = {split: partial(queries_of, split) for split in qrels}
    return Findings(report, ids_of, texts_of, queries, passages)


def _read_passages(source: RetrievalSource, sample: Sample) -> tuple[dict[str, int], array[int], _Occurrences]:
    """Id -> line, the hash of each passage in that order (0: no letters or digits), and the passages without text."""
    lines: dict[str, int] = {}
    hashes = array("Q")
    empty = _Occurrences()
    for line, passage in source.iter_passages():
        refuse_duplicate(source.corpus_path, line, passage.id, lines)
        sample.add(passage.full_text)
        if not passage.text.strip():
            empty.add(passage.id)
        text = comparable(passage.full_text)
        hashes.append(hash64(text) if text else 0)
    return lines, hashes, empty


def _repeated_passages(ids: list[str], hashes: array[int]) -> list[Repeats]:
    values = np.frombuffer(hashes, np.uint64)
    _, first = np.unique(values, return_index=True)
    repeated = np.setdiff1d(np.flatnonzero(values), first)
    examples = [ids[index] for index in repeated[:_NUM_EXAMPLES]]
    return _Occurrences(len(repeated), examples).as_repeats("passages with the same text as another")


def _count_judgements(split: str, judged: Mapping[str, Mapping[str, int]]) -> SplitCounts:
    grades = Counter(grade for passages in judged.values() for grade in passages.values())
    num_passages = len({passage_id for passages in judged.values() for passage_id in passages})
    values = {str(grade): grades[grade] for grade in sorted(grades)}
    return SplitCounts(split, len(judged), num_passages, sum(grades.values()), values)


def _shared_positives(
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]], index_of: Mapping[str, int], hashes: array[int]
) -> tuple[SharedPositives, ...]:
    texts = {
        split: {
            hashes[index_of[passage_id]]
            for grades in judged.values()
            for passage_id, grade in grades.items()
            if grade > 0 and passage_id in index_of
        }
        for split, judged in qrels.items()
    }
    return tuple(
        SharedPositives(first, second, len(texts[first] & texts[second]), len(texts[second]))
        for first, second in combinations(texts, 2)
        if texts[first] & texts[second]
    )


class _PairSplit:
    """Counts of one split of pairs. Keys are hashes of comparable texts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.query_ids: dict[int, str] = {}
        self.passage_keys: set[int] = set()
        self.pair_ids: dict[int, str] = {}  # the key is the same for both orders of the two texts
        self._orders: set[int] = set()
        self.classes: Counter[str] = Counter()
        self.num_pairs = 0
        self.score_sum, self.lowest, self.highest = 0.0, float("inf"), float("-inf")
        self.twice, self.turned = _Occurrences(), _Occurrences()

    def add(self, pair: LabelledPair, targets: dict[int, str | float | None], conflicts: _Occurrences) -> None:
        """Count a pair. ``targets``: pair -> its label or score, over all splits."""
        self.num_pairs += 1
        if pair.score is not None:
            self.score_sum += pair.score
            self.lowest, self.highest = min(self.lowest, pair.score), max(self.highest, pair.score)
        elif pair.label is not None:
            self.classes[pair.label] += 1
        query, passage = comparable(pair.query), comparable(pair.passage)
        self.passage_keys.add(hash64(passage))
        if query:
            self.query_ids.setdefault(hash64(query), pair.id)
        if not (query and passage):
            return
        key = hash64(f"{query}\n{passage}")
        target = pair.label if pair.score is None else pair.score
        if targets.setdefault(key, target) != target:
            conflicts.add(f"{self.name}/{pair.id}")
        either = hash64("\n".join(sorted((query, passage))))
        if either not in self.pair_ids:
            self.pair_ids[either] = pair.id
            self._orders.add(key)
        elif key in self._orders:
            self.twice.add(pair.id)
        else:
            self.turned.add(pair.id)
            self._orders.add(key)

    def counts(self) -> SplitCounts:
        scores = (self.lowest, self.score_sum / self.num_pairs, self.highest) if self.lowest <= self.highest else None
        classes = {label: self.classes[label] for label in sorted(self.classes)}
        return SplitCounts(self.name, len(self.query_ids), len(self.passage_keys), self.num_pairs, classes, scores)

    def repeats(self) -> list[Repeats]:
        return [
            *self.twice.as_repeats(f"{self.name}: repeated pairs"),
            *self.turned.as_repeats(f"{self.name}: repeated pairs in reverse order"),
        ]


def _read_pairs(source: PairSource, queries: Sample, passages: Sample) -> Findings:
    splits = {name: _PairSplit(name) for name in source.splits}
    targets: dict[int, str | float | None] = {}
    conflicts = _Occurrences()
    issues = list(source.issues)
    for name, split in splits.items():
        counts: Counter[str] = Counter()
        for pair in source.iter_pairs(name, counts):
            queries.add(pair.query)
            passages.add(pair.passage)
            split.add(pair, targets, conflicts)
        issues += [f"{name}: {counted(count, 'pair')} {problem}" for problem, count in counts.items() if count]
    splits = {name: split for name, split in splits.items() if split.num_pairs}
    classes_of: dict[str, set[str | None]] = {name: set(split.classes) or {None} for name, split in splits.items()}
    kind, _ = kind_of(source.path, classes_of)
    ids_of = {name: split.query_ids for name, split in splits.items()}
    report = DataReport(
        source.name,
        str(source.path),
        kind,
        len(set().union(*(split.query_ids for split in splits.values()))),
        len(set().union(*(split.passage_keys for split in splits.values()))),
        tuple(split.counts() for split in splits.values()),
        (
            *(repeat for split in splits.values() for repeat in split.repeats()),
            *conflicts.as_repeats("pairs that another line labels differently"),
        ),
        (
            *same_keys("same query", ids_of),
            *same_keys("same pair", {name: split.pair_ids for name, split in splits.items()}),
        ),
        (),
        issues=(*issues, *unseen_classes(classes_of)),
    )

    def queries_of(split: str) -> Iterator[tuple[str, str]]:
        return ((pair.id, pair.query) for pair in source.iter_pairs(split, Counter()))

    return Findings(report, ids_of, {name: partial(queries_of, name) for name in splits}, queries, passages)
