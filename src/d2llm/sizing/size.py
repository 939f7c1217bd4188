"""``size``: bytes, times, machines and costs of an index that does not exist yet, with what they were computed from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from d2llm.core.errors import InputError
from d2llm.core.machine import available_memory, usable_cores
from d2llm.core.names import counted
from d2llm.core.table import Column, Table
from d2llm.models.student import Student
from d2llm.retrieval.build_ann import NUM_QUERIES
from d2llm.sizing.index_bytes import PartBytes, StudentFacts, index_parts
from d2llm.sizing.plan import SizePlan, in_words
from d2llm.sizing.search_time import (
    AnnFacts,
    StageTime,
    can_approximate,
    search_stages,
    shipped_ann_facts,
    slowest_of,
    total_ms,
    wait_ms,
)
from d2llm.sizing.speeds import GRAPH_ROWS, Speed, Speeds, read_speeds, shipped_speeds
from d2llm.sizing.texts import TextFacts, shipped_text_facts
from d2llm.sizing.training_memory import TrainingMemory
from d2llm.store.vector_formats import make_format

MAX_LOAD = 0.7
"""Fraction of the time that cores may be busy. Beyond it, queries wait longer and longer for a free one."""
MONTH_HOURS = 730
_GIB = 1 << 30
_BASIS = Column("computed from", align="left", max_width=90)
_USED_MEMORY = 0.9  # of a machine; the rest is for what other programs and each search need


@dataclass(frozen=True, slots=True)
class Work:
    """Work that is done once: hours of one core, and of one machine by the clock; None if it was not measured."""

    work: str
    core_hours: float | None
    hours: float | None
    basis: str


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines for a plan's queries a second.

    ``cores`` are needed. A machine holds up to ``shards_each`` shards, and each shard is on ``replicas`` machines;
    there are ``num`` machines in all. ``load`` is the fraction of the time that their cores are busy.
    """

    num: int
    shards_each: int
    replicas: int
    cores: int
    load: float
    basis: str


@dataclass(frozen=True, slots=True)
class Cost:
    """An amount of the currency of the given prices, once or a month."""

    item: str
    once: float | None
    monthly: float | None
    basis: str


@dataclass(frozen=True, slots=True)
class SizeReport:
    """The answer to a plan.

    Attributes:
        plan: the plan, with the machine's memory and cores filled in.
        student: fingerprint of the student.
        speeds: where the speeds come from.
        measured: whether they were measured on this machine.
        texts: where the facts about texts come from.
        parts: bytes by part, of all shards together; the last part is programs and students.
        disk_bytes: their sum on disk.
        memory_bytes: their sum in memory.
        num_shards: number of shards, each of which fits the memory of a machine.
        num_machines: over how many machines all shards are spread, each of them once.
        shard_passages: passages of a shard.
        approximate: whether searches use an approximate index.
        stages: time of a search of one shard, by stage.
        p50_ms, p99_ms: of a whole search: the slowest shard, and waiting for a core; of what was measured. p99 is None
            if no ratio of the two was measured for this student.
        core_ms: milliseconds of processor time that a search takes on all shards together.
        unmeasured: stages that are missing in these times.
        machines: for the plan's queries a second; None if it names none.
        work: what is done once.
        costs: at the plan's prices.
        remarks: what a reader must know.
    """

    plan: SizePlan
    student: str
    speeds: str
    measured: bool
    texts: str
    parts: list[PartBytes]
    disk_bytes: int
    memory_bytes: int
    num_shards: int
    num_machines: int
    shard_passages: int
    approximate: bool
    stages: list[StageTime]
    p50_ms: float
    p99_ms: float | None
    core_ms: float
    unmeasured: list[str]
    machines: Machines | None
    work: list[Work]
    costs: list[Cost]
    remarks: list[str]


def size(
    plan: SizePlan, *, student: Student | None = None, speeds: Speeds | None = None, texts: TextFacts | None = None
) -> SizeReport:
    """What an index of the plan's passages takes, how fast it is searched, and what it costs. Nothing is built.

    Args:
        plan: what is to be built.
        student: the plan's student, if it is loaded already.
        speeds: of the machine and the student; by default those measured on this one, or else those shipped.
        texts: facts about the passages' texts; by default those of the benchmarks' passages.

    Raises:
        InputError: the plan contradicts itself or the student, or a machine cannot even hold the student.
        ModelNotFoundError: there is no such student.
    """
    plan = _with_machine(plan)
    loaded = student or Student.load(plan.student)
    if not loaded.backbone.reads_tokens:
        raise InputError(
            f"the backbone of the student '{plan.student}' is an API, whose speed and price are not known here; name a "
            "student with a local backbone and vectors of the same width"
        )
    facts = StudentFacts.of_student(loaded, plan)
    kept = read_speeds(facts.fingerprint, torch.get_num_threads()) if speeds is None else speeds
    return _Sizing(plan, facts, kept, texts or shipped_text_facts(), shipped_ann_facts()).report()


def _with_machine(plan: SizePlan) -> SizePlan:
    memory = plan.machine_memory or available_memory()
    if memory is None:
        raise InputError(
            "this system does not say how much memory it has; give machine_memory (--machine-memory 64GiB)"
        )
    return plan.replace(machine_memory=memory, machine_cores=plan.machine_cores or usable_cores())


class _Sizing:
    """One plan and all that its figures are computed from."""

    def __init__(
        self, plan: SizePlan, student: StudentFacts, measured: Speeds | None, texts: TextFacts, ann: AnnFacts
    ) -> None:
        self.plan = plan
        self.student = student
        self.is_measured = measured is not None
        self.speeds = shipped_speeds(student.fingerprint) if measured is None else measured
        self.texts = texts.at(plan.tokens)
        self.read_tokens = self.texts.read_tokens(student.max_tokens)
        self.ann = ann
        assert plan.machine_memory is not None
        assert plan.machine_cores is not None
        self.machine_memory, self.machine_cores = plan.machine_memory, plan.machine_cores
        process = self.speeds.process_bytes
        self.process_bytes = 0 if process is None else round(process.value)

    def report(self) -> SizeReport:
        """The whole answer."""
        num_shards = self._num_shards()
        passages = math.ceil(self.plan.passages / num_shards)
        approximate, stages = self._search(passages, num_shards)
        once_ms = total_ms(stage for stage in stages if not stage.per_shard)
        shard_ms = total_ms(stage for stage in stages if stage.per_shard)
        core_ms = once_ms + num_shards * shard_ms
        num_machines = math.ceil(num_shards / self._most_shards(passages, approximate=approximate))
        machines = self._machines(num_shards, num_machines, core_ms)
        if machines is not None:
            num_machines = machines.num // machines.replicas
        entries = self._bytes_of_shards(num_shards, num_machines, approximate=approximate)
        disk, memory = sum(part.disk for part in entries), sum(part.memory for part in entries)
        unmeasured = [stage.stage for stage in stages if stage.ms is None]
        p50, p99 = self._latencies(once_ms, shard_ms, num_shards, num_machines, machines)
        work = list(self._work(num_shards, passages, approximate=approximate))
        return SizeReport(
            plan=self.plan,
            student=self.student.fingerprint,
            speeds=str(self.speeds),
            measured=self.is_measured,
            texts=self.texts.source,
            parts=entries,
            disk_bytes=disk,
            memory_bytes=memory,
            num_shards=num_shards,
            num_machines=num_machines,
            shard_passages=passages,
            approximate=approximate,
            stages=stages,
            p50_ms=p50,
            p99_ms=p99,
            core_ms=core_ms,
            unmeasured=unmeasured,
            machines=machines,
            work=work,
            costs=list(self._costs(work, machines, disk, memory)),
            remarks=list(self._remarks(num_shards, num_machines, unmeasured, work)),
        )

    def _bytes_of_shard(self, passages: int, *, approximate: bool) -> list[PartBytes]:
        return index_parts(self.plan, self.student, self.texts, passages, approximate=approximate)

    def _bytes_of_shards(self, num_shards: int, num_machines: int, *, approximate: bool) -> list[PartBytes]:
        """The parts of all shards, and a program with the student on each machine."""
        passages = math.ceil(self.plan.passages / num_shards)
        shard = self._bytes_of_shard(passages, approximate=approximate)
        fraction = self.plan.passages / passages  # the last shard may be smaller
        entries = [
            replace(part, disk=round(fraction * part.disk), memory=round(fraction * part.memory)) for part in shard
        ]
        process = self.speeds.process_bytes
        source = "not measured" if process is None else process.source
        basis = f"{counted(num_machines, 'process', 'processes')}: {source}"
        return [*entries, PartBytes("programs with the student", 0, num_machines * self.process_bytes, basis)]

    def _shard_memory(self, passages: int, *, approximate: bool) -> int:
        return sum(part.memory for part in self._bytes_of_shard(passages, approximate=approximate))

    def _most_shards(self, passages: int, *, approximate: bool) -> int:
        """How many shards of so many passages the memory of a machine holds."""
        return max(1, int(self._room() / self._shard_memory(passages, approximate=approximate)))

    def _room(self) -> float:
        """Bytes of a machine's memory for shards."""
        room = _USED_MEMORY * self.machine_memory - self.process_bytes
        if room <= 0:
            raise InputError(
                f"a machine has {self.machine_memory / _GIB:.1f} GiB of memory, but a process with the student alone "
                f"takes {self.process_bytes / _GIB:.1f}; give larger machines"
            )
        return room

    def _num_shards(self) -> int:
        """The smallest number of shards, but not below the plan's, of which each fits a machine's memory."""
        room = self._room()

        def fits(num_shards: int) -> bool:
            passages = math.ceil(self.plan.passages / num_shards)
            approximate, _ = self._search(passages, num_shards)
            return self._shard_memory(passages, approximate=approximate) <= room

        most = self.plan.shards
        if fits(most):
            return most
        while not fits(most):
            if most > self.plan.passages:
                raise InputError("a machine's memory does not hold a single passage; give larger machines")
            most *= 2
        least = most // 2 + 1
        while least < most:  # halving: one more shard never needs more memory
            middle = (least + most) // 2
            least, most = (least, middle) if fits(middle) else (middle + 1, most)
        return most

    def _search(self, passages: int, num_shards: int) -> tuple[bool, list[StageTime]]:
        """Whether shards of so many passages are searched by an approximate index, and the stages of a search."""
        stages_of = partial(
            search_stages, self.plan, self.student, self.texts, self.speeds, passages, num_shards=num_shards
        )
        exact = stages_of()
        if not can_approximate(self.plan, self.student, passages, self.ann):
            return False, exact
        stages = stages_of(ann=self.ann)
        is_known = exact[1].ms is not None and stages[1].ms is not None
        return (True, stages) if is_known and total_ms(stages[1:2]) < total_ms(exact[1:2]) else (False, exact)

    def _machines(self, num_shards: int, fewest: int, core_ms: float) -> Machines | None:
        """As many machines as the load needs, at least ``fewest``; shards are spread over them before any is copied."""
        if self.plan.qps is None:
            return None
        busy = self.plan.qps * core_ms / 1e3
        cores = math.ceil(busy / MAX_LOAD)
        num = max(fewest, math.ceil(cores / self.machine_cores))
        replicas = math.ceil(num / num_shards)
        if replicas > 1:
            num = replicas * num_shards
        return Machines(
            num=num,
            shards_each=math.ceil(num_shards * replicas / num),
            replicas=replicas,
            cores=cores,
            load=busy / (num * self.machine_cores),
            basis=f"{self.plan.qps:g} queries a second, {core_ms:.1f} ms of a core each, cores busy {MAX_LOAD:.0%} of "
            f"the time at most; machines of {self.machine_cores} cores and {self.machine_memory / _GIB:.1f} GiB",
        )

    def _latencies(
        self, once_ms: float, shard_ms: float, num_shards: int, num_machines: int, machines: Machines | None
    ) -> tuple[float, float | None]:
        """Median and p99 of a search; waiting is that of a machine's queue at its load.

        If a machine has more shards than cores, its cores search some after others.
        """
        rounds = math.ceil(math.ceil(num_shards / num_machines) / self.machine_cores)

        def latency(fraction: float, ratio: float) -> float:
            slowest = rounds * slowest_of(num_shards, shard_ms, ratio, fraction)
            once = slowest_of(1, once_ms, ratio, fraction)
            if machines is None:
                return once + slowest
            work_ms = shard_ms + once_ms / num_shards
            return once + slowest + wait_ms(self.machine_cores, machines.load * self.machine_cores, work_ms, fraction)

        ratio = self.speeds.slow_ratio
        median = latency(0.5, 1.0 if ratio is None else ratio.value)
        return median, None if ratio is None else latency(0.99, ratio.value)

    def _work(self, num_shards: int, passages: int, *, approximate: bool) -> Iterator[Work]:
        yield self._encoding()
        text_bytes = self.plan.passages * self.texts.text_bytes
        yield self._timed(
            "write texts and words", text_bytes, "bytes of text", self.speeds.written_text_bytes, parallel=False
        )
        if approximate:
            yield self._approximate_index(num_shards, passages)
        if self.plan.teacher is not None:
            yield self._labelling(self.plan.teacher)

    def _encoding(self) -> Work:
        tokens = float(self.plan.passages * self.read_tokens)
        basis = f"{counted(self.plan.passages, 'passage')} of {self.read_tokens:.0f} tokens"
        if "window" in self.student.formats and self.texts.sentences:
            per_window = 2 * self.texts.tokens / self.texts.sentences  # a window is two sentences
            tokens += self.plan.passages * self.texts.windows * per_window
            basis += f" and {self.texts.windows:.1f} windows of {per_window:.0f}"
        return self._timed("encode passages", tokens, "tokens", self.speeds.passage_tokens, basis)

    def _approximate_index(self, num_shards: int, passages: int) -> Work:
        """Linking all rows, and the exact scans that tune the effort of a search."""
        rows = float(num_shards * passages) * math.log(max(passages, 2)) / math.log(GRAPH_ROWS)
        basis = f"{num_shards * passages:,} rows, each linked among {passages:,}"
        work = self._timed("build the approximate index", rows, "rows", self.speeds.linked_rows, basis)
        scan = self.speeds.scan_bytes.get(self.plan.vector_format)
        if work.core_hours is None or scan is None:
            return replace(work, core_hours=None, hours=None)
        code_size = make_format(self.plan.vector_format, self.student.dim).code_size
        seconds = num_shards * NUM_QUERIES * passages * code_size / scan.value
        hours = work.core_hours + seconds / 3600
        basis = f"{work.basis}; {NUM_QUERIES} exact scans to tune it"
        return replace(work, core_hours=hours, hours=hours / self.machine_cores, basis=basis)

    def _labelling(self, teacher: str) -> Work:
        pairs = self.plan.queries * self.plan.candidates
        speed = self.speeds.teachers.get(teacher)
        basis = f"{self.plan.queries:,} queries, {self.plan.candidates} candidates each"
        if speed is not None:
            at_length = {"value": speed.pairs(self.texts.tokens), "source": f"{speed.source}; in proportion to tokens"}
            speed = speed.model_copy(update=at_length)
        return self._timed(f"label with {teacher}", pairs, "pairs", speed, basis)

    def _timed(
        self, name: str, amount: float, unit: str, speed: Speed | None, basis: str = "", *, parallel: bool = True
    ) -> Work:
        """So much of something at a speed of one core; by the clock on all cores of a machine, unless one writes."""
        why = "; ".join(filter(None, [basis, f"{in_words(amount)} {unit}"]))
        if speed is None:
            return Work(name, None, None, f"{why}; their speed was not measured")
        hours = amount / speed.value / 3600
        cores = self.machine_cores if parallel else 1
        return Work(name, hours, hours / cores, f"{why}, at {in_words(speed.value)} a second and core: {speed.source}")

    def _costs(
        self, work: Sequence[Work], machines: Machines | None, disk_bytes: int, memory_bytes: int
    ) -> Iterator[Cost]:
        price = self.plan.core_hour_price
        replicas = 1 if machines is None else machines.replicas
        copies = "" if replicas == 1 else f" in {replicas} replicas"
        if price is not None:
            for one in work:
                if one.core_hours is not None:
                    yield Cost(one.work, one.core_hours * price, None, f"{one.core_hours:,.1f} hours of a core")
            if machines is not None:
                yield Cost(
                    "cores for searches", None, machines.cores * MONTH_HOURS * price, f"{machines.cores:,} cores"
                )
        kinds = (("memory", self.plan.memory_price, memory_bytes), ("disk", self.plan.disk_price, disk_bytes))
        for name, gib_price, num_bytes in kinds:
            if gib_price is not None:
                gib = replicas * num_bytes / _GIB
                yield Cost(name, None, gib * gib_price, f"{gib:,.1f} GiB{copies}")

    def _remarks(
        self, num_shards: int, num_machines: int, unmeasured: Sequence[str], work: Sequence[Work]
    ) -> Iterator[str]:
        if not self.is_measured:
            yield "the speeds are not this machine's, but ship with d2llm; `d2llm size --measure` measures this one"
        if self.plan.tokens > self.student.max_tokens:
            yield (
                f"the student reads {self.student.max_tokens} tokens of a passage and cuts the rest of "
                f"{self.plan.tokens}; split passages, and give their number and length"
            )
        if num_machines > 1:
            yield (
                f"the index does not fit the memory of one machine ({self.machine_memory / _GIB:.1f} GiB, "
                f"{_USED_MEMORY:.0%} of it used): {num_shards:,} shards do, on {num_machines:,} machines"
            )
        missing = [*unmeasured, *(one.work for one in work if one.core_hours is None)]
        if self.speeds.process_bytes is None:
            missing.append("memory of programs with the student")
        if missing:
            yield f"not measured, and in no sum: {', '.join(missing)}; `d2llm size --measure` measures them"


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
