"""The verb ``fit-scores``: fits feature weights and probabilities on dev without training the student."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.inputs import objects_of
from d2llm.core.names import counted
from d2llm.core.progress import progress_bar
from d2llm.core.settings import shows
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_source
from d2llm.data.pairs import PairDataset, PairSource, as_retrieval
from d2llm.models.document_expansion import NUM_WORDS, DocumentExpansion, LearnedWords
from d2llm.models.fitted_part import PassageQuality, TermWeights, directions
from d2llm.models.score_features import ScoreFeatures
from d2llm.models.student import Student
from d2llm.ops.bm25_words import terms
from d2llm.ops.pair_measures import binary_measurer
from d2llm.ops.ridge import NUM_FOLDS, PENALTIES, Moments, RidgeSet, choose_penalty, folds_of, ridge_weights
from d2llm.recipe import ScoreFeaturesConfig
from d2llm.training.fit_probabilities import fit_probabilities
from d2llm.training.fit_score_features import fit_score_features
from d2llm.training.mining.choose import key_of
from d2llm.training.settings import FitScoresSettings

_MIN_PASSAGES = 20  # relevant ones, and for quality as many others
_MIN_QUERIES = 20  # to weigh words
_MAX_PASSAGES = 20_000  # of a data set
_MIN_WITH_WORD = 2  # queries, for a word that passages may lack
_Floats = NDArray[np.float64]


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


def fit_quality(student: Student, data: Sequence[Dataset], *, seed: int = 0) -> PassageQuality:
    """Fit a student's quality of passages to the judgements of the train splits.

    Passages that some query judges relevant are told from all others of the corpus by ridge regression; its penalty is
    the one with the best mean AUC in five parts that were left out. Each data set counts by itself: what its passages
    have in common with each other, and not with those of other sets, is no quality.

    Source: Chang et al., "Neural Passage Quality Estimation for Static Pruning", SIGIR 2024 (arXiv 2407.12170), which
    trains a language model for it; here a linear function of the vector that an index stores does.

    Passages that only other splits judge relevant are left out, so that these splits can measure the result. ``seed``:
    of the draw of at most 20,000 passages of each corpus, and of the five parts.

    Raises:
        InputError: there are too few relevant passages, or too few others.
    """
    sets: dict[str, RidgeSet] = {}
    for dataset in data:
        relevant = dataset.relevant_passages(["train"])
        reserved = dataset.relevant_passages(split for split in dataset.qrels if split != "train") - relevant
        ids = sorted({*dataset.passages} - reserved, key=lambda name: key_of(seed, "quality", name))[:_MAX_PASSAGES]
        labels = np.array([passage_id in relevant for passage_id in ids], np.float64)
        if min(labels.sum(), len(labels) - labels.sum()) < _MIN_PASSAGES:
            raise InputError(
                f"{dataset.name}: {int(labels.sum())} of {len(ids):,} passages are relevant to a query of 'train', "
                f"but at least {_MIN_PASSAGES} must be, and {_MIN_PASSAGES} must not; use another data set"
            )
        with progress_bar(f"encoding passages of {dataset.name}", len(ids)) as advance:
            texts = [dataset.passages[passage_id].full_text for passage_id in ids]
            vectors = student.encode_passages(texts, advance=advance).vectors
        sets[dataset.name] = RidgeSet(directions(vectors), labels, folds_of(len(ids)))
    fitted = [*sets.values()]
    penalty, aucs = choose_penalty(fitted, _auc)
    return PassageQuality(
        weights=tuple(ridge_weights(fitted, penalty).tolist()),
        num_passages={name: len(one.targets) for name, one in sets.items()},
        num_relevant={name: int(one.targets.sum()) for name, one in sets.items()},
        auc=dict(zip(sets, aucs, strict=True)),
    )


def _auc(qualities: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    return binary_measurer(qualities, labels > 0, thresholds=None)(np.arange(len(labels)))["AUC"]


def fit_term_weights(
    student: Student, data: Sequence[Dataset], *, max_queries: int = 2_000, seed: int = 0
) -> TermWeights:
    """Fit the factors of a query's words to the fraction of its relevant passages that contain each of them.

    A linear function of the words' states, by ridge regression; its penalty is the one whose factors explain
    most of the fractions' variance in five parts of the queries that were left out.

    Of each data set, at most ``max_queries`` train queries are read, drawn at random. ``seed``: of this draw and of the
    five parts.

    Raises:
        InputError: there are too few queries with a relevant passage, or the student gives no states of words.
    """
    sets: dict[str, RidgeSet] = {}
    for dataset in data:
        positives = {query_id: ids for query_id, ids in dataset.positives("train").items() if ids}
        chosen = sorted(positives, key=lambda query_id: key_of(seed, "term weights", query_id))[:max_queries]
        if len(chosen) < _MIN_QUERIES:
            raise InputError(
                f"{dataset.name}: 'train' has {counted(len(chosen), 'query')} with a relevant passage, but at least "
                f"{_MIN_QUERIES} are needed to weigh words; use another data set"
            )
        passages = {passage_id for query_id in chosen for passage_id in positives[query_id]}
        terms_of = {passage_id: {*terms(dataset.passages[passage_id].full_text)} for passage_id in passages}
        states: list[NDArray[np.float32]] = []
        fractions: list[float] = []
        folds: list[int] = []
        words = student.term_states([dataset.queries[query_id].text for query_id in chosen])
        for query_id, word_states, fold in zip(chosen, words, folds_of(len(chosen)).tolist(), strict=True):
            for term, state in word_states.items():
                states.append(state)
                fractions.append(fmean(term in terms_of[passage_id] for passage_id in positives[query_id]))
                folds.append(fold)
        sets[dataset.name] = RidgeSet(np.array(states, np.float64), np.array(fractions), np.array(folds, np.int64))
    fitted = [*sets.values()]
    penalty, explained = choose_penalty(fitted, _explained)
    weights = ridge_weights(fitted, penalty)
    usual = fmean(float(one.targets.mean()) for one in fitted)
    middle = np.mean([one.features.mean(axis=0) for one in fitted], axis=0)
    return TermWeights(
        weights=tuple(weights.tolist()),
        offset=usual - float(middle @ weights),
        usual=usual,
        num_words={name: len(one.targets) for name, one in sets.items()},
        explained=dict(zip(sets, explained, strict=True)),
    )


def _explained(predictions: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    """The fraction of the targets' variance [n] that predictions [n] of their differences from the mean explain."""
    differences = targets - targets.mean()
    return 1 - float(((predictions - differences) ** 2).mean() / max(float(differences.var()), 1e-12))


class _Passages(NamedTuple):
    """Passages of a data set: texts, and for each the fraction of its queries that have a word, by word."""

    name: str
    texts: list[str]
    fractions: list[dict[str, float]]
    num_queries: Counter[str]
    num_passages_with: Counter[str]
    num_counted: int


def fit_document_expansion(
    student: Student,
    data: Sequence[Dataset],
    *,
    num_words: int = NUM_WORDS,
    max_passages: int = _MAX_PASSAGES,
    seed: int = 0,
) -> DocumentExpansion:
    """Fit how likely a query for a passage has each word, from the passage's vector.

    Words of at least two queries; a linear function for each, by ridge regression on the fraction of a passage's
    queries that have the word. The penalty is the one with the smallest error on five parts of the passages that were
    left out.

    Passages that are relevant in other splits too are left out, so that these can measure the result.

    Args:
        student: makes the vectors.
        data: data sets with train judgements.
        num_words: words that are added to a passage, at most.
        max_passages: of each data set, at most so many, drawn at random, are read, and as many count rarity.
        seed: seed of this draw.

    Raises:
        InputError: too few passages are relevant to a query, or no word is in two queries.
    """
    sets = [_passages_of(dataset, max_passages, seed) for dataset in data]
    num_queries = sum((data_set.num_queries for data_set in sets), Counter[str]())
    vocabulary = sorted(term for term, count in num_queries.items() if count >= _MIN_WITH_WORD)
    if not vocabulary:
        raise InputError("no word is in two of the queries of 'train'; use a data set with more of them")
    column_of = {term: index for index, term in enumerate(vocabulary)}
    texts = [text for data_set in sets for text in data_set.texts]
    with progress_bar("encoding passages with queries", len(texts)) as advance:
        features = student.encode_passages(texts, advance=advance).vectors.astype(np.float64)
    fractions = np.zeros((len(features), len(vocabulary)))
    for row, by_term in enumerate(fraction for data_set in sets for fraction in data_set.fractions):
        for term, value in by_term.items():
            if term in column_of:
                fractions[row, column_of[term]] = value
    set_of = np.repeat(np.arange(len(sets)), [len(data_set.texts) for data_set in sets])
    whole = RidgeSet(features, fractions, np.concatenate([folds_of(len(data_set.texts)) for data_set in sets]))
    errors = _errors_apart(whole, set_of)
    penalty = min(PENALTIES, key=lambda candidate: float(errors[candidate].sum()))
    usual, middle = fractions.mean(axis=0), features.mean(axis=0)
    variances = np.bincount(set_of, ((fractions - usual) ** 2).sum(axis=1))
    return DocumentExpansion(
        terms=tuple(vocabulary),
        usual=usual.astype(np.float32),
        middle=middle.astype(np.float32),
        weights=ridge_weights([whole], penalty).astype(np.float32),
        rarity=_rarity(vocabulary, sets).astype(np.float32),
        num_passages={data_set.name: len(data_set.texts) for data_set in sets},
        explained={
            data_set.name: round(1 - float(error / max(variance, 1e-12)), 4)
            for data_set, error, variance in zip(sets, errors[penalty], variances, strict=True)
        },
        num_words=num_words,
    )


def _passages_of(dataset: Dataset, max_passages: int, seed: int) -> _Passages:
    reserved = dataset.relevant_passages(split for split in dataset.qrels if split != "train")
    queries_of: defaultdict[str, list[set[str]]] = defaultdict(list)
    num_queries = Counter[str]()
    for query_id, ids in dataset.positives("train").items():
        words = {*terms(dataset.queries[query_id].text)}
        fitted = [passage_id for passage_id in ids if passage_id not in reserved]
        if fitted:
            num_queries.update(words)
        for passage_id in fitted:
            queries_of[passage_id].append(words)
    if len(queries_of) < _MIN_PASSAGES:
        raise InputError(
            f"{dataset.name}: has {counted(len(queries_of), 'passage')} relevant to a query of 'train' and to no "
            f"other split's, but at least {_MIN_PASSAGES} are needed to learn what words passages lack; use another set"
        )
    chosen = sorted(queries_of, key=lambda name: key_of(seed, "document expansion", name))[:max_passages]
    fractions: list[dict[str, float]] = []
    for passage_id in chosen:
        queries = queries_of[passage_id]
        counts = Counter(word for words in queries for word in words)
        fractions.append({word: count / len(queries) for word, count in counts.items()})
    num_with = Counter[str]()
    sample = sorted(dataset.passages, key=lambda name: key_of(seed, "rarity", name))[:max_passages]
    for passage_id in sample:
        num_with.update({*terms(dataset.passages[passage_id].full_text)})
    texts = [dataset.passages[passage_id].full_text for passage_id in chosen]
    return _Passages(dataset.name, texts, fractions, num_queries, num_with, len(sample))


def _rarity(vocabulary: Sequence[str], sets: Sequence[_Passages]) -> _Floats:
    """The idf of each word among the passages of all data sets (``store.bm25``)."""
    num_with = np.array([sum(data_set.num_passages_with[term] for data_set in sets) for term in vocabulary], np.float64)
    num = sum(data_set.num_counted for data_set in sets)
    return np.log1p((num - num_with + 0.5) / (num_with + 0.5))


def _errors_apart(data: RidgeSet, set_of: NDArray[np.int64]) -> dict[float, _Floats]:
    """By penalty, the squared errors in each data set of likelihoods that are predicted from the other four fifths."""
    errors = {penalty: np.zeros(int(set_of.max()) + 1) for penalty in PENALTIES}
    for fold in range(NUM_FOLDS):
        known, rest = data.only(data.folds != fold), data.only(data.folds == fold)
        moments, usual = Moments.of([known]), known.targets.mean(axis=0)
        differences = rest.features - known.features.mean(axis=0)
        for penalty, sums in errors.items():
            predicted = np.maximum(usual + differences @ moments.weights(penalty), 0)
            by_row = ((predicted - rest.targets) ** 2).sum(axis=1)
            sums += np.bincount(set_of[data.folds == fold], by_row, minlength=len(sums))
    return errors
