"""Chooses the lists that a large language model grades, and writes them as packets for it.

A list: a query with 20 passages, the best 9 of BM25 and of a student's vectors in turn, and random passages; a train
query's list has one of its positives. A packet (Markdown) has the rubric and up to 10 queries with their passages in
random order, under numbers that say nothing. The key (JSON) has the ids, and stays away from whoever judges.

    python benchmarks/judgements/lists.py DATA --train 600 --dev 100 --out PACKETS --keys KEYS

``--of passages`` or ``--of queries`` compares texts of one kind with each other (the symmetric task): a random sample
of them, each with a list of the others; there are no judgements, and only train queries are taken. ``--written NAME``
takes the queries that a model wrote for passages (``../written_queries/NAME.jsonl``, such as ``styles/squad``), which
count as their positives. ``--best`` writes packets of the recorded dev lists for a third judging (``best/SET.jsonl``):
their 8 passages with the best grades, in another order.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from itertools import chain, zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from recorded_judge import mean_grades, read_graded_lists
from recorded_writer import written_queries

from d2llm.core.types import Passage, Query, Task
from d2llm.data.beir import Dataset, read_beir
from d2llm.models.student import Student
from d2llm.store.bm25 import bm25_lists
from d2llm.training.dev_sets import dev_queries
from d2llm.training.mining.choose import key_of
from d2llm.training.mining.ranking import EncoderRanking

RUBRICS = Path(__file__).parent
NUM_PASSAGES, NUM_RANDOM = 20, 2
NUM_BEST = 8
_MAX_CHARACTERS = 75_000  # of a packet
_MAX_QUERIES = 10
_MAX_WORDS = 400  # of a passage


def choose_lists(
    dataset: Dataset, queries: list[Query], *, split: str, student: Student, task: Task
) -> list[list[str]]:
    """The passage ids of each query's list."""
    ids = sorted(dataset.passages)
    depth = NUM_PASSAGES
    by_words = bm25_lists(dataset.passages, ids, queries, depth)
    with tempfile.TemporaryDirectory() as folder:
        ranking = EncoderRanking(
            student, dataset.passages, ids, queries, task=task, folder=Path(folder), resumable=False
        )
        by_vectors = ranking.lists(depth)
    lists: list[list[str]] = []
    for query, words, vectors in zip(queries, by_words, by_vectors, strict=True):
        draw = random.Random(f"list {dataset.name} {query.id}")
        own = {query.id} if dataset.passages.get(query.id) and dataset.passages[query.id].text == query.text else set()
        best = [name for name in chain.from_iterable(zip_longest(words, vectors)) if name is not None]
        chosen = [name for name in dict.fromkeys(best) if name not in own][: NUM_PASSAGES - NUM_RANDOM]
        positives = dataset.positives(split)[query.id]
        if split == "train" and positives and not set(chosen) & set(positives):
            chosen.append(draw.choice(sorted(positives)))
        while len(chosen) < NUM_PASSAGES:
            name = draw.choice(ids)
            if name not in chosen and name not in own:
                chosen.append(name)
        lists.append(chosen)
    return lists


def texts_of_one_kind(dataset: Dataset, kind: str) -> Dataset:
    """The passages or the train queries of a data set as a set whose queries are its passages."""
    passages = dataset.passages
    if kind == "queries":
        passages = {name: Passage(name, dataset.queries[name].text) for name in sorted(dataset.qrels["train"])}
    queries = {name: Query(name, each.full_text) for name, each in passages.items()}
    judged: dict[str, dict[str, int]] = {name: {} for name in queries}
    return Dataset(f"{dataset.name}-{kind}", dataset.path, passages, queries, {"train": judged, "dev": {}})


def with_written_queries(dataset: Dataset, name: str) -> Dataset:
    """The data set with the queries that a model wrote for its passages, as train queries."""
    written = written_queries(name)
    queries = {query_id: Query(query_id, text) for query_id, (text, _) in written.items()}
    judged = {query_id: {passage_id: 1} for query_id, (_, passage_id) in written.items()}
    return Dataset(f"{dataset.name}-written", dataset.path, dataset.passages, queries, {"train": judged, "dev": {}})


def write_packets(
    dataset: Dataset,
    queries: list[Query],
    lists: list[list[str]],
    *,
    rubric: str,
    name: str,
    packets: Path,
    keys: Path,
    seed: int,
) -> int:
    """Write the packets of one judging of these lists, each list in an order of its own; returns their number."""
    blocks: list[tuple[str, dict[str, object]]] = []
    for query, ids in zip(queries, lists, strict=True):
        order = list(ids)
        random.Random(f"order {seed} {query.id}").shuffle(order)
        texts = (dataset.passages[passage_id].full_text.split() for passage_id in order)
        lines = [f"[{position}] {' '.join(words[:_MAX_WORDS])}" for position, words in enumerate(texts, start=1)]
        blocks.append(("\n".join(lines), {"query_id": query.id, "query": query.text, "passages": order}))
    number = start = 0
    while start < len(blocks):
        end = start
        size = 0
        while end < len(blocks) and end < start + _MAX_QUERIES and size + len(blocks[end][0]) <= _MAX_CHARACTERS:
            size += len(blocks[end][0])
            end += 1
        end = max(end, start + 1)
        number += 1
        parts = [
            f"## Query {position}\n\n{key['query']}\n\n{text}"
            for position, (text, key) in enumerate(blocks[start:end], start=1)
        ]
        stem = f"{name}-{number:03d}"
        (packets / f"{stem}.md").write_text(rubric + "\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
        (keys / f"{stem}.json").write_text(
            json.dumps([key for _, key in blocks[start:end]], ensure_ascii=False, indent=1), encoding="utf-8"
        )
        start = end
    return number


def _write(
    dataset: Dataset,
    queries: list[Query],
    lists: list[list[str]],
    split: str,
    judging: int,
    rubric: str,
    given: argparse.Namespace,
) -> None:
    name, folders = f"{dataset.name}-{split}-{judging}", {"packets": given.out, "keys": given.keys}
    number = write_packets(dataset, queries, lists, rubric=rubric, name=name, seed=judging, **folders)
    print(f"{name}: {len(queries)} queries in {number} packets")


def main() -> None:
    """Choose and write the lists of one data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--of", choices=["passages", "queries"], help="compare texts of one kind with each other")
    parser.add_argument("--written", metavar="NAME", help="queries that a model wrote for the passages")
    parser.add_argument("--best", action="store_true", help="the best passages of the recorded dev lists once more")
    parser.add_argument("--task", default="asymmetric", choices=["asymmetric", "symmetric"])
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--dev", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keys", type=Path, required=True)
    given = parser.parse_args()
    dataset = read_beir(given.data, splits=["train", "dev"])
    if given.of is not None:
        dataset = texts_of_one_kind(dataset, given.of)
    if given.written is not None:
        dataset = with_written_queries(dataset, given.written)
    rubric = (RUBRICS / f"rubric-{given.task}.md").read_text(encoding="utf-8").strip()
    for folder in (given.out, given.keys):
        folder.mkdir(parents=True, exist_ok=True)
    if given.best:
        recorded = mean_grades([one for one in read_graded_lists(dataset.name) if one.split == "dev"])
        lists = [sorted(grades, key=lambda name: -grades[name])[:NUM_BEST] for grades in recorded.values()]
        rubric = rubric.replace(f"there are {NUM_PASSAGES}", f"there are {NUM_BEST}")
        _write(dataset, [dataset.queries[name] for name in recorded], lists, "dev", 3, rubric, given)
        return
    student = Student.load(given.student)
    judged = sorted(name for name, ids in dataset.positives("train").items() if ids or given.of is not None)
    train = [dataset.queries[name] for name in sorted(judged, key=lambda name: key_of(0, name))[: given.train]]
    dev = dev_queries(dataset, num_queries=given.dev, seed=0) if dataset.qrels["dev"] else []
    for split, queries in (("train", train), ("dev", dev)):
        if not queries:
            continue
        lists = choose_lists(dataset, queries, split=split, student=student, task=given.task)
        for judging in (1,) if split == "train" else (1, 2):
            _write(dataset, queries, lists, split, judging, rubric, given)


if __name__ == "__main__":
    main()
