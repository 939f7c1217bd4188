"""Hard negatives drawn anew during training, from the student's own ranking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.core.recipe import MiningConfig
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.plan import PlanEntry
from d2llm.data.training import TrainingSource
from d2llm.models.student import Student
from d2llm.training.mining.remine import remine
from fake_models import FakeStudent
from tiny_data import make_plan, topics
from tiny_models import randomise, tiny_student_config, write_tiny_model

TOP = MiningConfig(num_hard=3, num_easy=0, range_max=24, sampling="top", near_duplicate=1)


def by_hand(source: TrainingSource, student: FakeStudent, entry: PlanEntry) -> list[str]:
    """All passages but the positives, by the student's score."""
    ids = sorted(set(source.dataset.passages) - set(entry.positives))
    vectors = student.encode_passages([source.passage_text(passage_id) for passage_id in ids]).vectors
    [query] = student.encode_queries([source.query_text(entry.query_id)]).vectors
    scores = student.score(query, vectors, source.task)
    return [ids[row] for row in np.argsort(-scores, kind="stable")]


def store(tmp_path, source, of_query):
    labels = LabelStore(tmp_path, teacher="t", prompt="p", dataset=source.dataset.name)
    labels.write([QueryLabels(q, tuple(odds), np.array([*odds.values()], np.float32)) for q, odds in of_query.items()])
    return labels


def test_the_hardest_by_the_student_are_drawn():
    source, student = topics(), FakeStudent()
    found = remine(source, student, TOP, seed=0, epoch=1)
    num_new = 0
    for old, new in zip(source.plan.entries, found.plan.entries, strict=True):
        assert (new.query_id, new.positives) == (old.query_id, old.positives)
        assert list(new.hard_negatives) == by_hand(source, student, old)[:3]
        assert new.easy_negatives == tuple(p for p in old.easy_negatives if p not in new.hard_negatives)
        num_new += len(set(new.hard_negatives) - set(old.hard_negatives))
    assert found.plan.manifest["remined"] == {"seed": 0, "epoch": 1, "num_new": num_new}
    assert num_new > 0
    assert found.plan.manifest["content_hash"] != source.plan.manifest["content_hash"]
    assert (found.task, found.dataset) == (source.task, source.dataset)


def test_the_draw_follows_seed_and_epoch_alone():
    source, student = topics(), FakeStudent()
    config = TOP.model_copy(update={"sampling": "uniform"})
    one = remine(source, student, config, seed=0, epoch=1).plan.entries
    assert one == remine(source, student, config, seed=0, epoch=1).plan.entries
    assert one != remine(source, student, config, seed=0, epoch=2).plan.entries
    assert one != remine(source, student, config, seed=1, epoch=1).plan.entries
    # ... not on which other queries the plan has, nor on what was drawn before
    fewer = TrainingSource(source.dataset, make_plan(reversed(source.plan.entries[:5])), source.task)
    assert remine(fewer, student, config, seed=0, epoch=1).plan.entries == one[:5][::-1]


def test_only_labelled_passages(tmp_path):
    source, student = topics(), FakeStudent()
    first, second, *_ = source.plan.entries
    others = [p for p in sorted(source.dataset.passages) if p not in first.positives]
    labels = store(
        tmp_path,
        source,
        {first.query_id: dict.fromkeys((*first.positives, *others[:5]), 1.0), second.query_id: {"p00": 0.0}},
    )
    found = remine(source, student, TOP, seed=0, epoch=0, labels=labels, only_labelled=True).plan.entries
    expected = [p for p in by_hand(source, student, first) if p in others[:5]][:3]
    assert list(found[0].hard_negatives) == expected
    assert labels.missing(first.query_id, found[0].positives + found[0].hard_negatives) == []
    # With too few, the earlier ones fill up: here one labelled passage, then those of the plan.
    own = [] if "p00" in second.positives else ["p00"]
    earlier = [p for p in second.hard_negatives if p not in own]
    assert list(found[1].hard_negatives) == (own + earlier)[:3]
    unlabelled = found[2]
    assert unlabelled.hard_negatives == source.plan.entries[2].hard_negatives[:3]


def test_the_teachers_margin_uses_stored_labels(tmp_path):
    source, student = topics(), FakeStudent()
    entry = source.plan.entries[0]
    hardest = by_hand(source, student, entry)
    labels = store(
        tmp_path, source, {entry.query_id: {**dict.fromkeys(entry.positives, 2.0), hardest[0]: 1.5, hardest[1]: 0.5}}
    )
    config = TOP.model_copy(update={"teacher_margin": 1.0})
    found = remine(source, student, config, seed=0, epoch=0, labels=labels).plan.entries[0]
    assert list(found.hard_negatives) == hardest[1:4]  # 1.5 > 2 - 1, 0.5 is not
    # A passage that is dropped now does not come back as one of the earlier.
    plan = make_plan([replace(entry, hard_negatives=(hardest[0],), easy_negatives=())])
    config = config.model_copy(update={"num_hard": 24})
    narrow = TrainingSource(source.dataset, plan, source.task)
    found = remine(narrow, student, config, seed=0, epoch=0, labels=labels).plan.entries[0]
    assert hardest[0] not in found.hard_negatives
    for options in ({"only_labelled": True}, {}):
        with pytest.raises(InputError, match="needs the label store"):
            remine(source, student, config, seed=0, epoch=0, **options)


def test_a_real_student_in_the_middle_of_training(tmp_path):
    model = write_tiny_model(tmp_path / "m", "modernbert", initializer_range=0.1)
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    student.prepare_training()
    student.train()
    randomise(student)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    source = topics()
    found = remine(source, student, TOP, seed=0, epoch=0)
    assert student.training  # as it was
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    entry = found.plan.entries[0]
    assert len(entry.hard_negatives) == 3
    assert list(entry.hard_negatives) == by_hand(source, student, entry)[:3]
