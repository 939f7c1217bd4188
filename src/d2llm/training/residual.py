"""Trains the interaction as a residual, on vectors that are computed once, with many candidates for each query.

This is the second stage of a distillation in stages. The first has trained the vectors. Now they stay fixed, so a step
needs no pass through the backbone, and a query can be scored against its nearest passages as well as those of its plan.
What the inner product already ranks correctly has no gradient; the interaction learns the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2llm.core.errors import OutOfTimeError
from d2llm.core.progress import progress_bar, remarks
from d2llm.core.types import Task
from d2llm.data.collation import Draw, LabelledSource, collate_lists
from d2llm.models.interaction import Interaction, PairScores
from d2llm.models.student import Student
from d2llm.ops.batching import even_batches
from d2llm.ops.selection import nearest_rows
from d2llm.recipe import Recipe, ResidualConfig
from d2llm.training.checkpoints import BestState, warmup_steps
from d2llm.training.choose_weights import mean_value
from d2llm.training.dev_sets import DevResult, DevSet, EncodedDev, encode_dev, encode_together, measure_by_weight
from d2llm.training.losses import LossInput, batch_losses, weighted_sum
from d2llm.training.processes import ALONE, Processes
from d2llm.training.trainer import Trainable, Trainer

AskTeacher = Callable[[LabelledSource, Mapping[str, Sequence[str]]], None]
"""Lets the teacher score passages (query_id -> passage ids), and adds its labels to the data set's store."""


@dataclass(frozen=True)
class _Vectors:
    """The vectors of one data set: queries of its entries [q, d], and passages of the plan [n, d]."""

    labelled: LabelledSource
    queries: Tensor
    passages: Tensor
    ids: list[str]
    row: dict[str, int]
    near: NDArray[np.int64] | None
    """[q, depth] rows of the passages with the largest inner products; None for labelled pairs."""
    near_queries: NDArray[np.int64] | None
    """The same among the queries, each query itself included; None if it is not needed."""


def train_residual(
    student: Student,
    sources: Sequence[LabelledSource],
    dev_sets: Sequence[DevSet],
    recipe: Recipe,
    offsets: Callable[[LabelledSource], Tensor | None],
    write: Callable[..., None],
    *,
    ask_teacher: AskTeacher,
    processes: Processes = ALONE,
) -> dict[str, DevResult]:
    """Train the interaction of a dot student on its own vectors, and keep the epoch with the best dev result.

    Dev results are taken at the best weight r of each task, which may be 0, so the result is never worse on dev than
    the inner product alone. Only the interaction changes; it is trained with r = 1, the value in a new student. The
    stage is short and starts over after an interruption. If its time is over (``core.time_limit``), the best epoch so
    far is kept.

    Several processes encode the texts together, which takes nearly all of the time. The first one trains alone: a step
    on cached vectors is shorter than the exchange of its gradient would be.

    Args:
        student: a student with the head ``dot``.
        sources: data sets with their labels.
        dev_sets: dev sets for choosing the epoch and the weights.
        recipe: the recipe, with ``training.residual``, losses and seed.
        offsets: returns the logit of a pair set at which yes and no are equally likely.
        write: writes ``step`` and named values to the log.
        ask_teacher: labels passages of queries, if ``training.unjudged`` is "ask_teacher".
        processes: the processes that share the work; all must call this function.

    Returns:
        The dev results of the state that is kept; empty in other processes than the first, whose interaction is not
        trained.
    """
    config = recipe.training.residual
    head = student.interaction
    assert isinstance(head, Interaction)
    student.eval()
    # Only the symmetric interaction is penalised for changing the ranking of queries of asymmetric sets.
    needs_queries = config.off_task_penalty > 0 and any(source.source.task == "symmetric" for source in sources)
    encoded = [(source, *_encode(student, source, processes)) for source in sources if source.entries]
    with progress_bar("encoding dev", sum(dev_set.num_texts for dev_set in dev_sets)) as advance:
        dev = [encode_dev(student, dev_set, advance=advance, processes=processes) for dev_set in dev_sets]
    if not processes.is_first:
        return {}
    sets = [_vectors(student, *of_set, config, with_near_queries=needs_queries) for of_set in encoded]
    if recipe.training.unjudged == "ask_teacher":
        for vectors in sets:
            ask_teacher(vectors.labelled, _drawn_neighbours(vectors, config, recipe.seed))
    run = _Training(student, head, sets, dev, recipe, offsets, write)
    trainer = Trainer(
        run,
        seed=recipe.seed,
        warmup_steps=warmup_steps(config, run.total_steps),
        max_gradient_norm=recipe.training.max_gradient_norm,
        eval_every=max(1, run.total_steps // config.epochs),
        eval_start=True,
    )
    try:
        trainer.train()
    except OutOfTimeError:
        remarks.info(
            "distill: the interaction was trained for %d of %d steps: out of time", trainer.step, run.total_steps
        )
        trainer.best.restore()
    head.eval()
    return run.results


@dataclass(eq=False)
class _Training(Trainable):
    """The interaction, the vectors it learns from, and the dev results of its best state."""

    student: Student
    head: Interaction
    sets: Sequence[_Vectors]
    dev: Sequence[EncodedDev]
    recipe: Recipe
    offsets: Callable[[LabelledSource], Tensor | None]
    write: Callable[..., None]
    title = "training the interaction"

    def __post_init__(self) -> None:
        self.config, self.results = self.recipe.training.residual, dict[str, DevResult]()
        self.only_scored = self.recipe.training.unjudged != "negatives"
        self.objective = {kind: loss for kind, loss in self.recipe.losses.root.items() if not loss.of_vectors}
        self.parameters = self.head.residual_parameters()
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.groups = [([*self.parameters.values()], self.config.learning_rate, self.config.weight_decay)]
        seeds = [f"{self.recipe.seed}:{epoch}" for epoch in range(self.config.epochs)]
        self.batches = [
            (seed, *batch) for seed in seeds for batch in _epoch(self.sets, self.config.batch_queries, seed)
        ]
        self.total_steps = len(self.batches)

    def step(self, step: int) -> dict[str, Any]:
        seed, vectors, positions = self.batches[step]
        self.head.train()
        loss = self._loss(vectors, positions, seed)
        if self.config.off_task_penalty:
            loss = loss + self.config.off_task_penalty * self._change_elsewhere(vectors, f"{seed}:{step}")
        loss.backward()
        return {"loss": loss.detach()}

    def evaluate(self) -> dict[str, DevResult]:
        self.student.eval()
        with progress_bar("measuring on dev", sum(len(encoded.queries) for encoded in self.dev)) as advance:
            return {
                encoded_dev.dev.name: measure_by_weight(self.student, encoded_dev, advance=advance)
                for encoded_dev in self.dev
            }

    def record(self, results: dict[str, DevResult], step: int, best: BestState) -> dict[str, Any]:
        if step:
            self.write(step, stage="residual", dev={name: result.values for name, result in results.items()})
        if best.update(mean_value(results), step):
            self.results = results
        return {}

    def _loss(self, vectors: _Vectors, positions: Sequence[int], seed: str) -> Tensor:
        draws = [_draw(vectors, position, self.config, seed, only_scored=self.only_scored) for position in positions]
        batch = collate_lists(vectors.labelled, draws)
        width = batch.positive.shape[1]
        lists = [[vectors.row[passage_id] for passage_id in draw.passage_ids] for draw in draws]
        rows = torch.tensor([query_rows + [0] * (width - len(query_rows)) for query_rows in lists])
        scores = self._score_lists(vectors.queries[positions], vectors.passages[rows], vectors.labelled.source.task)
        offset = self.offsets(vectors.labelled)
        inputs = LossInput(batch, scores, self.student, offset=offset)
        return weighted_sum(batch_losses(self.objective, inputs), self.objective)

    def _score_lists(self, queries: Tensor, passages: Tensor, task: Task) -> PairScores:
        device, dtype = self.student.backbone.device, self.student.backbone.compute_dtype
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return self.head.score_lists(queries.to(device), passages.to(device), task)

    def _change_elsewhere(self, vectors: _Vectors, seed: str) -> Tensor | float:
        """Mean squared change of the scores of another task's texts by this task's interaction.

        There are no labels for ranking these texts in this task, so the interaction should leave the order of the inner
        product as it is. In the symmetric task both texts are of the same kind, so a query is scored against itself and
        its nearest queries; in the asymmetric task it is scored against passages. 0 if all sets have the same task.
        """
        task = vectors.labelled.source.task
        others = [other for other in self.sets if other.labelled.source.task != task]
        if not others:
            return 0.0
        rng = random.Random(seed)
        other = rng.choice(others)
        pool, near = (other.queries, other.near_queries) if task == "symmetric" else (other.passages, other.near)
        if near is None:
            return 0.0
        chosen = rng.sample(range(len(near)), min(self.config.batch_queries, len(near)))
        width = min(self.config.num_near, near.shape[1])
        rows = [near[row, sorted(rng.sample(range(near.shape[1]), width))] for row in chosen]
        scores = self._score_lists(other.queries[chosen], pool[torch.from_numpy(np.stack(rows))], task)
        assert scores.dot is not None
        change = scores.logits.float() - scores.dot.float()
        # A change that all have in common does not affect the ranking.
        return (change - change.mean(dim=1, keepdim=True)).square().mean()


def _encode(
    student: Student, source: LabelledSource, processes: Processes
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The vectors of a data set's queries [entries, d] and of its passages [passages, d], in the order of their ids."""
    query_ids = [entry.query_id for entry in source.entries]
    queries = source.source.instructed_queries(query_ids, student.config.backbone.query_prefix)
    passages = [source.source.passage_text(passage_id) for passage_id in source.passage_ids]
    with progress_bar(f"encoding {source.source.dataset.name}", len(queries) + len(passages)) as advance:
        return (
            encode_together(student, queries, "query", advance=advance, processes=processes),
            encode_together(student, passages, "passage", advance=advance, processes=processes),
        )


def _vectors(
    student: Student,
    source: LabelledSource,
    queries: NDArray[np.float32],
    passages: NDArray[np.float32],
    config: ResidualConfig,
    *,
    with_near_queries: bool,
) -> _Vectors:
    ids = source.passage_ids
    name = source.source.dataset.name
    is_pairs = any(entry.targets for entry in source.entries)
    near: NDArray[np.int64] | None = None
    near_queries: NDArray[np.int64] | None = None
    if not is_pairs:
        dot_queries = student.query_vectors(queries, source.source.task)
        near = _nearest(dot_queries, passages, config.depth, f"neighbours in {name}")
    if with_near_queries and source.source.task == "asymmetric":
        dot_queries = student.query_vectors(queries, "symmetric")
        near_queries = _nearest(dot_queries, queries, config.num_near, f"similar queries in {name}")
    rows = {passage_id: row for row, passage_id in enumerate(ids)}
    return _Vectors(source, torch.from_numpy(queries), torch.from_numpy(passages), ids, rows, near, near_queries)


def _nearest(queries: NDArray[np.float32], passages: NDArray[np.float32], depth: int, title: str) -> NDArray[np.int64]:
    with progress_bar(title, len(queries)) as advance:
        return np.stack(nearest_rows(queries, passages, depth, advance=advance))


def _epoch(sets: Sequence[_Vectors], batch_queries: int, seed: str) -> list[tuple[_Vectors, list[int]]]:
    batches: list[tuple[_Vectors, list[int]]] = []
    for vectors in sets:
        order = list(range(len(vectors.labelled.entries)))
        random.Random(f"{seed}:{vectors.labelled.source.dataset.name}").shuffle(order)
        _, size = even_batches(len(order), batch_queries)
        batches += [(vectors, order[start : start + size]) for start in range(0, len(order), size)]
    random.Random(seed).shuffle(batches)
    return batches


def _drawn_neighbours(vectors: _Vectors, config: ResidualConfig, seed: int) -> dict[str, list[str]]:
    """query_id -> the neighbours that the epochs will draw for it, for queries that learn from the teacher."""
    entries = [] if vectors.near is None else vectors.labelled.entries
    drawn: dict[str, list[str]] = {}
    for position, entry in enumerate(entries):
        if entry.query_id in vectors.labelled.unlabelled:
            continue
        excluded = vectors.labelled.never_negative(entry)
        ids: list[str] = []
        for epoch in range(config.epochs):
            near, _ = _neighbours(vectors, position, config, f"{seed}:{epoch}")
            ids += [passage_id for passage_id in near if passage_id not in excluded]
        drawn[entry.query_id] = list(dict.fromkeys(ids))
    return drawn


def _neighbours(vectors: _Vectors, position: int, config: ResidualConfig, seed: str) -> tuple[list[str], random.Random]:
    """A sample of a query's neighbours, and the random generator for the rest of its draw."""
    assert vectors.near is not None
    rng = random.Random(f"{seed}:{vectors.labelled.entries[position].query_id}")
    rows = rng.sample(vectors.near[position].tolist(), min(config.num_near, vectors.near.shape[1]))
    return [vectors.ids[row] for row in rows], rng


def _draw(vectors: _Vectors, position: int, config: ResidualConfig, seed: str, *, only_scored: bool) -> Draw:
    """Draw a positive, the plan's negatives, neighbours by inner product and random passages; for pairs, those judged.

    ``only_scored`` keeps only neighbours that the teacher has scored, if the query learns from the teacher.
    """
    entry = vectors.labelled.entries[position]
    if vectors.near is None:
        return Draw(entry, list(entry.positives), list(entry.hard_negatives), [])
    near, rng = _neighbours(vectors, position, config, seed)
    if only_scored and entry.query_id not in vectors.labelled.unlabelled:
        unjudged = {*vectors.labelled.labels.missing(entry.query_id, near)}
        near = [passage_id for passage_id in near if passage_id not in unjudged]
    others = [vectors.ids[rng.randrange(len(vectors.ids))] for _ in range(config.num_random)]
    known = vectors.labelled.never_negative(entry) | {*entry.hard_negatives}
    drawn = dict.fromkeys([*entry.easy_negatives, *near, *others])
    easy = [passage_id for passage_id in drawn if passage_id not in known]
    return Draw(entry, [rng.choice(entry.drawn_positives)], list(entry.hard_negatives), easy)
