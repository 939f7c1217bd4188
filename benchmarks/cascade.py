"""Cost and benefit of a cascade, in which the teacher reads again only what the student is uncertain about.

One run on the dev splits of two data sets, with the student `d2llm-minilm` and the ensemble of teachers of a run of the
recipe `d2llm` (`python benchmarks/cascade.py RUN_FOLDER`): nDCG@10 of the student alone, of the cascade at several
numbers of passages, of a teacher that reads the first n, and of the teacher on all candidates. Dev queries
that the teacher's weights were fitted on are left out; 40 others calibrate the student's error, and up to 120 are
measured.

The teacher scores every candidate once, and the policies are compared on these values. Times are measured with the
cascade itself calling the teacher, on one thread. squad-sent (CC BY-SA 4.0) is a set that both were trained on, wikiqa
(research only) one that neither has seen; nothing is trained here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from scaling.data_sets import DATA, require

from d2llm import Student
from d2llm.core.types import Task
from d2llm.data.beir import read_beir
from d2llm.methods.rerankers.cascade import Cascade
from d2llm.models.teachers.ensemble import ensemble_queries
from d2llm.models.teachers.pair_teacher import PairTeacher, load_teacher
from d2llm.ops.measures import per_query_measures
from d2llm.ops.rereading import StudentError, calibrate_error, on_one_scale
from d2llm.recipe import TeacherConfig
from d2llm.retrieval.reranker import Candidates as SearchCandidates
from d2llm.retrieval.reranker import rerank_candidates

SETS: dict[str, Task] = {"squad-sent": "asymmetric", "wikiqa": "asymmetric"}
CALIBRATION_QUERIES, QUERIES, CANDIDATES = 40, 120, 50
BUDGETS = (5, 10, 20, 50)
FIRST = (2, 4, 6, 8, *BUDGETS)
TIMED_QUERIES = 30
BUDGET_MS = 100.0
RESULT = Path(__file__).parent / "results" / "cascade.json"


class Candidates(NamedTuple):
    """A query's first candidates by the student, with both models' scores."""

    text: str
    ids: list[str]
    texts: list[str]
    scores: np.ndarray
    log_odds: np.ndarray
    relevant: dict[str, int]
    task: Task

    @property
    def ranking(self) -> SearchCandidates:
        """What a cascade gets of them."""
        return SearchCandidates(
            self.scores,
            np.arange(len(self.ids)),
            texts=lambda positions: [self.texts[index] for index in positions],
            vectors=lambda positions: np.zeros((len(positions), 0), np.float32),
            task=self.task,
            top_k=10,
        )


class Known:
    """A teacher that returns recorded log-odds."""

    def __init__(self, candidates: Candidates) -> None:
        self._values = dict(zip(candidates.texts, candidates.log_odds, strict=True))

    def score_pairs(self, pairs: Sequence[tuple[str, str]], task: Task) -> SimpleNamespace:
        """Look up the recorded log-odds of the pairs."""
        del task
        return SimpleNamespace(log_odds=np.array([self._values[text] for _, text in pairs]), num_truncated=0)


def read(student: Student, teacher: PairTeacher, name: str, fitted: frozenset[str]) -> tuple[list[Candidates], float]:
    """Queries with their first candidates, judged; and milliseconds per pair when many are judged in one call."""
    data = read_beir(DATA / name, splits=["dev"])
    ids = list(data.passages)
    query_ids = [i for i in data.qrels["dev"] if i not in fitted][: CALIBRATION_QUERIES + QUERIES]
    passages = student.encode_passages([data.passages[i].full_text for i in ids]).vectors
    queries = student.encode_queries([data.queries[i].text for i in query_ids]).vectors
    judged: list[Candidates] = []
    seconds = 0.0
    for query_id, vector in zip(query_ids, queries, strict=True):
        scores = student.score(vector, passages, SETS[name])
        best = np.argsort(-scores, kind="stable")[:CANDIDATES]
        texts = [data.passages[ids[row]].full_text for row in best]
        query = data.queries[query_id].text
        start = time.perf_counter()
        log_odds = teacher.score_pairs([(query, text) for text in texts], SETS[name]).log_odds
        seconds += time.perf_counter() - start
        kept = [ids[row] for row in best]
        judged.append(
            Candidates(query, kept, texts, scores[best], log_odds, dict(data.qrels["dev"][query_id]), SETS[name])
        )
    return judged, 1e3 * seconds / (len(judged) * CANDIDATES)


def fit(queries: Sequence[Candidates]) -> StudentError:
    """The student's error on some queries."""
    scores, log_odds = (np.concatenate(parts) for parts in zip(*((q.scores, q.log_odds) for q in queries), strict=True))
    return calibrate_error(scores, log_odds, [str(n) for n, q in enumerate(queries) for _ in q.ids])


def ndcg(queries: Sequence[Candidates], order: Callable[[Candidates], np.ndarray]) -> list[float]:
    """nDCG@10 of every query, with its candidates ranked by the scores of ``order``."""
    rankings = {
        str(n): [query.ids[index] for index in np.argsort(-order(query), kind="stable")[:10]]
        for n, query in enumerate(queries)
    }
    qrels = {str(n): query.relevant for n, query in enumerate(queries)}
    values = per_query_measures(rankings, qrels)["nDCG@10"]
    return [values[str(n)] for n in range(len(queries))]


def first_n(query: Candidates, n: int) -> np.ndarray:
    """The usual policy: the first n in the teacher's order, followed by the rest in the student's."""
    order = np.concatenate([np.argsort(-query.log_odds[:n], kind="stable"), np.arange(n, len(query.ids))])
    scores = np.empty(len(order))
    scores[order] = -np.arange(len(order))
    return scores


def first_n_one_scale(query: Candidates, n: int, error: StudentError) -> np.ndarray:
    """The first n by the teacher, the rest by the log-odds expected from the student's scores, on one scale."""
    return on_one_scale(query.scores, np.arange(n), query.log_odds[:n].astype(np.float64), error)


def measure(name: str, student: Student, teacher: PairTeacher, fitted: frozenset[str]) -> dict[str, object]:
    """Quality and cost on one data set."""
    judged, pair_ms = read(student, teacher, name, fitted)
    error, queries = fit(judged[:CALIBRATION_QUERIES]), judged[CALIBRATION_QUERIES:]
    values = {
        "student": ndcg(queries, lambda q: q.scores),
        f"teacher on all {CANDIDATES}": ndcg(queries, lambda q: q.log_odds),
    }
    num_read: dict[str, float] = {"student": 0.0, f"teacher on all {CANDIDATES}": float(CANDIDATES)}
    for n in BUDGETS:
        counts: list[int] = []

        def cascade(query: Candidates, n: int = n, counts: list[int] = counts) -> np.ndarray:
            reranker = Cascade(num_passages=n).with_teacher(Known(query), error)  # type: ignore[arg-type]
            reranked = reranker.rerank(query.text, query.ranking)
            counts.append(len(reranked.read))
            return reranked.scores

        values[f"cascade, {n}"] = ndcg(queries, cascade)
        num_read[f"cascade, {n}"] = float(np.mean(counts))
    for n in sorted(FIRST):
        values[f"first {n}"] = ndcg(queries, lambda q, n=n: first_n(q, n))
        values[f"first {n}, one scale"] = ndcg(queries, lambda q, n=n: first_n_one_scale(q, n, error))
        num_read[f"first {n}"] = num_read[f"first {n}, one scale"] = float(n)
    rows = {
        system: {"ndcg_at_10": float(np.mean(per_query)), "passages_read": num_read[system]}
        for system, per_query in values.items()
    }
    return {
        "num_queries": len(queries),
        "error": {
            "slope": error.slope,
            "intercept": error.intercept,
            "sigma": error.sigma,
            "query_sigma": error.query_sigma,
            "num_pairs": error.num_pairs,
        },
        "teacher_pair_ms": pair_ms,
        "systems": rows,
        "times": times(queries[:TIMED_QUERIES], teacher, error, SETS[name]),
    }


def times(queries: Sequence[Candidates], teacher: PairTeacher, error: StudentError, task: Task) -> dict[str, object]:
    """Milliseconds per query for each budget of passages, for all candidates at once, and for a budget of time."""

    def run(cascade: Cascade) -> tuple[np.ndarray, np.ndarray]:
        reranker = cascade.with_teacher(teacher, error)
        done = [rerank_candidates(reranker, q.text, q.ranking) for q in queries]
        return np.array([1e3 * one.seconds for one in done]), np.array([len(one.read) for one in done])

    measured: dict[str, object] = {}
    for n in BUDGETS:
        ms, read = run(Cascade(num_passages=n))
        measured[f"cascade, {n}"] = {
            "median_ms": float(np.median(ms)),
            "p95_ms": float(np.quantile(ms, 0.95)),
            "read": float(read.mean()),
        }
    all_ms: list[float] = []
    for query in queries:
        start = time.perf_counter()
        teacher.score_pairs([(query.text, text) for text in query.texts], task)
        all_ms.append(1e3 * (time.perf_counter() - start))
    measured[f"teacher on all {CANDIDATES}"] = {"median_ms": float(np.median(all_ms))}
    ms, read = run(Cascade(num_passages=None, max_ms=BUDGET_MS))
    measured[f"budget of {BUDGET_MS:g} ms"] = {
        "median_ms": float(np.median(ms)),
        "most_ms": float(ms.max()),
        "share_late": float((ms > BUDGET_MS).mean()),
        "read": float(read.mean()),
    }
    return measured


def main() -> None:
    """Measure, print a table, write the JSON."""
    require(*(DATA / name for name in SETS))
    if len(sys.argv) < 2:
        print("skipped: pass the run folder with the ensemble of teachers (python benchmarks/cascade.py RUN_FOLDER)")
        return
    torch.set_num_threads(1)
    config = TeacherConfig(model=str(Path(sys.argv[1]) / "ensemble"))
    student, teacher, fitted = Student.load("d2llm-minilm"), load_teacher(config), ensemble_queries(config)
    result: dict[str, object] = {}
    for name in SETS:
        figures = result[name] = measure(name, student, teacher, fitted.get(name, frozenset()))
        print(f"{name}: {json.dumps({key: value for key, value in figures.items() if key != 'systems'}, indent=1)}")
        for system, row in figures["systems"].items():  # type: ignore[attr-defined]
            print(f"  {system:24} {row['ndcg_at_10']:.4f}   {row['passages_read']:.1f} read")
    setting = {"student": "d2llm-minilm", "teacher": "ensemble", "split": "dev", "candidates": CANDIDATES, "threads": 1}
    RESULT.write_text(json.dumps({"setting": setting, "sets": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
