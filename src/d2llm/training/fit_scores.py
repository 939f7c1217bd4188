"""The verb ``fit-scores``: fits feature weights and probabilities on dev without training the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.inputs import objects_of
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.pairs import PairDataset, as_retrieval
from d2llm.models.score_features import ScoreFeatures
from d2llm.models.student import Student
from d2llm.recipe import ScoreFeaturesConfig
from d2llm.training.fit_document_expansion import fit_document_expansion
from d2llm.training.fit_probabilities import fit_probabilities
from d2llm.training.fit_quality import fit_quality
from d2llm.training.fit_score_features import LISTED_PASSAGES, fit_score_features
from d2llm.training.fit_term_weights import fit_term_weights


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


def fit_scores(
    student: Student,
    data: Sequence[Dataset | PairDataset] | Dataset | PairDataset,
    task: Task,
    *,
    words: bool = True,
    words_factor: bool | None = None,
    window_vectors: bool = True,
    token_vectors: bool | None = None,
    quality: bool = False,
    term_weights: bool = False,
    document_expansion: bool = False,
    num_queries: int = 200,
    num_passages: int = LISTED_PASSAGES,
    seed: int = 0,
) -> FitScoresReport:
    """Fit the weights of a student's score features, and its probabilities, for one task; the other task keeps its own.

    Args:
        student: the student to change; it needs an inner product if ``words`` is set.
        data: data sets with judged dev queries; in labelled pairs of yes and no, each query is to find its own passages
            among those of all splits that were read.
        task: the task of their pairs.
        words: fit the weights of BM25 and of windows; otherwise the present weights are kept.
        words_factor: the weight of words depends on the query; by default if that is better.
        window_vectors: also fit the weight of the window vectors, which an index then computes and stores;
            otherwise only words.
        token_vectors: also fit the weight of the token embeddings; by default if the student has them
            (``training.fit_tokens``).
        quality: also fit which passages answer queries at all, on the train split (``training.fit_quality``).
        term_weights: first fit how much each word of a query counts, on the train split
            (``training.fit_term_weights``); the weights are then fitted to words that count so.
        document_expansion: first fit what words passages lack, on the train split
            (``training.fit_document_expansion``); the weights are then fitted to passages with these words.
        num_queries: maximum number of queries per data set.
        num_passages: minimum number of passages per data set to encode (``make_feature_lists``).
        seed: seed of the choice of queries and passages.

    Raises:
        InputError: a data set has no judged dev queries; or ``quality``, ``term_weights`` or ``document_expansion`` is
            set, and no data set has a corpus, or one has too few train judgements; or ``words`` is set and the
            student's head is ``paper``; or ``token_vectors`` is set and the student has none.
        DataFormatError: labelled pairs have scores or classes other than yes and no.
    """
    data = objects_of(data, "data", (Dataset, PairDataset))
    judged: list[tuple[Dataset, Task]] = [
        (as_retrieval(dataset, "dev") if isinstance(dataset, PairDataset) else dataset, task) for dataset in data
    ]
    if token_vectors is None:
        token_vectors = student.token_projection is not None
    retrieval_sets = [dataset for dataset in data if isinstance(dataset, Dataset)]
    on_words: list[str] = [*["term_weights"] * term_weights, *["document_expansion"] * document_expansion]
    _check(student, words=words, token_vectors=token_vectors, on_words=on_words)
    _check_corpus(retrieval_sets, needs_one=quality or bool(on_words))
    if term_weights:
        student.term_weights = fit_term_weights(student, retrieval_sets, seed=seed)
    if document_expansion:
        student.document_expansion = fit_document_expansion(student, retrieval_sets, seed=seed)
    new_score_features = ScoreFeatures()
    if words:
        config = ScoreFeaturesConfig(bm25=True, window_bm25=True, window_vectors=window_vectors, maxsim=token_vectors)
        new_score_features = fit_score_features(
            student,
            judged,
            terms=config.terms,
            words_factor=words_factor,
            num_queries=num_queries,
            num_passages=num_passages,
            seed=seed,
        )
        student.score_features = new_score_features.model_copy(
            update={"tasks": {**student.score_features.tasks, **new_score_features.tasks}}
        )
    fitted = fit_probabilities(student, judged, num_queries=num_queries, seed=seed)
    student.calibration = fitted.model_copy(update={"tasks": {**student.calibration.tasks, **fitted.tasks}})
    if quality:
        student.quality = fit_quality(student, retrieval_sets, seed=seed)
    score_features, calibration = new_score_features.tasks.get(task), fitted.tasks.get(task)
    return FitScoresReport(
        task,
        None if score_features is None else score_features.model_dump(),
        None if calibration is None else calibration.model_dump(),
        student.quality.model_dump(exclude={"weights"}) if quality and student.quality else None,
        student.term_weights.model_dump(exclude={"weights"}) if term_weights and student.term_weights else None,
        student.document_expansion.facts() if document_expansion and student.document_expansion else None,
    )


def _check(student: Student, *, words: bool, token_vectors: bool, on_words: Sequence[str]) -> None:
    """Refuse what this student cannot have, before anything is fitted; ``on_words`` changes what words count."""
    if words and not student.has_dot:
        raise InputError("words are added to an inner product, which the head 'paper' does not have; leave them out")
    if token_vectors and student.token_projection is None:
        raise InputError("this student has no token embeddings; train them first with `d2llm fit-tokens`")
    if on_words and not words:
        raise InputError(
            f"{on_words[0]} changes what words count, so their weight must be fitted again; leave words true"
        )


def _check_corpus(retrieval_sets: Sequence[Dataset], *, needs_one: bool) -> None:
    if needs_one and not retrieval_sets:
        raise InputError(
            "quality, term_weights and document_expansion need a corpus, and labelled pairs have none; leave them out"
        )
