"""How much the words of a query count: fitted to judgements, stored with the student, and used by a search."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage
from d2llm.data.beir import Dataset
from d2llm.models.fitted_part import TermWeights
from d2llm.models.student import Student
from d2llm.ops.bm25_words import placed_terms, terms
from d2llm.ops.ridge import RidgeSet, choose_penalty, folds_of, ridge_weights
from d2llm.retrieval.cosine import DotStudent
from d2llm.retrieval.index import Index
from d2llm.store.bm25 import WordIndex
from d2llm.training.fit_scores import fit_scores, fit_term_weights
from fake_models import FakeStudent
from tiny_data import make_source, topics
from tiny_models import tiny_student_config, write_tiny_model

STATES = {"kept": [1.0, 0.0], "dropped": [0.0, 1.0]}


class TwoWords:
    """Words that begin with "kept" have one state, all others another."""

    fingerprint = "two words"

    def term_states(self, queries: list[str]) -> list[dict[str, np.ndarray]]:
        return [
            {
                term: np.array(STATES["kept" if term.startswith("kept") else "dropped"], np.float32)
                for term in terms(query)
            }
            for query in queries
        ]


def repeated(name: str, *, num: int = 40) -> Dataset:
    """Each relevant passage repeats the first word of its query, and every fourth its second word too."""
    passages, queries, qrels = {}, {}, {}
    for n in range(num):
        passages[f"p{n:02}"] = f"kept{n} something" + (f" dropped{n}" if n % 4 == 0 else "")
        queries[f"q{n:02}"] = f"kept{n} dropped{n}"
        qrels[f"q{n:02}"] = {f"p{n:02}": 1}
    return make_source(passages, queries, [], qrels={"train": qrels}, name=name).dataset


def weights_of(student: Student, seed: int = 0) -> TermWeights:
    weights = np.random.default_rng(seed).normal(size=student.vector_dim).tolist()
    counts, values = {"tiny": 1}, {"tiny": 0.5}
    return TermWeights(weights=weights, offset=0.4, usual=0.7, num_words=counts, explained=values)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    model = write_tiny_model(tmp_path_factory.mktemp("model"), "modernbert", initializer_range=0.1)
    return Student.create(tiny_student_config(model), device="cpu", dtype="float32")


def test_factors_are_shares_of_relevant_passages() -> None:
    fitted = fit_term_weights(TwoWords(), [repeated("one")])
    kept, dropped = fitted.factors(np.array([STATES["kept"], STATES["dropped"]], np.float32)).tolist()
    # 1 and 1/4, drawn towards their mean by the penalty
    assert 0.9 < kept < 1.01
    assert 0.24 < dropped < 0.35
    assert fitted.usual == pytest.approx((1 + 1 / 4) / 2)
    assert fitted.num_words == {"one": 80}
    # Of the shares 1 (40 times), 1 (10) and 0 (30), the means 1 and 1/4 of the two words explain 1 - 7.5 / 18.75.
    assert fitted.explained["one"] == pytest.approx(1 - 7.5 / 18.75, abs=0.05)


def test_a_factor_has_a_lower_limit() -> None:
    fitted = TermWeights(weights=(1.0,), offset=0.0, usual=0.5, num_words={}, explained={})
    assert fitted.factors(np.array([[-3.0], [0.2]], np.float32)).tolist() == pytest.approx([0.05, 0.2])


def test_too_few_queries_are_refused() -> None:
    with pytest.raises(InputError, match=r"few: 'train' has 10 queries with a relevant passage, but at least 20"):
        fit_term_weights(TwoWords(), [repeated("few", num=10)])


def test_ridge_regression_of_several_sets() -> None:
    rng = np.random.default_rng(0)
    sets = [RidgeSet(rng.normal(size=(n, 3)) + n, rng.normal(size=n), folds_of(n)) for n in (30, 50)]
    # As least squares: each row by the root of its share, the penalty as further rows.
    rows = [(s.features - s.features.mean(axis=0)) / math.sqrt(2 * len(s.targets)) for s in sets]
    values = [(s.targets - s.targets.mean()) / math.sqrt(2 * len(s.targets)) for s in sets]
    variance = sum((part**2).sum() for part in rows) / 3
    expected, *_ = np.linalg.lstsq(
        np.vstack([*rows, math.sqrt(0.3 * variance) * np.eye(3)]), np.concatenate([*values, np.zeros(3)]), rcond=None
    )
    np.testing.assert_allclose(ridge_weights(sets, 0.3), expected, rtol=1e-9)


def test_the_penalty_is_chosen_on_rows_left_out() -> None:
    """Features that say nothing fit the rows they have seen, and the less so, the higher the penalty."""
    rng = np.random.default_rng(1)
    targets = rng.normal(size=60)
    features = np.concatenate([targets[:, None] + rng.normal(size=(60, 1)), rng.normal(size=(60, 45))], axis=1)
    sets = [RidgeSet(features, targets, folds_of(60))]
    penalty, (value,) = choose_penalty(sets, lambda own, true: float(np.corrcoef(own, true)[0, 1]))
    seen = float(np.corrcoef(features @ ridge_weights(sets, penalty), targets)[0, 1])
    assert penalty >= 0.3
    assert 0.2 < value < seen


def test_places_of_terms() -> None:
    assert placed_terms("Cats sleep, 猫猫") == [
        ((0, 4), "cat"),
        ((5, 10), "sleep"),
        ((12, 13), "猫"),
        ((13, 14), "猫"),
        ((12, 14), "猫猫"),
    ]
    assert placed_terms("İ sleeps") == [((0, 1), "i"), ((2, 8), "sleep")]  # longer in lower case


def test_states_of_terms_are_means_of_their_tokens(student: Student) -> None:
    text = "unbelievable cats see cats"
    (states,) = student.term_states([text])
    tokenized = student.tokenize([text], "query")
    spans = student.backbone.token_spans(text, len(tokenized.ids[0]), "query")
    own, _ = student.backbone(*student.backbone.pad(tokenized.ids))
    own = own[0].detach().numpy()
    # Not by overlap: by the word of which a token's middle is a part.
    word_of = [(text[: (start + end) // 2].count(" "), end > start) for start, end in spans]
    for term, words in {"unbeliev": {0}, "cat": {1, 3}, "see": {2}}.items():
        tokens = [at for at, (word, is_text) in enumerate(word_of) if is_text and word in words]
        np.testing.assert_allclose(states[term], own[tokens].mean(axis=0), rtol=1e-4, atol=1e-5)
    assert student.term_factors([text]) is None


def test_words_beyond_the_limit_have_the_usual_factor(student: Student) -> None:
    student.term_weights = weights_of(student)
    text = " ".join(f"word{n}" for n in range(300)) + " zebra"
    try:
        (factors,) = student.term_factors([text])
    finally:
        student.term_weights = None
    assert factors["zebra"] == 0.7
    assert factors.keys() == {*terms(text)}
    assert factors["word0"] != 0.7


def test_they_are_stored_with_the_student(student: Student, tmp_path: Path) -> None:
    student.term_weights = weights_of(student)
    try:
        student.save(tmp_path / "s")
    finally:
        student.term_weights = None
    loaded = Student.load(tmp_path / "s", device="cpu", dtype="float32")
    assert loaded.term_weights == weights_of(student)
    assert loaded.fingerprint == student.fingerprint
    with pytest.raises(DataFormatError, match="was fitted to the student"):
        TermWeights.read(tmp_path / "s", "another")


def test_words_count_by_their_factors() -> None:
    texts = ["red cats", "red dogs", "cats", "birds"]
    index = WordIndex.from_texts(texts)
    words = index.query("red cats cats owls", {"red": 0.5, "cat": 2.0, "owl": 1.0})
    idf = math.log1p((4 - 2 + 0.5) / (2 + 0.5))
    norms = [1.2 * (0.25 + 0.75 * len(text.split()) / (6 / 4)) for text in texts]
    red, cat = 0.5 * idf, 2 * 2.0 * idf
    expected = [(red + cat) / (1 + norms[0]), red / (1 + norms[1]), cat / (1 + norms[2]), 0]
    assert index.scores(words).tolist() == pytest.approx(expected, rel=1e-6)
    assert words.limit == pytest.approx(red + cat, rel=1e-6)
    assert words.statistics.tolist() == pytest.approx([math.log1p(4), math.log1p(red + cat), cat / (red + cat), 0.25])


class CountingStudent(FakeStudent):
    """A word of six letters or more counts ten times as much as another."""

    def term_factors(self, queries: list[str]) -> list[dict[str, float]]:
        return [{term: 10.0 if len(term) > 5 else 1.0 for term in terms(query)} for query in queries]


@pytest.mark.parametrize("num_shards", [None, 2])
def test_a_search_counts_words_by_their_factors(tmp_path: Path, num_shards: int | None) -> None:
    student = CountingStudent()
    passages = [Passage("a", "green cats"), Passage("b", "purple"), Passage("c", "green cats run"), Passage("d", "dog")]
    index = Index.create(tmp_path / "i", student, vector_format="float32", num_shards=num_shards)
    index.upsert(passages)
    words = WordIndex.from_texts(passage.full_text for passage in passages)
    text = "green cats purple"
    scores = words.scores(words.query(text, student.term_factors([text])[0]))
    vectors = student.encode_passages([passage.full_text for passage in passages]).vectors
    own = student.score(student.encode_queries([text]).vectors[0], vectors, "asymmetric")
    expected = dict(zip("abcd", (own + 3.0 * scores).tolist(), strict=True))
    score_features = {"bm25": 3.0}
    for exact in (False, True):
        ranking = index.search(text, top_k=4, score_features=score_features, exact=exact)
        results = {result.passage.id: result.score for result in ranking.passages}
        assert results == pytest.approx(expected, rel=1e-5)
        if exact:
            assert ranking.certificate is not None
            assert ranking.certificate.proved == 4
    assert DotStudent(student).term_factors([text]) == student.term_factors([text])
    assert DotStudent(FakeStudent()).term_factors([text]) is None


def test_the_verb_fits_words_before_their_weights(student: Student, tmp_path: Path) -> None:
    data = topics(shift=0, num_train=40, num_dev=24).dataset
    data.qrels["train"] = {
        query: {p: 1 for p in data.passages if int(p[-2:]) % 8 == int(query[-2:]) % 8}
        for query in data.queries
        if query.startswith("q")
    }
    try:
        report = fit_scores(student, [data], "asymmetric", window_vectors=False, term_weights=True)
        assert report.term_weights is not None
        assert report.term_weights["num_words"]["tiny"] > 40
        assert student.term_weights is not None
        with pytest.raises(InputError, match="weight must be fitted again"):
            fit_scores(student, [data], "asymmetric", words=False, term_weights=True)
    finally:
        student.prepare_training()
