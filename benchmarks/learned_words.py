"""What words that a student has learnt find, alone and beside those of texts (SPLADE, DSR).

    python benchmarks/learned_words.py STUDENT... --json benchmarks/results/learned-words.json

The students have the pooling `splade`: those of `graded_lists/splade.toml`, for instance; `minilm` is the backbone
before training, with a head that was fitted to the passages.

nDCG@10 on dev of the words of an index alone, 200 queries among at most 1,000 passages: BM25, learnt words, and their
sum; and with the largest weight of each of 768 slices of the vocabulary alone. "words" and "query words" are how many
a passage and a query have.

Licences: wikiqa Microsoft Research Data License (research only), banking77 CC BY 4.0; nothing that was trained on them
is shipped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scaling.data_sets import DATA, require
from untrained import sample

from d2llm.data.beir import read_beir
from d2llm.methods.poolings.splade import SpladePooling
from d2llm.models.document_expansion import LearnedWords
from d2llm.models.student import Student
from d2llm.ops.bm25_words import terms
from d2llm.ops.measures import per_query_measures
from d2llm.recipe import BackboneConfig, InteractionConfig, Pooling, StudentConfig
from d2llm.store.bm25 import WordIndex
from d2llm.store.word_segment import WordSegment

SLICES = 768


def open_student(name: str, texts: Sequence[str]) -> Student:
    if Path(name).is_dir():
        return Student.load(name, device="cpu")
    backbone = BackboneConfig(model=name, max_query_tokens=48, max_passage_tokens=64)
    config = StudentConfig(
        backbone=backbone, pooling=Pooling.of("splade"), interaction=InteractionConfig(head="product")
    )
    student = Student.create(config, device="cpu", dtype="float32")
    student.fit_pooling(texts)
    return student


def rows_of(name: str, samples: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for BM25, and two for all learnt words and for those of slices: alone and with BM25."""
    texts = [text for _, passages, _ in samples.values() for text in passages.values()]
    student = open_student(name, texts)
    pooling, learned = student.pooling, LearnedWords(student)
    assert isinstance(pooling, SpladePooling)
    rows: list[dict[str, Any]] = []
    for slices in (None, SLICES):
        pooling.slices = slices
        only: dict[str, Any] = {"words": Path(name).name, "slices": slices, "with BM25": False}
        both = only | {"with BM25": True}
        for set_name, (queries, passages, qrels) in samples.items():
            added = learned.words(torch.zeros(0).numpy(), [*passages.values()])
            asked = learned.of_queries([*queries.values()])
            index = WordIndex([WordSegment.from_texts(passages.values()).with_added(added)])
            for row, factor in ((only, 0.0), (both, 1.0)):
                factors = [
                    dict.fromkeys(terms(text), factor) | words
                    for text, words in zip(queries.values(), asked, strict=True)
                ]
                row[set_name] = ndcg(index, [*passages], queries, factors, qrels)
                row[f"words, {set_name}"] = [round(fmean(map(len, words))) for words in (added, asked)]
        rows += [only, both]
    return rows


def ndcg(
    index: WordIndex,
    ids: Sequence[str],
    queries: Mapping[str, str],
    factors: Sequence[Mapping[str, float] | None],
    qrels: Any,
) -> float:
    rankings: dict[str, list[str]] = {}
    for (query_id, text), weights in zip(queries.items(), factors, strict=True):
        rows, scores = index.best(index.query(text, weights), 10)
        best = sorted((-score, ids[int(row)]) for row, score in zip(rows.tolist(), scores.tolist(), strict=True))
        rankings[query_id] = [passage_id for _, passage_id in best[:10]]
    return round(fmean(per_query_measures(rankings, qrels)["nDCG@10"].values()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", default=["minilm"], help="folders of students, or a backbone")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ("wikiqa", "banking77")
    require(*(DATA / name for name in names))
    samples = {name: sample(read_beir(DATA / name, splits=["dev"]), 200, 1_000) for name in names}
    bm25: dict[str, Any] = {"words": "BM25"}
    for name, (queries, passages, qrels) in samples.items():
        index = WordIndex([WordSegment.from_texts(passages.values())])
        bm25[name] = ndcg(index, [*passages], queries, [None] * len(queries), qrels)
    rows = [bm25, *(row for name in arguments.students for row in rows_of(name, samples))]
    print("\n".join(map(str, rows)))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
