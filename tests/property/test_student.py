"""A vector or a score depends only on its own texts, not on what is computed alongside."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.types import TASKS
from d2llm.models.student import Student
from examples import examples
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

TOLERANCE = 2e-5  # for vectors of norm near sqrt(32) and scores near 20
WORDS = sorted({word for text in TEXTS for word in text.split()})
texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join), min_size=1, max_size=6)
architectures = pytest.mark.parametrize("architecture", ["llama", "gemma2", "bert", "xlm_roberta", "modernbert"])


@cache
def student(architecture: str) -> Student:
    with TemporaryDirectory() as folder:
        write_tiny_model(Path(folder), architecture)
        created = Student.create(tiny_student_config(folder), device="cpu", dtype="float32")
    randomise(created, scale=0.1)
    with torch.no_grad():
        created.pooling.gate.fill_(0.5)
    return created


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=10 * TOLERANCE)


@architectures
@settings(max_examples=15)
@given(batch=texts, order=st.randoms(use_true_random=False))
def test_neither_batch_nor_order_changes_a_vector(architecture, batch, order):
    model = student(architecture)
    together = model.encode_passages(batch).vectors
    assert_close(np.concatenate([model.encode_passages([text]).vectors for text in batch]), together)
    positions = list(range(len(batch)))
    order.shuffle(positions)
    assert_close(model.encode_passages([batch[position] for position in positions]).vectors, together[positions])


@architectures
@settings(max_examples=15)
@given(batch=texts, extra=st.integers(0, 9))
def test_neither_side_nor_width_of_the_padding_changes_a_vector(architecture, batch, extra):
    model = student(architecture)
    rows = model.tokenize(batch, "passage").ids
    width, padding = max(map(len, rows)) + extra, model.backbone.tokenizer.pad_token_id

    def padded(fill, *, on_the_left):
        sides = [([fill] * (width - len(row)), row) for row in rows]
        return torch.tensor([gap + row if on_the_left else row + gap for gap, row in sides])

    with torch.inference_mode():
        expected = model(*model.backbone.pad(rows))
        for on_the_left in (True, False):
            ids, mask = padded(padding, on_the_left=on_the_left), padded(-1, on_the_left=on_the_left) >= 0
            assert_close(model(ids, mask).numpy(), expected.numpy())


@settings(max_examples=examples(30))
@given(
    num_passages=st.integers(1, 12),
    num_added=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    task=st.sampled_from(TASKS),
)
def test_adding_a_passage_never_changes_anothers_score(num_passages, num_added, seed, task):
    model = student("llama")
    generator = np.random.default_rng(seed)
    query = generator.standard_normal(model.vector_dim).astype(np.float32)
    passages = generator.standard_normal((num_passages + num_added, model.vector_dim)).astype(np.float32)
    fewer, more = (model.score(query, passages[:n], task) for n in (num_passages, num_passages + num_added))
    assert_close(more[:num_passages], fewer)
    order = generator.permutation(len(passages))
    assert_close(model.score(query, passages[order], task), more[order])


@settings(max_examples=20)
@given(batch=texts, task=st.sampled_from(TASKS))
def test_the_score_is_the_inner_product_within_the_bound(batch, task):
    model = student("llama")
    queries, passages = model.encode_queries(batch).vectors, model.encode_passages(batch).vectors
    dots = model.query_vectors(queries, task) @ passages.T
    scores = np.stack([model.score(query, passages, task) for query in queries])
    bound = model.interaction.bound(task).item()
    assert (np.abs(scores - dots) <= bound + 1e-3).all()
