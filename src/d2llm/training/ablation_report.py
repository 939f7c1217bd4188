"""The results of ``ablate`` as frozen dataclasses, from which tables, JSON, Markdown and HTML are rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from d2llm.core.types import Task
from d2llm.ops.significance import Interval, mean_interval
from d2llm.recipe.variants import VariantGroup, find_variant

REPORT_VERSION = 1
"""Version of ``AblationReport.to_json``; changes when a field is renamed or removed, or its meaning changes."""
BASE = "recipe"
"""The name of the unchanged recipe among the variants."""
MEASURE = "nDCG@10"
"""The measure of retrieval sets; sets of labelled pairs have the main measure of their kind (``evaluation.gold``)."""
RowGroup = Literal["recipe"] | VariantGroup


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of one training run.

    ``by_set`` has the measure of each data set (``MeasuredSet.measure``), and ``ndcg`` is the mean over the data sets,
    which is nDCG@10 only if all of them are retrieval sets. ``interaction_weights`` has the weight r of the interaction
    that the run chose for each task; it is empty for a head that is not an inner product with an interaction.
    ``best_step`` is the step whose state was kept: 0 means that no state after the first was better. ``seconds`` is the
    training time with dev evaluations, over all sessions of an interrupted run, without steps that were lost after a
    checkpoint.
    """

    variant: str
    seed: int
    ndcg: float
    by_set: Mapping[str, float]
    interaction_weights: Mapping[Task, float]
    steps: int
    best_step: int
    seconds: float
    fingerprint: str


@dataclass(frozen=True, slots=True)
class FailedRun:
    """A run that could not be trained, and why."""

    variant: str
    seed: int
    reason: str


@dataclass(frozen=True, slots=True)
class AblationRow:
    """The recipe, or one variant of it, over its seeds.

    ``mean`` is over the runs, ``by_set`` the same for each data set. ``differences`` has variant minus recipe for each
    seed that both have; ``difference`` is their mean. Intervals are 95 % Student's t intervals over seeds, or None if
    there are fewer than two seeds. Means are None if there are no runs.
    """

    name: str
    group: RowGroup
    title: str
    runs: tuple[RunResult, ...]
    mean: float | None
    interval: Interval | None
    by_set: Mapping[str, float]
    differences: Mapping[int, float]
    difference: float | None
    difference_interval: Interval | None

    @property
    def interaction_weights(self) -> dict[Task, float]:
        """The mean weight of the interaction over the runs, by task."""
        tasks: list[Task] = sorted({task for run in self.runs for task in run.interaction_weights})
        return {task: fmean(run.interaction_weights[task] for run in self.runs) for task in tasks}


@dataclass(frozen=True, slots=True)
class MeasuredSet:
    """The dev queries of one data set, or its dev pairs, that every run was measured on.

    ``num_passages`` is the size of the queries' small corpus, or the number of distinct passages of the pairs.
    """

    name: str
    task: Task
    num_queries: int
    num_passages: int
    num_training_queries: int
    measure: str = MEASURE


@dataclass(frozen=True, slots=True)
class AblationReport:
    """The result of ``ablate``.

    ``measure`` names all measures of the data sets (``named_measures``); a row's mean is over the data sets. ``base``
    is the recipe itself, ``rows`` its variants in the requested order. ``same`` maps each variant that was not trained,
    because it changes nothing, to the variant that it is equal to. ``missing`` has each (variant, seed) that was left
    for the next call because of the budget, ``failed`` those that could not be trained. ``settings`` has everything
    that affects the runs.
    """

    recipe: str
    measure: str
    sets: tuple[MeasuredSet, ...]
    seeds: tuple[int, ...]
    base: AblationRow
    rows: tuple[AblationRow, ...]
    same: Mapping[str, str]
    missing: tuple[tuple[str, int], ...]
    failed: tuple[FailedRun, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    folder: str

    @property
    def best(self) -> str | None:
        """The name of the row with the highest mean over the recipe's seeds; the first of equal ones.

        A variant without a run for one of these seeds (because of a budget, for example) is not considered.
        """
        seeds = {run.seed for run in self.base.runs}
        means = {
            row.name: fmean(run.ndcg for run in row.runs if run.seed in seeds)
            for row in (self.base, *self.rows)
            if seeds and seeds <= {run.seed for run in row.runs}
        }
        return max(means, key=means.__getitem__) if means else None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-serialisable values."""
        return {"report_version": REPORT_VERSION, **asdict(self)}


def named_measures(sets: Sequence[MeasuredSet]) -> str:
    """The distinct measures of these data sets: "nDCG@10", or "nDCG@10 and AP"."""
    return " and ".join(dict.fromkeys(data_set.measure for data_set in sets))


def summarise(names: Sequence[str], results: Sequence[RunResult]) -> tuple[AblationRow, tuple[AblationRow, ...]]:
    """The base row and one row for each of the variants ``names``, from the available runs."""
    by_variant = {name: [run for run in results if run.variant == name] for name in (BASE, *names)}
    base = {run.seed: run for run in by_variant[BASE]}
    rows = [_row(name, runs, base) for name, runs in by_variant.items()]
    return rows[0], tuple(rows[1:])


def _row(name: str, runs: Sequence[RunResult], base: Mapping[int, RunResult]) -> AblationRow:
    values = [run.ndcg for run in runs]
    differences = {run.seed: run.ndcg - base[run.seed].ndcg for run in runs if run.seed in base and name != BASE}
    names = list(runs[0].by_set) if runs else []
    return AblationRow(
        name=name,
        group="recipe" if name == BASE else find_variant(name).group,
        title="the recipe as it is" if name == BASE else find_variant(name).title,
        runs=tuple(runs),
        mean=fmean(values) if values else None,
        interval=mean_interval(values),
        by_set={data: fmean(run.by_set[data] for run in runs) for data in names},
        differences=differences,
        difference=fmean(differences.values()) if differences else None,
        difference_interval=mean_interval(list(differences.values())),
    )
