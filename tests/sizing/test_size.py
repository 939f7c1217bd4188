"""The whole answer: shards, machines, hours and costs, for a tiny student and made-up speeds."""

from __future__ import annotations

import pytest

from d2llm.core.errors import InputError
from d2llm.sizing import size as sizing
from d2llm.sizing.plan import SizePlan
from d2llm.sizing.search_time import total_ms
from d2llm.sizing.size import MAX_LOAD, MONTH_HOURS, size, size_tables
from d2llm.sizing.texts import shipped_text_facts
from sizing.sized_index import made_up_speeds, token_student

GIB = 1 << 30
PLAN = SizePlan(passages=1_000_000, tokens=100, machine_memory=64 * GIB, machine_cores=16)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return token_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def answer(student):
    """Sizes a plan with some changes."""
    speeds = made_up_speeds(student.fingerprint)
    return lambda **changes: size(PLAN.replace(**changes), student=student, speeds=speeds, texts=shipped_text_facts())


def texts_of(report) -> str:
    return "\n".join(cell for table in size_tables(report) for row in table.texts() for cell in row)


def test_sums_and_sources(answer):
    report = answer()
    assert report.disk_bytes == sum(part.disk for part in report.parts)
    assert report.memory_bytes == sum(part.memory for part in report.parts)
    assert report.p50_ms == pytest.approx(total_ms(report.stages))
    assert report.p99_ms == pytest.approx(2 * report.p50_ms)
    assert report.core_ms == pytest.approx(report.p50_ms)
    assert (report.num_shards, report.machines, report.costs, report.remarks) == (1, None, [], [])
    assert report.measured
    for figures in (report.parts, report.stages, report.work):
        assert all(figure.basis for figure in figures)
    assert "4,000 passages of squad-sent" in texts_of(report)


def test_more_of_anything_never_takes_less(answer):
    """Bytes and times grow with passages, tokens and candidates; machines with the queries."""
    for name, values in {
        "passages": (1_000, 30_000, 1_000_000, 50_000_000),
        "tokens": (20, 100, 400),
        "num_candidates": (10, 1_000, 5_000),
    }.items():
        reports = [answer(**{name: value}) for value in values]
        for figure in ("disk_bytes", "memory_bytes", "core_ms"):
            figures = [getattr(report, figure) for report in reports]
            assert figures == sorted(figures), (name, figure)
    loads = [answer(qps=qps).machines for qps in (1, 50, 500, 5_000)]
    assert [load.cores for load in loads] == sorted(load.cores for load in loads)
    assert all(load.load <= MAX_LOAD for load in loads)


def test_machines_hold_the_load_and_queries_wait(answer):
    alone, report = answer(), answer(qps=100.0)
    busy = 100 * alone.core_ms / 1e3
    assert report.machines.cores == -(-busy // MAX_LOAD)
    assert report.machines.replicas == max(1, -(-report.machines.cores // 16))
    assert report.machines.load == pytest.approx(busy / (16 * report.machines.num))
    assert report.p50_ms >= alone.p50_ms
    assert report.p99_ms >= alone.p99_ms


def test_an_index_that_does_not_fit_is_sharded(answer):
    whole, report = answer(passages=5_000_000), answer(passages=5_000_000, machine_memory=4 * GIB)
    room = 0.9 * 4 * GIB
    assert report.num_shards > 1
    assert report.shard_passages == -(-5_000_000 // report.num_shards)
    assert report.memory_bytes <= report.num_shards * room
    assert report.num_machines == report.num_shards
    index_bytes = report.memory_bytes - report.parts[-1].memory
    assert index_bytes > (report.num_shards - 1) * (room - GIB / 2) * 0.99  # one shard fewer would not do
    assert report.core_ms > whole.core_ms  # each shard has its own candidates
    assert any(
        f"(4.0 GiB, 90% of it used): {report.num_shards:,} shards do, on {report.num_machines:,}" in each
        for each in report.remarks
    )
    assert f"{report.num_shards:,} shards" in next(iter(size_tables(report))).title


def test_more_shards_than_memory_needs_answer_sooner(answer):
    few, many = answer(passages=50_000_000, qps=10.0), answer(passages=50_000_000, qps=10.0, shards=64)
    assert few.num_shards < 64 == many.num_shards
    assert many.p50_ms < few.p50_ms
    assert many.machines.replicas == 1  # spread before they are copied
    assert many.machines.shards_each == -(-64 // many.num_machines)
    assert many.machines.num == many.num_machines


def test_a_machine_searches_no_more_shards_at_once_than_it_has_cores(answer):
    some = answer(passages=50_000_000, shards=64, machine_memory=1 << 40, machine_cores=64)
    fewer = answer(passages=50_000_000, shards=64, machine_memory=1 << 40, machine_cores=32)
    assert some.num_machines == fewer.num_machines == 1
    once_ms = total_ms(stage for stage in some.stages if not stage.per_shard)
    assert once_ms == pytest.approx(10 + 2)  # the query, and the texts of the results
    assert fewer.p50_ms - once_ms == pytest.approx(2 * (some.p50_ms - once_ms))


def test_machines_too_small_for_the_student(answer):
    with pytest.raises(InputError, match=r"a process with the student alone takes 0\.5; give larger machines"):
        answer(machine_memory=GIB // 2)


def test_recall_decides_between_scan_and_approximate_index(answer):
    approximate, exact = answer(passages=50_000_000), answer(passages=50_000_000, recall=1.0)
    assert approximate.approximate
    assert not exact.approximate
    assert "approximate index" in {part.part for part in approximate.parts}
    assert "build the approximate index" in {work.work for work in approximate.work}
    assert "scan of all vectors" in {stage.stage for stage in exact.stages}
    assert exact.core_ms > approximate.core_ms


def test_hours_by_hand(answer):
    report = answer(passages=36_000, teacher="smollm2", queries=90, candidates=10)
    work = {each.work: each for each in report.work}
    texts = shipped_text_facts().at(100)
    window_tokens = texts.windows * 2 * 100 / texts.sentences
    assert work["encode passages"].core_hours == pytest.approx(36_000 * (100 + window_tokens) / 1_000 / 3600)
    assert work["encode passages"].hours == pytest.approx(work["encode passages"].core_hours / 16)
    assert work["write texts and words"].hours == pytest.approx(36_000 * texts.text_bytes / 1e6 / 3600)
    # 10 pairs a second at 100 tokens; with 100 tokens of a passage in place of 40, a pair has 160.
    assert work["label with smollm2"].core_hours == pytest.approx(900 / (10 * 100 / 160) / 3600)


def test_costs_by_hand(answer):
    report = answer(qps=100.0, core_hour_price=0.05, memory_price=3.0, disk_price=0.1)
    costs = {cost.item: cost for cost in report.costs}
    replicas = report.machines.replicas
    assert costs["cores for searches"].monthly == pytest.approx(report.machines.cores * MONTH_HOURS * 0.05)
    assert costs["memory"].monthly == pytest.approx(replicas * report.memory_bytes / GIB * 3)
    assert costs["disk"].monthly == pytest.approx(replicas * report.disk_bytes / GIB * 0.1)
    assert costs["encode passages"].once == pytest.approx(report.work[0].core_hours * 0.05)
    assert "in all" in texts_of(report)


def test_unmeasured_figures_are_named_and_in_no_sum(answer):
    report = answer(vector_format="int4", teacher="another")
    assert set(report.unmeasured) == {"scan of all vectors", "candidates' vectors"}
    assert next(work for work in report.work if work.work == "label with another").core_hours is None
    [remark] = [each for each in report.remarks if each.startswith("not measured, and in no sum: ")]
    assert "scan of all vectors, candidates' vectors, label with another" in remark
    assert "without: scan of all vectors" in texts_of(report)


def test_passages_longer_than_the_student_reads(answer):
    report = answer(tokens=900)
    assert any("reads 500 tokens of a passage and cuts the rest of 900" in each for each in report.remarks)
    assert report.work[0].basis.startswith("1,000,000 passages of 500 tokens")


def test_shipped_speeds_of_another_student(student, monkeypatch):
    monkeypatch.setattr(sizing, "read_speeds", lambda student, threads: None)
    report = size(PLAN, student=student)
    assert not report.measured
    assert "the speeds are not this machine's" in report.remarks[0]
    assert {"query"} <= set(report.unmeasured)
    assert report.p99_ms is None


def test_a_plan_is_checked_before_the_student_is_loaded():
    with pytest.raises(InputError, match="recall is 2"):
        size(PLAN.replace(recall=2, student="no such student"))


def test_this_machine_is_the_default(student):
    report = size(SizePlan(passages=1_000), student=student, speeds=made_up_speeds(student.fingerprint))
    assert report.plan.machine_memory > GIB // 8
    assert report.plan.machine_cores >= 1


def test_a_system_that_does_not_say_its_memory(student, monkeypatch):
    monkeypatch.setattr(sizing, "available_memory", lambda: None)
    with pytest.raises(InputError, match="give machine_memory"):
        size(SizePlan(passages=1_000), student=student)
