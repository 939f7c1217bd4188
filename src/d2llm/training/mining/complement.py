"""Training on what BM25 gets wrong, so that a student's vectors complement words (``training.complement_words``)."""

from __future__ import annotations

from dataclasses import replace

from d2llm.core.errors import InputError
from d2llm.data.collation import LabelledSource
from d2llm.data.plan import PlanEntry
from d2llm.store.bm25 import bm25_lists
from d2llm.training.checkpoints import remarks


def complement_words(labelled: LabelledSource, depth: int) -> LabelledSource:
    """The same queries, whose hard negatives and positives are what BM25 gets wrong among its first ``depth`` passages.

    Hard negatives that BM25 does not have there become easy ones. Positives are drawn from those that it does not have
    there; a query of which it has all, and labelled pairs, keep theirs.

    Source: Wrzalik and Krechel, "CoRT: Complementary Rankings from Transformers", NAACL 2021 (arXiv 2010.10252), whose
    negatives come from BM25's ranking. Here they are also negatives of the plan, which the teacher has scored, and the
    losses are the recipe's. That positives which BM25 misses come first is an addition.

    Raises:
        InputError: the plan has hard negatives, but BM25 has none of them among its first.
    """
    source, entries = labelled.source, labelled.entries
    if source.pairs is not None or not entries:
        return labelled
    dataset = source.dataset
    queries = [dataset.queries[entry.query_id] for entry in entries]
    lists = bm25_lists(dataset.passages, sorted(dataset.passages), queries, depth, title=f"BM25 of {dataset.name}")
    chosen = [_complementing(entry, set(first)) for entry, first in zip(entries, lists, strict=True)]
    num_hard, num_kept = (sum(len(entry.hard_negatives) for entry in group) for group in (entries, chosen))
    if num_hard and not num_kept:
        raise InputError(
            f"training.complement_words: none of the hard negatives of '{dataset.name}' is among BM25's first {depth}; "
            "mine them with BM25 as a source, or set a larger number"
        )
    remarks.info(
        "%s: BM25 has %d of %d hard negatives among its first %d, and misses positives of %d of %d queries",
        dataset.name,
        num_kept,
        num_hard,
        depth,
        sum(bool(entry.preferred) for entry in chosen),
        len(entries),
    )
    return replace(labelled, entries=tuple(chosen))


def _complementing(entry: PlanEntry, first: set[str]) -> PlanEntry:
    hard = tuple(passage_id for passage_id in entry.hard_negatives if passage_id in first)
    others = tuple(passage_id for passage_id in entry.hard_negatives if passage_id not in first)
    missed = tuple(passage_id for passage_id in entry.positives if passage_id not in first)
    return replace(entry, hard_negatives=hard, easy_negatives=entry.easy_negatives + others, preferred=missed)
