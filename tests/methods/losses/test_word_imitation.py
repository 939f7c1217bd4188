"""Imitating words (SPAR): BM25 of each pair of a batch as the target, by a formula of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from d2llm.methods.losses.word_imitation import WordImitation
from d2llm.store.bm25 import WordIndex
from d2llm.training.losses import LossInput, Preparation
from tiny_data import make_source

PASSAGES = {"a": "the cat sat", "b": "a dog ran to the cat", "c": "rain"}
QUERIES = {"q": "cat dog", "r": "rain"}


def test_the_target_is_the_distribution_of_bm25() -> None:
    source = make_source(PASSAGES, QUERIES, [])
    added: dict[str, Any] = {}
    preparation = SimpleNamespace(
        with_lists=[SimpleNamespace(source=source)], add_pair_input=lambda name, _, scores: added.update({name: scores})
    )
    loss = WordImitation(temperature=2.0)
    assert loss.prepare(cast("Preparation", preparation)) == {}
    scores = np.stack([added["word_imitation"](text, [*PASSAGES]) for text in QUERIES.values()])
    words = WordIndex.from_texts(PASSAGES.values())
    np.testing.assert_allclose(scores, [words.scores(words.query(text)) for text in QUERIES.values()], rtol=1e-6)
    logits = np.array([[0.5, 1.0, -1.0], [0.0, 2.0, 1.0]])
    target, predicted = (
        np.exp(values) / np.exp(values).sum(axis=1, keepdims=True) for values in (scores.astype(float) / 2, logits)
    )
    inputs = SimpleNamespace(
        pair_input=lambda name: torch.from_numpy(scores) if name == "word_imitation" else None,
        logits=torch.from_numpy(logits),
        candidates=torch.ones(2, 3, dtype=torch.bool),
    )
    found = loss(cast("LossInput", inputs))
    assert found is not None
    assert found.item() == pytest.approx((target * np.log(target / predicted)).sum(axis=1).mean(), rel=1e-5)
