"""Writes the recorded lists that have no data set of their own as data sets.

Queries that a model wrote (`written_queries/styles`), with the lists that a large language model graded: a folder
`SET-written` in the BEIR layout, whose passages of a grade of 70 or more, and the passage that a query was written for,
are relevant. Texts of one kind (`judgements/SET-passages.jsonl`, `SET-queries.jsonl`): a folder of labelled pairs with
the grade as score. A fifth of the queries, chosen by the passage they were written for, are dev. Pairs of sentences
that a model wrote (`written_pairs/KIND`): a folder `written-KIND`.

    python benchmarks/judged_sets.py DATA OUT
    python benchmarks/judged_sets.py DATA OUT --as-written [--described]

`--as-written` writes the written queries alone, as `d2llm fit` has them before anything has read them: train queries,
to each of which only the passage is relevant that it was written for; dev queries are those that people asked of the
same passages (`graded_lists/gecko.toml`). `--described` puts before each query what it is for, as Gecko does.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from recorded_judge import RECORDED, GradedList, mean_grades, read_graded_lists
from recorded_writer import written_queries

from d2llm.data.beir import read_beir

RELEVANT = 70
TASKS = {
    "question": "find a passage that answers the question",
    "topic": "find a passage about the topic",
    "claim": "find a passage that supports or refutes the claim",
    "request": "find a passage that helps with the request",
}
"""What written queries of each style are for."""
WRITTEN_PAIRS = RECORDED.parent / "written_pairs"
_DEV_FRACTION = 0.2


def split_of(name: str) -> str:
    """The split of everything that was made of one passage or query."""
    draw = int.from_bytes(hashlib.sha256(f"judged set {name}".encode()).digest()[:8], "big") / 2**64
    return "dev" if draw < _DEV_FRACTION else "train"


def write_written(data: Path, out: Path, name: str) -> str:
    """Write the written queries of a data set whose lists were graded."""
    lists = mean_grades(read_graded_lists(f"{name}-written"))
    queries = written_queries(f"styles/{name}")
    folder = out / f"{name}-written"
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / name / "corpus.jsonl.gz", folder / "corpus.jsonl.gz")
    _write_lines(folder / "queries.jsonl.gz", [{"_id": each, "text": queries[each][0]} for each in lists])
    rows: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for query_id, grades in lists.items():
        source = queries[query_id][1]
        relevant = {each for each, grade in grades.items() if grade >= RELEVANT} | {source}
        rows[split_of(source)] += [f"{query_id}\t{passage}\t1" for passage in sorted(relevant)]
    for split, lines in rows.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return f"{folder.name}: {len(lists)} queries"


def write_as_written(data: Path, out: Path, name: str, *, described: bool) -> str:
    """Write the written queries with the passages that they were written for, and the data set's own dev queries."""
    queries = {query: text for query, (text, _) in written_queries(f"styles/{name}").items()}
    sources = {query: source for query, (_, source) in written_queries(f"styles/{name}").items()}
    graded = mean_grades(read_graded_lists(f"{name}-written"))
    num_better = sum(max(grades.values()) > grades[sources[query]] for query, grades in graded.items())
    own = read_beir(data / name, splits=["dev"])
    asked = {query: own.queries[query].text for query in own.qrels["dev"]}
    folder = out / f"{name}-written"
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / name / "corpus.jsonl.gz", folder / "corpus.jsonl.gz")
    texts = {query: queries[query] for query in graded} | asked
    if described:
        styles = {query: query.partition("-")[0] if query in queries else "question" for query in texts}
        texts = {query: f"task: {TASKS[styles[query]]} | query: {text}" for query, text in texts.items()}
    _write_lines(folder / "queries.jsonl.gz", [{"_id": query, "text": text} for query, text in texts.items()])
    judged = [f"{query}\t{passage}\t{grade}" for query in asked for passage, grade in own.qrels["dev"][query].items()]
    rows = {"train": [f"{query}\t{sources[query]}\t1" for query in sorted(graded)], "dev": judged}
    for split, lines in rows.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
    better = f"for {num_better} of which another passage is graded higher"
    return f"{folder.name}: {len(graded)} written queries, {better}; {len(asked)} that people asked"


def write_pairs(data: Path, out: Path, name: str, kind: str) -> str:
    """Write the graded pairs of texts of one kind of a data set."""
    dataset = read_beir(data / name, splits=["train"])
    texts: dict[str, str] = (
        {each: passage.full_text for each, passage in dataset.passages.items()}
        if kind == "passages"
        else {each: query.text for each, query in dataset.queries.items()}
    )
    lists = read_graded_lists(f"{name}-{kind}")
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "dev": []}
    for each in lists:
        lines[split_of(each.query_id)] += _pairs(each, texts)
    return _write_pair_set(out / f"{name}-{kind}", lines)


def write_written_pairs(out: Path, kind: str) -> str:
    """Write the pairs of sentences of one kind that a model wrote and graded."""
    folder = out / f"written-{kind}"
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "dev": []}
    for path in sorted((WRITTEN_PAIRS / kind).glob("*.jsonl")):
        for group in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            lines[split_of(group["text"])] += [{"query": group["text"], "document": text} for text in group["others"]]
    for graded in read_graded_lists(folder.name):
        line = int(graded.passages[0].rpartition("-")[2])
        lines[graded.split][line - 1]["score"] = graded.grades[0]
    return _write_pair_set(folder, lines)


def _write_pair_set(folder: Path, lines: dict[str, list[dict[str, Any]]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in lines.items():
        _write_lines(folder / f"{split}.jsonl.gz", pairs)
    (folder / "README").write_text("score 0 (unrelated) to 100 (same meaning), by a large language model\n")
    return f"{folder.name}: {sum(map(len, lines.values()))} pairs"


def _pairs(graded: GradedList, texts: dict[str, str]) -> list[dict[str, Any]]:
    pairs = zip(graded.passages, graded.grades, strict=True)
    return [{"query": texts[graded.query_id], "document": texts[each], "score": grade} for each, grade in pairs]


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--as-written", action="store_true", help="written queries alone, without their grades")
    parser.add_argument("--described", action="store_true", help="with what each is for")
    given = parser.parse_args()
    names = [path.stem.removesuffix("-written") for path in sorted(RECORDED.glob("*-written.jsonl"))]
    if given.as_written:
        for name in names:
            print(write_as_written(given.data, given.out, name, described=given.described))
        return
    for name in names:
        print(write_written(given.data, given.out, name))
    for kind in ("passages", "queries"):
        for path in sorted(RECORDED.glob(f"*-{kind}.jsonl")):
            print(write_pairs(given.data, given.out, path.stem.removesuffix(f"-{kind}"), kind))
    for kind in ("contrasts", "natural"):
        print(write_written_pairs(given.out, kind))


if __name__ == "__main__":
    main()
