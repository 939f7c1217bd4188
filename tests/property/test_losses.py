from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import formulas as losses
from examples import examples

NAMES = (
    "contrastive_imitation",
    "in_batch_cross_entropy",
    "list_imitation",
    "rank_imitation_positive_hard",
    "rank_imitation_hard_easy",
    "feature_imitation",
)
Batch = dict[str, Tensor]
batches = st.builds(
    lambda queries, passages, seed: make_batch(queries, passages, seed),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 2**32 - 1),
)


def make_batch(num_queries: int, num_passages: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_queries, num_passages)
    # Any two values differ by at least half a step: for almost equal logits the correlation is undefined.
    steps = [
        torch.rand(shape, generator=generator).argsort(dim=1) + torch.rand(shape, generator=generator).double() / 2
        for _ in range(2)
    ]
    features = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    unit = torch.nn.functional.normalize(features + 1, dim=2)
    return {
        "logits": steps[0] - 2,
        "teacher": steps[1] / num_passages,
        "roles": torch.randint(0, 4, shape, generator=generator),  # none, positive, hard, easy
        "features": features,
        "gram": unit @ unit.mT,
    }


def loss_of(name: str, batch: Batch) -> float:
    logits, teacher = batch["logits"], batch["teacher"]
    positive, hard, easy = (batch["roles"] == role for role in (1, 2, 3))
    if name == "contrastive_imitation":
        return losses.contrastive_imitation(logits, teacher, positive, hard | easy, temperature=0.8).item()
    if name == "in_batch_cross_entropy":
        return losses.in_batch_cross_entropy(logits, positive, positive | hard | easy).item()
    if name == "list_imitation":
        return losses.list_imitation(logits, teacher, positive | hard | easy).item()
    if name == "rank_imitation_positive_hard":
        return losses.rank_imitation_positive_hard(logits, teacher, positive | hard).item()
    if name == "rank_imitation_hard_easy":
        return losses.rank_imitation_hard_easy(logits, teacher, hard, easy).item()
    return losses.feature_imitation(batch["features"], batch["gram"], positive | hard).item()


def select_passages(batch: Batch, order: Tensor) -> Batch:
    """The batch with its passages picked by ``order``, along both axes of the Gram matrix too."""
    moved = {name: values.index_select(1, order) for name, values in batch.items()}
    return moved | {"gram": moved["gram"].index_select(2, order)}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(batch=batches, data=st.data())
def test_the_order_of_passages_does_not_matter(name: str, batch: Batch, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(batch["logits"].shape[1])))
    assert loss_of(name, select_passages(batch, torch.tensor(order))) == pytest.approx(
        loss_of(name, batch), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(batch=batches, data=st.data())
def test_the_order_of_queries_does_not_matter(name: str, batch: Batch, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(batch["logits"].shape[0]))))
    moved = {name: values.index_select(0, order) for name, values in batch.items()}
    assert loss_of(name, moved) == pytest.approx(loss_of(name, batch), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(batch=batches, data=st.data(), garbage=st.sampled_from([0.0, -7.5, float("nan"), float("inf")]))
def test_a_masked_passage_changes_nothing(name: str, batch: Batch, data: st.DataObject, garbage: float) -> None:
    num_passages = batch["logits"].shape[1]
    position = data.draw(st.integers(0, num_passages))
    longer = select_passages(batch, torch.tensor([*range(position), num_passages - 1, *range(position, num_passages)]))
    longer["roles"][:, position] = 0
    for key in ("logits", "teacher", "features", "gram"):
        longer[key][:, position] = garbage
    longer["gram"][:, :, position] = garbage
    assert loss_of(name, longer) == pytest.approx(loss_of(name, batch), rel=1e-9, abs=1e-12)


@settings(max_examples=examples(50))
@given(batch=batches, offset=st.floats(-100, 100), scale=st.floats(0.1, 10))
def test_correlation_ignores_offset_and_scale_of_logits_and_teacher(batch: Batch, offset: float, scale: float) -> None:
    expected = loss_of("rank_imitation_positive_hard", batch)
    for name in ("logits", "teacher"):
        moved = loss_of("rank_imitation_positive_hard", batch | {name: batch[name] * scale + offset})
        assert moved == pytest.approx(expected, rel=1e-8, abs=1e-9)


@settings(max_examples=examples(50))
@given(batch=batches, offset=st.floats(-100, 100))
def test_losses_of_differences_ignore_an_offset_of_the_logits(batch: Batch, offset: float) -> None:
    for name in ("in_batch_cross_entropy", "list_imitation", "rank_imitation_hard_easy"):
        moved = loss_of(name, batch | {"logits": batch["logits"] + offset})
        assert moved == pytest.approx(loss_of(name, batch), rel=1e-8, abs=1e-10)


@settings(max_examples=examples(50))
@given(batch=batches)
def test_losses_stay_within_their_ranges(batch: Batch) -> None:
    for name in NAMES:
        assert loss_of(name, batch) >= -1e-12
    assert loss_of("rank_imitation_positive_hard", batch) <= 2 + 1e-12
    assert loss_of("feature_imitation", batch) <= 4 + 1e-12


@settings(max_examples=25)
@given(batch=batches)
def test_a_student_equal_to_its_teacher_has_no_loss(batch: Batch) -> None:
    unit = torch.nn.functional.normalize(batch["features"], dim=2)
    assert loss_of("feature_imitation", batch | {"gram": unit @ unit.mT}) == pytest.approx(0.0, abs=1e-12)
    assert loss_of("rank_imitation_positive_hard", batch | {"logits": batch["teacher"]}) == pytest.approx(0.0, abs=1e-9)
