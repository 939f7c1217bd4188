"""The benchmark of a reader of vectors: the sum of two scores, the times, and a row on tiny models."""

from __future__ import annotations

import math

import listwise_reader as benchmark
import numpy as np
import pytest

from d2llm.recipe import LoraConfig
from d2llm.training.tune_reader import RankedLists
from tiny_models import write_tiny_model

VECTOR_DIM = 6


def ranked_lists(number, *, relevant=3, depth=10):
    """Lists whose passages have falling scores; the one at the place ``relevant`` answers the query."""
    vectors = np.random.default_rng(0).normal(size=(number, depth, VECTOR_DIM)).astype(np.float32)
    ids = [[f"{row}-{index}" for index in range(depth)] for row in range(number)]
    scores = np.tile(-np.arange(depth, dtype=np.float64), (number, 1))
    grades = np.tile(np.eye(depth, dtype=np.int64)[relevant], (number, 1))
    lists = RankedLists([str(row) for row in range(number)], ["the cat"] * number, ids, vectors, scores, grades)
    return lists, {str(row): {ids[row][relevant]: 1} for row in range(number)}


def test_the_weight_of_a_half_is_chosen_on_the_other():
    lists, qrels = ranked_lists(8)
    helpful, useless = np.eye(10)[3], 5 * np.eye(10)[9]
    values, weights = benchmark.fitted_sum(lists, [helpful] * 8, qrels)
    assert weights[0] == weights[1] > 0
    assert values.tolist() == [1.0] * 8
    # It helps the first half alone, so it is used for the second, and not the other way round.
    values, weights = benchmark.fitted_sum(lists, [helpful, useless] * 4, qrels)
    assert weights[0] > 0
    assert weights[1] == 0
    assert values[::2] == pytest.approx([1 / math.log2(5)] * 4)
    assert (values[1::2] < 1 / math.log2(5)).all()


def test_rows_of_a_tiny_model(tmp_path):
    model = write_tiny_model(tmp_path / "llama")
    lists, qrels = ranked_lists(12)
    for row, stages in (("text", 1), ("deep+lora", 2)):
        config = benchmark.settings_of(row, (8, 8), 100, 100)
        layers = None if row.startswith("deep") else 1
        update = {"model": str(model), "layers": layers, "lora": LoraConfig(rank=2), "depth": 10}
        config = config.model_copy(update=update)
        reader, trained = benchmark.trained_reader(row, config, [lists], tmp_path)
        assert len(trained["loss"]) == stages
        assert reader.backbone.num_layers == (layers or 2)
        assert benchmark.milliseconds(reader, lists).keys() == {"one step", "decoded"}
        assert reader.steps == 10
        figures = benchmark.measure(reader, {"tiny": {"dev": lists}}, {"tiny": qrels})["tiny"]
        assert figures["student"] == pytest.approx(1 / math.log2(5), abs=1e-4)
        assert figures["queries"] == 12
    described = benchmark.describe({"train": lists, "dev": lists}, qrels)
    assert described["dev nDCG@10 of the best order"] == 1
    assert described["train lists with a relevant passage"] == 12
