"""What a proved ranking costs: nDCG@10 of a student against the share of the corpus that a certificate rescores.

The interaction of an anchored student changes a score by at most B r_q r_p, so passages can be rescored from the
highest upper bound down until no other can be among the first ten (``ops.certificates``). A smaller weight r of the
interaction gives a narrower bound, and another ranking; this draws one against the other, on dev queries.

    python benchmarks/certificate.py STUDENT DATA_SET --task symmetric --json result.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from d2llm.core.files import write_bytes
from d2llm.data.beir import read_beir
from d2llm.models.interaction import Interaction
from d2llm.models.student import Student
from d2llm.ops.certificates import num_rescored
from d2llm.ops.measures import per_query_measures
from d2llm.ops.ranking import top_k

WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
TOP_K = 10
MARGIN = 1e-3  # of a bound, for rounding in bfloat16 products


def measure(student: Student, place: Path, task: str, split: str, num_queries: int) -> list[dict[str, float]]:
    """For each weight r: nDCG@10, mean and 95th percentile of the share rescored, and the bound."""
    head = student.interaction
    assert isinstance(head, Interaction)
    dataset = read_beir(place)
    judged = {q: grades for q, grades in dataset.qrels[split].items() if q in dataset.queries}
    chosen = sorted(judged)[:num_queries]
    ids = list(dataset.passages)
    passages = student.encode_passages([passage.full_text for passage in dataset.passages.values()]).vectors
    queries = student.encode_queries([dataset.queries[query_id].text for query_id in chosen]).vectors
    rows: list[dict[str, float]] = []
    residual = head.residual_weight(task)
    for weight in WEIGHTS:
        residual.fill_(weight)
        with torch.inference_mode():
            reach_of_passages = head.passage_reach(torch.from_numpy(passages)).numpy()
            reach_of_queries = head.query_reach(torch.from_numpy(queries), task).numpy()
        anchors = student.anchor_queries(queries, task) @ passages.T
        rankings: dict[str, list[str]] = {}
        shares: list[float] = []
        for number, query_id in enumerate(chosen):
            final = student.score(queries[number], passages, task)
            upper = anchors[number] + reach_of_queries[number] * reach_of_passages + MARGIN
            rankings[query_id] = [passage_id for passage_id, _ in top_k(final, ids, TOP_K)]
            shares.append(num_rescored(upper, np.minimum(final, upper), TOP_K) / len(ids))
        values = per_query_measures(rankings, {q: judged[q] for q in chosen})["nDCG@10"]
        rows.append(
            {
                "weight": weight,
                "bound": float(head.bound(task).detach()),
                "ndcg": float(np.mean(list(values.values()))),
                "share_mean": float(np.mean(shares)),
                "share_p95": float(np.percentile(shares, 95)),
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", choices=["symmetric", "asymmetric"], default="asymmetric")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    student = Student.load(options.student)
    rows = measure(student, options.data, options.task, options.split, options.queries)
    print(f"{'r':>6} {'bound':>7} {'nDCG@10':>8} {'rescored':>9} {'p95':>7}")
    for row in rows:
        values = f"{row['weight']:6.3f} {row['bound']:7.2f} {row['ndcg']:8.4f}"
        print(f"{values} {row['share_mean']:8.2%} {row['share_p95']:6.1%}")
    if options.json:
        content = {
            "student": student.fingerprint,
            "data": options.data.name,
            "task": options.task,
            "split": options.split,
            "queries": options.queries,
            "rows": rows,
        }
        write_bytes(options.json, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
