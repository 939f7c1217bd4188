"""Drawing a ranking from vectors: the loss and the orders by hand, decoding against reading everything at once."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
import torch
from listwise_reader import DEPTH, ListwiseReader, RankedList, drawing_loss, fitted_sum, target_of, training_lists

from d2llm.core.recipe import BackboneConfig
from d2llm.models.backbone import Backbone
from tiny_models import DIM, write_tiny_model

VECTOR_DIM = 6


def ranked_list(number, *, query="the cat", relevant=(), depth=DEPTH):
    random = np.random.default_rng(number)
    return RankedList(
        data_set="tiny",
        query_id=str(number),
        query=query,
        query_vector=random.normal(size=VECTOR_DIM).astype(np.float32),
        ids=tuple(f"{number}-{place}" for place in range(depth)),
        vectors=random.normal(size=(depth, VECTOR_DIM)).astype(np.float32),
        scores=-np.arange(depth, dtype=np.float64),
        anchors=np.zeros(depth),
        grades=np.array([int(place in relevant) for place in range(depth)]),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(params=[False, True], ids=["text", "text and vector"])
def reader(model, request):
    backbone = Backbone.load(BackboneConfig(model=str(model)), device="cpu", dtype="float32")
    return ListwiseReader(backbone, VECTOR_DIM, query_vector=request.param).eval()


def test_drawing_loss_by_hand():
    logits = torch.tensor([[[1.0, 2.0, 3.0], [0.5, 9.0, 0.0]]])
    first = -math.log(math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(3)))
    second = -math.log(1 / (math.exp(0.5) + 1))  # the second passage was drawn, so its 9 counts no more
    expected = (first + second / 2) / 1.5
    assert drawing_loss(logits, torch.tensor([[1, 2]])).item() == pytest.approx(expected, abs=1e-6)


def test_the_last_passage_is_drawn_with_certainty():
    logits = torch.tensor([[[5.0, 5.0], [-3.0, 3.0]]], requires_grad=True)
    loss = drawing_loss(logits, torch.tensor([[1, 0]]))
    assert loss.item() == pytest.approx(math.log(2) / 1.5, abs=1e-6)
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_the_target_has_relevant_passages_first_wherever_they_are_read():
    ranked = ranked_list(0, relevant=(7, 12))
    assert target_of(ranked) == [7, 12, 0, 1, 2, 3, 4, 5, 6, 8]
    order = [*range(DEPTH)][::-1]
    reversed_list = ranked.reordered(order)
    assert [reversed_list.ids[place] for place in target_of(reversed_list)] == [
        ranked.ids[place] for place in target_of(ranked)
    ]
    assert np.array_equal(reversed_list.vectors[0], ranked.vectors[-1])


def test_training_lists_have_something_to_learn_and_half_of_them_are_mixed():
    lists = [ranked_list(number, relevant=(number,) if number else ()) for number in range(5)]
    drawn = [*islice(training_lists(lists, 0), 8)]
    assert [sorted(each.query_id for each in part) for part in (drawn[:4], drawn[4:])] == [["1", "2", "3", "4"]] * 2
    in_order = [each.ids == lists[int(each.query_id)].ids for each in drawn]
    assert in_order == [False, True] * 4


def test_decoding_draws_what_reading_everything_at_once_draws(reader):
    lists = [ranked_list(number) for number in range(3)]
    first, orders = reader.decode(lists, 5)
    with torch.no_grad():
        logits = reader.step_logits(lists, orders)
    assert torch.allclose(first, logits[:, 0], atol=1e-4)
    for own, order in zip(logits, orders, strict=True):
        for step, chosen in enumerate(order):
            own[step, order[:step]] = -torch.inf
            assert own[step].argmax() == chosen
        assert len({*order}) == 5


def test_padding_changes_no_logit(reader):
    short, long = ranked_list(0, query="a dog"), ranked_list(1, query="bread is baked from flour, water and salt")
    orders = [[3, 1, 2], [0, 4, 5]]
    with torch.no_grad():
        together = reader.step_logits([short, long], orders)
        alone = [reader.step_logits([each], [order])[0] for each, order in zip((short, long), orders, strict=True)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)


def test_the_query_vector_is_read_where_there_is_one(reader):
    ranked = ranked_list(0)
    start, passages = reader.read(ranked)
    first, middle, last = reader.prompt(ranked.query)
    assert start.shape == (len(first) + len(middle) + len(last) + DEPTH + reader.query_vector, DIM)
    assert passages.shape == (DEPTH, DIM)


def test_the_weight_of_a_half_is_chosen_on_the_other():
    lists = [ranked_list(number, relevant=(3,), depth=10) for number in range(8)]
    qrels = {each.query_id: {each.ids[3]: 1} for each in lists}
    helpful, useless = np.eye(10)[3], 5 * np.eye(10)[9]
    values, weights = fitted_sum(lists, [helpful] * 8, qrels)
    assert weights[0] == weights[1] > 0
    assert values.tolist() == [1.0] * 8
    # It helps the first half alone, so it is used for the second, and not the other way round.
    values, weights = fitted_sum(lists, [helpful, useless] * 4, qrels)
    assert weights[0] > 0
    assert weights[1] == 0
    assert values[::2] == pytest.approx([1 / math.log2(5)] * 4)
    assert (values[1::2] < 1 / math.log2(5)).all()
