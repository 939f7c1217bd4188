"""QueryScorer, the fast scoring of one query against many passages, compared with the formula in numpy float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from d2llm.core.types import TASKS
from d2llm.models.interaction import CosineHead, Interaction
from d2llm.models.scorer import HeadWeights, QueryScorer
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig
from d2llm.retrieval.index import Index
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

pytestmark = pytest.mark.usefixtures("cpu")

DIM, HIDDEN = 24, 40
FEATURES = ("concat", "product", "difference", "rich")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make(head="dot", features="rich", **settings) -> Interaction:
    torch.manual_seed(0)
    config = InteractionConfig(head=head, features=features, hidden_dim=HIDDEN, feature_dim=16, **settings)
    module = Interaction(config, DIM).eval()
    randomise(module, scale=0.2)
    return module


def vectors(num, seed):
    return np.random.default_rng(seed).standard_normal((num, DIM)).astype(np.float32)


def prepare(module, query, *, task="symmetric", dtype=torch.float32, block=64) -> QueryScorer:
    with torch.inference_mode():
        weights = HeadWeights(module, task, dtype)
    return QueryScorer(module, weights, torch.from_numpy(query), task, block)


def scores_in_numpy(module: Interaction, a, passages, task):
    """The formula as published, pair by pair, with no layer split or folded."""
    weights = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    features = module.config.features

    def layer(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    scores = []
    a = a.astype(np.float64)
    for b in passages.astype(np.float64):
        inputs = [a, b]
        if features in ("product", "rich"):
            inputs.append(a * b)
        if features in ("difference", "rich"):
            inputs.append(abs(a - b))
        hidden = np.maximum(layer("first", np.concatenate(inputs)), 0)
        hidden = np.maximum(layer("shared", hidden), 0)
        hidden = np.maximum(layer(f"branches.{task}.0", hidden), 0)
        g = layer("output", layer(f"branches.{task}.2", hidden))[0]
        if not module.has_dot:
            scores.append(g)
            continue
        maps = [weights[f"dots.{task}.{name}_map"] for name in ("query", "passage")]
        dot = np.exp(weights[f"dots.{task}.log_scale"]) * (maps[0] @ a) @ (maps[1] @ b) / DIM
        bound = weights[f"residual_{task}"] * module.config.max_bound / (1 + np.exp(-weights["raw_bound"]))
        if module.config.gates:
            for gate, vector in (("query_gate", a), ("passage_gate", b)):
                bound = bound / (1 + np.exp(-layer(gate, vector)[0]))
        scores.append(dot + bound * np.tanh(g))
    return np.array(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("head", "gates"), [("paper", False), ("dot", False), ("dot", True)])
def test_scores_equal_the_formula(head, gates, features, dtype):
    module, (query,), passages = make(head, features, gates=gates), vectors(1, 1), vectors(37, 2)
    for task in TASKS:
        expected = scores_in_numpy(module, query, passages, task)
        scores = prepare(module, query, task=task, dtype=dtype)(passages)
        assert scores.dtype == np.float32
        # Relative to the largest score. In bfloat16 only the interaction is rounded; it changes a score by at most 4.
        largest = max(1, abs(expected).max()) if head == "paper" or dtype == torch.float32 else 4
        tolerance = TOLERANCE[dtype] * largest
        np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)
        if head == "dot":  # the interaction must contribute more than the tolerance
            dots = passages @ prepare(module, query, task=task).dot_query
            assert abs(scores - dots).max() > 5 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_passages_score_like_their_float32_values(dtype):
    module, (query,) = make(), vectors(1, 1)
    stored = torch.from_numpy(vectors(50, 2)).bfloat16()
    score = prepare(module, query, dtype=dtype)
    np.testing.assert_allclose(score(stored), score(stored.float().numpy()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_scores_do_not_depend_on_blocks_or_threads(dtype, num_threads):
    module, (query,), passages = make(gates=True), vectors(1, 1), vectors(67, 2)
    before = torch.get_num_threads()
    expected = prepare(module, query, dtype=dtype, block=512)(passages)
    order = np.random.default_rng(3).permutation(67)
    torch.set_num_threads(num_threads)
    try:
        scores_by_block = [prepare(module, query, dtype=dtype, block=block)(passages) for block in (1, 7, 32, 512)]
        shuffled = prepare(module, query, dtype=dtype, block=50)(passages[order])
    finally:
        torch.set_num_threads(before)
    for scores in scores_by_block:
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
        assert (np.argsort(-scores, kind="stable") == np.argsort(-expected, kind="stable")).all()
    np.testing.assert_allclose(shuffled, expected[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_does_not_depend_on_how_many_are_scored_to_the_bit(dtype):
    module, (query,), passages = make(gates=True), vectors(1, 1), vectors(1100, 2)
    score = prepare(module, query, dtype=dtype, block=480)
    expected = score.change(passages)
    for num in (1, 2, 31, 32, 47, 49, 64, 100, 128, 130, 160, 203, 479, 481, 1024):
        np.testing.assert_array_equal(score.change(passages[:num]), expected[:num])


def test_change_is_what_the_interaction_adds():
    module, (query,), passages = make(gates=True, max_bound=3.0), vectors(1, 1), vectors(60, 2)
    module.interaction_weight("asymmetric").fill_(0.5)
    score = prepare(module, query, task="asymmetric")
    change = score.change(passages)
    assert change.min() >= -1
    assert change.max() <= 1
    assert np.ptp(change) > 0.1
    with torch.inference_mode():
        bound = module.passage_bound(torch.from_numpy(passages)).numpy()
        assert score.bound == pytest.approx(module.query_bound(torch.from_numpy(query), "asymmetric").item())
    np.testing.assert_allclose(passages @ score.dot_query + score.bound * bound * change, score(passages), atol=1e-5)


def test_the_interaction_weight_can_be_overridden():
    module, query, passages = make(gates=True), torch.from_numpy(vectors(1, 1)[0]), vectors(60, 2)
    module.interaction_weight("symmetric").fill_(0.25)
    with torch.inference_mode():
        weights = HeadWeights(module, "symmetric", torch.float32)
    expected = {}
    for weight in (0.0, 0.5, 1.0):
        module.interaction_weight("symmetric").fill_(weight)
        expected[weight] = QueryScorer(module, weights, query, "symmetric", 16)(passages)
    module.interaction_weight("symmetric").fill_(0.25)
    for weight, scores in expected.items():
        scorer = QueryScorer(module, weights, query, "symmetric", 16, interaction_weight=weight)
        np.testing.assert_array_equal(scorer(passages), scores)
    assert float(module.interaction_weight("symmetric")) == 0.25
    assert np.ptp(expected[1.0] - expected[0.0]) > 0.1


def test_weight_zero_skips_the_interaction(monkeypatch):
    module, (query,), passages = make(), vectors(1, 1), vectors(9, 2)
    module.interaction_weight("symmetric").fill_(0.0)
    monkeypatch.setattr(QueryScorer, "_interaction", lambda *_: pytest.fail("the interaction was computed"))
    score = prepare(module, query)
    assert score.bound == 0
    np.testing.assert_allclose(score(passages), passages @ score.dot_query, rtol=0, atol=1e-5)
    assert (score.change(passages) == 0).all()


def test_the_cosine_head_scores_by_its_inner_product_alone():
    head, (query,), passages = CosineHead(DIM), vectors(1, 1), vectors(9, 2)
    score = QueryScorer(head, None, torch.from_numpy(query), "symmetric", 4)
    np.testing.assert_allclose(score(passages), 20 * passages @ query / DIM, rtol=0, atol=1e-5)
    assert score.bound == 0


def test_the_paper_heads_scores_are_finer_than_bfloat16():
    """The last sum is in float32: with bfloat16's eight bits, a thousand passages would share a few hundred scores."""
    module, (query,), passages = make("paper"), vectors(1, 1), vectors(1000, 2)
    scores = prepare(module, query, dtype=torch.bfloat16)(passages)
    assert len(set(scores.tolist())) > 990


def test_no_passages_give_no_scores():
    module, (query,) = make(), vectors(1, 1)
    assert prepare(module, query)(vectors(0, 2)).shape == (0,)


# --- the student ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["rich", "generated"])
def student(tmp_path_factory, request):
    config = tiny_student_config(write_tiny_model(tmp_path_factory.mktemp("models") / "llama"))
    interaction = config.interaction.model_copy(update={"features": request.param})
    config = config.model_copy(update={"interaction": interaction})
    student = Student.create(config, device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.05)
    return student.eval()


def full_network_scores(student, queries, passages, task):
    """Scores from the full network, as in training."""
    with torch.inference_mode():
        return student.interaction(torch.from_numpy(queries), torch.from_numpy(passages), task).logits.numpy()


def test_a_prepared_query_scores_like_the_full_network(student):
    queries, passages = student.encode_queries(TEXTS[:3]).vectors, student.encode_passages(TEXTS).vectors
    for task in TASKS:
        expected = full_network_scores(student, queries, passages, task)
        prepared = student.prepare(queries[1], task)
        for query, logits in zip(queries, expected, strict=True):
            np.testing.assert_allclose(student.score(query, passages, task), logits, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(prepared(passages), student.score(queries[1], passages, task))


def test_an_index_scores_like_the_full_network(student, tmp_path):
    query, passages = student.encode_queries(TEXTS[:1]).vectors, student.encode_passages(TEXTS).vectors
    with Index.create(tmp_path / "index", student, task="asymmetric") as index:
        index.upsert([{"id": str(number), "text": text} for number, text in enumerate(TEXTS)])
        (ranking,) = index.search(TEXTS[:1], top_k=len(TEXTS))
    scores = {each.passage.id: each.score for each in ranking}
    expected = full_network_scores(student, query, passages, "asymmetric")[0]
    np.testing.assert_allclose([scores[str(number)] for number in range(len(TEXTS))], expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("change", ["optimizer", "fill", "load"])
def test_changed_weights_change_the_scores(student, change):
    queries, passages = student.encode_queries(TEXTS[:1]).vectors, student.encode_passages(TEXTS).vectors
    before = student.score(queries[0], passages, "symmetric")
    head = student.interaction
    if change == "optimizer":
        head.shared.weight.grad = torch.ones_like(head.shared.weight)
        torch.optim.AdamW([head.shared.weight], lr=0.1).step()
        head.shared.weight.grad = None
    elif change == "fill":
        with torch.no_grad():
            head.output.weight.mul_(3)
    else:
        head.load_state_dict({name: tensor * 1.1 for name, tensor in head.state_dict().items()})
    after = student.score(queries[0], passages, "symmetric")
    assert abs(after - before).max() > 1e-3
    np.testing.assert_allclose(
        after, full_network_scores(student, queries, passages, "symmetric")[0], rtol=0, atol=1e-4
    )


def test_a_student_can_be_copied_after_scoring(student):
    student = copy.deepcopy(student)  # without cached weights that were folded for another kind of CPU
    queries, passages = student.encode_queries(TEXTS[:1]).vectors, student.encode_passages(TEXTS).vectors
    student.backbone.compute_dtype = torch.bfloat16
    expected = student.score(queries[0], passages, "symmetric")
    copied = copy.deepcopy(student)
    np.testing.assert_array_equal(copied.score(queries[0], passages, "symmetric"), expected)
    with torch.no_grad():
        copied.interaction.output.weight.mul_(3)
    assert (copied.score(queries[0], passages, "symmetric") != expected).any()
    np.testing.assert_array_equal(student.score(queries[0], passages, "symmetric"), expected)


def test_passage_bound_is_one_without_gates(student):
    passages = student.encode_passages(TEXTS).vectors
    assert (student.passage_bound(passages) == 1).all()
