"""Small in-memory data sets, plans and teacher labels for tests of labelling and training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import Passage, Query, Task
from d2llm.data.beir import Dataset
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.plan import PlanEntry, TrainingPlan, TrainingSource
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.recipe import Recipe, StudentConfig, TeacherConfig, TrainingConfig
from d2llm.recipe.losses import Objective
from tiny_models import TEXTS

_WORDS = [text.split() for text in TEXTS]


def make_source(
    passages: Mapping[str, str],
    queries: Mapping[str, str],
    entries: Iterable[PlanEntry],
    *,
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]] | None = None,
    name: str = "tiny",
    task: Task = "asymmetric",
) -> TrainingSource:
    """A training source from texts by id; qrels by split."""
    dataset = Dataset(
        name,
        Path(name),
        {key: Passage(key, text) for key, text in passages.items()},
        {key: Query(key, text) for key, text in queries.items()},
        {
            split: {query: dict(grades) for query, grades in split_qrels.items()}
            for split, split_qrels in (qrels or {}).items()
        },
    )
    return TrainingSource(dataset, make_plan(entries), task)


def make_plan(entries: Iterable[PlanEntry]) -> TrainingPlan:
    entries = tuple(entries)
    content = [[e.query_id, e.positives, e.hard_negatives, e.easy_negatives] for e in entries]
    return TrainingPlan(entries, {"content_hash": fingerprint_json(content)})


def topics(
    *,
    num_train: int = 16,
    num_dev: int = 8,
    num_passages: int = 24,
    shift: int = 1,
    name: str = "tiny",
    task: Task = "asymmetric",
) -> TrainingSource:
    """Texts on eight topics; each consists of a few words of one of ``TEXTS``.

    The relevant passages of a query on topic ``t`` are those on topic ``t + shift``; with ``shift=1`` the passages that
    share words with it are hard negatives. Passage ``p<n>`` and query ``q<n>`` / ``dev<n>`` are on topic ``n % 8``.
    """
    rng = random.Random(0)
    passages = {f"p{n:02}": _say(rng, n % 8, 5) for n in range(num_passages)}
    queries = {f"q{n:02}": _say(rng, n % 8, 3) for n in range(num_train)}
    queries |= {f"dev{n:02}": _say(rng, n % 8, 3) for n in range(num_dev)}
    of_topic = [[p for p in passages if topic(p) == t] for t in range(8)]
    entries: list[PlanEntry] = []
    for query in [q for q in queries if q.startswith("q")]:
        relevant = of_topic[(topic(query) + shift) % 8]
        others = [p for p in passages if p not in relevant and p not in of_topic[topic(query)]]
        hard = tuple(p for p in of_topic[topic(query)] if p not in relevant) + tuple(rng.sample(others, 1))
        easy = tuple(p for p in rng.sample(others, 3) if p not in hard)
        entries.append(PlanEntry(query, tuple(relevant), hard, easy))
    dev = {q: dict.fromkeys(of_topic[(topic(q) + shift) % 8], 1) for q in queries if q.startswith("dev")}
    return make_source(passages, queries, entries, qrels={"dev": dev}, name=name, task=task)


def topic(identifier: str) -> int:
    return int(identifier[-2:]) % 8


def write_rule_labels(
    store: Path,
    sources: Sequence[TrainingSource],
    teacher: TeacherConfig,
    *,
    queries: Sequence[str] | None = None,
    reverse: bool = False,
) -> None:
    """Labels of a perfect teacher: log-odds 4 for positives, 0 for hard and -4 for easy negatives.

    With ``reverse`` positives and hard negatives are swapped. The cosines are 1 within the positives and within the
    hard negatives, and 0 between them.
    """
    identity = identify_teacher(teacher)
    for source in sources:
        labels = LabelStore(
            store, teacher=identity.fingerprint, prompt=identity.prompts[source.task], dataset=source.dataset.name
        )
        labels.write([_by_rule(e, reverse) for e in source.plan.entries if queries is None or e.query_id in queries])


JUDGEMENTS = {"in_batch_cross_entropy": 1.0, "dot_cross_entropy": 1.0, "pair_cross_entropy": 1.0}
PUBLISHED = JUDGEMENTS | {
    "contrastive_imitation": 1.0,
    "rank_imitation_positive_hard": 1.0,
    "rank_imitation_hard_easy": 0.01,
    "feature_imitation": 0.001,
}
"""The published losses, with cross-entropies of the inner product and of labelled pairs."""


def tiny_recipe(student: StudentConfig, *, losses: Objective | None = None, **training: object) -> Recipe:
    """A recipe with few steps, batches of 4 queries, and dev evaluation on all data."""
    settings = {
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "epochs": 2,
        "batch_queries": 4,
        "num_hard": 2,
        "num_easy": 1,
        "unlabelled": "leave_out",
        "eval_every": 4,
        "patience": 5,
        "residual": {"epochs": 0},
        "checkpoint_every": 3,
        "dev_queries": 50,
        "dev_passages": 100,
    }
    return Recipe(
        student=student,
        losses=losses or Objective(PUBLISHED),
        training=TrainingConfig.model_validate(settings | training),
    )


def _by_rule(entry: PlanEntry, reverse: bool) -> QueryLabels:
    best, second = (0.0, 4.0) if reverse else (4.0, 0.0)
    values = [best] * len(entry.positives) + [second] * len(entry.hard_negatives) + [-4.0] * len(entry.easy_negatives)
    kinds = np.array([True] * len(entry.positives) + [False] * len(entry.hard_negatives))
    gram = (kinds[:, None] == kinds).astype(np.float32)
    return QueryLabels(entry.query_id, entry.passage_ids, np.array(values, np.float32), gram)


def _say(rng: random.Random, number: int, num_words: int) -> str:
    return " ".join(rng.sample(_WORDS[number], num_words))


LETTERS = "abcdefghijkl"


def everyday(name="everyday"):
    """Twelve dev queries; each shares words with three passages, one of which is relevant."""
    passages = {
        f"{letter}{n}": Passage(f"{letter}{n}", f"{letter * 4} thing {n}") for letter in LETTERS for n in range(3)
    }
    queries = {f"q{letter}": Query(f"q{letter}", f"{letter * 4} please") for letter in LETTERS}
    queries["none"] = Query("none", "nothing")
    grades = {f"q{letter}": {f"{letter}2": 1, f"{letter}1": 0} for letter in LETTERS} | {"none": {"a0": 0}}
    return Dataset(name, Path(name), passages, queries, {"dev": grades})
