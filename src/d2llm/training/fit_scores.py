"""The verb ``fit-scores``: fits feature weights and probabilities on dev without training the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.inputs import objects_of
from d2llm.core.settings import shows
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_source
from d2llm.data.pairs import PairDataset, PairSource, as_retrieval
from d2llm.models.document_expansion import DocumentExpansion
from d2llm.models.learned_words import LearnedWords
from d2llm.models.score_features import ScoreFeatures
from d2llm.models.student import Student
from d2llm.recipe import ScoreFeaturesConfig
from d2llm.training.fit_document_expansion import fit_document_expansion
from d2llm.training.fit_probabilities import fit_probabilities
from d2llm.training.fit_quality import fit_quality
from d2llm.training.fit_score_features import fit_score_features
from d2llm.training.fit_term_weights import fit_term_weights
from d2llm.training.settings import FitScoresSettings


@dataclass(frozen=True, slots=True)
class FitScoresReport:
    """What was fitted for one task (``TaskFeatureWeights``, ``TaskCalibration``); None if there were too few queries.

    ``quality`` is that of passages (``PassageQuality``), ``term_weights`` those of words (``TermWeights``) and
    ``document_expansion`` says what words passages lack (``DocumentExpansion``), without the functions' own weights;
    None if it was not fitted.
    """

    task: Task
    score_features: dict[str, Any] | None
    probabilities: dict[str, Any] | None
    quality: dict[str, Any] | None = None
    term_weights: dict[str, Any] | None = None
    document_expansion: dict[str, Any] | None = None


def read_judged(paths: Sequence[str | Path], settings: FitScoresSettings) -> list[Dataset | PairDataset]:
    """Read data sets with the splits that these settings fit on; of pairs, all, whose passages are the corpus."""
    splits = None if settings.needs_train else ["dev"]
    sources = [open_source(path, splits=splits) for path in paths]
    return [
        (open_source(path) if isinstance(source, PairSource) else source).load()
        for path, source in zip(paths, sources, strict=True)
    ]


@shows(FitScoresSettings)
def fit_scores(
    student: Student,
    data: Sequence[Dataset | PairDataset] | Dataset | PairDataset,
    task: Task,
    settings: FitScoresSettings | None = None,
    **changes: Any,
) -> FitScoresReport:
    """Fit the weights of a student's score features, and its probabilities, for one task; the other task keeps its own.

    Args:
        student: the student to change; it needs an inner product if ``words`` is set.
        data: data sets with judged dev queries; in labelled pairs of yes and no, each query is to find its own passages
            among those of all splits that were read.
        task: the task of their pairs.
        settings: what to fit, on how much.
        changes: override single fields of the settings.

    Raises:
        InputError: a data set has no judged dev queries; or ``quality``, ``term_weights`` or ``document_expansion`` is
            set, and no data set has a corpus, or one has too few train judgements; or ``words`` is set and the
            student's head is ``paper``; or ``token_vectors`` is set and the student has none.
        DataFormatError: labelled pairs have scores or classes other than yes and no.
    """
    chosen = FitScoresSettings.of(settings, **changes)
    seed = chosen.seed
    data = objects_of(data, "data", (Dataset, PairDataset))
    judged: list[tuple[Dataset, Task]] = [
        (as_retrieval(dataset, "dev") if isinstance(dataset, PairDataset) else dataset, task) for dataset in data
    ]
    retrieval_sets = [dataset for dataset in data if isinstance(dataset, Dataset)]
    _check(student, chosen, has_corpus=bool(retrieval_sets))
    if chosen.term_weights:
        student.term_weights = fit_term_weights(student, retrieval_sets, seed=seed)
    if chosen.document_expansion:
        student.document_expansion = fit_document_expansion(student, retrieval_sets, seed=seed)
    if chosen.learned_words:
        student.document_expansion = LearnedWords(Student.load(chosen.learned_words, device=student.device))
    new_score_features = ScoreFeatures()
    if chosen.words:
        maxsim = student.token_projection is not None if chosen.token_vectors is None else chosen.token_vectors
        config = ScoreFeaturesConfig(bm25=True, window_bm25=True, window_vectors=chosen.window_vectors, maxsim=maxsim)
        new_score_features = fit_score_features(
            student,
            judged,
            terms=config.terms,
            words_factor=chosen.words_factor,
            num_queries=chosen.num_queries,
            num_passages=chosen.num_passages,
            seed=seed,
        )
        student.score_features = new_score_features.model_copy(
            update={"tasks": {**student.score_features.tasks, **new_score_features.tasks}}
        )
    fitted = fit_probabilities(student, judged, num_queries=chosen.num_queries, seed=seed)
    earlier = student.calibration
    kept = {other: one for other, one in earlier.with_features.items() if other not in fitted.tasks}
    student.calibration = fitted.model_copy(
        update={"tasks": {**earlier.tasks, **fitted.tasks}, "with_features": {**kept, **fitted.with_features}}
    )
    if chosen.quality:
        student.quality = fit_quality(student, retrieval_sets, seed=seed)
    score_features, calibration = new_score_features.tasks.get(task), fitted.tasks.get(task)
    return FitScoresReport(
        task,
        None if score_features is None else score_features.model_dump(),
        None if calibration is None else calibration.model_dump(),
        student.quality.model_dump(exclude={"weights"}) if chosen.quality and student.quality else None,
        student.term_weights.model_dump(exclude={"weights"}) if chosen.term_weights and student.term_weights else None,
        student.document_expansion.facts()
        if chosen.document_expansion and isinstance(student.document_expansion, DocumentExpansion)
        else None,
    )


def _check(student: Student, settings: FitScoresSettings, *, has_corpus: bool) -> None:
    """Refuse what this student or data cannot have, before anything is fitted."""
    if settings.words and not student.has_dot:
        raise InputError("words are added to an inner product, which the head 'paper' does not have; leave them out")
    if settings.token_vectors and student.token_projection is None:
        raise InputError("this student has no token embeddings; train them first with `d2llm fit-tokens`")
    on_words = [name for name in ("term_weights", "document_expansion", "learned_words") if getattr(settings, name)]
    if on_words and not settings.words:
        raise InputError(
            f"{on_words[0]} changes what words count, so their weight must be fitted again; leave words true"
        )
    if settings.document_expansion and settings.learned_words:
        raise InputError("an index adds either the words of document_expansion or learned_words; leave one of them out")
    if settings.needs_train and not has_corpus:
        raise InputError(
            "quality, term_weights and document_expansion need a corpus, and labelled pairs have none; leave them out"
        )
