"""The IEM's split forms against the unsplit reference (benchmarks/unsplit_interaction.py), in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unsplit_interaction import dot_logit, multilayer_perceptron, pair_features

from d2llm.core.errors import InputError
from d2llm.core.types import TASKS
from d2llm.models.interaction import Interaction
from d2llm.models.scorer import HeadWeights, QueryScorer
from d2llm.ops.scoring import Linear, bounded_logit
from d2llm.recipe import InteractionConfig
from tiny_models import randomise

DIM = 10
FEATURES = ("rich", "concat", "product", "difference")
ALL_CASES = [
    (head, features, branches, task)
    for head in ("dot", "paper")
    for features in FEATURES
    for branches in ("per_task", "shared")
    for task in TASKS
]


def make(head="dot", features="rich", *, trained=True, **settings) -> Interaction:
    torch.manual_seed(0)
    width = 7 if settings.get("layers") == 3 else 6
    config = InteractionConfig(head=head, features=features, hidden_dim=7, feature_dim=width, **settings)
    module = Interaction(config, DIM).double().eval()
    if trained:
        randomise(module)
    return module


def search_scores(module: Interaction, query, passages, task) -> np.ndarray:
    """Scores as a search computes them, but in float64."""
    with torch.inference_mode():
        weights = HeadWeights(module, task, torch.float64, query)
    return QueryScorer(module, weights, query, task, 3)(passages)


def vectors(num, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, DIM, generator=generator, dtype=torch.float64)


def reference(module: Interaction, query, passage, task):
    """Features, inner product and logit of one pair, from the unsplit functions."""

    def layer(linear):
        return Linear(linear.weight, linear.bias)

    name = task if module.config.branches == "per_task" else "shared"
    branch = module.branches[name]
    inputs = pair_features(query, passage, module.config.features)
    if module.shared is None:
        features = torch.relu(multilayer_perceptron(inputs, [layer(module.first), layer(branch[0])]))
    else:
        layers = [layer(module.first), layer(module.shared), layer(branch[0]), layer(branch[2])]
        features = multilayer_perceptron(inputs, layers)
    logit = torch.nn.functional.linear(features, module.output.weight, module.output.bias)[..., 0]
    if module.dots is None:
        return features, None, logit
    dot = module.dots[name]
    inner = dot_logit(query, passage, dot.query_map, dot.passage_map, dot.log_scale.exp())
    return features, inner, bounded_logit(inner, logit, module.bound(task))


def test_the_reference_functions_by_hand():
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    assert pair_features(a, b, "concat").tolist() == [1, -2, 3, 4]
    assert pair_features(a, b, "rich").tolist() == [1, -2, 3, 4, 3, -8, 2, 6]
    assert pair_features(a, b, "product").tolist() == [1, -2, 3, 4, 3, -8]
    assert pair_features(a, b, "difference").tolist() == [1, -2, 3, 4, 2, 6]
    layers = [
        Linear(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.5, 0.5])),
        Linear(torch.tensor([[2.0, 3.0]]), None),
    ]
    assert multilayer_perceptron(a, layers).tolist() == [3.0]  # relu([1.5, -1.5]) = [1.5, 0]
    identity = torch.eye(2)
    assert dot_logit(a, b, 2 * identity, identity, 10.0).item() == pytest.approx(10 * 2 * (3 - 8) / 2)
    assert bounded_logit(torch.tensor(1.0), torch.tensor(100.0), 3.0).item() == pytest.approx(4.0)


@pytest.mark.parametrize("layers", [3, 5])
@pytest.mark.parametrize(("head", "features", "branches", "task"), ALL_CASES)
def test_split_equals_unsplit(head, features, branches, task, layers):
    module = make(head, features, branches=branches, layers=layers)
    queries, passages = vectors(3, 1), vectors(4, 2)
    scores = module(queries, passages, task)
    assert scores.logits.dtype == torch.float64
    for i, query in enumerate(queries):
        expected_features, dot, logits = reference(module, query.expand(4, -1), passages, task)
        np.testing.assert_allclose(scores.features[i].detach(), expected_features.detach(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(scores.logits[i].detach(), logits.detach(), rtol=0, atol=1e-12)
        searched = search_scores(module, query, passages, task)
        np.testing.assert_allclose(searched, logits.detach(), rtol=0, atol=1e-12)
        if dot is None:
            assert scores.dot is None
        else:
            np.testing.assert_allclose(scores.dot[i].detach(), dot.detach(), rtol=0, atol=1e-12)
            inner = passages @ module.query_vectors(query[None], task)[0]
            np.testing.assert_allclose(inner.detach(), dot.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [3, 5])
@pytest.mark.parametrize("head", ["dot", "paper"])
def test_a_query_generates_all_weights(head, layers):
    """Every layer is (W + P a) x + c + Q a, of the passage alone."""
    module, queries, passages = make(head, "generated", layers=layers), vectors(3, 1), vectors(4, 2)
    arrays = {name: value.detach().numpy() for name, value in module.named_parameters()}

    def layer(name, a, x):
        made = np.einsum("nd,d->n", arrays[f"{name}.generator"], a).reshape(-1, len(x) + 1)
        return (arrays[f"{name}.weight"] + made[:, :-1]) @ x + arrays[f"{name}.bias"] + made[:, -1]

    for task in TASKS:
        scores = module(queries, passages, task)
        names = [f"branches.{task}.0"] if layers == 3 else ["shared", f"branches.{task}.0"]
        for row, a in enumerate(queries.numpy()):
            expected = []
            for b in passages.numpy():
                x = np.maximum(layer("first", a, b), 0)
                for name in names:
                    x = np.maximum(layer(name, a, x), 0)
                if layers == 5:
                    x = layer(f"branches.{task}.2", a, x)
                expected.append(layer("output", a, x)[0])
            if head == "dot":
                bound = module.bound(task).item()
                expected = scores.dot[row].detach().numpy() + bound * np.tanh(expected)
            assert np.ptp(expected) > 0.1
            np.testing.assert_allclose(scores.logits[row].detach(), expected, rtol=0, atol=1e-11)
            np.testing.assert_allclose(search_scores(module, queries[row], passages, task), expected, atol=1e-11)


def test_generated_weights_are_narrow_and_stay_here():
    with pytest.raises(InputError, match="so both are at most 64"):
        InteractionConfig(features="generated")
    with pytest.raises(InputError, match="cannot be written into a file for other programs"):
        make("dot", "generated").split_layers("symmetric")


def test_the_authors_form_has_three_layers_and_features_after_a_relu():
    module = make("paper", "concat", layers=3)
    shapes = {name: tuple(each.shape) for name, each in module.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "first.weight": (7, 20),
        "branches.symmetric.0.weight": (7, 7),
        "branches.asymmetric.0.weight": (7, 7),
        "output.weight": (1, 7),
    }
    assert module(vectors(3, 1), vectors(4, 2), "symmetric").features.min() == 0
    with pytest.raises(InputError, match="set feature_dim to hidden_dim"):
        InteractionConfig(layers=3, hidden_dim=7)


def test_a_shared_branch_is_the_same_for_both_tasks():
    module, queries, passages = make(branches="shared"), vectors(2, 1), vectors(3, 2)
    symmetric, asymmetric = (module(queries, passages, task) for task in TASKS)
    assert torch.equal(symmetric.features, asymmetric.features)
    assert torch.equal(symmetric.logits, asymmetric.logits)
    assert set(module.branches) == set(module.dots) == {"shared"}
    module.interaction_weight("symmetric").fill_(0.5)  # the interaction weight is still per task
    halved = module(queries, passages, "symmetric")
    torch.testing.assert_close(halved.logits - halved.dot, (asymmetric.logits - asymmetric.dot) / 2)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("features", [*FEATURES, "generated"])
def test_untrained_dot_head_is_twenty_times_the_cosine(task, features):
    module = make(features=features, trained=False)
    queries, passages = (v / v.norm(dim=1, keepdim=True) * DIM**0.5 for v in (vectors(3, 1), vectors(4, 2)))
    cosines = queries @ passages.T / DIM
    torch.testing.assert_close(module(queries, passages, task).logits, 20 * cosines, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_gates_narrow_the_bound_of_each_pair(task):
    module, queries, passages = make(gates=True), vectors(5, 1), vectors(6, 2)
    plain = make(gates=False)
    plain.load_state_dict({name: p for name, p in module.state_dict().items() if "gate" not in name})
    module.interaction_weight(task).fill_(0.5)
    plain.interaction_weight(task).fill_(0.5)
    gated, ungated = module(queries, passages, task), plain(queries, passages, task)
    query_gate = torch.sigmoid(queries @ module.query_gate.weight[0] + module.query_gate.bias)
    passage_gate = torch.sigmoid(passages @ module.passage_gate.weight[0] + module.passage_gate.bias)
    gates = query_gate[:, None] * passage_gate[None, :]
    expected = ungated.dot + (ungated.logits - ungated.dot) * gates
    torch.testing.assert_close(gated.logits, expected, rtol=0, atol=1e-12)
    for row, query in enumerate(queries):
        searched = search_scores(module, query, passages, task)
        np.testing.assert_allclose(searched, expected[row].detach(), rtol=0, atol=1e-12)
    bound = module.query_bound(queries, task)[:, None] * module.passage_bound(passages)
    torch.testing.assert_close(bound, module.bound(task) * gates, rtol=0, atol=1e-12)
    assert bool(((gated.logits - gated.dot).abs() <= bound).all())
    upper = torch.cat([module.query_vectors(queries, task), module.query_bound(queries, task)[:, None]], dim=1)
    stored = torch.cat([passages, module.passage_bound(passages)[:, None]], dim=1)
    # The upper bound is one inner product.
    torch.testing.assert_close(upper @ stored.T, gated.dot + bound, rtol=0, atol=1e-12)


def test_gates_are_nearly_open_at_first():
    module = make(gates=True, trained=False)
    assert module.passage_bound(vectors(4, 1)).tolist() == pytest.approx([0.9526] * 4, abs=1e-4)
    assert make(trained=False).passage_bound(vectors(4, 1)).tolist() == [1.0] * 4


@pytest.mark.parametrize("gates", [False, True])
def test_per_query_lists_score_like_all_pairs(gates):
    module, queries, passages = make(gates=gates), vectors(3, 1), vectors(4, 2)
    together = module(queries, passages, "symmetric")
    lists = module.score_lists(queries, passages.expand(3, -1, -1), "symmetric")
    for name in ("logits", "dot", "features"):
        torch.testing.assert_close(getattr(lists, name), getattr(together, name), rtol=0, atol=1e-12)
    shuffled = torch.stack([passages[[2, 0]], passages[[3, 3]], passages[[1, 2]]])
    actual = module.score_lists(queries, shuffled, "symmetric").logits
    expected = torch.stack([together.logits[0, [2, 0]], together.logits[1, [3, 3]], together.logits[2, [1, 2]]])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    dots = module.score_dots(queries, passages, "symmetric")
    torch.testing.assert_close(dots.logits, together.dot, rtol=0, atol=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_the_interaction_stays_within_its_bound(task):
    module, queries, passages = make(max_bound=3.0), vectors(20, 1), vectors(20, 2)
    with torch.no_grad():
        module.output.weight.mul_(1000)  # drive tanh to its limits
        module.interaction_weight(task).fill_(0.25)
    scores = module(queries, passages, task)
    bound = module.bound(task).item()
    assert 0 < bound <= 0.25 * 3.0
    change = (scores.logits - scores.dot).abs().max().item()
    assert 0.99 * bound < change <= bound * (1 + 1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_weight_zero_leaves_the_inner_product_alone(task):
    module, queries, passages = make(), vectors(3, 1), vectors(4, 2)
    other = TASKS[1 - TASKS.index(task)]
    module.interaction_weight(task).fill_(0.0)
    scores = module(queries, passages, task)
    assert torch.equal(scores.logits, scores.dot)
    searched = search_scores(module, queries[0], passages, task)
    np.testing.assert_allclose(searched, scores.dot[0].detach(), rtol=0, atol=1e-12)
    untouched = module(queries, passages, other)
    assert not torch.equal(untouched.logits, untouched.dot)


def test_the_weight_is_saved_with_the_head():
    module = make()
    module.interaction_weight("symmetric").fill_(0.5)
    copy = make(trained=False)
    copy.load_state_dict(module.state_dict())
    assert copy.interaction_weight("symmetric").item() == 0.5
    assert copy.interaction_weight("asymmetric").item() == 1.0


def test_the_paper_head_has_no_inner_product():
    module = make("paper")
    assert not module.has_dot
    with pytest.raises(InputError, match="head 'paper' has no inner product"):
        module.query_vectors(vectors(1, 1), "symmetric")


def test_the_inner_product_stays_float32_under_autocast():
    module = make().float()
    queries, passages = vectors(3, 1).float(), vectors(4, 2).float()
    expected = module(queries, passages, "asymmetric")
    with torch.autocast("cpu", torch.bfloat16):
        scores = module(queries, passages, "asymmetric")
    assert torch.equal(scores.dot, expected.dot)
    assert scores.logits.dtype == torch.float32
    torch.testing.assert_close(scores.logits, expected.logits, rtol=0, atol=0.2)


def test_every_parameter_of_the_task_gets_a_gradient():
    module = make().train()
    module(vectors(3, 1), vectors(4, 2), "symmetric").logits.square().sum().backward()
    with_gradient = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    without_gradient = {name for name, _ in module.named_parameters()} - with_gradient
    assert without_gradient == {name for name, _ in module.named_parameters() if ".asymmetric." in name}


def inner_product(dot, queries, passages) -> np.ndarray:
    """t <U a, V b> / dim of every query and passage."""
    query_map, passage_map, scale = (
        each.detach().numpy() for each in (dot.query_map, dot.passage_map, dot.log_scale.exp())
    )
    return scale * (queries.numpy() @ query_map.T) @ (passages.numpy() @ passage_map.T).T / DIM


@pytest.mark.parametrize("branches", ["per_task", "shared"])
@pytest.mark.parametrize("task", TASKS)
def test_two_heads_are_combined_into_one(branches, task):
    head = make(branches=branches, gates=True)
    head.split_heads()
    randomise(head.teacher_dots, seed=1)
    queries, passages = vectors(3, seed=2), vectors(5, seed=3)
    name = task if branches == "per_task" else "shared"
    labels, teacher = (inner_product(dots[name], queries, passages) for dots in (head.dots, head.teacher_dots))
    assert np.abs(labels - teacher).min() > 1e-3
    head.label_weight = 0.3
    combined = head(queries, passages, task)
    np.testing.assert_allclose(combined.dot.detach().numpy(), 0.3 * labels + 0.7 * teacher, rtol=1e-12)
    by_head = head.score_heads(combined, queries, passages, task)
    change = (combined.logits - combined.dot).detach().numpy()
    for scores, dot in (by_head, labels), (by_head.teacher, teacher):
        np.testing.assert_allclose(scores.dot.detach().numpy(), dot, rtol=1e-12)
        np.testing.assert_allclose(scores.logits.detach().numpy(), dot + change, rtol=1e-12)
    head.merge_heads()
    assert not any("teacher" in parameter for parameter in head.state_dict())
    np.testing.assert_allclose(inner_product(head.dots[name], queries, passages), combined.dot.detach(), rtol=1e-10)
    merged = head(queries, passages, task)
    np.testing.assert_allclose(merged.logits.detach(), combined.logits.detach(), rtol=1e-10)
    for row, query in enumerate(queries):
        np.testing.assert_allclose(search_scores(head, query, passages, task), combined.logits[row].detach(), rtol=1e-6)


def test_two_heads_share_the_interaction_and_begin_alike():
    head = make()
    before = head(vectors(3, seed=2), vectors(5, seed=3), "symmetric")
    head.split_heads()
    after = head(vectors(3, seed=2), vectors(5, seed=3), "symmetric")
    np.testing.assert_allclose(after.logits.detach(), before.logits.detach(), rtol=1e-12)
    assert not any("dots" in name for name in head.residual_parameters())
    with pytest.raises(InputError, match=r"set student\.interaction\.head to 'dot'"):
        make(head="paper").split_heads()
