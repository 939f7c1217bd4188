"""Where speeds are kept, and that those shipped are the benchmarks' results."""

from __future__ import annotations

import json

import pytest

from d2llm.models.hub import find_student
from d2llm.sizing import speeds as kept
from d2llm.sizing.search_time import shipped_ann_facts, shipped_maxscore_facts
from d2llm.sizing.speeds import TeacherSpeed, keep_speeds, read_speeds, shipped_speeds, speeds_path
from sizing.sized_index import made_up_speeds


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path


def test_speeds_are_kept_by_processor_student_and_threads(cache, monkeypatch):
    monkeypatch.setattr(kept, "processor_name", lambda: "A (R) CPU @ 2.0 GHz")
    speeds = made_up_speeds("one")
    path = keep_speeds(speeds)
    assert path == cache / "d2llm" / "speeds" / "A-R-CPU-2-0-GHz-one-1.json"
    assert read_speeds("one", 1) == speeds
    assert read_speeds("two", 1) is None
    assert read_speeds("one", 2) is None


def test_teachers_measured_before_are_kept(cache):
    keep_speeds(made_up_speeds("one"))
    other = TeacherSpeed(value=3, source="later", pair_tokens=50, passage_tokens=20)
    keep_speeds(made_up_speeds("one").model_copy(update={"teachers": {"other": other}}))
    again = read_speeds("one", 1)
    assert again is not None
    assert set(again.teachers) == {"smollm2", "other"}


@pytest.mark.parametrize("content", ["", "{", "{}", '{"machine": "m", "threads": 1, "student": "one", "query_ms": 3}'])
def test_damaged_speeds_are_reported_and_not_used(cache, content, caplog):
    path = speeds_path("one", 1)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert read_speeds("one", 1) is None
    assert f"{path} cannot be used" in caplog.text
    assert "d2llm size --measure" in caplog.text


def test_a_teachers_pairs_by_length():
    speed = TeacherSpeed(value=10, source="a test", pair_tokens=100, passage_tokens=40)
    assert speed.pairs(40) == 10
    assert speed.pairs(140) == 5


def test_shipped_speeds_are_those_of_the_default_student():
    fingerprint = json.loads((find_student("d2llm-minilm") / "manifest.json").read_text())["fingerprint"]
    own, others = shipped_speeds(fingerprint), shipped_speeds("another")
    assert own.query_ms is not None
    assert own.passage_tokens is not None
    assert others.query_ms is None
    assert others.passage_tokens is None
    assert others.scan_bytes == own.scan_bytes
    assert all(speed.source.startswith("`d2llm size --measure` on ") for speed in own.scan_bytes.values())
    assert None not in own.model_dump().values()


def test_shipped_figures_are_the_results_of_benchmarks(repository):
    """A few are worked out here from the files that they name; `benchmarks/size.py --ship` writes them all."""

    def result(name):
        return json.loads((repository / "benchmarks" / "results" / f"{name}.json").read_text())

    fingerprint = json.loads((find_student("d2llm-minilm") / "manifest.json").read_text())["fingerprint"]
    speeds, teacher = shipped_speeds(fingerprint), result("teacher")
    judged = teacher["rows"]["paper, bfloat16"]["judge_pairs_per_second"]
    assert speeds.teachers["smollm2"].value == pytest.approx(judged / teacher["threads"])
    of_index = next(one for one in result("size")["sizes"] if one["passages"] == 100_000)["predicted from"]["ann"]
    assert shipped_ann_facts().visited == of_index["visited"]


def test_shipped_fractions_of_postings_are_those_of_the_benchmark(repository):
    bm25 = json.loads((repository / "benchmarks" / "results" / "bm25.json").read_text())
    facts = shipped_maxscore_facts()
    for depth, fraction in bm25["of which are read"].items():
        assert facts.fraction(int(depth), bm25["passages"]) == pytest.approx(fraction)
