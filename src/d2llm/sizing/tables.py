"""A size report and speeds as tables."""

from __future__ import annotations

from collections.abc import Iterator

from d2llm.core.table import Column, Table
from d2llm.sizing.size import SizeReport
from d2llm.sizing.speeds import Speed, Speeds
from d2llm.sizing.training_memory import TrainingMemory

_GIB = 1 << 30
_BASIS = Column("computed from", align="left", max_width=90)


def size_tables(report: SizeReport) -> Iterator[Table]:
    """Bytes, the time of a search, machines, work and costs; those that the plan asks for."""
    yield _bytes(report)
    yield _search(report)
    if report.machines is not None:
        yield _machines(report)
    yield _work(report)
    if report.costs:
        yield _costs(report)


def _bytes(report: SizeReport) -> Table:
    plan = report.plan
    title = f"{plan.passages:,} passages of {plan.tokens:,} tokens, {plan.student}"
    shards = (
        "" if report.num_shards == 1 else f", in {report.num_shards:,} shards of {report.shard_passages:,} passages"
    )
    table = Table("", *(Column(name, ",.2f") for name in ("disk, GiB", "memory, GiB")), _BASIS, title=title + shards)
    for part in report.parts:
        memory = part.memory / _GIB if part.memory or part.disk else None  # not measured
        table.add_row(part.part, part.disk / _GIB, memory, part.basis)
    table.add_section()
    per_passage = (
        f"{report.disk_bytes / plan.passages:,.0f} and {report.memory_bytes / plan.passages:,.0f} bytes a passage"
    )
    table.add_row("in all", report.disk_bytes / _GIB, report.memory_bytes / _GIB, per_passage, highlighted=True)
    return table


def _search(report: SizeReport) -> Table:
    of_shard = "" if report.num_shards == 1 else " of one shard"
    table = Table("", Column("ms", ",.2f"), _BASIS, title=f"A search{of_shard}, on one core of: {report.speeds}")
    for stage in report.stages:
        table.add_row(stage.stage, stage.ms, stage.basis)
    table.add_section()
    missing = f"without: {', '.join(report.unmeasured)}; " if report.unmeasured else ""
    slowest = "" if report.num_shards == 1 else f", the slowest of {report.num_shards:,} shards"
    waiting = "" if report.machines is None else ", with waiting for a core"
    table.add_row("p50", report.p50_ms, f"{missing}the sum{slowest}{waiting}", highlighted=True)
    table.add_row("p99", report.p99_ms, "the same, as much slower as p99 was measured to be", highlighted=True)
    return table


def _machines(report: SizeReport) -> Table:
    machines = report.machines
    assert machines is not None
    table = Table("", Column("number", ","), _BASIS, title=f"For {report.plan.qps:g} queries a second")
    table.add_row("cores", machines.cores, machines.basis)
    shards = "one shard" if machines.shards_each == 1 else f"up to {machines.shards_each:,} shards"
    held = f"{shards} on each, each shard on {machines.replicas:,}; busy {machines.load:.0%} of the time"
    table.add_row("machines", machines.num, held)
    return table


def _work(report: SizeReport) -> Table:
    hours = (Column(name, ",.2f") for name in ("hours of a core", "hours on one machine"))
    table = Table("", *hours, _BASIS, title="Done once")
    for work in report.work:
        table.add_row(work.work, work.core_hours, work.hours, work.basis)
    return table


def _costs(report: SizeReport) -> Table:
    table = Table("", Column("once", ",.2f"), Column("a month", ",.2f"), _BASIS, title="At the given prices")
    for cost in report.costs:
        table.add_row(cost.item, cost.once, cost.monthly, cost.basis)
    table.add_section()
    once = sum(cost.once for cost in report.costs if cost.once is not None)
    monthly = sum(cost.monthly for cost in report.costs if cost.monthly is not None)
    table.add_row("in all", once, monthly, "", highlighted=True)
    return table


def training_table(memory: TrainingMemory, title: str) -> Table:
    """The memory of a training, by part."""
    table = Table("", Column("GiB", ",.2f"), _BASIS, title=title)
    for part in memory.items:
        table.add_row(part.part, part.memory / _GIB, part.basis)
    table.add_section()
    more = f"with {memory.batch_bytes / _GIB:,.2f} GiB of activations, a whole batch is kept and nothing computed twice"
    table.add_row("in all", memory.memory_bytes / _GIB, more, highlighted=True)
    return table


def speeds_table(speeds: Speeds) -> Table:
    """The speeds of a machine."""
    table = Table("", Column("a core", ",.4g"), Column("source", align="left"), title=str(speeds))
    for field in Speeds.model_fields:
        value: object = getattr(speeds, field)
        named = value if isinstance(value, dict) else {"": value}
        for name, speed in named.items():
            if isinstance(speed, Speed):
                table.add_row(f"{field.replace('_', ' ')} {name}".rstrip(), speed.value, speed.source)
    return table
