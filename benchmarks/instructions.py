"""What an instruction before the queries does to students that were not trained with any.

    taskset -c 1 python benchmarks/instructions.py      some ten minutes on one core

nDCG@10 on the first 300 dev queries of two data sets, among all of their passages, of two shipped students: with the
whole score, and by the vectors alone (``score_features={}``). The difference from the plain query is paired, with its
standard error.

Licences: squad-sent CC BY-SA 4.0, banking77 CC BY 4.0; they are only measured on, nothing is trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scaling.data_sets import DATA, require

from d2llm import Index, Student
from d2llm.core.types import Task
from d2llm.data.beir import read_beir
from d2llm.ops.measures import per_query_measures

STUDENTS = ("d2llm-multilingual", "d2llm-minilm")
SETS: dict[str, tuple[Task, str]] = {
    "squad-sent": ("asymmetric", "Instruct: Given a question, retrieve passages that answer it\nQuery: "),
    "banking77": ("symmetric", "Instruct: Given a customer's question, retrieve questions of the same intent\nQuery: "),
}
NUM_QUERIES = 300
RESULT = Path(__file__).parent / "results" / "instructions.json"


def measure(index: Index, queries: dict[str, str], qrels: dict[str, dict[str, int]], **settings: Any) -> np.ndarray:
    """nDCG@10 of each query."""
    rankings = {
        query_id: [result.passage.id for result in ranking.passages]
        for query_id, ranking in zip(queries, index.search([*queries.values()], **settings), strict=True)
    }
    values = per_query_measures(rankings, qrels)["nDCG@10"]
    return np.array([values[query_id] for query_id in queries])


def rows_of(name: str, data_set: str) -> list[dict[str, Any]]:
    """One row for each text put before the queries, with both scores."""
    student, (task, instruction) = Student.load(name, device="cpu"), SETS[data_set]
    data = read_beir(DATA / data_set, splits=["dev"])
    query_ids = list(data.qrels["dev"])[:NUM_QUERIES]
    queries = {query_id: data.queries[query_id].text for query_id in query_ids}
    qrels = {query_id: data.qrels["dev"][query_id] for query_id in query_ids}
    prefix = student.config.backbone.query_prefix
    texts = {"the prefix (as trained)": None, "the instruction": instruction}
    if prefix:
        texts |= {"nothing": "", "prefix and instruction": prefix + instruction}
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "index", student, task=task)
        index.upsert(data.passages.values())
        for score, score_features in (("whole score", None), ("vectors alone", {})):
            plain = None
            for before, text in texts.items():
                values = measure(index, queries, qrels, instruction=text, score_features=score_features)
                plain = values if plain is None else plain
                changes = values - plain
                row: dict[str, Any] = {"student": name, "set": data_set, "score": score, "before the query": before}
                row |= {"ndcg@10": float(values.mean()), "change": float(changes.mean())}
                row["standard error"] = float(changes.std(ddof=1) / len(changes) ** 0.5)
                rows.append(row)
                print(
                    f"{name:20} {data_set:11} {score:14} {before:24} {row['ndcg@10']:.3f} "
                    f"{row['change']:+.3f} ({row['standard error']:.3f})",
                    flush=True,
                )
    return rows


def main() -> None:
    """Measure, print a table, write the JSON."""
    require(*(DATA / name for name in SETS))
    torch.set_num_threads(1)
    rows = [row for name in STUDENTS for data_set in SETS for row in rows_of(name, data_set)]
    setting = {"split": "dev", "queries": NUM_QUERIES, "instructions": {name: text for name, (_, text) in SETS.items()}}
    RESULT.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
