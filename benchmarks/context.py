"""Is a passage found better with its context in front of it: title, neighbours, the beginning of its document?

    python benchmarks/context.py

One run with the student `d2llm-minilm`, dev splits, nDCG@10 by the vectors alone and by the full score. The passages of
covidqa (Apache-2.0) are parts of articles with titles; those of squad-sent (CC BY-SA 4.0) and wikiqa are sentences
without titles, mostly in the order of their articles (the last of an article precedes the first of the next one). What
is in front of a passage counts as its title does: for its vector, its words and the vectors of its tokens. At most
4,000 passages of a set: all that are relevant to a dev query, and others at random; their context is from the whole
set.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scaling.corpus import write_json
from scaling.data_sets import DATA, require

from d2llm import Student
from d2llm.core.types import Passage, Query
from d2llm.data.beir import read_beir
from d2llm.ops.bm25_words import sentences
from d2llm.ops.measures import per_query_measures
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings

SETS = ("covidqa", "squad-sent", "wikiqa")
NUM_PASSAGES = 4_000
RESULT = Path(__file__).parent / "results" / "context.json"


def sentence(text: str, which: int) -> str:
    """The first sentence of a text (0), or the last one (-1)."""
    spans = sentences(text)
    start, end = spans[which] if spans else (0, 0)
    return text[start:end].strip()


def contexts(passages: Mapping[str, Passage]) -> dict[str, dict[str, str]]:
    """By kind of context, what stands in front of each passage."""
    ids = list(passages)
    before = dict(zip(ids, [None, *ids[:-1]], strict=True))
    after = dict(zip(ids, [*ids[1:], None], strict=True))
    title = {name: passage.title for name, passage in passages.items()}

    def document(name: str | None) -> str | None:
        return None if name is None or not title[name] else name.split("-")[0]

    def near(name: str, other: str | None, which: int) -> str:
        if other is None or document(name) != document(other):
            return ""
        return sentence(passages[other].text, which)

    first = {name: near(name, before[name], -1) for name in ids}
    both = {name: " ".join(filter(None, (first[name], near(name, after[name], 0)))) for name in ids}
    kinds = {"nothing": dict.fromkeys(ids, ""), "the sentence before": first, "the sentences before and after": both}
    if any(title.values()):
        kinds |= {"the title": title, "title and the sentence before": {n: f"{title[n]}. {first[n]}" for n in ids}}
        beginning: dict[str, str] = {}
        for name in ids:
            beginning.setdefault(name.split("-")[0], sentence(passages[name].text, 0))
        kinds["title and the article's first sentence"] = {n: f"{title[n]}. {beginning[n.split('-')[0]]}" for n in ids}
    return kinds


def measure(student: Student, name: str) -> dict[str, dict[str, float]]:
    """Figures of one set, by kind of context."""
    data = read_beir(DATA / name, splits=["dev"])
    qrels = data.qrels["dev"]
    queries = [Query(query_id, data.queries[query_id].text) for query_id in qrels]
    relevant = {passage_id for judged in qrels.values() for passage_id in judged}
    others = [passage_id for passage_id in data.passages if passage_id not in relevant]
    chosen = relevant | {*random.Random(0).sample(others, max(0, min(len(others), NUM_PASSAGES - len(relevant))))}
    rows: dict[str, dict[str, float]] = {}
    for kind, context in contexts(data.passages).items():
        with tempfile.TemporaryDirectory() as temporary:
            index = Index.create(Path(temporary) / "index", student, window_vectors="none")
            report = index.upsert(
                [replace(data.passages[passage_id], title=context[passage_id]) for passage_id in sorted(chosen)]
            )
            rows[kind] = {"truncated": float(report.num_truncated)}
            for how, score_features in (("vectors", {}), ("full score", None)):
                found = {
                    ranking.query.id: [passage_id for passage_id, _ in ranking.passages]
                    for ranking in Searcher(
                        index.view, student, SearchSettings(score_features=score_features)
                    ).rank_ids(queries)
                }
                rows[kind][how] = float(np.mean(list(per_query_measures(found, qrels)["nDCG@10"].values())))
        print(name, kind, rows[kind], flush=True)
    return rows


def main() -> None:
    """Measure, print, write the JSON."""
    require(*(DATA / name for name in SETS))
    torch.set_num_threads(1)
    student = Student.load("d2llm-minilm")
    result = {name: measure(student, name) for name in SETS}
    write_json(RESULT, {"student": "d2llm-minilm", "split": "dev", "num_passages": NUM_PASSAGES, "sets": result})


if __name__ == "__main__":
    main()
