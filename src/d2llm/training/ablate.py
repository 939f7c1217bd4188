"""The verb ``ablate``: measures the contribution of each part of a recipe by training without it, on several seeds."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from d2llm.core.errors import D2LLMError, InputError, RecipeError
from d2llm.core.files import new_folder, write_json
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.json_values import parse_json
from d2llm.core.manifest import read_manifest
from d2llm.core.progress import remarks
from d2llm.core.settings import shows
from d2llm.data.labels import LabelStore
from d2llm.data.plan import TrainingPlan, TrainingSource, check_sources
from d2llm.data.run_folder import is_finished, working_folder
from d2llm.models.device import choose_device, choose_dtype
from d2llm.models.student import Student
from d2llm.models.student_files import FORMAT_VERSION, KIND
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.recipe import Recipe, TeacherConfig
from d2llm.recipe.variants import VARIANTS, find_variant
from d2llm.training.ablation_report import (
    BASE,
    AblationReport,
    AblationRow,
    FailedRun,
    MeasuredSet,
    RunResult,
    named_measures,
    summarise,
)
from d2llm.training.checkpoints import LOG, epochs_of
from d2llm.training.choose_weights import value_by_set
from d2llm.training.dev_sets import DevSet, evaluate_dev, make_dev_set
from d2llm.training.distill import distill
from d2llm.training.settings import AblationSettings

# A seed that a recipe is unlikely to use. Runs of a recipe with this seed would be measured on the same queries that
# chose their best step, unlike runs with other seeds.
MEASURING_SEED = 1_000_003
_RECORD_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """Settings shared by all runs: ``root`` is their common folder, ``measured_on`` a fingerprint of the dev sets."""

    sources: list[TrainingSource]
    dev_sets: list[DevSet]
    measured_on: str
    root: Path
    labels: Path
    teacher: TeacherConfig
    closed_gates: Collection[str]
    device: str | None
    dtype: str | None

    def student(self, variant: str, seed: int) -> Path:
        """The folder of one run's student; ``<folder>.run`` and ``<folder>.json`` beside it have its log and result."""
        return self.root / variant / f"seed-{seed}"


def fingerprint_sets(dev_sets: Sequence[DevSet]) -> str:
    """A fingerprint of everything besides the student that a measured value depends on."""
    return fingerprint_json([_RECORD_VERSION, [_content(dev) for dev in dev_sets]])


def _content(dev: DevSet) -> list[Any]:
    if dev.pairs:
        return [dev.name, dev.task, [(pair.query, pair.passage, pair.label, pair.score) for pair in dev.pairs]]
    return [dev.name, dev.task, [*dev.queries.items()], [*dev.passages], [*dev.passages.values()], dev.qrels]


def _record(student: Path) -> Path:
    return student.with_name(student.name + ".json")


def read_result(shared: RunSettings, name: str, seed: int) -> RunResult | None:
    """The result of an earlier call; None if there is none, or if it was measured on other queries."""
    student = shared.student(name, seed)
    if not _record(student).is_file() or not is_finished(student):
        return None
    record = parse_json(_record(student).read_text(encoding="utf-8"))
    result = RunResult(**record["result"]) if record.get("measured_on") == shared.measured_on else None
    fingerprint = read_manifest(student, KIND, FORMAT_VERSION)["fingerprint"]
    return result if result is not None and result.fingerprint == fingerprint else None


def train_and_measure(shared: RunSettings, recipe: Recipe, name: str, seed: int) -> RunResult:
    """Train one student, unless an earlier call has done so, and measure the student in its folder."""
    folder = shared.student(name, seed)
    if not is_finished(folder):
        distill(
            shared.sources,
            folder,
            recipe=recipe.model_copy(update={"seed": seed}),
            labels=_own_labels(shared, folder) if recipe.training.asks_teacher else shared.labels,
            teacher=shared.teacher,
            closed_gates=shared.closed_gates if recipe.losses.imitates else (),
            device=shared.device,
            dtype=shared.dtype,
        )
    manifest = read_manifest(folder, KIND, FORMAT_VERSION)
    student = Student.load(folder, device=shared.device, dtype=shared.dtype)
    weights = manifest["interaction_weights"]
    by_set = value_by_set(evaluate_dev(student, shared.dev_sets), weights)
    result = RunResult(
        variant=name,
        seed=seed,
        ndcg=fmean(by_set.values()),
        by_set=by_set,
        interaction_weights=weights if student.config.interaction.head == "dot" else {},
        steps=manifest["steps"],
        best_step=manifest["best_step"],
        seconds=_seconds(working_folder(folder) / LOG),
        fingerprint=student.fingerprint,
    )
    write_json(_record(folder), {"measured_on": shared.measured_on, "result": asdict(result)})
    for checkpoint in working_folder(folder).glob("*.safetensors"):
        checkpoint.unlink()  # no longer needed, and several times as large as the student
    return result


def _own_labels(shared: RunSettings, student: Path) -> Path:
    """A copy of the label store for a run that lets the teacher score more: other runs must not see those labels."""
    labels = working_folder(student) / "labels"
    if shared.labels.is_dir() and not labels.is_dir():
        with new_folder(labels) as temporary:
            shutil.copytree(shared.labels, temporary, dirs_exist_ok=True)
    return labels


def _seconds(log: Path) -> float:
    """The training time over all sessions; the log's clock restarts in each session."""
    total = before = 0.0
    for line in log.read_text(encoding="utf-8").splitlines():
        now = parse_json(line)["seconds"]
        total += now - before if now >= before else now
        before = now
    return total


@shows(AblationSettings)
def ablate(
    sources: Sequence[TrainingSource],
    folder: Path,
    settings: AblationSettings | None = None,
    *,
    recipe: Recipe,
    labels: Path,
    teacher: TeacherConfig,
    closed_gates: Collection[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> AblationReport:
    """Train a recipe and its variants over the same seeds, and measure all of them on the same dev queries.

    Every run is one ``distill`` in ``folder/<settings>/<variant>/seed-<n>``, where ``<settings>`` is a fingerprint of
    everything that affects the runs. A finished run is not repeated; an interrupted one continues from its checkpoint.
    All recipes are trained with the first seed before the next one, and the unchanged recipe comes first, so that an
    early end leaves complete seeds.

    As in any ``distill``, the seed decides the initial weights, batches, samples, and the dev sample by which a run
    chooses its best step and the weight of its interaction. The reported results are measured afterwards, with the
    student as it was written, on dev queries that are the same for all runs.

    A variant that cannot be trained is reported with the reason; if the recipe itself cannot be trained, that is an
    error.

    The other arguments are those of ``distill``; labels are not needed if neither the recipe nor a variant imitates a
    teacher. Without ``variants``, there are all that the recipe can have, and that need no labels unless the recipe
    does. A larger sample of ``max_queries`` contains a smaller one. ``changes`` are single fields of the settings, of
    which ``halving`` is for ``halve``; ``progress`` counts the runs with those of its other calls.

    Raises:
        RecipeError: a variant is unknown (the message suggests the nearest).
        InputError: a number is out of range, or there are no labels or no dev queries; see also ``distill``.
        LabelMismatchError: the store has only labels of another teacher or prompt.
        TrainingDivergedError: the training of the recipe itself diverged.
    """
    started = time.monotonic()
    chosen = AblationSettings.of(settings, **changes)
    names, unsuited = _trainable(recipe) if chosen.variants is None else (chosen.variants, [])
    recipes, same = _distinct(_shortened(recipe, chosen.max_queries, chosen.epochs), names)
    check_sources(sources)
    needs_labels = any(recipe.losses.imitates for recipe in recipes.values())
    some = recipe.training.unlabelled == "own_labels"
    labelled = _labelled(sources, labels, teacher, closed_gates, other_sets_suffice=some) if needs_labels else None
    notes = [*unsuited, *_left_out(recipe, sources, labelled)]
    sources = _training_queries(recipe, sources, labelled, chosen.max_queries)
    dev_sets = [
        make_dev_set(
            source, num_queries=chosen.dev_queries, num_passages=recipe.training.dev_passages, seed=MEASURING_SEED
        )
        for source in sources
    ]
    content_of_runs = _settings(recipes, sources, labelled, teacher, closed_gates, device, dtype)
    root = folder / fingerprint_json(content_of_runs)
    content = fingerprint_sets(dev_sets)
    shared = RunSettings(sources, dev_sets, content, root, labels, teacher, closed_gates, device, dtype)
    seeds = range(recipe.seed, recipe.seed + chosen.num_seeds)
    runs = [(name, seed) for seed in seeds for name in recipes]
    results = {run: result for run in runs if (result := read_result(shared, *run)) is not None}
    if waiting := [run for run in runs if run not in results]:
        write_json(root / "settings.json", content_of_runs)
    deadline = math.inf if chosen.budget_minutes is None else started + 60 * chosen.budget_minutes
    (progress := progress or Progress()).begin_round(len(recipes) - 1, chosen.num_seeds, len(results))
    missing, failed = _train_waiting(shared, recipes, waiting, deadline, progress, results)
    base, rows = summarise([name for name in recipes if name != BASE], [results[run] for run in runs if run in results])
    sets = tuple(_measured_set(dev, source) for dev, source in zip(dev_sets, sources, strict=True))
    return AblationReport(
        recipe=recipe.name,
        measure=named_measures(sets),
        sets=sets,
        seeds=tuple(seeds),
        base=base,
        rows=rows,
        same=same,
        missing=tuple(missing),
        failed=tuple(failed),
        settings=content_of_runs,
        notes=(*notes, *_notes(recipes[BASE], sources, chosen.num_seeds)),
        folder=str(root),
    )


def _shortened(recipe: Recipe, max_queries: int | None, epochs: int | None) -> Recipe:
    """The recipe for the runs, with data sets by name, so that moving them does not change the runs' fingerprint."""
    data = [
        item.model_copy(
            update={
                "path": Path(item.path).name,
                "max_queries": min((n for n in (item.max_queries, max_queries) if n is not None), default=None),
            }
        )
        for item in recipe.data
    ]
    training = recipe.training if epochs is None else recipe.training.model_copy(update={"epochs": epochs})
    return recipe.model_copy(update={"data": tuple(data), "training": training})


def _trainable(recipe: Recipe) -> tuple[list[str], list[str]]:
    """The variants that this recipe can have, and a note for each that its settings forbid.

    None of them imitates a teacher if the recipe has no imitation loss.
    """
    names: list[str] = []
    notes: list[str] = []
    for variant in VARIANTS.values():
        try:
            imitates = variant.apply(recipe).losses.imitates
        except RecipeError as error:
            notes.append(f"left out: {error}")
            continue
        if recipe.losses.imitates or not imitates:
            names.append(variant.name)
    return names, notes


def _distinct(base: Recipe, variants: Iterable[str]) -> tuple[dict[str, Recipe], dict[str, str]]:
    """The recipes to train, by name, and the variants that are equal to an earlier one, with its name."""
    recipes: dict[str, Recipe] = {BASE: base}
    same: dict[str, str] = {}
    for name in dict.fromkeys(variants):
        changed = find_variant(name).apply(base)
        equal = next((n for n, r in recipes.items() if changed.model_copy(update={"name": r.name}) == r), None)
        if equal is None:
            recipes[name] = changed
        else:
            same[name] = equal
    return recipes, same


def _labelled(
    sources: Sequence[TrainingSource],
    labels: Path,
    teacher: TeacherConfig,
    closed_gates: Collection[str],
    *,
    other_sets_suffice: bool,
) -> list[set[str]]:
    """The queries of each plan that have all the labels they need: none if the data set's gate is closed."""
    if not is_finished(labels) and not all(source.dataset.name in closed_gates for source in sources):
        raise InputError(f"{labels}: there are no labels yet; run `d2llm label` with this recipe first")
    identity = identify_teacher(teacher)
    labelled: list[set[str]] = []
    for source in sources:
        if source.dataset.name in closed_gates:
            labelled.append({entry.query_id for entry in source.plan.entries})
            continue
        key = {"teacher": identity.fingerprint, "prompt": identity.prompts[source.task], "dataset": source.dataset.name}
        store = LabelStore.open_for_reading(labels, **key, other_sets_suffice=other_sets_suffice)
        labelled.append({e.query_id for e in source.plan.entries if not store.missing(e.query_id, e.passage_ids)})
    return labelled


def _left_out(recipe: Recipe, sources: Sequence[TrainingSource], labelled: Sequence[set[str]] | None) -> Iterator[str]:
    """Notes on queries without labels, and whether they are left out."""
    left_out = recipe.training.unlabelled == "leave_out"
    treatment = "left out of every run" if left_out else "trained on the data set's own judgements"
    for source, query_ids in zip(sources, labelled or (), strict=labelled is not None):
        if num_unlabelled := len(source.plan.entries) - len(query_ids):
            yield (
                f"{source.dataset.name}: {num_unlabelled:,} of {len(source.plan.entries):,} training queries lack the "
                f"teacher's labels and are {treatment}"
            )


def _training_queries(
    recipe: Recipe, sources: Sequence[TrainingSource], labelled: Sequence[set[str]] | None, max_queries: int | None
) -> list[TrainingSource]:
    """The sources, restricted to the queries that every run is trained on.

    This includes runs without imitation, which could otherwise use the unlabelled queries too and would then have more
    steps than the recipe.
    """
    chosen = [{entry.query_id for entry in source.plan.entries} for source in sources]
    if labelled is not None and recipe.training.unlabelled == "leave_out":
        chosen = list(labelled)
    # A different hash than the one that selects queries for the teacher, so that a small sample is not fully labelled.
    ordered = [sorted(ids, key=lambda i: hashlib.sha256(f"ablate:{i}".encode()).digest()) for ids in chosen]
    return [only_queries(source, set(ids[:max_queries])) for source, ids in zip(sources, ordered, strict=True)]


def only_queries(source: TrainingSource, query_ids: set[str]) -> TrainingSource:
    """The source with these queries of its plan alone."""
    entries = tuple(entry for entry in source.plan.entries if entry.query_id in query_ids)
    if len(entries) == len(source.plan.entries):
        return source
    content = fingerprint_json([source.plan.manifest["content_hash"], sorted(query_ids)])
    return replace(source, plan=TrainingPlan(entries, source.plan.manifest | {"content_hash": content}))


def _settings(
    recipes: Mapping[str, Recipe],
    sources: Sequence[TrainingSource],
    labelled: Sequence[set[str]] | None,
    teacher: TeacherConfig,
    closed_gates: Collection[str],
    device: str | None,
    dtype: str | None,
) -> dict[str, Any]:
    """Everything that affects the runs, except variant and seed."""
    identity = identify_teacher(teacher) if labelled is not None else None
    plans = [{entry.query_id for entry in source.plan.entries} for source in sources]
    counts = None if labelled is None else [len(a & b) for a, b in zip(plans, labelled, strict=True)]
    target = choose_device(device)
    settings = {
        "recipe": recipes[BASE].model_dump(
            mode="json", exclude={"name", "seed", "teacher", "teacher_tuning", "mining"}
        ),
        "plans": {source.dataset.name: source.plan.manifest["content_hash"] for source in sources},
        "teacher": None if identity is None else [identity.fingerprint, dict(identity.prompts)],
        "labelled_queries": counts,
        "device": target.type,
        "dtype": str(choose_dtype(target, dtype)).removeprefix("torch."),
    }
    if any(recipe.training.remine for recipe in recipes.values()):
        settings["mining"] = recipes[BASE].mining.model_dump(mode="json")
    closed = sorted({source.dataset.name for source in sources} & set(closed_gates)) if labelled is not None else []
    return settings | {"closed_gates": closed}


def _measured_set(dev: DevSet, source: TrainingSource) -> MeasuredSet:
    num_queries, num_passages = len(dev.item_ids), len(dev.passages)
    return MeasuredSet(dev.name, dev.task, num_queries, num_passages, len(source.plan.entries), dev.measure_name)


def _train_waiting(
    shared: RunSettings,
    recipes: Mapping[str, Recipe],
    waiting: Sequence[tuple[str, int]],
    deadline: float,
    progress: Progress,
    results: dict[tuple[str, int], RunResult],
) -> tuple[list[tuple[str, int]], list[FailedRun]]:
    """Add the results of the waiting runs (variant, seed); returns those left for later, and failures."""
    missing: list[tuple[str, int]] = []
    failed: list[FailedRun] = []
    for name, seed in waiting:
        begun = time.monotonic()
        is_trained = is_finished(shared.student(name, seed))  # an earlier call was killed before measuring
        if not is_trained and begun >= deadline:
            missing.append((name, seed))
            continue
        epochs = f", epochs {recipes[name].training.epochs}" if progress.halving else ""
        remarks.info("ablate: %s", progress.begin_run(f"{name}, seed {seed}{epochs}"))
        try:
            results[name, seed] = train_and_measure(shared, recipes[name], name, seed)
        except D2LLMError as error:
            if name == BASE:
                raise
            failed.append(FailedRun(name, seed, str(error)))
            _log.warning("%s, seed %d could not be trained: %s", name, seed, error)
        progress.end_run(time.monotonic() - begun)
    return missing, failed


def _notes(base: Recipe, sources: Sequence[TrainingSource], num_seeds: int) -> Iterator[str]:
    """Notes that help to interpret the results."""
    if num_seeds == 1:
        yield "one seed only: there are no intervals, so an effect cannot be distinguished from chance"
    training = base.training
    per_epoch = sum(-(-len(source.plan.entries) // training.batch_queries) for source in sources)
    steps = per_epoch * epochs_of(training, per_epoch)
    warmup = training.warmup_of(steps)
    if warmup >= steps:
        yield (
            f"the warm-up of {warmup:,} steps is as long as the runs of at most {steps:,} steps or "
            "longer: the learning rate never reached its value"
        )


@dataclass
class Progress:
    """Which run of how many is trained, and how long the rest takes: over all rounds, if there is ``halving``."""

    halving: bool = False
    run: int = 0
    """Runs that are finished."""
    runs: int = 0
    left: int = 0
    """Runs that are not finished; one with twice the epochs counts twice."""
    seconds: list[float] = field(default_factory=list[float])

    def begin_round(self, num_variants: int, num_seeds: int, num_finished: int) -> None:
        """Count the runs of a round and of those after it, each of the recipe and half as many variants."""
        rounds = [num_variants]
        while self.halving and rounds[-1] > 1:
            rounds.append(rounds[-1] // 2)
        counts = [(count + 1) * num_seeds for count in rounds]
        self.runs, self.run = self.run + sum(counts), self.run + num_finished
        self.left = sum(count << later for later, count in enumerate(counts)) - num_finished
        self.seconds = [2 * fmean(self.seconds)] if self.seconds else []

    def begin_run(self, title: str) -> str:
        """``run 3 of 7: cosine`` and, once one has ended, the minutes that are left."""
        self.run += 1
        minutes = max(1.0, fmean(self.seconds) * self.left / 60) if self.seconds else None
        left = "" if minutes is None else f", about {minutes:,.0f} min left"
        return f"run {self.run} of {self.runs}: {title}{left}"

    def end_run(self, seconds: float) -> None:
        """Count a run that took so long."""
        self.seconds.append(seconds)
        self.left -= 1


def halve(
    measure: Callable[..., AblationReport],
    variants: Sequence[str] | None,
    epochs: int,
    budget_minutes: float | None = None,
) -> AblationReport:
    """The last of several ablations, each of the better half of the variants before, with twice as many epochs.

    Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016, for
    what AutoDistiller (He et al., "Distiller", 2021, arXiv 2109.11105) does by fitting a model of such runs.

    Args:
        measure: ``ablate`` without what is set here; the recipe itself is always in it.
        variants: those to begin with; None: all.
        epochs: those of the first ablation.
        budget_minutes: for all of them.
    """
    started, progress = time.monotonic(), Progress(halving=True)
    while True:
        left = None if budget_minutes is None else max(0.0, budget_minutes - (time.monotonic() - started) / 60)
        report = measure(variants=variants, epochs=epochs, budget_minutes=left, progress=progress)
        if len(report.rows) <= 1 or report.missing:
            return report
        best_first = sorted(report.rows, key=_best_first)
        variants, epochs = [row.name for row in best_first[: len(best_first) // 2]], 2 * epochs


def _best_first(row: AblationRow) -> tuple[float, str]:
    return -(row.mean or 0.0), row.name
