"""Probing: tasks made from texts, classifiers on vectors of known content, and generated sets ranked by hand."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.types import Passage, Query, Task
from d2llm.evaluation import probe as module
from d2llm.evaluation.probe import (
    ProbingTask,
    classifier_accuracy,
    probe,
    probe_task,
    probing_tasks,
    rank,
    sample_sentences,
)
from d2llm.models.tokens import EncodedTexts
from d2llm.reports.html import page as page_of
from d2llm.reports.leaderboard import probe_document, probe_tables

VOCABULARY = [
    f"{a}{b}{c}"
    for a in ("bar", "cor", "din", "fel", "gon", "hap", "jul", "kef")
    for b in ("la", "mo", "su", "ti")
    for c in "aeiouy"
]


def make_texts(number: int, *, seed: int = 0) -> list[str]:
    """Sentences whose words are in alphabetical order, so that an exchange of two can be seen."""
    rng = random.Random(seed)
    texts = (" ".join(sorted(rng.sample(VOCABULARY, rng.randint(6, 14)))) for _ in range(number))
    return [f"Text {text} end." for text in texts]


class Student:
    """Vectors of a function of the text; the whole score is the inner product minus the passage's second number."""

    has_dot = True

    def __init__(self, vector: Callable[[str], Sequence[float]]) -> None:
        self.vector = vector

    def encode_queries(self, texts: Sequence[str]) -> EncodedTexts:
        return EncodedTexts(np.array([self.vector(text) for text in texts], np.float32), (), 0)

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        if advance is not None:
            advance(len(texts))
        return self.encode_queries(texts)

    def query_vectors(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        assert task == "asymmetric"
        return query_vectors

    def score(self, query_vector: NDArray[np.float32], passage_vectors: NDArray[np.float32], task: Task):
        assert task == "asymmetric"
        return passage_vectors @ query_vector - 10 * passage_vectors[:, 1]


def vector_of_words(text: str) -> list[float]:
    words = text.split()
    return [float(len(words)), *(float(word in words) for word in VOCABULARY)]


def number_of_words(text: str) -> list[float]:
    return [float(len(text.split())), 0.0]


def number_of_descents(text: str) -> list[float]:
    words = text.split()[1:-1]
    return [float(sum(one > other for one, other in itertools.pairwise(words))), 0.0]


# Texts and tasks ---------------------------------------------------------------------------------------------------


def test_sentences_are_drawn_from_all_passages_and_differ() -> None:
    texts = make_texts(400)
    passages = [Passage(str(n), f"{one} {other} {one}") for n, (one, other) in enumerate(zip(texts[::2], texts[1::2]))]  # noqa: B905
    assert sorted(sample_sentences(passages, 10_000, seed=0)) == sorted(texts)
    drawn = sample_sentences(passages, 250, seed=0)
    assert drawn == sample_sentences(passages, 250, seed=0) != sample_sentences(passages, 250, seed=1)
    assert {*drawn} <= {*texts}
    assert {*drawn} & {*texts[:100]}
    assert {*drawn} & {*texts[300:]}
    with pytest.raises(InputError, match=r"the corpus has 20 different sentences of 5 to 30 words, .* at least 200"):
        sample_sentences(passages[:10], 1000, seed=0)


@pytest.fixture(scope="module")
def tasks() -> dict[str, ProbingTask]:
    return {task.name: task for task in probing_tasks(make_texts(1000), seed=0)}


def test_lengths_are_in_four_classes_in_order(tasks: dict[str, ProbingTask]) -> None:
    task = tasks["length"]
    lengths: dict[int, set[int]] = {label: set() for label in range(task.num_classes)}
    for text, label in zip(task.texts, task.labels, strict=True):
        lengths[label].add(len(text.split()))
    assert [min(each) for each in lengths.values()] == [max(0, *lengths[n - 1]) + 1 if n else 8 for n in lengths]
    assert len(lengths) == 4
    assert min(Counter(task.labels).values()) > 150


def test_texts_have_one_of_the_words_and_words_as_many_texts(tasks: dict[str, ProbingTask]) -> None:
    task = tasks["word content"]
    assert len({*Counter(task.labels).values()}) == 1
    by_label: dict[int, set[str]] = {}
    for text, label in zip(task.texts, task.labels, strict=True):
        by_label[label] = by_label.get(label, {*text.split()}) & {*text.split()}
    words = [next(iter(each & {*VOCABULARY})) for each in by_label.values()]
    assert len({*words}) == task.num_classes > 2
    assert all(sum(word in text.split() for word in words) == 1 for text in task.texts)


def test_every_second_text_is_changed_in_one_place(tasks: dict[str, ProbingTask]) -> None:
    originals = {*make_texts(1000)}
    by_words = {tuple(sorted(text.split())): text for text in originals}
    for name in ("word order", "odd word"):
        task = tasks[name]
        assert task.labels == tuple(n % 2 for n in range(len(task.labels)))
        assert {text in originals for text, label in zip(task.texts, task.labels, strict=True) if not label} == {True}
        for text in task.texts[1::2]:
            words = text.split()
            if name == "word order":
                same = by_words[tuple(sorted(words))].split()
                differing = [n for n, pair in enumerate(zip(same, words, strict=True)) if len({*pair}) == 2]
                assert differing == [differing[0], differing[0] + 1]
            else:
                assert text not in originals
    assert len(tasks["odd word"].texts) > 100


# Classifiers -------------------------------------------------------------------------------------------------------


def test_a_classifier_finds_what_is_linear_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(600, 5)).astype(np.float32) * [1, 100, 1, 0, 1]
    parts = np.split(rng.permutation(600), [360, 480])
    labels = np.digitize(inputs[:, 1] + 300, [250, 350])
    assert classifier_accuracy(inputs.astype(np.float32), labels, *parts) > 0.9
    shuffled = rng.integers(0, 2, size=600)
    assert classifier_accuracy(inputs.astype(np.float32), shuffled, *parts) == pytest.approx(0.5, abs=0.15)


@pytest.fixture
def one_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PENALTIES", (1e-2,))  # saves time


@pytest.mark.usefixtures("one_penalty")
def test_vectors_are_credited_with_what_is_in_them(tasks: dict[str, ProbingTask]) -> None:
    words = {name: probe_task(Student(vector_of_words), tasks[name], seed=0) for name in ("word content", "word order")}
    assert words["word content"].vectors > 0.9
    assert words["word content"].bag_of_words > 0.9
    assert words["word order"].vectors < 0.7
    assert words["word order"].bag_of_words < 0.7
    order = probe_task(Student(number_of_descents), tasks["word order"], seed=0)
    assert order.vectors == 1.0
    assert order.margin == 0.0
    assert order.num_train + 2 * order.num_test == len(tasks["word order"].texts)
    assert probe_task(Student(number_of_words), tasks["length"], seed=0).vectors == 1.0
    one = words["word content"]
    assert one.margin == pytest.approx(1.96 * np.sqrt(one.vectors * (1 - one.vectors) / one.num_test))


# Generated sets ----------------------------------------------------------------------------------------------------


def test_a_ranking_by_hand() -> None:
    vectors = {"a": (3.0, 0.3), "b": (2.0, 0.0), "c": (1.0, 0.0), "q": (1.0, 0.0)}
    passages = [Passage(name, name) for name in "abc"]
    student = Student(vectors.__getitem__)
    results = rank(
        student, "set", passages, [Query("1", "q"), Query("2", "q")], {"1": {"b": 1, "c": 1}, "2": {"a": 1}},
        {"1": "pairs", "2": "one"}, "asymmetric",
    )  # fmt: skip
    by_kind = {(each.kind, each.system): each.measures for each in results}
    # By the inner product a, b, c; by the score b (2), c (1), a (0).
    assert by_kind["pairs", "student, inner product"]["R-precision"] == 0.5
    assert by_kind["pairs", "student"]["R-precision"] == 1.0
    assert by_kind["one", "student, inner product"]["nDCG@10"] == 1.0
    assert by_kind["one", "student"]["nDCG@10"] == pytest.approx(1 / np.log2(4))
    assert by_kind["one", "BM25"]["Recall@100"] == 0.0  # no word in common
    assert {each.num_queries for each in results} == {1}


@pytest.mark.usefixtures("one_penalty")
def test_the_whole_report() -> None:
    passages = [Passage(str(n), text) for n, text in enumerate(make_texts(300))]
    sizes = {"num_persons": 6, "num_distractors": 4, "num_scenes": 20, "num_texts": 250}
    report = probe(Student(vector_of_words), passages, name="<mine>", **sizes)
    assert next(each.task for each in report.probing) == "length"
    kinds = [(each.set_name, each.kind, each.num_passages) for each in report.ranking][::3]
    assert kinds[0] == ("LIMIT", "pairs", 10)
    assert {kind for _, kind, _ in kinds[1:]} == {"scene", "entity", "detail"}
    assert report.ranking[0].num_queries == 15  # each two of six
    bm25 = [each for each in report.ranking if each.system == "BM25"]
    assert bm25[0].measures["R-precision"] == 1.0
    assert json.loads(json.dumps(asdict(report)))["ranking"][0]["system"] == "BM25"
    assert next(table.title for table in probe_tables(report)).startswith("Probing")
    assert ["Bold" in probe_tables(report, has_styles=it)[0].caption for it in (True, False)] == [True, False]
    assert len(probe_tables(probe(Student(vector_of_words), **sizes))) == 1
    document = probe_document(report)
    markdown, page = document.to_markdown(), page_of(document)
    assert "| BM25 | 1.000 |" in markdown
    assert "&lt;mine&gt;" in page
    assert "<script" not in page
