"""Re-mining: hard negatives drawn again during training from the student's own ranking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.plan import PlanEntry, TrainingSource
from d2llm.models.student import Student
from d2llm.recipe import MiningConfig
from d2llm.recipe.data import Uniform
from d2llm.training.mining.mine import remine
from fake_models import FakeStudent
from tiny_data import make_plan, topics
from tiny_models import randomise, tiny_student_config, write_tiny_model

TOP = MiningConfig(num_hard=3, num_easy=0, range_max=24, sampling="top", near_duplicate=1)


def by_hand(source: TrainingSource, student: FakeStudent, entry: PlanEntry) -> list[str]:
    """All passages but the positives, ordered by the student's score."""
    ids = sorted(set(source.dataset.passages) - set(entry.positives))
    vectors = student.encode_passages([source.passage_text(passage_id) for passage_id in ids]).vectors
    [query] = student.encode_queries([source.query_text(entry.query_id)]).vectors
    scores = student.score(query, vectors, source.task)
    return [ids[row] for row in np.argsort(-scores, kind="stable")]


def store(tmp_path, source, odds_by_query):
    labels = LabelStore(tmp_path, teacher="t", prompt="p", dataset=source.dataset.name)
    labels.write(
        [QueryLabels(q, tuple(odds), np.array([*odds.values()], np.float32)) for q, odds in odds_by_query.items()]
    )
    return labels


def test_the_students_hardest_passages_become_negatives():
    source, student = topics(), FakeStudent()
    remined = remine(source, student, TOP, seed=0, epoch=1)
    num_new = 0
    for old, new in zip(source.plan.entries, remined.plan.entries, strict=True):
        assert (new.query_id, new.positives) == (old.query_id, old.positives)
        assert list(new.hard_negatives) == by_hand(source, student, old)[:3]
        assert new.easy_negatives == tuple(p for p in old.easy_negatives if p not in new.hard_negatives)
        num_new += len(set(new.hard_negatives) - set(old.hard_negatives))
    assert remined.plan.manifest["remined"] == {"seed": 0, "epoch": 1, "num_new": num_new}
    assert num_new > 0
    assert remined.plan.manifest["content_hash"] != source.plan.manifest["content_hash"]
    assert (remined.task, remined.dataset) == (source.task, source.dataset)


def test_the_draw_depends_only_on_seed_and_epoch():
    source, student = topics(), FakeStudent()
    config = TOP.model_copy(update={"sampling": Uniform()})
    entries = remine(source, student, config, seed=0, epoch=1).plan.entries
    assert entries == remine(source, student, config, seed=0, epoch=1).plan.entries
    assert entries != remine(source, student, config, seed=0, epoch=2).plan.entries
    assert entries != remine(source, student, config, seed=1, epoch=1).plan.entries
    # ... and not on the plan's other queries or on earlier draws
    fewer = TrainingSource(source.dataset, make_plan(reversed(source.plan.entries[:5])), source.task)
    assert remine(fewer, student, config, seed=0, epoch=1).plan.entries == entries[:5][::-1]


def test_only_labelled_limits_negatives_to_labelled_passages(tmp_path):
    source, student = topics(), FakeStudent()
    first, second, *_ = source.plan.entries
    others = [p for p in sorted(source.dataset.passages) if p not in first.positives]
    labels = store(
        tmp_path,
        source,
        {first.query_id: dict.fromkeys((*first.positives, *others[:5]), 1.0), second.query_id: {"p00": 0.0}},
    )
    entries = remine(source, student, TOP, seed=0, epoch=0, labels=labels, only_labelled=True).plan.entries
    expected = [p for p in by_hand(source, student, first) if p in others[:5]][:3]
    assert list(entries[0].hard_negatives) == expected
    assert labels.missing(first.query_id, entries[0].positives + entries[0].hard_negatives) == []
    # If too few are labelled, the plan's earlier negatives fill up: here they follow one labelled passage.
    own = [] if "p00" in second.positives else ["p00"]
    earlier = [p for p in second.hard_negatives if p not in own]
    assert list(entries[1].hard_negatives) == (own + earlier)[:3]
    unlabelled = entries[2]
    assert unlabelled.hard_negatives == source.plan.entries[2].hard_negatives[:3]


def test_the_teachers_margin_uses_stored_labels(tmp_path):
    source, student = topics(), FakeStudent()
    entry = source.plan.entries[0]
    hardest = by_hand(source, student, entry)
    labels = store(
        tmp_path, source, {entry.query_id: {**dict.fromkeys(entry.positives, 2.0), hardest[0]: 1.5, hardest[1]: 0.5}}
    )
    config = TOP.model_copy(update={"teacher_margin": 1.0})
    remined = remine(source, student, config, seed=0, epoch=0, labels=labels).plan.entries[0]
    assert list(remined.hard_negatives) == hardest[1:4]  # 1.5 > 2 - 1, 0.5 is not
    # A passage dropped now does not come back as one of the earlier negatives.
    plan = make_plan([replace(entry, hard_negatives=(hardest[0],), easy_negatives=())])
    config = config.model_copy(update={"num_hard": 24})
    narrow = TrainingSource(source.dataset, plan, source.task)
    remined = remine(narrow, student, config, seed=0, epoch=0, labels=labels).plan.entries[0]
    assert hardest[0] not in remined.hard_negatives
    for options in ({"only_labelled": True}, {}):
        with pytest.raises(InputError, match="needs the label store"):
            remine(source, student, config, seed=0, epoch=0, **options)


def test_remining_leaves_a_student_in_training_unchanged(tmp_path):
    model = write_tiny_model(tmp_path / "m", "modernbert", initializer_range=0.1)
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    student.prepare_training()
    student.train()
    randomise(student)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    source = topics()
    remined = remine(source, student, TOP, seed=0, epoch=0)
    assert student.training  # the mode is unchanged
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    entry = remined.plan.entries[0]
    assert len(entry.hard_negatives) == 3
    assert list(entry.hard_negatives) == by_hand(source, student, entry)[:3]
