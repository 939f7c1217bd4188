"""What the score of a distilled student counts beside its vectors: fitted before the first step, and after the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import OutOfTimeError
from d2llm.core.progress import remarks
from d2llm.core.time_limit import seconds_left, time_limit
from d2llm.core.types import ScoreFeature, Task
from d2llm.data.beir import Dataset
from d2llm.data.collation import LabelledSource
from d2llm.data.plan import TrainingSource
from d2llm.models.fitted_part import Widths
from d2llm.models.score_features import FeatureWeights, ScoreFeatures, TaskFeatureWeights
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from d2llm.recipe import Recipe
from d2llm.store.bm25 import WordIndex
from d2llm.training.dev_sets import DevSet
from d2llm.training.fit_probabilities import fit_probabilities
from d2llm.training.fit_score_features import fit_score_features
from d2llm.training.fit_tokens import fit_tokens
from d2llm.training.processes import Processes
from d2llm.training.training_loop import DistillRun, listed_passages


class WordScores:
    """The words' part of the score of any query and passage of one data set, with fixed weights."""

    def __init__(self, dataset: Dataset, weights: FeatureWeights) -> None:
        self._words = WordIndex.from_texts(passage.full_text for passage in dataset.passages.values())
        self._row_of = {passage_id: row for row, passage_id in enumerate(dataset.passages)}
        self._weights = weights

    def __call__(self, query: str, passage_ids: Sequence[str]) -> NDArray[np.float32]:
        """What words add to the scores [n] of the given passages."""
        words = self._words.query(query)
        rows = np.array([self._row_of[passage_id] for passage_id in passage_ids], np.int64)
        passages, windows = self._words.score(words, rows)
        passage_weight, window_weight = self._weights.word_weights(words.limit, words.statistics)
        return passage_weight * passages + window_weight * windows


def score_features_at_start(
    student: Student, sources: Sequence[TrainingSource], recipe: Recipe, run_folder: Path, processes: Processes
) -> tuple[ScoreFeatures, TokenProjection | None]:
    """The feature weights beside the student before the first step, and its projection of tokens, if it counts.

    Both are kept in the run's folder for a run that is resumed. A student without a projection gets one, trained on
    states that do not change.
    """
    key = student.fingerprint
    if processes.is_first and not ScoreFeatures.read(run_folder, key):
        run_folder.mkdir(parents=True, exist_ok=True)
        counted: list[ScoreFeature] = [term for term in recipe.score_features.terms if term != "window_vectors"]
        judged = _with_corpus(sources)
        if "maxsim" in counted and judged and student.has_dot:
            if student.token_projection is None:
                _fit_tokens(student, judged, recipe, start=None)
            assert student.token_projection is not None
            student.token_projection.write(run_folder, key)
        fitted = _fit_score_features(student, sources, recipe, counted, use_nearest=False)
        # Only an index knows how near the nearest passage is.
        current, usable = student.score_features, dict[Task, TaskFeatureWeights]()
        for task, task_weights in current.tasks.items():
            weights = current.weights(task)
            if weights.terms.keys() <= {*counted} and not weights.needs_nearest:
                usable[task] = task_weights
        start = current.model_copy(update={"tasks": usable})
        if chosen := _with_inherited(fitted, start, student):
            chosen.write(run_folder, key)
    processes.from_first(None)  # wait until both are written
    widths = Widths(student.vector_dim, student.backbone.dim)
    return ScoreFeatures.read(run_folder, key) or ScoreFeatures(), TokenProjection.read(run_folder, key, widths)


def with_score_features(
    labelled: Sequence[LabelledSource], dev_sets: Sequence[DevSet], score_features: ScoreFeatures
) -> tuple[list[LabelledSource], list[DevSet]]:
    """The same data sets, whose scores count words and tokens where they have a weight; never for labelled pairs."""
    sources, dev = list(labelled), list(dev_sets)
    for index, labelled_source in enumerate(labelled):
        weights = score_features.weights(labelled_source.source.task, stored=("token",))
        if labelled_source.source.pairs is None and weights:
            score_words = WordScores(labelled_source.source.dataset, weights) if weights.counts_words else None
            token_weight = weights.terms.get("maxsim", 0.0)
            sources[index] = replace(labelled_source, score_words=score_words, token_weight=token_weight)
            dev[index] = dev[index].with_score_features(score_words, token_weight)
    return sources, dev


def fit_beside(
    run: DistillRun, sources: Sequence[TrainingSource], *, tokens: TokenProjection | None, score_features: ScoreFeatures
) -> None:
    """Fit the trained student's score features and probabilities on dev.

    ``tokens`` is the projection of tokens of the student that training started from, if it had one. One that was
    trained together with the backbone remains as it is. ``score_features`` has the weights of that student, which
    remain for each task for which none are fitted.
    """
    student, recipe = run.student.eval(), run.recipe
    if student.token_projection is not None:
        student.token_projection.requires_grad_(False)
    judged = _with_corpus(sources)
    if recipe.score_features.maxsim and judged and student.has_dot and student.token_projection is None:
        try:
            with time_limit(seconds_left() - run.seconds_after("tokens")):
                _fit_tokens(student, judged, recipe, start=tokens)
        except OutOfTimeError:
            student.token_projection = tokens
            remarks.info(
                "distill: there was no time to train token embeddings; %s",
                "the score counts none" if tokens is None else "the projection that training started from is kept",
            )
    if student.token_projection is None:
        student.token_projection = tokens
    has_tokens = student.token_projection is not None
    terms: list[ScoreFeature] = [term for term in recipe.score_features.terms if has_tokens or term != "maxsim"]
    student.score_features = _with_inherited(
        _fit_score_features(student, sources, recipe, terms), score_features, student
    )
    student.calibration = fit_probabilities(
        student,
        [(source.dataset, source.task) for source in sources],
        num_queries=recipe.training.dev_queries,
        seed=recipe.seed,
    )


def _fit_score_features(
    student: Student,
    sources: Sequence[TrainingSource],
    recipe: Recipe,
    terms: Sequence[ScoreFeature],
    *,
    use_nearest: bool = True,
) -> ScoreFeatures:
    """Fit the weights on dev queries of retrieval sets; labelled pairs have no corpus to count words in."""
    if not terms or not student.has_dot:
        return ScoreFeatures()
    return fit_score_features(
        student,
        [(source.dataset, source.task) for source in _with_corpus(sources)],
        terms=terms,
        use_nearest=use_nearest,
        num_queries=recipe.training.dev_queries,
        num_passages=listed_passages(recipe.training),
        seed=recipe.seed,
    )


def _fit_tokens(
    student: Student, judged: Sequence[TrainingSource], recipe: Recipe, *, start: TokenProjection | None
) -> None:
    fit_tokens(
        student,
        [source.dataset for source in judged],
        recipe.training.tokens,
        queries={source.dataset.name: [entry.query_id for entry in source.plan.entries] for source in judged},
        start=start,
        seed=recipe.seed,
    )


def _with_inherited(fitted: ScoreFeatures, start: ScoreFeatures, student: Student) -> ScoreFeatures:
    """The fitted score features; for other tasks, those of the student at the start."""
    if not (start.tasks and student.has_dot):
        return fitted
    kept = start.inherited(has_tokens=student.token_projection is not None)
    for task in sorted(kept.tasks.keys() - fitted.tasks.keys()):
        remarks.info("distill: %s search: the feature weights are those of the start", task)
    return kept.model_copy(update={"tasks": {**kept.tasks, **fitted.tasks}})


def _with_corpus(sources: Sequence[TrainingSource]) -> list[TrainingSource]:
    """The data sets that have a corpus and judged queries, in contrast to labelled pairs."""
    return [source for source in sources if source.pairs is None]
