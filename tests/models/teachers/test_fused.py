"""Rankings fused by reciprocal ranks (Gecko), and query likelihood (UPR), by hand and by whole texts one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2llm.core.types import Task
from d2llm.models.teachers.ensemble import FusedTeacher
from d2llm.models.teachers.likelihood import LikelihoodTeacher
from d2llm.models.teachers.pair_teacher import (
    TeacherScores,
    identify_teacher,
    load_teacher,
    ranks_lists,
    recorded_teacher,
    scores_only_recorded,
)
from d2llm.recipe import FusedTeacherConfig, TeacherConfig
from tiny_models import TEXTS, write_tiny_model


class Known:
    """Says what it was told of each pair."""

    fingerprint = "known"

    def __init__(self, log_odds: dict[tuple[str, str], float]) -> None:
        self.log_odds = log_odds

    def prompt_fingerprint(self, task: Task) -> str:
        return task

    def score_pairs(self, pairs: Sequence[tuple[str, str]], task: Task, **_: Any) -> TeacherScores:
        return TeacherScores(np.array([self.log_odds[pair] for pair in pairs], np.float32), None, 0, 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=1, initializer_range=0.4)


def test_reciprocal_ranks_by_hand() -> None:
    pairs = [("q", "a"), ("r", "a"), ("q", "b"), ("q", "c"), ("r", "b")]
    one = Known({("q", "a"): -6.0, ("q", "b"): -5.0, ("q", "c"): -7.0, ("r", "a"): 90.0, ("r", "b"): 3.0})
    other = Known({("q", "a"): 8.0, ("q", "b"): 1.0, ("q", "c"): 1.0, ("r", "a"): 0.0, ("r", "b"): 0.5})
    fused = FusedTeacher([one, other]).score_pairs(pairs, "asymmetric").log_odds
    # ranks of q's: 2, 1, 3 and 1, 2.5, 2.5; of r's: 1, 2 and 2, 1
    expected = [1 / 2 + 1, 1 + 1 / 2, 1 + 1 / 2.5, 1 / 3 + 1 / 2.5, 1 / 2 + 1]
    assert fused.tolist() == pytest.approx([math.log(value) for value in expected])


def test_the_likelihood_is_the_mean_of_the_querys_tokens_after_the_passage(llama: Path) -> None:
    config = TeacherConfig.model_validate({"kind": "likelihood", "model": str(llama), "max_passage_tokens": 16})
    teacher = load_teacher(config, device="cpu", dtype="float32")
    assert isinstance(teacher, LikelihoodTeacher)
    pairs = [("the cat", TEXTS[0]), ("the cat", " ".join(TEXTS)), ("what is the cat?", "a dog"), ("the cat", " ")]
    scores = teacher.score_pairs(pairs, "asymmetric")
    assert scores.num_truncated == 1
    tokenizer, model = teacher.writer.tokenizer, teacher.writer.whole
    for index, (kind, passage) in {0: ("keywords", TEXTS[0]), 2: ("question", "a dog"), 3: ("keywords", "-")}.items():
        before = [1, *tokenizer(f"{passage}\n\n{kind}:", add_special_tokens=False)["input_ids"]]
        query = tokenizer(" " + pairs[index][0], add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([[*before, *query]])).logits[0].double().log_softmax(-1)
        values = [float(logits[len(before) + n - 1, token]) for n, token in enumerate(query)]
        assert float(scores.log_odds[index]) == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_a_recipe_names_both_and_records_one(llama: Path, tmp_path: Path) -> None:
    likelihood: dict[str, Any] = {"kind": "likelihood", "model": str(llama), "max_passage_tokens": 16}
    graded: dict[str, Any] = {"kind": "graded", "model": "large"}
    config = TeacherConfig.model_validate({"kind": "fused", "teachers": [likelihood, graded]})
    assert TeacherConfig.model_validate(config.model_dump(mode="json")) == config
    assert ranks_lists(config)
    assert not scores_only_recorded(config)
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"query": "the cat", "passages": ["a dog", "the cat sat"], "grades": [10, 90]}\n')
    recorded = recorded_teacher(config, lists)
    assert isinstance(recorded, FusedTeacherConfig)
    assert scores_only_recorded(recorded)
    teacher = load_teacher(recorded, device="cpu", dtype="float32")
    identity = identify_teacher(recorded)
    assert (teacher.fingerprint, teacher.prompt_fingerprint("symmetric")) == (
        identity.fingerprint,
        identity.prompts["symmetric"],
    )
    assert identity.fingerprint != identify_teacher(recorded.teachers[0]).fingerprint
    pairs = [("the cat", "a dog"), ("the cat", "the cat sat")]
    parts = [load_teacher(one, device="cpu", dtype="float32") for one in recorded.teachers]
    values = [part.score_pairs(pairs, "asymmetric").log_odds for part in parts]
    expected = [sum(1.0 if own[n] > own[1 - n] else 0.5 for own in values) for n in range(2)]
    assert teacher.score_pairs(pairs, "asymmetric").log_odds.tolist() == pytest.approx([*map(math.log, expected)])
