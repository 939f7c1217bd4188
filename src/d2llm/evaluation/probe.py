"""The verb ``probe``: what a student's vectors know of a text, and what they can rank, without any annotated data.

Probing: a linear classifier reads from a text's vector how long the text is, which word is in it, and whether its words
were changed. The tasks are those of Conneau et al., "What you can cram into a single vector", ACL 2018 (arXiv
1805.01070), as in SentEval (Conneau and Kiela 2018, arXiv 1803.05449), that need no annotation, made from any corpus.

Generated sets: LIMIT, in which each two of n passages answer one query (``data.limit_set``), and granularity, whose
queries name a scene, a thing in it, or its colour too (``data.granularity``).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.core.progress import progress_bar
from d2llm.core.types import Passage, Query, Task
from d2llm.data.granularity import make_granularity
from d2llm.data.limit_set import make_limit_set
from d2llm.models.protocols import SearchStudent
from d2llm.ops.bm25_words import sentences
from d2llm.ops.measures import per_query_measures
from d2llm.store.bm25 import bm25_lists

SHOWN_MEASURES = ("R-precision", "nDCG@10", "Recall@100")
"""R-precision: of the first R passages, the fraction that is relevant; R is the number of relevant ones."""
_LENGTHS = range(5, 31)  # words of a sentence
_LEAST_TEXTS = 200
_LENGTH_CLASSES = 4
_WORD_CLASSES = 20
_TEXTS_PER_WORD = 10
_FREQUENT = 50  # of the most frequent words, which say little of a text
_BAG_WORDS = 2000
_TEST_FRACTION = 0.2  # as much again chooses the penalty
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
_DEPTH = 100


@dataclass(frozen=True, slots=True)
class ProbingTask:
    """Texts with a class each, from 0."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return max(self.labels) + 1


@dataclass(frozen=True, slots=True)
class ProbingResult:
    """Accuracies on a task's test texts, in [0, 1].

    ``majority``: always the most frequent class. ``bag_of_words``: the classifier reads which words a text has.
    ``vectors``: it reads the student's vectors. ``margin``: half of the 95 % interval of ``vectors``, over test texts.
    """

    task: str
    num_classes: int
    num_train: int
    num_test: int
    majority: float
    bag_of_words: float
    vectors: float
    margin: float


@dataclass(frozen=True, slots=True)
class RankingResult:
    """One system on the queries of one kind of a generated set; means of ``SHOWN_MEASURES``."""

    set_name: str
    kind: str
    num_passages: int
    num_queries: int
    system: str
    measures: dict[str, float]


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What was measured; ``probing`` is empty without a corpus."""

    student: str
    fingerprint: str
    task: Task
    seed: int
    probing: tuple[ProbingResult, ...]
    ranking: tuple[RankingResult, ...]


def probe(
    student: SearchStudent,
    passages: Iterable[Passage] | None = None,
    *,
    name: str = "student",
    fingerprint: str = "",
    task: Task = "asymmetric",
    num_texts: int = 2000,
    num_persons: int = 30,
    num_distractors: int = 270,
    num_scenes: int = 200,
    seed: int = 0,
) -> ProbeReport:
    """Probe a student's vectors on sentences of a corpus, and rank two generated sets with it.

    Args:
        student: the student.
        passages: the corpus that the probing tasks are made from; None: no probing.
        name: its name in the report.
        fingerprint: its fingerprint.
        task: the task whose score ranks.
        num_texts: sentences to probe with, at most.
        num_persons: n of LIMIT, which has n (n - 1) / 2 queries (``make_limit_set``).
        num_distractors: passages of LIMIT that answer no query.
        num_scenes: passages of the granularity set.
        seed: seed of everything random.

    Raises:
        InputError: the corpus has too few sentences, or a number is out of range.
    """
    limit_set = make_limit_set(num_persons, num_distractors=num_distractors, seed=seed)
    scenes = make_granularity(num_scenes, seed=seed)
    tasks = () if passages is None else probing_tasks(sample_sentences(passages, num_texts, seed=seed), seed=seed)
    judged = {query_id: grades for split in limit_set.qrels.values() for query_id, grades in split.items()}
    return ProbeReport(
        name,
        fingerprint,
        task,
        seed,
        tuple(probe_task(student, task, seed=seed) for task in tasks),
        (
            *rank(
                student, "LIMIT", limit_set.passages, limit_set.queries, judged, dict.fromkeys(judged, "pairs"), task
            ),
            *rank(student, "granularity", scenes.passages, scenes.queries, scenes.qrels, scenes.granularity, task),
        ),
    )


def sample_sentences(passages: Iterable[Passage], num_sentences: int, *, seed: int) -> list[str]:
    """At most ``num_sentences`` different sentences of 5 to 30 words, drawn at random from all passages, in random
    order.

    Raises:
        InputError: there are fewer than 200.
    """
    rng, kept, num_seen = random.Random(seed), list[str](), 0
    for passage in passages:
        for start, end in sentences(passage.text):
            sentence = " ".join(passage.text[start:end].split())
            if len(sentence.split()) not in _LENGTHS:
                continue
            num_seen += 1
            if len(kept) < num_sentences:
                kept.append(sentence)
            elif (position := rng.randrange(num_seen)) < num_sentences:
                kept[position] = sentence
    kept = [*dict.fromkeys(kept)]
    rng.shuffle(kept)
    if len(kept) < _LEAST_TEXTS:
        raise InputError(
            f"the corpus has {len(kept)} different sentences of {_LENGTHS[0]} to {_LENGTHS[-1]} words, but probing "
            f"needs at least {_LEAST_TEXTS}; give a larger corpus, or none"
        )
    return kept


def probing_tasks(texts: Sequence[str], *, seed: int) -> tuple[ProbingTask, ...]:
    """The tasks that can be made from these texts; word content is left out if no two words are frequent enough."""
    words = [text.split() for text in texts]
    counts = Counter(word.lower() for text_words in words for word in {*text_words} if _is_plain(word))
    tasks = [_length(texts, words), _word_content(texts, words, counts)]
    tasks += [
        _changed("word order", texts, words, _swap, seed=seed),
        _changed("odd word", texts, words, _Replacement(counts), seed=seed),
    ]
    return tuple(task for task in tasks if task is not None and len(task.texts) >= _LEAST_TEXTS // 2)


def _is_plain(word: str) -> bool:
    """Whether a word has small letters only: no name, number or punctuation that would give a change away."""
    return word.isalpha() and word.islower()


def _length(texts: Sequence[str], words: Sequence[Sequence[str]]) -> ProbingTask:
    """How many words a text has, in four classes of about equal size."""
    lengths = np.array([len(text_words) for text_words in words])
    limits = np.unique(np.quantile(lengths, np.arange(1, _LENGTH_CLASSES) / _LENGTH_CLASSES))
    classes = np.unique(np.searchsorted(limits, lengths), return_inverse=True)[1]
    return ProbingTask("length", tuple(texts), tuple(classes.tolist()))


def _word_content(texts: Sequence[str], words: Sequence[Sequence[str]], counts: Counter[str]) -> ProbingTask | None:
    """Which of some words a text has; texts have one of them, and each word as many texts."""
    frequent = [word for word, count in counts.most_common()[_FREQUENT:] if count >= _TEXTS_PER_WORD and len(word) > 3]
    chosen = frequent[:_WORD_CLASSES]
    by_word: dict[str, list[str]] = {word: [] for word in chosen}
    for text, text_words in zip(texts, words, strict=True):
        if len(present := {word.lower() for word in text_words} & by_word.keys()) == 1:
            by_word[present.pop()].append(text)
    used = [texts for texts in by_word.values() if len(texts) >= _TEXTS_PER_WORD]
    if len(used) < 2:
        return None
    smallest = min(map(len, used))
    pairs = [(text, label) for label, texts_of_label in enumerate(used) for text in texts_of_label[:smallest]]
    return ProbingTask("word content", *zip(*pairs, strict=True))


def _changed(
    name: str,
    texts: Sequence[str],
    words: Sequence[list[str]],
    change: Callable[[list[str], random.Random], list[str] | None],
    *,
    seed: int,
) -> ProbingTask:
    """Whether a text was changed, as every second one is; texts that cannot be changed are left out."""
    rng = random.Random(f"{seed}:{name}")
    rows: list[tuple[str, int]] = []
    for text, text_words in zip(texts, words, strict=True):
        changed = change(text_words, rng)
        if changed is not None:
            label = len(rows) % 2
            rows.append((" ".join(changed) if label else text, label))
    return ProbingTask(name, tuple(text for text, _ in rows), tuple(label for _, label in rows))


def _swap(words: list[str], rng: random.Random) -> list[str] | None:
    """Exchange two different neighbouring words."""
    positions = [
        position
        for position, (one, other) in enumerate(pairwise(words))
        if one != other and _is_plain(one) and _is_plain(other)
    ]
    if not positions:
        return None
    position = rng.choice(positions)
    return [*words[:position], words[position + 1], words[position], *words[position + 2 :]]


class _Replacement:
    """Replaces a word, but no very frequent one, by one of the ten words that are next to it in frequency."""

    def __init__(self, counts: Counter[str]) -> None:
        self.words = [word for word, _ in counts.most_common()[_FREQUENT:] if len(word) > 3]
        self.rank_of = {word: index for index, word in enumerate(self.words)}

    def __call__(self, words: list[str], rng: random.Random) -> list[str] | None:
        positions = [position for position, word in enumerate(words) if word in self.rank_of]
        if not positions:
            return None
        position = rng.choice(positions)
        rank = self.rank_of[words[position]]
        near = [word for word in self.words[max(0, rank - 5) : rank + 6] if word not in words]
        return [*words[:position], rng.choice(near), *words[position + 1 :]] if near else None


def probe_task(student: SearchStudent, task: ProbingTask, *, seed: int) -> ProbingResult:
    """Train the classifiers of one task on three fifths of its texts and measure them on one fifth."""
    order = random.Random(f"{seed}:{task.name}").sample(range(len(task.texts)), len(task.texts))
    num_test = round(_TEST_FRACTION * len(order))
    test, dev, train = order[:num_test], order[num_test : 2 * num_test], order[2 * num_test :]
    with progress_bar(f"probing {task.name}", len(task.texts)) as advance:
        vectors = student.encode_passages(task.texts, advance=advance).vectors
    labels = np.array(task.labels)
    splits = [np.array(part) for part in (train, dev, test)]
    majority = np.bincount(labels[train]).argmax()
    accuracy = classifier_accuracy(vectors, labels, *splits)
    return ProbingResult(
        task.name,
        task.num_classes,
        len(train),
        len(test),
        float((labels[test] == majority).mean()),
        classifier_accuracy(_bags(task.texts, train), labels, *splits),
        accuracy,
        1.96 * (accuracy * (1 - accuracy) / len(test)) ** 0.5,
    )


def _bags(texts: Sequence[str], train: Sequence[int]) -> NDArray[np.float32]:
    """Which of the most frequent words of the training texts each text has [texts, words], 0 or 1."""
    words = [{*text.lower().split()} for text in texts]
    counts = Counter(word for position in train for word in sorted(words[position]))
    column = {word: position for position, (word, _) in enumerate(counts.most_common(_BAG_WORDS))}
    bags = np.zeros((len(texts), len(column)), np.float32)
    for row, text_words in enumerate(words):
        bags[row, [column[word] for word in text_words if word in column]] = 1
    return bags


def classifier_accuracy(
    inputs: NDArray[np.float32],
    labels: NDArray[np.int64],
    train: NDArray[np.int64],
    dev: NDArray[np.int64],
    test: NDArray[np.int64],
) -> float:
    """Accuracy of a logistic regression on ``test``; its L2 penalty is the one that is best on ``dev``.

    The inputs are standardised. Multinomial logistic regression as in SentEval, fitted by L-BFGS.
    """
    mean, deviation = inputs[train].mean(axis=0), inputs[train].std(axis=0)
    values = torch.from_numpy((inputs - mean) / np.where(deviation > 0, deviation, 1)).float()
    target = torch.from_numpy(labels).long()
    results = [
        _accuracies(values, target, torch.from_numpy(train), [torch.from_numpy(dev), torch.from_numpy(test)], penalty)
        for penalty in _PENALTIES
    ]
    return max(results, key=lambda result: result[0])[1]


def _accuracies(values: Tensor, target: Tensor, train: Tensor, splits: Sequence[Tensor], penalty: float) -> list[float]:
    """Accuracy on each part of the classifier with this penalty."""
    weights = torch.zeros(values.shape[1], int(target.max()) + 1, requires_grad=True)
    bias = torch.zeros(weights.shape[1], requires_grad=True)
    # Accuracies do not change any more long before the loss is exact.
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=100, tolerance_grad=1e-4, tolerance_change=1e-5, line_search_fn="strong_wolfe"
    )
    rows, classes = values[train], target[train]

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(rows @ weights + bias, classes) + penalty * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType] - a closure may return a tensor
    with torch.no_grad():
        right = (values @ weights + bias).argmax(dim=1) == target
    return [float(right[part].float().mean()) for part in splits]


def rank(
    student: SearchStudent,
    set_name: str,
    passages: Sequence[Passage],
    queries: Sequence[Query],
    qrels: Mapping[str, Mapping[str, int]],
    kinds: Mapping[str, str],
    task: Task,
) -> list[RankingResult]:
    """Rank all passages for each query by BM25, by the student's inner product and by its whole score."""
    ids = [passage.id for passage in passages]
    by_id = {passage.id: passage for passage in passages}
    rankings = {"BM25": dict(zip((q.id for q in queries), bm25_lists(by_id, ids, queries, _DEPTH), strict=True))}
    passage_vectors = student.encode_passages([passage.full_text for passage in passages]).vectors
    query_vectors = student.encode_queries([query.text for query in queries]).vectors
    scores: dict[str, NDArray[np.float32]] = {}
    if student.has_dot:
        scores["student, inner product"] = student.query_vectors(query_vectors, task) @ passage_vectors.T
    scores["student"] = np.stack([student.score(vector, passage_vectors, task) for vector in query_vectors])
    for system, rows in scores.items():
        best = np.argsort(-rows, axis=1, kind="stable")[:, :_DEPTH]
        rankings[system] = {
            query.id: [ids[index] for index in row] for query, row in zip(queries, best.tolist(), strict=True)
        }
    results: list[RankingResult] = []
    for kind in dict.fromkeys(kinds.values()):
        judged = {query_id: dict(grades) for query_id, grades in qrels.items() if kinds[query_id] == kind}
        for system, ranking in rankings.items():
            values = per_query_measures(ranking, judged)
            means = {measure: fmean(per_query.values()) for measure, per_query in values.items()}
            means["R-precision"] = fmean(
                len({*ranking[query_id][: len(grades)]} & grades.keys()) / len(grades)
                for query_id, grades in judged.items()
            )
            shown = {measure: means[measure] for measure in SHOWN_MEASURES}
            results.append(RankingResult(set_name, kind, len(passages), len(judged), system, shown))
    return results
