"""Cost of a proved ranking: nDCG@10 of a student against the fraction of the corpus that a certificate rescores.

The interaction of a dot student changes a score by at most B r_q r_p, so passages can be rescored from the
highest upper bound down until no other can be among the first ten. A smaller weight r of the
interaction gives a narrower bound, and another ranking; this script compares the two on dev queries.

    python benchmarks/certificate.py                                  the shipped student on banking77
    python benchmarks/certificate.py STUDENT DATA_SET --task symmetric --json result.json

With ``--speed N``, it measures the time of ``retrieval.exact_search`` on N real passages of the data set, all in
memory: the exact scan of inner products, the certified top ten and the full score of every passage, in processor time.
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scaling.array_view import ArrayView, passage_bounds
from scaling.data_sets import DATA, require

from d2llm.core.errors import InputError
from d2llm.core.files import write_bytes
from d2llm.core.types import TASKS, Task
from d2llm.data.beir import read_beir
from d2llm.models.interaction import Interaction
from d2llm.models.protocols import PairScorer
from d2llm.models.student import Student
from d2llm.ops.measures import per_query_measures
from d2llm.ops.ranking import top_k
from d2llm.retrieval.cosine import ForwardingStudent
from d2llm.retrieval.exact_search import certified_top_k
from d2llm.retrieval.segments import CachedBounds

WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
TOP_K = 10
MARGIN = 1e-3  # of a bound, for rounding in bfloat16 products


def num_rescored(upper_bounds: NDArray[np.floating[Any]], final_scores: NDArray[np.floating[Any]], top_k: int) -> int:
    """How many passages are rescored, from the highest bound down, before the first ``top_k`` are certain.

    Args:
        upper_bounds: upper bound of each passage's final score.
        final_scores: final score of each passage, at most its bound.
        top_k: length of the ranking, at least 1.

    Raises:
        InputError: ``top_k`` is below 1, or a final score is above its bound.
    """
    if top_k < 1:
        raise InputError(f"top_k is {top_k}, but a ranking has at least one place")
    if (final_scores > upper_bounds).any():
        raise InputError("a final score is above its upper bound, so nothing can be concluded from the bounds")
    best: list[float] = []  # a heap of the top_k best final scores so far
    order = np.argsort(-upper_bounds, kind="stable")
    for index, row in enumerate(order.tolist()):
        if len(best) == top_k and best[0] >= upper_bounds[row]:
            return index
        if len(best) < top_k:
            heapq.heappush(best, float(final_scores[row]))
        else:
            heapq.heappushpop(best, float(final_scores[row]))
    return len(order)


def measure(student: Student, workspace: Path, task: Task, split: str, num_queries: int) -> list[dict[str, float]]:
    """For each weight r: nDCG@10, mean and 95th percentile of the fraction rescored, and the bound."""
    head = student.interaction
    assert isinstance(head, Interaction)
    dataset = read_beir(workspace)
    judged = {q: grades for q, grades in dataset.qrels[split].items() if q in dataset.queries}
    chosen = sorted(judged)[:num_queries]
    ids = list(dataset.passages)
    passages = student.encode_passages([passage.full_text for passage in dataset.passages.values()]).vectors
    queries = student.encode_queries([dataset.queries[query_id].text for query_id in chosen]).vectors
    rows: list[dict[str, float]] = []
    dots = student.query_vectors(queries, task) @ passages.T
    with torch.inference_mode():
        reach_of_passages = head.passage_bound(torch.from_numpy(passages)).numpy()
    for weight in WEIGHTS:
        with torch.inference_mode():
            reach_of_queries = head.query_bound(torch.from_numpy(queries), task, interaction_weight=weight).numpy()
            bound = float(head.bound(task, interaction_weight=weight))
        rankings: dict[str, list[str]] = {}
        fractions: list[float] = []
        for number, query_id in enumerate(chosen):
            final = student.score(queries[number], passages, task, interaction_weight=weight)
            upper = dots[number] + reach_of_queries[number] * reach_of_passages + MARGIN
            rankings[query_id] = [passage_id for passage_id, _ in top_k(final, ids, TOP_K)]
            fractions.append(num_rescored(upper, np.minimum(final, upper), TOP_K) / len(ids))
        values = per_query_measures(rankings, {q: judged[q] for q in chosen})["nDCG@10"]
        rows.append(
            {
                "weight": weight,
                "bound": bound,
                "ndcg": float(np.mean(list(values.values()))),
                "share_mean": float(np.mean(fractions)),
                "share_p95": float(np.percentile(fractions, 95)),
            }
        )
    return rows


def milliseconds(work: Callable[[], object]) -> float:
    """Of the process, so that other work on the machine counts little."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


class WeightedStudent(ForwardingStudent):
    """A student whose interaction has the weight r in every task."""

    def __init__(self, student: Student, weight: float) -> None:
        super().__init__(student)
        self._student, self._weight = student, weight

    def prepare(self, query_vector: NDArray[np.float32], task: Task) -> PairScorer:
        """The student's scorer, with the weight r."""
        return self._student.prepare(query_vector, task, interaction_weight=self._weight)

    def score(
        self, query_vector: NDArray[np.float32], passage_vectors: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        """The student's scores with the weight r."""
        return self.prepare(query_vector, task)(passage_vectors)

    def passage_bound(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """The student's, which the weight does not change."""
        return self._student.passage_bound(passage_vectors)


def measure_speed(
    student: Student, workspace: Path, task: Task, split: str, num_queries: int, num_passages: int
) -> list[dict[str, float]]:
    """For each weight r: mean milliseconds of the scan, the certified top ten, the full scan; the fraction scored."""
    dataset = read_beir(workspace)
    ids = list(dataset.passages)[:num_passages]
    passages = student.encode_passages([dataset.passages[passage_id].full_text for passage_id in ids]).vectors
    chosen = sorted(query_id for query_id in dataset.qrels[split] if query_id in dataset.queries)[:num_queries]
    queries = student.encode_queries([dataset.queries[query_id].text for query_id in chosen]).vectors
    view: Any = ArrayView(passages)  # what is read of a PassageView
    cached = CachedBounds(passage_bounds(view, student))
    rows: list[dict[str, float]] = []
    for weight in WEIGHTS:
        weighted = WeightedStudent(student, weight)
        times: dict[str, list[float]] = {"scan_ms": [], "certified_ms": [], "full_ms": [], "share": []}
        weighted.score(queries[0], passages, task)  # casts the weights, once
        for query in queries:
            dot_query = student.query_vectors(query[None], task)[0]
            times["scan_ms"].append(milliseconds(lambda: view.scan(dot_query, TOP_K)))  # noqa: B023 - used at once
            start = time.process_time()
            found = certified_top_k(view, weighted, query, task, TOP_K, cached=cached)
            times["certified_ms"].append((time.process_time() - start) * 1e3)
            times["full_ms"].append(milliseconds(lambda: weighted.score(query, passages, task)))  # noqa: B023
            times["share"].append(found.certificate.num_scored / len(ids))
        rows.append({"weight": weight, **{name: float(np.mean(values)) for name, values in times.items()}})
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", nargs="?", default="d2llm-minilm")
    parser.add_argument("data", type=Path, nargs="?", default=DATA / "banking77")
    parser.add_argument("--task", choices=TASKS, default="symmetric")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--speed", type=int, metavar="N")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    require(options.data)
    student = Student.load(options.student)
    if options.speed:
        torch.set_num_threads(1)
        rows = measure_speed(student, options.data, options.task, options.split, options.queries, options.speed)
        print(f"{'r':>6} {'scan ms':>8} {'certified':>10} {'all':>8} {'scored':>8}")
        for row in rows:
            values = f"{row['weight']:6.3f} {row['scan_ms']:8.2f} {row['certified_ms']:10.2f} {row['full_ms']:8.2f}"
            print(f"{values} {row['share']:8.2%}")
    else:
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
            "speed_of_passages": options.speed,
            "rows": rows,
        }
        write_bytes(options.json, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
