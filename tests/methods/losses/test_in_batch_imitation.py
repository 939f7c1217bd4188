"""The live teacher's scores, with and without the token embeddings, worked out from the states of the backbone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.core.types import ScoreFeature
from d2llm.data.plan import TrainingSource
from d2llm.methods.losses.in_batch_imitation import LiveScores, LiveTeacher
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from d2llm.models.tokens import TextKind
from d2llm.recipe.losses import Objective
from tiny_data import JUDGEMENTS, tiny_recipe, topics
from tiny_distill import LEARNING, Workspace, log_of
from tiny_models import DIM, randomise, tiny_student_config, write_tiny_model

WEIGHT, MAX_TOKENS = 7.5, 3
TOLERANCE = 0.004  # token embeddings are kept in two bytes for each number


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A student with random weights whose score counts tokens in asymmetric search, at most three of a query."""
    model = write_tiny_model(tmp_path_factory.mktemp("live") / "model", "bert")
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    randomise(student.interaction)
    rarity = [float(number % 5) for number in range(len(student.backbone.tokenizer))]  # every fifth token has no vector
    student.token_projection = TokenProjection(DIM, 8, rarity, max_query_tokens=MAX_TOKENS)
    weights: dict[ScoreFeature, float] = {"maxsim": WEIGHT, "bm25": 3.0}
    fitted = TaskFeatureWeights(weights=weights, dev={}, num_queries={})
    student.score_features = ScoreFeatures(tasks={"asymmetric": fitted})
    return student


@pytest.fixture(scope="module")
def source() -> TrainingSource:
    return topics()


def token_vectors(student: Student, text: str, kind: TextKind) -> tuple[list[list[float]], int]:
    """Unit vectors of the tokens that count, from the backbone's states, and how many tokens could."""
    projection = student.token_projection
    assert projection is not None
    ids = student.tokenize([text], kind).ids[0]
    with torch.no_grad():
        states, _ = student.backbone(*student.backbone.pad([ids]))
        projected = (states[0].double() @ projection.weight.double().T).tolist()
    rare = [(index, projection.rarity[token].item()) for index, token in enumerate(ids)]
    counted = sorted((pair for pair in rare if pair[1] > 0), key=lambda pair: -pair[1])
    kept = sorted(index for index, _ in (counted[:MAX_TOKENS] if kind == "query" else counted))
    rows = [projected[index] for index in kept]
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows], len(counted)


def max_sim(student: Student, query: str, passage: str) -> tuple[float, float]:
    """The sum over the query's tokens of the highest cosine, and the mean over all of its tokens."""
    (of_query, count), (of_passage, _) = (
        token_vectors(student, query, "query"),
        token_vectors(student, passage, "passage"),
    )
    total = sum(max(sum(x * y for x, y in zip(a, b, strict=True)) for b in of_passage) for a in of_query)
    return total, total / count


@pytest.mark.parametrize("scores", ["all", "vectors", "tokens"])
def test_scores_by_an_independent_formula(student: Student, source: TrainingSource, scores: LiveScores) -> None:
    live = LiveTeacher(student, source.dataset, "asymmetric", scores=scores)
    ids = list(source.dataset.passages)[:7]
    texts = [source.passage_text(passage_id) for passage_id in ids]
    queries = [source.query_text(entry.query_id) for entry in source.plan.entries[:4]]
    queries.append(" ".join(queries))  # with more tokens than count
    assert token_vectors(student, queries[-1], "query")[1] > MAX_TOKENS
    spread = 0.0
    for query in queries:
        vectors = student.score(
            student.encode_queries([query]).vectors[0], student.encode_passages(texts).vectors, "asymmetric"
        )
        sums, means = np.array([max_sim(student, query, text) for text in texts]).T
        expected = {"vectors": vectors, "tokens": sums, "all": vectors + WEIGHT * means}[scores]
        np.testing.assert_allclose(live(query, ids), expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(live(query, ids[::-1]), live(query, ids)[::-1], rtol=1e-5)  # from what is in memory
        spread = max(spread, float(np.ptp(WEIGHT * means)), float(np.ptp(sums)))
    assert spread > 10 * TOLERANCE  # tokens make differences that the tolerance does not hide


def test_tokens_count_only_where_they_have_a_weight(student: Student, source: TrainingSource) -> None:
    """In symmetric search they have none here, and the score is that of the vectors."""
    ids = list(source.dataset.passages)[:5]
    query = source.query_text(source.plan.entries[0].query_id)
    every, vectors = (LiveTeacher(student, source.dataset, "symmetric", scores=scores) for scores in ("all", "vectors"))
    assert (every.token_weight, vectors.token_weight) == (0.0, 0.0)
    np.testing.assert_array_equal(every(query, ids), vectors(query, ids))
    assert LiveTeacher(student, source.dataset, "asymmetric").token_weight == WEIGHT


def test_max_sim_needs_vectors_of_tokens(source: TrainingSource, tmp_path: Path) -> None:
    config = tiny_student_config(write_tiny_model(tmp_path / "model", "bert"))
    student = Student.create(config, device="cpu", dtype="float32")
    with pytest.raises(InputError, match=r'in_batch_imitation\.scores is "tokens", but the live teacher has no'):
        LiveTeacher(student, source.dataset, "asymmetric", scores="tokens")
    assert LiveTeacher(student, source.dataset, "asymmetric").token_weight == 0.0


@pytest.mark.parametrize("scores", ["all", "vectors", "tokens"])
def test_a_student_learns_from_the_chosen_scores(student: Student, tmp_path: Path, scores: LiveScores) -> None:
    """The first loss is the divergence from these scores, and the run records what they depend on."""
    workspace = Workspace(tmp_path)
    student.save(tmp_path / "live")
    live = {"teacher": str(tmp_path / "live"), "scores": scores}
    weights = Objective(JUDGEMENTS | {"in_batch_imitation": live, "in_batch_cross_entropy": 0.0})
    recipe = tiny_recipe(tiny_student_config(workspace.model), losses=weights, epochs=1, **LEARNING)
    workspace.run(tmp_path / "taught", recipe=recipe, labels=tmp_path / "none")
    settings = json.loads((tmp_path / "taught" / "manifest.json").read_text(encoding="utf-8"))["settings"]
    assert settings["live_teacher"] == student.fingerprint
    assert settings.get("live_tokens") == (None if scores == "vectors" else student.token_fingerprint)
    assert settings.get("live_token_weights") == (
        {"symmetric": None, "asymmetric": WEIGHT} if scores == "all" else None
    )
    first = next(line["in_batch_imitation"] for line in log_of(tmp_path / "taught") if "loss" in line)
    others = LiveTeacher(Student.load(tmp_path / "live", dtype="float32"), workspace.source.dataset, "asymmetric")
    assert first > 0
    assert others.token_weight == WEIGHT
