"""The verb ``mine``: which passages each training query learns from (method: negatives)."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.recipe import MiningConfig
from d2llm.core.types import Query
from d2llm.data.beir import Dataset
from d2llm.data.plan import PlanEntry
from d2llm.data.same_text import SameText
from d2llm.index.lexical import LexicalIndex
from d2llm.ops.selection import top_rows
from d2llm.pipeline.cosine import CosineStudent
from d2llm.pipeline.progress import progress_bar
from d2llm.pipeline.protocols import TextEncoder

_log = logging.getLogger(__name__)
_BLOCK_NUMBERS = 1 << 23  # cosines held at a time: 32 MB of float32
_NUM_SHOWN = 5
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class MiningResult:
    """The plan's entries, in the order of the qrels file, and a report of counts, examples and seconds."""

    entries: list[PlanEntry]
    report: dict[str, Any]


@dataclass
class _Tally:
    """What happened, counted."""

    left_out: dict[str, list[str]] = field(
        default_factory=lambda: {"without_positives": [], "shared_positive": [], "not_sampled": []}
    )
    hard_from: Counter[str] = field(default_factory=Counter[str])
    same_text: int = 0
    too_few_hard: list[str] = field(default_factory=list[str])
    too_few_easy: list[str] = field(default_factory=list[str])
    seconds: dict[str, float] = field(default_factory=dict[str, float])


def mine(
    dataset: Dataset,
    split: str,
    config: MiningConfig,
    *,
    encoder: TextEncoder | None,
    seed: int,
    max_queries: int | None = None,
    exclude_passages_of: Sequence[str] = ("dev", "test"),
    show_progress: bool | None = None,
) -> MiningResult:
    """Choose hard and easy negatives for the queries of a split.

    Hard negatives are drawn at random from the union of the first ``depth`` passages of BM25 and of the encoder's
    cosine, without the query's positives (of any split), passages of the same text as one, and the first
    ``skip_top`` others of either list. Easy negatives are drawn from the rest of the corpus. A query's draw depends on
    the seed, its id and the corpus, not on the order of files or on which other queries are mined.

    Args:
        dataset: passages, queries and judgements.
        split: the split to train on.
        config: numbers of negatives and depth of the lists.
        encoder: gives the cosine list; None means BM25 alone.
        seed: of the draws and of the sample of queries.
        max_queries: mine a random sample of this many queries (a larger sample contains a smaller one).
        exclude_passages_of: queries that share a positive with a query of these splits are left out, so that dev and
            test passages have never been positives in training. The passages stay available as negatives.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: no query is left to mine.
        ModelError: the encoder gave vectors that are not finite.
    """
    start = time.perf_counter()
    tally = _Tally()
    positives = _eligible(dataset, split, exclude_passages_of, tally)
    if max_queries is not None and len(positives) > max_queries:
        chosen = set(sorted(positives, key=lambda query_id: _key(seed, query_id))[:max_queries])
        tally.left_out["not_sampled"] = [query_id for query_id in positives if query_id not in chosen]
        positives = {query_id: ids for query_id, ids in positives.items() if query_id in chosen}
    queries = [dataset.queries[query_id] for query_id in positives]
    lists = {"bm25": _lexical_lists(dataset, queries, config.range_max, tally, show_progress)}
    if encoder is not None:
        lists["cosine"] = _cosine_lists(dataset, queries, encoder, config.range_max, tally, show_progress)
    known = _relevant_anywhere(dataset)
    same_text = SameText(dataset)
    corpus = sorted(dataset.passages)
    entries: list[PlanEntry] = []
    for number, query in enumerate(queries):
        repeats = same_text.as_any_of(known[query.id])
        tally.same_text += len(repeats)
        forbidden = known[query.id] | repeats
        rng = random.Random(_key(seed, query.id))
        ranked = {source: found[number] for source, found in lists.items()}
        hard = _draw_hard(ranked, forbidden, config, rng, tally)
        easy = _draw_easy(corpus, forbidden | set(hard), config.num_easy, rng)
        if len(hard) < config.num_hard:
            tally.too_few_hard.append(query.id)
        if len(easy) < config.num_easy:
            tally.too_few_easy.append(query.id)
        entries.append(PlanEntry(query.id, positives[query.id], tuple(hard), tuple(easy)))
    tally.seconds["total"] = time.perf_counter() - start
    return MiningResult(entries, _report(dataset, split, entries, tally))


def _eligible(
    dataset: Dataset, split: str, exclude_passages_of: Sequence[str], tally: _Tally
) -> dict[str, tuple[str, ...]]:
    """Positives of the queries of ``split`` that can be trained on."""
    others = [other for other in exclude_passages_of if other != split]
    unread = [other for other in others if other not in dataset.qrels]
    if unread:
        _log.warning("%s: positives of %s are not kept apart: not read", dataset.name, ", ".join(unread))
    reserved = {
        passage_id
        for other in others
        if other in dataset.qrels
        for positives in dataset.positives(other).values()
        for passage_id in positives
    }
    eligible: dict[str, tuple[str, ...]] = {}
    for query_id, positives in dataset.positives(split).items():
        if not positives:
            tally.left_out["without_positives"].append(query_id)
        elif not reserved.isdisjoint(positives):
            tally.left_out["shared_positive"].append(query_id)
        else:
            eligible[query_id] = positives
    if not eligible:
        raise InputError(
            f"{dataset.path}: no query of split '{split}' is left to mine: {len(dataset.qrels[split])} in qrels, "
            f"{len(tally.left_out['without_positives'])} without a positive in the corpus, "
            f"{len(tally.left_out['shared_positive'])} sharing a positive with {' or '.join(others) or 'none'} "
            "(allow that with exclude_passages_of=(), in a recipe with exclude_shared_passages = false)"
        )
    return eligible


def _relevant_anywhere(dataset: Dataset) -> dict[str, set[str]]:
    """Passages judged relevant to a query in any split."""
    relevant: dict[str, set[str]] = {}
    for split in dataset.qrels:
        for query_id, positives in dataset.positives(split).items():
            relevant.setdefault(query_id, set()).update(positives)
    return relevant


def _lexical_lists(
    dataset: Dataset, queries: Sequence[Query], depth: int, tally: _Tally, show: bool | None
) -> list[list[str]]:
    start = time.perf_counter()
    index = LexicalIndex(list(dataset.passages.values()))
    lists: list[list[str]] = []
    with progress_bar("BM25", len(queries), show=show) as advance:
        for candidates in index.iterate([query.text for query in queries], depth):
            lists.append([candidate.passage_id for candidate in candidates])
            advance(1)
    tally.seconds["bm25"] = time.perf_counter() - start
    return lists


def _cosine_lists(
    dataset: Dataset, queries: Sequence[Query], encoder: TextEncoder, depth: int, tally: _Tally, show: bool | None
) -> list[list[str]]:
    start = time.perf_counter()
    ids = list(dataset.passages)
    cosine = CosineStudent(encoder)
    with progress_bar("encoding passages", len(ids), show=show) as advance:
        encoded = cosine.encode_passages([passage.full_text for passage in dataset.passages.values()], advance=advance)
        passage_vectors = _finite(encoded.vectors, "passage", ids)
    with progress_bar("encoding queries", len(queries), show=show) as advance:
        encoded = cosine.encode_queries([query.text for query in queries], advance=advance)
        query_vectors = _finite(encoded.vectors, "query", [query.id for query in queries])
    tally.seconds["encoding"] = time.perf_counter() - start
    start = time.perf_counter()
    lists = nearest_ids(query_vectors, passage_vectors, ids, depth)
    tally.seconds["cosine"] = time.perf_counter() - start
    return lists


def _finite(vectors: NDArray[np.float32], kind: str, ids: Sequence[str]) -> NDArray[np.float32]:
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise ModelError(
            f"{len(wrong)} {kind} vectors are not finite, the first is that of '{ids[wrong[0]]}'; check the encoder"
        )
    return vectors


def nearest_ids(
    queries: NDArray[np.float32],
    passages: NDArray[np.float32],
    ids: Sequence[str],
    top_k: int,
    *,
    block_numbers: int = _BLOCK_NUMBERS,
) -> list[list[str]]:
    """Passages with the largest inner products, best first, equal ones by id; exact, in blocks of queries.

    Args:
        queries: [q, d].
        passages: [n, d].
        ids: of the n passages.
        top_k: how many per query; all n when there are fewer.
        block_numbers: inner products held at a time; at least one query's n are.

    Returns:
        q lists of min(top_k, n) ids.
    """
    num_queries = max(1, block_numbers // max(1, len(passages)))
    lists: list[list[str]] = []
    for start in range(0, len(queries), num_queries):
        for scores in queries[start : start + num_queries] @ passages.T:
            rows: list[int] = top_rows(scores, top_k, ids.__getitem__).tolist()
            lists.append([ids[row] for row in rows])
    return lists


def _draw_hard(
    ranked: Mapping[str, Sequence[str]], forbidden: set[str], config: MiningConfig, rng: random.Random, tally: _Tally
) -> list[str]:
    """``num_hard`` of the union of the lists, in random order."""
    allowed = {
        source: [passage_id for passage_id in found if passage_id not in forbidden] for source, found in ranked.items()
    }
    # What either list puts first, another list's lower place does not make a surer negative.
    skipped = {passage_id for found in allowed.values() for passage_id in found[: config.range_min]}
    pool = sorted({passage_id for found in allowed.values() for passage_id in found} - skipped)
    hard = rng.sample(pool, min(config.num_hard, len(pool)))
    for passage_id in hard:
        tally.hard_from["+".join(source for source, found in allowed.items() if passage_id in found)] += 1
    return hard


def _draw_easy(corpus: Sequence[str], forbidden: set[str], num_easy: int, rng: random.Random) -> list[str]:
    """``num_easy`` of the corpus (ids in order), in random order."""
    # So many are drawn that enough remain even if every forbidden passage is among them.
    drawn = rng.sample(range(len(corpus)), min(len(corpus), num_easy + len(forbidden)))
    return [corpus[row] for row in drawn if corpus[row] not in forbidden][:num_easy]


def _key(seed: int, query_id: str) -> bytes:
    return hashlib.sha256(f"{seed}:{query_id}".encode()).digest()


def _report(dataset: Dataset, split: str, entries: Sequence[PlanEntry], tally: _Tally) -> dict[str, Any]:
    lists = {**tally.left_out, "too_few_hard": tally.too_few_hard, "too_few_easy": tally.too_few_easy}
    return {
        "dataset": dataset.name,
        "split": split,
        "num_judged_queries": len(dataset.qrels[split]),
        "num_unknown_queries": sum(query_id not in dataset.queries for query_id in dataset.qrels[split]),
        "num_entries": len(entries),
        "num_positives": sum(len(entry.positives) for entry in entries),
        "num_hard_negatives": sum(len(entry.hard_negatives) for entry in entries),
        "num_easy_negatives": sum(len(entry.easy_negatives) for entry in entries),
        "num_same_text_as_positive": tally.same_text,
        "hard_negatives_from": dict(sorted(tally.hard_from.items())),
        "queries": {name: {"count": len(ids), "first": ids[:_NUM_SHOWN]} for name, ids in lists.items()},
        "examples": [_example(dataset, entry) for entry in entries[:_NUM_EXAMPLES]],
        "issues": list(dataset.issues),
        "seconds": {name: round(seconds, 3) for name, seconds in tally.seconds.items()},
    }


def _example(dataset: Dataset, entry: PlanEntry) -> dict[str, str | None]:
    hard = entry.hard_negatives[0] if entry.hard_negatives else None
    return {
        "query_id": entry.query_id,
        "query": dataset.queries[entry.query_id].text,
        "positive": dataset.passages[entry.positives[0]].full_text,
        "hard_negative": None if hard is None else dataset.passages[hard].full_text,
    }
