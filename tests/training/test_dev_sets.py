"""Dev measure: nDCG@10 at each interaction weight, checked against hand-made scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d2llm.core import progress
from d2llm.core.errors import InputError, TrainingDivergedError
from d2llm.core.types import Task
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig
from d2llm.training.choose_weights import choose_interaction_weights, value_by_set
from d2llm.training.dev_sets import INTERACTION_WEIGHTS, DevResult, DevSet, evaluate_dev, make_dev_set
from tiny_data import make_source, topics
from tiny_models import randomise, tiny_student_config, write_tiny_model

IDS = ("pa", "pb", "pc", "pd")


class HandMadeStudent:
    """Preset inner products and changes, [queries, passages]; encodes queries as unit vectors, passages as columns."""

    def __init__(self, dots: np.ndarray, changes: np.ndarray, *, has_dot: bool = True) -> None:
        self.dots, self.changes = dots.astype(np.float32), changes.astype(np.float32)
        self.has_dot = has_dot
        self.config = SimpleNamespace(backbone=SimpleNamespace(query_prefix=""))
        self.interaction = SimpleNamespace(has_interaction=lambda task: True)

    def encode_queries(
        self, texts: list[str], *, instruction: str | None, advance: Callable[[int], None]
    ) -> SimpleNamespace:
        assert instruction == ""  # it is in the texts
        advance(len(texts))
        return SimpleNamespace(vectors=np.eye(len(self.dots), dtype=np.float32)[[int(text) for text in texts]])

    def encode_passages(self, texts: list[str], *, advance: Callable[[int], None]) -> SimpleNamespace:
        advance(len(texts))
        return SimpleNamespace(vectors=np.ascontiguousarray(self.dots.T))

    def query_vectors(self, vectors: np.ndarray, task: Task) -> np.ndarray:
        return vectors

    def score(self, query: np.ndarray, passages: np.ndarray, task: Task, *, interaction_weight: float) -> np.ndarray:
        return passages @ query + interaction_weight * self.changes[int(query.argmax())]


def dev_set(qrels: dict[str, dict[str, int]], *, name: str = "set", task: Task = "asymmetric") -> DevSet:
    queries = {query_id: str(row) for row, query_id in enumerate(qrels)}
    passages = {passage_id: passage_id for passage_id in IDS}
    return DevSet(name, task, queries, passages, dict.fromkeys(queries, IDS), qrels)


def discount(rank: int) -> float:
    return 1 / math.log2(1 + rank)


# Query 0: pb is relevant. Inner product order pa 4, pb 3, pc 2, pd 1; the interaction moves pb by +2 and pa by -1:
#   r = 0: pb second; r = 0.25: pa 3.75, pb 3.5: second; r = 0.5: pa 3.5, pb 4: first; and so on.
# Query 1: pa (grade 2) and pd (grade 1) are relevant. Inner product order pd, pa, pc, pb = 4, 3.5, 2, 1; pa changes by
# -1.75, pc by +0.25:
#   pd, pa, pc up to r = 0.5 (pa 2.625, pc 2.125); r = 0.75: pa 2.1875, pc 2.1875: a tie, broken by id;
#   r = 1: pa 1.75, pc 2.25: pd, pc, pa.
ANCHORS = np.array([[4, 3, 2, 1], [3.5, 1, 2, 4]])
CHANGES = np.array([[-1, 2, 0, 0], [-1.75, 0, 0.25, 0]])
QRELS = {"q0": {"pb": 1, "pa": 0}, "q1": {"pa": 2, "pd": 1}}
IDEAL = 2 * discount(1) + discount(2)
SECOND_BEST = (discount(1) + 2 * discount(2)) / IDEAL
BY_HAND = {
    0.0: (discount(2) + SECOND_BEST) / 2,
    0.25: (discount(2) + SECOND_BEST) / 2,
    0.5: (1 + SECOND_BEST) / 2,
    0.75: (1 + SECOND_BEST) / 2,
    1.0: (1 + (discount(1) + 2 * discount(3)) / IDEAL) / 2,
}


def test_ndcg_at_each_weight_matches_hand_calculation() -> None:
    student = HandMadeStudent(ANCHORS, CHANGES)
    result = evaluate_dev(student, [dev_set(QRELS)])["set"]
    assert result.task == "asymmetric"
    assert result.values == pytest.approx(BY_HAND, abs=1e-6)


def test_student_without_inner_product_is_measured_at_one_weight() -> None:
    student = HandMadeStudent(ANCHORS, CHANGES, has_dot=False)
    result = evaluate_dev(student, [dev_set(QRELS)])["set"]
    assert result.values == pytest.approx({1.0: BY_HAND[1.0]}, abs=1e-6)


def test_progress_counts_encoded_texts_and_ranked_queries(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "d2llm.remarks"):
        evaluate_dev(HandMadeStudent(ANCHORS, CHANGES), [dev_set(QRELS), dev_set(QRELS, name="other")], title="looking")
    lines = [record.getMessage() for record in caplog.records]
    counts = [(line.split(" (")[0], line.rsplit(", ", 1)[1]) for line in lines]
    assert counts == [
        (f"looking: {finished} of 16", name)  # encodes two queries and four passages, then ranks two queries
        for name, totals in (("set", (0, 2, 6, 7, 8)), ("other", (8, 10, 14, 15, 16)))
        for finished in totals
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("has_dot", [True, False])
def test_non_finite_scores_raise_a_divergence_error(bad: float, has_dot: bool) -> None:
    changes = CHANGES.copy()
    changes[1, 2] = bad
    student = HandMadeStudent(ANCHORS, changes, has_dot=has_dot)
    with pytest.raises(TrainingDivergedError, match="dev queries of 'set' are not finite"):
        evaluate_dev(student, [dev_set(QRELS)])


# --- a real student ---------------------------------------------------------------------------------------------------


@pytest.fixture
def student(tmp_path: Path) -> Student:
    return Student.create(tiny_student_config(write_tiny_model(tmp_path / "model")), device="cpu", dtype="float32")


@pytest.fixture
def real_dev() -> DevSet:
    return make_dev_set(topics(), num_queries=50, num_passages=100, seed=0)


def ndcg_of(student: Student, dev: DevSet) -> float:
    """Independent of the code under test: binary nDCG@10 of the student's own scores."""
    queries = student.encode_queries([*dev.queries.values()]).vectors
    passages = student.encode_passages([*dev.passages.values()]).vectors
    passage_ids = [*dev.passages]
    values: list[float] = []
    for query_id, vector in zip(dev.queries, queries, strict=True):
        scores = student.score(vector, passages, dev.task)
        order = sorted(range(len(scores)), key=lambda row: (-scores[row], passage_ids[row]))[:10]
        relevant = dev.qrels[query_id]
        gain = sum(discount(rank) for rank, row in enumerate(order, 1) if passage_ids[row] in relevant)
        values.append(gain / sum(discount(rank) for rank in range(1, 1 + min(10, len(relevant)))))
    return float(np.mean(values))


def test_each_weight_matches_a_student_with_that_weight(student: Student, real_dev: DevSet) -> None:
    student.prepare_training()
    randomise(student, seed=3)
    residual = student.interaction.interaction_weight("asymmetric")
    residual.fill_(0.5)
    result = evaluate_dev(student, [real_dev])["tiny"]
    assert float(residual) == 0.5
    assert float(student.interaction.interaction_weight("symmetric")) == 1.0
    assert set(result.values) == set(INTERACTION_WEIGHTS)
    for weight, value in result.values.items():
        residual.fill_(weight)
        assert value == pytest.approx(ndcg_of(student, real_dev), abs=1e-6)
    assert len({round(value, 4) for value in result.values.values()}) > 1  # the weight matters in this test


def test_a_student_whose_interaction_was_left_out_is_measured_without_it(student: Student, real_dev: DevSet) -> None:
    before = evaluate_dev(student, [real_dev])["tiny"].values
    student.drop_idle_parts()
    assert evaluate_dev(student, [real_dev])["tiny"].values == {0.0: before[0.0]}


def test_untrained_student_scores_the_same_at_every_weight(student: Student) -> None:
    """Passages with the same text tie exactly, so any rounding of a zero change would show."""
    texts = {f"p{n}": "the cat sat on the mat" for n in range(30)}
    dev = make_dev_set(
        make_source(texts, {"q": "the cat"}, [], qrels={"dev": {"q": {"p3": 1, "p4": 1}}}),
        num_queries=1,
        num_passages=30,
        seed=0,
    )
    values = evaluate_dev(student, [dev])["tiny"].values
    assert len(set(values.values())) == 1
    assert choose_interaction_weights({"tiny": DevResult("asymmetric", values)}) == {"asymmetric": 0.0}


def test_paper_head_is_measured_at_one_weight(tmp_path: Path, real_dev: DevSet) -> None:
    config = tiny_student_config(write_tiny_model(tmp_path / "model"))
    paper = config.model_copy(update={"interaction": InteractionConfig(head="paper", hidden_dim=16, feature_dim=8)})
    student = Student.create(paper, device="cpu", dtype="float32")
    values = evaluate_dev(student, [real_dev])["tiny"].values
    assert values == pytest.approx({1.0: ndcg_of(student, real_dev)}, abs=1e-6)


# --- choosing the weight ----------------------------------------------------------------------------------------------


def result(task: Task, *values: float) -> DevResult:
    return DevResult(task, dict(zip(INTERACTION_WEIGHTS, values, strict=True)))


def test_weight_with_the_best_mean_per_task_is_chosen() -> None:
    results = {
        "a": result("asymmetric", 0.5, 0.6, 0.7, 0.5, 0.2),
        "b": result("asymmetric", 0.5, 0.9, 0.7, 0.5, 0.2),
        "c": result("symmetric", 0.1, 0.1, 0.1, 0.1, 0.2),
    }
    weights = choose_interaction_weights(results)
    assert weights == {"asymmetric": 0.25, "symmetric": 1.0}
    assert value_by_set(results, weights) == {"a": 0.6, "b": 0.9, "c": 0.2}


def test_ties_choose_the_smallest_weight() -> None:
    assert choose_interaction_weights({"a": result("asymmetric", 0.5, 0.5, 0.5, 0.5, 0.5)}) == {"asymmetric": 0.0}
    assert choose_interaction_weights({"a": result("asymmetric", 0.4, 0.5, 0.3, 0.5, 0.5)}) == {"asymmetric": 0.25}
    descending = DevResult("asymmetric", {1.0: 0.5, 0.5: 0.5, 0.0: 0.4})
    assert choose_interaction_weights({"a": descending}) == {"asymmetric": 0.5}


# --- the dev set ------------------------------------------------------------------------------------------------------


def test_dev_set_has_positives_neighbours_and_random_passages() -> None:
    passages = {f"p{n:03}": f"filler number{n}" for n in range(100)}
    passages |= {"answer": "nothing in common", "near": "the cat sat", "graded0": "unlike anything"}
    queries = {"q": "where the cat sat", "unjudged": "x", "hopeless": "y"}
    judged = {"q": {"answer": 2, "graded0": 0}, "hopeless": {"p000": 0, "unknown": 1}}
    source = make_source(passages, queries, [], qrels={"dev": judged, "test": {}})
    dev = make_dev_set(source, num_queries=10, num_passages=20, seed=0)
    assert (dev.name, dev.task) == ("tiny", "asymmetric")
    assert dev.queries == {"q": "where the cat sat"}
    assert len(dev.passages) == 20
    assert {"answer", "near"} <= set(dev.passages)
    assert list(dev.candidates["q"]) == list(dev.passages) == sorted(dev.passages)
    assert all(text == passages[passage_id] for passage_id, text in dev.passages.items())
    assert dev.qrels == {"q": {"answer": 2, "graded0": 0}}
    assert make_dev_set(source, num_queries=10, num_passages=20, seed=0) == dev
    assert make_dev_set(source, num_queries=10, num_passages=20, seed=1).passages != dev.passages
    # never fewer than the required passages, never more than exist
    assert set(make_dev_set(source, num_queries=1, num_passages=1, seed=0).passages) >= {"answer", "near"}
    assert len(make_dev_set(source, num_queries=1, num_passages=999, seed=0).passages) == len(passages)


def test_dev_queries_are_a_seeded_sample() -> None:
    source = topics(num_dev=20)
    dev = make_dev_set(source, num_queries=6, num_passages=100, seed=0)
    assert len(dev.queries) == 6
    assert set(dev.qrels) == set(dev.queries)
    assert make_dev_set(source, num_queries=6, num_passages=100, seed=3).queries != dev.queries


@pytest.mark.parametrize(
    "qrels",
    [
        {},
        {"train": {"q": {"p": 1}}},
        {"dev": {}},
        {"dev": {"unknown": {"p": 1}}},
        {"dev": {"q": {"unknown": 1}}},
        {"dev": {"q": {"p": 0}}},
    ],
)
def test_data_set_without_dev_queries_is_rejected(qrels: dict[str, dict[str, dict[str, int]]]) -> None:
    source = make_source({"p": "text"}, {"q": "text"}, [], qrels=qrels)
    with pytest.raises(InputError, match=r"qrels/dev.tsv has no query with a positive"):
        make_dev_set(source, num_queries=1, num_passages=1, seed=0)
