"""Measuring, with a tiny student and little data."""

from __future__ import annotations

import pytest

from d2llm.models.teachers.pair_teacher import load_teacher
from d2llm.sizing import measure
from d2llm.sizing.measure import made_up_passages, measure_speeds
from d2llm.sizing.plan import SizePlan
from d2llm.sizing.size import size, speeds_table
from d2llm.sizing.speeds import Speeds
from d2llm.store.index_spec import FORMATS
from sizing.sized_index import passages, token_student
from tiny_models import tiny_teacher_config, write_tiny_model


@pytest.fixture
def little(monkeypatch):
    """Less data than in a real measurement, so that a test takes seconds."""
    for name, value in {
        "_SCANNED_BYTES": 1 << 20,
        "_DISTINCT_VECTORS": 512,
        "_WORD_ROWS": 2_000,
        "_WRITTEN_PASSAGES": 300,
        "_TOKEN_ROWS": 200,
        "GRAPH_ROWS": 512,
        "_MIN_QUERIES": 5,
        "_GRAPH_QUERIES": 5,
        "_CANDIDATES": 50,
        "_TIMED_PAIRS": 4,
    }.items():
        monkeypatch.setattr(measure, name, value)


@pytest.mark.slow
def test_every_speed_is_measured_and_answers_a_plan(tmp_path, little):
    student = token_student(tmp_path)
    teacher = load_teacher(tiny_teacher_config(write_tiny_model(tmp_path / "teacher")), device="cpu", dtype="float32")
    speeds = measure_speeds(student, passages(300), teachers={"tiny": lambda: teacher}, seconds=0.01)
    assert set(speeds.scan_bytes) == set(speeds.products) == set(FORMATS)
    assert set(speeds.compared_tokens) == {"int4"}
    for name in Speeds.model_fields:
        assert getattr(speeds, name) is not None, name
    assert speeds.slow_ratio.value >= 1
    assert speeds.query_ms.source.startswith("measured on this machine, 20")
    plan = SizePlan(passages=1_000_000, qps=10, teacher="tiny", machine_memory=1 << 36, machine_cores=4)
    report = size(plan, student=student, speeds=speeds)
    assert report.unmeasured == []
    assert all(work.core_hours is not None and work.core_hours > 0 for work in report.work)
    assert Speeds.model_validate_json(speeds.model_dump_json()) == speeds
    shown = speeds_table(speeds).texts()
    assert len(shown) >= 13 + 2 * len(FORMATS)


def test_passages_are_made_up_of_the_students_words(tmp_path):
    made = made_up_passages(token_student(tmp_path), num_passages=50, words=40)
    assert len({passage.id for passage in made}) == 50
    assert all(len(passage.text.split()) == 40 and passage.text.count(".") == 2 for passage in made)
    counts = [passage.text.lower().count(made[0].text.split()[0].lower()) for passage in made]
    assert sum(counts) > 1
