"""Training objective: the losses of ops applied to the masks of a batch, and scores assigned to the right texts."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import formulas as losses
from d2llm.core.errors import InputError
from d2llm.data.collation import DistillationBatch
from d2llm.models.interaction import PairScores
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig
from d2llm.recipe.losses import LOSSES, Objective
from d2llm.training.losses import weighted_sum
from tiny_data import make_source
from tiny_distill import losses_of, score_batch
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

NONE = -np.inf
ALL_WEIGHTS = Objective(
    {
        "contrastive_imitation": {"weight": 0.5, "temperature": 0.7},
        "list_imitation": 13.0,
        "recalibrated_imitation": 1.2,
        "weighted_imitation": 1.4,
        "score_regression": 0.2,
        "margin_mse": 0.3,
        "listmle": 0.4,
        "plackett_luce": 0.45,
        "ranknet": 0.6,
        "lambdarank": 0.8,
        "sinkhorn": 0.9,
        "in_batch_imitation": {"weight": 1.5, "teacher": "d2llm-minilm"},
        "word_imitation": 1.9,
        "rank_imitation_positive_hard": 2.0,
        "rank_imitation_hard_easy": 3.0,
        "feature_imitation": 5.0,
        "subclass_imitation": 1.7,
        "in_batch_cross_entropy": 7.0,
        "relabelled_cross_entropy": 6.0,
        "dot_cross_entropy": 11.0,
    }
)
POSITIVE = [[1, 0, 0, 0], [0, 0, 0, 1]]
HARD = [[0, 1, 1, 0], [0, 0, 1, 0]]
EASY = [[0, 0, 0, 1], [1, 0, 0, 0]]
LOG_ODDS = [[2.0, -1.0, 0.5, NONE], [-20.0, 9.0, -3.0, 1.0]]
LABELLED = [[1, 1, 1, 0], [0, 1, 1, 1]]  # the first passage of q1 has the data set's own judgement
LIVE = [[3.0, 1.0, 2.0, -1.0], [0.5, 4.0, -2.0, 2.5]]
OWN = [[0, 2, 1], [3, 2, -1]]
GRAM = [[[1, 0.3, 0.2], [0.3, 1, 0.6], [0.2, 0.6, 1]], [[1, -0.4, 0], [-0.4, 1, 0], [0, 0, 0]]]


@pytest.fixture
def batch() -> DistillationBatch:
    passages = {f"p{n}": text for n, text in enumerate(TEXTS[:4])}
    source = make_source(passages, {"q0": TEXTS[4], "q1": TEXTS[5]}, [])
    masks = (np.array(mask, bool) for mask in (POSITIVE, HARD, EASY))
    return DistillationBatch(
        source,
        ("q0", "q1"),
        tuple(passages),
        *masks,
        np.array(LOG_ODDS, np.float32),
        np.array(LABELLED, bool),
        np.array(OWN),
        np.array(GRAM, np.float32),
        pair_inputs={name: np.array(LIVE, np.float32) for name in ("in_batch_imitation", "word_imitation")},
    )


@pytest.fixture
def scores() -> PairScores:
    generator = torch.Generator().manual_seed(0)
    return PairScores(
        torch.randn(2, 4, generator=generator, requires_grad=True),
        torch.randn(2, 4, generator=generator, requires_grad=True),
        torch.randn(2, 4, 3, generator=generator, requires_grad=True),
    )


def by_hand(scores: PairScores) -> dict[str, torch.Tensor]:
    positive, hard, easy = (torch.tensor(mask, dtype=torch.bool) for mask in (POSITIVE, HARD, EASY))
    labelled = torch.tensor(LABELLED, dtype=torch.bool)
    log_odds = torch.tensor(LOG_ODDS)
    probabilities = 1 / (1 + torch.exp(-log_odds))  # 0 without a label
    features = torch.zeros(2, 3, 3)
    features[0] = scores.features[0, [0, 2, 1]]
    features[1, :2] = scores.features[1, [3, 2]]
    listed = torch.tensor([[True, True, True], [True, True, False]])
    assert scores.dot is not None
    change = scores.logits - scores.dot  # by the interaction; the mean over a query's passages is removed
    included = positive | hard | easy
    logits = scores.logits - (change * included).sum(1, keepdim=True) / included.sum(1, keepdim=True)
    return {
        "contrastive_imitation": losses.contrastive_imitation(
            logits, probabilities, positive, hard | easy, temperature=0.7
        ),
        "list_imitation": losses.list_imitation(logits, log_odds, positive | hard | easy),
        "recalibrated_imitation": losses.recalibrated_imitation(logits, log_odds, positive, included),
        "weighted_imitation": losses.weighted_imitation(logits, log_odds, positive, included),
        "score_regression": losses.score_regression(logits, log_odds, included & labelled),
        "margin_mse": losses.margin_mse(logits, log_odds, positive & labelled, (hard | easy) & labelled),
        "listmle": losses.listmle(logits, log_odds, included),
        "plackett_luce": losses.plackett_luce(logits, log_odds, positive, included),
        "ranknet": losses.ranknet(logits, log_odds, included),
        "lambdarank": losses.lambdarank(logits, probabilities, included),
        "sinkhorn": losses.sinkhorn(logits, log_odds, included, temperature=2.0),
        "in_batch_imitation": losses.list_imitation(logits, torch.tensor(LIVE), included),
        "word_imitation": losses.list_imitation(logits, torch.tensor(LIVE), included),
        "rank_imitation_positive_hard": losses.rank_imitation_positive_hard(logits, log_odds, positive | hard),
        "rank_imitation_hard_easy": losses.rank_imitation_hard_easy(logits, probabilities, hard, easy),
        "feature_imitation": losses.feature_imitation(features, torch.tensor(GRAM), listed),
        "subclass_imitation": losses.subclass_imitation(
            features,
            torch.tensor(GRAM),
            torch.stack([probabilities[0, [0, 2, 1]], probabilities[1, [3, 2, 0]]]),
            listed,
        ),
        "in_batch_cross_entropy": losses.in_batch_cross_entropy(logits, positive, positive | hard | easy),
        "relabelled_cross_entropy": losses.in_batch_cross_entropy(logits, positive, positive | hard | easy),
        "dot_cross_entropy": losses.in_batch_cross_entropy(scores.dot, positive, positive | hard | easy),
    }


def test_each_loss_is_that_of_ops_on_the_batch_masks(scores: PairScores, batch: DistillationBatch) -> None:
    actual, expected = losses_of(scores, batch, ALL_WEIGHTS), by_hand(scores)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.item() != 0.0
        torch.testing.assert_close(actual[name], value, msg=name)


def test_the_authors_normalisation(scores: PairScores, batch: DistillationBatch) -> None:
    """In-batch cross-entropy by the batch once more, CI over and by the hard negatives, FI summed over queries."""
    authors = {"normalisation": "authors"}
    weights = ALL_WEIGHTS.with_losses(dict.fromkeys(NORMALISED, authors))
    ours, theirs = (losses_of(scores, batch, each) for each in (ALL_WEIGHTS, weights))
    num_queries = len(batch.query_ids)
    hard, positive = torch.from_numpy(batch.hard), torch.from_numpy(batch.positive)
    alone = losses.contrastive_imitation(
        scores.logits
        - (scores.logits - scores.dot).mul(hard | positive | torch.from_numpy(batch.easy)).sum(1)[:, None]
        / (hard | positive | torch.from_numpy(batch.easy)).sum(1)[:, None],
        torch.sigmoid(torch.from_numpy(batch.teacher_log_odds)),
        positive,
        hard,
        temperature=0.7,
    )
    per_query = hard.sum() / hard.any(dim=1).sum()
    assert theirs["contrastive_imitation"].item() == pytest.approx((alone / per_query).item(), rel=1e-5)
    assert theirs["in_batch_cross_entropy"].item() == pytest.approx(ours["in_batch_cross_entropy"].item() / num_queries)
    assert theirs["feature_imitation"].item() == pytest.approx(ours["feature_imitation"].item() * num_queries)
    same = set(ours) - {*NORMALISED}
    assert all(ours[name] == theirs[name] for name in same)


def test_the_authors_feature_imitation_sums_over_the_queries_with_features(scores, batch):
    columns = batch.gram_columns.copy()
    columns[1] = -1  # the store has no cosines of the second query
    first = replace(batch, gram_columns=columns)
    ours, theirs = (
        losses_of(scores, first, ALL_WEIGHTS.with_losses({"feature_imitation": {"normalisation": name}}))[
            "feature_imitation"
        ]
        for name in ("mean", "authors")
    )
    assert theirs.item() == pytest.approx(ours.item())  # a sum of one


def test_the_total_is_the_weighted_sum(scores: PairScores, batch: DistillationBatch) -> None:
    terms = losses_of(scores, batch, ALL_WEIGHTS)
    parts = {name: value.item() for name, value in terms.items()}
    total = weighted_sum(terms, ALL_WEIGHTS.root).item()
    assert total == pytest.approx(
        0.5 * parts["contrastive_imitation"]
        + 13 * parts["list_imitation"]
        + 1.2 * parts["recalibrated_imitation"]
        + 1.4 * parts["weighted_imitation"]
        + 0.2 * parts["score_regression"]
        + 0.3 * parts["margin_mse"]
        + 0.4 * parts["listmle"]
        + 0.45 * parts["plackett_luce"]
        + 0.6 * parts["ranknet"]
        + 0.8 * parts["lambdarank"]
        + 0.9 * parts["sinkhorn"]
        + 1.5 * parts["in_batch_imitation"]
        + 1.9 * parts["word_imitation"]
        + 2 * parts["rank_imitation_positive_hard"]
        + 3 * parts["rank_imitation_hard_easy"]
        + 5 * parts["feature_imitation"]
        + 1.7 * parts["subclass_imitation"]
        + 7 * parts["in_batch_cross_entropy"]
        + 6 * parts["relabelled_cross_entropy"]
        + 11 * parts["dot_cross_entropy"],
        rel=1e-5,
    )


OF_VECTORS = {
    "angular_margin",
    "flops",
    "mixed_negatives",
    "passage_contrast",
    "token_cross_entropy",
    "nested_cross_entropy",
    "soft_expansion",
}
LOSS_NAMES = [kind for kind in LOSSES.shipped if kind not in OF_VECTORS | {"pair_cross_entropy"}]
NORMALISED = ("contrastive_imitation", "in_batch_cross_entropy", "feature_imitation")


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_weight_of_0_leaves_the_loss_out(scores: PairScores, batch: DistillationBatch, name: str) -> None:
    terms = losses_of(scores, batch, ALL_WEIGHTS.with_losses({name: 0.0}))
    assert set(terms) == set(LOSS_NAMES) - {name}


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_every_loss_has_a_gradient_of_its_own(scores: PairScores, batch: DistillationBatch, name: str) -> None:
    alone = ALL_WEIGHTS.with_losses(dict.fromkeys(LOSS_NAMES, 0.0) | {name: ALL_WEIGHTS.root[name]})
    terms = losses_of(scores, batch, alone)
    assert set(terms) == {name}
    weighted_sum(terms, alone.root).backward()
    reached = {part: getattr(scores, part).grad is not None for part in ("logits", "dot", "features")}
    # Losses on the logits reach the inner product too: the change by the interaction is the logit less the inner
    # product.
    of_features = {key: {"features"} for key in ("feature_imitation", "subclass_imitation")}
    expected = (of_features | {"dot_cross_entropy": {"dot"}}).get(name, {"logits", "dot"})
    assert reached == {part: part in expected for part in reached}
    # A passage outside all masks gets no gradient: p1 has no role for q1.
    for part in expected - {"features"}:
        assert float(getattr(scores, part).grad[1, 1]) == 0.0


def test_a_constant_added_by_the_interaction_changes_no_loss(scores: PairScores, batch: DistillationBatch) -> None:
    shift = torch.tensor([[3.0], [-5.0]], requires_grad=True)
    shifted = PairScores(scores.logits + shift, scores.dot, scores.features)
    before, after = (losses_of(pair_scores, batch, ALL_WEIGHTS) for pair_scores in (scores, shifted))
    for name, value in before.items():
        assert after[name].item() == pytest.approx(value.item(), abs=1e-5), name
    weighted_sum(after, ALL_WEIGHTS.root).backward()
    assert shift.grad is not None
    assert shift.grad.abs().max().item() < 1e-5  # so nothing drives the interaction to its bound


def test_words_are_part_of_the_score_and_not_of_the_interaction(scores: PairScores, batch: DistillationBatch) -> None:
    words = np.array([[0.5, 2.0, 0.0, 1.0], [3.0, 0.0, 0.25, 0.0]], np.float32)
    assert scores.dot is not None
    with_words = PairScores(
        scores.logits + torch.from_numpy(words), scores.dot + torch.from_numpy(words), scores.features
    )
    expected = by_hand(with_words) | {"dot_cross_entropy": by_hand(scores)["dot_cross_entropy"]}
    for name, value in losses_of(scores, replace(batch, word_scores=words), ALL_WEIGHTS).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    paper = losses_of(PairScores(scores.logits, None, None), replace(batch, word_scores=words), ALL_WEIGHTS)
    masks = [torch.tensor(mask, dtype=torch.bool) for mask in (POSITIVE, HARD, EASY)]
    in_batch = losses.in_batch_cross_entropy(with_words.logits, masks[0], masks[0] | masks[1] | masks[2])
    torch.testing.assert_close(paper["in_batch_cross_entropy"], in_batch)


def test_tokens_are_part_of_the_score_and_have_a_loss_of_their_own(scores, batch):
    cosines = torch.tensor([[0.5, 0.2, 0.0, 0.9], [-1.0, 0.1, 0.25, 0.0]], requires_grad=True)
    assert scores.dot is not None
    in_all = PairScores(scores.logits + 8 * cosines, scores.dot + 8 * cosines, scores.features)
    positive, hard, easy = (torch.tensor(mask, dtype=torch.bool) for mask in (POSITIVE, HARD, EASY))
    expected = by_hand(in_all) | {
        "dot_cross_entropy": by_hand(scores)["dot_cross_entropy"],
        "token_cross_entropy": losses.in_batch_cross_entropy(8 * cosines, positive, positive | hard | easy),
    }
    weights = ALL_WEIGHTS.with_losses({"token_cross_entropy": 2.5})
    actual = losses_of(replace(scores, tokens=cosines), replace(batch, token_weight=8.0), weights)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    weighted_sum(actual, weights.root).backward()
    assert cosines.grad is not None
    assert cosines.grad.abs().max().item() > 0


def test_a_head_without_inner_product_has_no_inner_product_loss(scores: PairScores, batch: DistillationBatch) -> None:
    paper = PairScores(scores.logits, None, scores.features)
    assert set(losses_of(paper, batch, ALL_WEIGHTS)) == set(LOSS_NAMES) - {"dot_cross_entropy"}


def test_weights_that_leave_no_loss_are_rejected(scores: PairScores, batch: DistillationBatch) -> None:
    weights = Objective({"dot_cross_entropy": 1.0})
    terms = losses_of(PairScores(scores.logits, None, scores.features), batch, weights)
    with pytest.raises(InputError, match="no loss has a weight above 0"):
        weighted_sum(terms, weights.root)


# --- labelled pairs ---------------------------------------------------------------------------------------------------

TARGETS = [[1.0, 0.0, np.nan, np.nan], [np.nan, np.nan, 0.5, np.nan]]
JUDGED = [(0, 0), (0, 1), (1, 2)]


def pair_batch(batch: DistillationBatch) -> DistillationBatch:
    return replace(batch, targets=np.array(TARGETS, np.float32))


def cross_entropy_by_hand(logits: torch.Tensor, offset: float, fraction: float) -> float:
    values: list[float] = []
    for row, column in JUDGED:
        teacher = 1 / (1 + math.exp(-LOG_ODDS[row][column]))
        target = (1 - fraction) * TARGETS[row][column] + fraction * teacher
        yes = 1 / (1 + math.exp(offset - logits[row, column].item()))
        values.append(-target * math.log(yes) - (1 - target) * math.log(1 - yes))
    return sum(values) / len(values)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_labelled_pairs_use_pointwise_cross_entropy(scores, batch, fraction: float):
    weights = ALL_WEIGHTS.with_losses({"pair_cross_entropy": {"teacher_weight": fraction}})
    terms = losses_of(scores, pair_batch(batch), weights, offset=torch.tensor(0.5))
    assert set(terms) == {"pair_cross_entropy"}
    assert scores.dot is not None
    whole, dot = (cross_entropy_by_hand(logits, 0.5, fraction) for logits in (scores.logits, scores.dot))
    assert terms["pair_cross_entropy"].item() == pytest.approx(whole + 0.5 * dot, rel=1e-5)


def test_unlabelled_pairs_get_no_gradient(scores: PairScores, batch: DistillationBatch) -> None:
    offset = torch.tensor(0.5, requires_grad=True)
    weights = ALL_WEIGHTS.with_losses({"pair_cross_entropy": {"dot": 0.0}})
    weighted_sum(losses_of(scores, pair_batch(batch), weights, offset=offset), weights.root).backward()
    gradient = scores.logits.grad
    assert gradient is not None
    assert {(row, column) for row, column in gradient.nonzero().tolist()} == set(JUDGED)
    assert offset.grad is not None
    assert offset.grad.item() == pytest.approx(-gradient.sum().item(), rel=1e-5)


def test_pairs_without_an_inner_product_have_no_inner_product_loss(scores, batch):
    terms = losses_of(
        PairScores(scores.logits, None, None), pair_batch(batch), ALL_WEIGHTS.with_losses({"pair_cross_entropy": 1.0})
    )
    whole = cross_entropy_by_hand(scores.logits, 0.0, 0.0)
    assert terms["pair_cross_entropy"].item() == pytest.approx(whole, rel=1e-5)


# --- two heads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_heads(scores: PairScores) -> PairScores:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(2, 2, 4, generator=generator)
    return replace(scores, teacher=PairScores(teacher[0], teacher[1], scores.features))


def test_one_head_learns_judgements_and_the_other_imitates(two_heads: PairScores, batch: DistillationBatch) -> None:
    assert two_heads.teacher is not None
    actual = losses_of(two_heads, batch, ALL_WEIGHTS)
    labels, teacher = by_hand(two_heads), by_hand(two_heads.teacher)
    assert actual.keys() == labels.keys()
    for name, value in actual.items():
        of_labels = name in ("word_imitation",) or name.endswith("cross_entropy")
        torch.testing.assert_close(value, (labels if of_labels else teacher)[name], msg=name)
        if name not in ("feature_imitation", "subclass_imitation"):  # of the features that both heads share
            assert abs(labels[name].item() - teacher[name].item()) > 1e-6, name


def test_words_are_part_of_the_scores_of_both_heads(two_heads: PairScores, batch: DistillationBatch) -> None:
    words = np.array([[0.5, 2.0, 0.0, 1.0], [3.0, 0.0, 0.25, 0.0]], np.float32)
    assert two_heads.teacher is not None
    assert two_heads.teacher.dot is not None
    added = torch.from_numpy(words)
    teacher = PairScores(two_heads.teacher.logits + added, two_heads.teacher.dot + added, two_heads.features)
    actual = losses_of(two_heads, replace(batch, word_scores=words), ALL_WEIGHTS)
    torch.testing.assert_close(actual["list_imitation"], by_hand(teacher)["list_imitation"])


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_pairs_divide_their_target_between_the_heads(two_heads, batch, fraction: float):
    weights = ALL_WEIGHTS.with_losses({"pair_cross_entropy": {"teacher_weight": fraction}})
    terms = losses_of(two_heads, pair_batch(batch), weights, offset=torch.tensor(0.5))
    expected = 0.0
    for weight, part in (1.0, "logits"), (0.5, "dot"):
        own, teacher = getattr(two_heads, part), getattr(two_heads.teacher, part)
        expected += weight * (1 - fraction) * cross_entropy_by_hand(own, 0.5, 0.0)
        expected += weight * fraction * cross_entropy_by_hand(teacher, 0.5, 1.0)
    assert terms["pair_cross_entropy"].item() == pytest.approx(expected, rel=1e-5)


# --- scores of a batch ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def student(model: Path) -> Student:
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    return student


@pytest.fixture
def long_batch() -> DistillationBatch:
    """Texts of 1 to 8 words in random order, so that batching by length has to be undone."""
    rng = random.Random(0)
    words = " ".join(TEXTS).split()
    passages = {f"p{n:02}": " ".join(rng.sample(words, rng.randint(1, 8))) for n in range(17)}
    queries = {f"q{n}": " ".join(rng.sample(words, rng.randint(1, 8))) for n in range(5)}
    shape = (5, 17)
    empty = [np.zeros(shape, bool)] * 3
    return DistillationBatch(
        make_source(passages, queries, [], task="symmetric"),
        tuple(queries),
        tuple(passages),
        *empty,
        np.zeros(shape, np.float32),
        np.zeros(shape, bool),
        np.full((5, 1), -1),
        np.zeros((5, 1, 1), np.float32),
    )


def test_scores_match_texts_encoded_one_by_one(student: Student, long_batch: DistillationBatch) -> None:
    scores = score_batch(student, long_batch)
    texts = [long_batch.source.passage_text(passage_id) for passage_id in long_batch.passage_ids]
    passages = np.concatenate([student.encode_passages([text]).vectors for text in texts])
    for row, query_id in enumerate(long_batch.query_ids):
        query = student.encode_queries([long_batch.source.query_text(query_id)]).vectors
        one_by_one = student.score(query[0], passages, "symmetric")
        np.testing.assert_allclose(scores.logits[row].detach().numpy(), one_by_one, rtol=1e-4, atol=1e-4)
        dot = (student.query_vectors(query, "symmetric") @ passages.T)[0]
        assert scores.dot is not None
        np.testing.assert_allclose(scores.dot[row].detach().numpy(), dot, rtol=1e-4, atol=1e-4)
    spread = float(scores.logits.detach().std())
    assert spread > 0.1  # the scores differ, so a wrong order would show


def test_gradients_reach_adapters_pooling_and_interaction(student: Student, long_batch: DistillationBatch) -> None:
    score_batch(student, long_batch).logits.sum().backward()
    without_gradient = {name for name, p in student.named_parameters() if p.requires_grad and p.grad is None}
    # only the branch of the other task
    assert without_gradient
    assert all("asymmetric" in name for name in without_gradient)


def test_a_paper_head_scores_a_batch_too(model: Path, long_batch: DistillationBatch) -> None:
    interaction = InteractionConfig(head="paper", features="concat", hidden_dim=16, feature_dim=8)
    config = tiny_student_config(model).model_copy(update={"interaction": interaction})
    scores = score_batch(Student.create(config, device="cpu", dtype="float32"), long_batch)
    assert scores.dot is None
    assert scores.logits.shape == (5, 17)
    assert scores.features.shape == (5, 17, 8)


def test_the_data_set_s_own_judgements_are_no_scores_to_regress(scores: PairScores, batch: DistillationBatch) -> None:
    """They stand for certainty, and their size means nothing."""
    weights = Objective({"score_regression": 1.0, "margin_mse": 1.0, "dot_cross_entropy": 1.0})
    other = replace(batch, teacher_log_odds=np.where(batch.labelled, batch.teacher_log_odds, np.float32(99.0)))
    before, after = (losses_of(scores, each, weights) for each in (batch, other))
    assert {name: value.item() for name, value in before.items()} == {
        name: value.item() for name, value in after.items()
    }
    unlabelled = replace(batch, labelled=np.zeros_like(batch.labelled))
    values = losses_of(scores, unlabelled, weights)
    assert values["score_regression"].item() == values["margin_mse"].item() == 0.0


def test_a_batch_without_scores_of_the_live_teacher_has_no_such_loss(scores, batch):
    assert set(losses_of(scores, replace(batch, pair_inputs={}), ALL_WEIGHTS)) == {*LOSS_NAMES} - {
        "in_batch_imitation",
        "word_imitation",
    }
