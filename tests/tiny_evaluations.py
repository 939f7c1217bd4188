"""Small retrieval sets, and fakes of all systems that can be evaluated on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.data.trec import TrecRun
from d2llm.evaluation.contenders import Contenders
from d2llm.evaluation.evaluate import evaluate
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.retrieval.cosine import CosineStudent
from fake_models import FakeStudent, FakeTeacher

PASSAGES = {
    "a": Passage("a", "the cat sleeps on the sofa"),
    "b": Passage("b", "a dog runs in the garden"),
    "c": Passage("c", "fish swim in the sea"),
    "d": Passage("d", "birds fly over the sea"),
    "e": Passage("e", "horses eat grass in the garden"),
}
QUERIES = {
    "q1": Query("q1", "cat sleeps"),
    "q2": Query("q2", "dog garden"),
    "q3": Query("q3", "zebra"),
    "q4": Query("q4", "sea fish"),
}
QRELS = {
    "q1": {"a": 1, "gone": 1},
    "q2": {"e": 1, "b": 0},
    "q3": {"c": 1},
    "q4": {"c": 2, "d": 1},
    "left": {"gone": 1},
    "nobody": {"a": 1},
}
_WORDS = "cat dog fish bird horse cow sleeps runs swims flies eats sings red green blue small large old young wet"
WORDS = _WORDS.split()


def make_dataset(qrels=QRELS):
    queries = QUERIES | {"left": Query("left", "cat")}
    return Dataset("zoo", Path("zoo"), PASSAGES, queries, {"test": qrels}, ("test: 1 odd thing",))


def make_words(num_passages=130, num_queries=24):
    """Random texts with graded judgements, and more passages than a ranking contains."""
    rng = np.random.default_rng(5)
    passages = {f"p{n:03}": Passage(f"p{n:03}", " ".join(rng.choice(WORDS, 4 + n % 3))) for n in range(num_passages)}
    queries, qrels = {}, {}
    for n in range(num_queries):
        name = f"q{n:02}"
        relevant = rng.choice(list(passages), 3, replace=False).tolist()
        text = passages[relevant[0]].text.split()[:2] + passages[relevant[1]].text.split()[:1]
        queries[name] = Query(name, " ".join([*text, str(rng.choice(WORDS))]))
        qrels[name] = {relevant[0]: 2, relevant[1]: 1, relevant[2]: int(n % 2), f"p{n:03}": 0}
    return Dataset("words", Path("words"), passages, queries, {"test": qrels}, ())


def everyone(**changes):
    students = {
        "student": FakeStudent(),
        "untuned": FakeStudent(fingerprint="base"),
        "tuned_cosine": CosineStudent(FakeStudent(fingerprint="tuned")),
        "paper_head": FakeStudent(fingerprint="paper", head="paper"),
        "teacher": FakeTeacher(),
    }
    return Contenders(**(students | changes))


def run(name, rankings):
    """An external run; scores decrease by one per rank."""
    scores = {query: {p: float(-index) for index, p in enumerate(ids)} for query, ids in rankings.items()}
    return TrecRun(name, {query: tuple(ids) for query, ids in rankings.items()}, scores)


def measure(dataset, contenders, work=None, *, labels=None, indexes=(), **settings):
    chosen = EvaluationSettings(**({"latency_queries": 3} | settings))
    return evaluate(dataset, contenders, chosen, work_folder=work, labels=labels, indexes=indexes)


def with_indexes_of(work, folder):
    """Turn ``folder`` into a work folder with the indexes of another one, but without its results."""
    if (work / "indexes").exists():
        shutil.copytree(work / "indexes", folder / "indexes")
    return folder


def figures(row):
    """measure -> value."""
    return {name: estimate.value for name, estimate in row.measures.items()}
