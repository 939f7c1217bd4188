"""Advice after a distillation that learnt nothing."""

from __future__ import annotations

import pytest

from d2llm.recipe import TrainingConfig
from d2llm.training.distill import DistillReport
from d2llm.training.sentences import untrained_advice


@pytest.mark.parametrize(
    ("start", "last", "advice"),
    [
        (1.0, 1.0, "The start leaves nothing to gain on dev: use harder dev questions"),
        (1.0, 0.9, "The start leaves nothing to gain on dev: use harder dev questions"),
        (0.7, 0.7, "It hardly moved in 40 steps: raise training.learning_rate"),
        (0.7, 0.6, "Training made it worse: lower training.learning_rate"),
    ],
)
def test_advice_fits_what_dev_shows(start: float, last: float, advice: str) -> None:
    dev = {"tea": {"start": start, "last": last, "num_items": 200}}
    report = DistillReport("student", "f", 40, 0, False, 60, 0, {}, 0.0, True, dev)
    assert f"). {advice}" in untrained_advice(report, TrainingConfig())
