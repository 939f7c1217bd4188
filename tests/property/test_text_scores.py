"""Texts that are scored without being in an index get the scores that they have in one."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.errors import IndexMismatchError, InputError
from d2llm.core.types import Passage
from d2llm.models.score_features import FeatureWeights, WordsFactor
from d2llm.models.text_scores import TextScorer
from d2llm.retrieval.index import Index
from examples import examples
from fake_models import FakeStudent, TokenStudent
from scored_student import FACTOR, real_student
from sharded_index import WORDS, BoundedStudent
from tiny_models import TEXTS

CHINESE = "绿茶需要八十度的水。红茶要更热的水！"


class NearestStudent(BoundedStudent):
    """Words count by how near the nearest passage of the index is."""

    def feature_weights(self, task, **options):
        weights = super().feature_weights(task, **options)
        return weights.model_copy(update={"words_factor": WordsFactor(nearest_slope=-0.3, **FACTOR)})


class PaperStudent(FakeStudent):
    """No inner product; words count."""

    def feature_weights(self, task, **_):
        return FeatureWeights(terms={"bm25_fraction": 2.0, "window_bm25": 1.0})


STUDENTS = {
    "vectors": FakeStudent(),
    "tokens": TokenStudent(),
    "all": BoundedStudent(),
    "nearest": NearestStudent(),
    "paper": PaperStudent(head="paper"),
}
sentences = st.lists(st.sampled_from([*WORDS, "绿茶", "水"]), min_size=1, max_size=6).map(" ".join)
texts = st.lists(sentences | st.just(CHINESE), min_size=1, max_size=4).map(". ".join) | st.sampled_from([" ", "fig"])
passages_lists = st.lists(st.tuples(texts, st.sampled_from(["", "pear", "绿茶"])), min_size=1, max_size=8)
FORMATS = {"vector_format": "bfloat16", "window_vectors": "float16", "token_vectors": "int4"}


@pytest.fixture(scope="module", params=[*STUDENTS, "sharded"])
def indexed(request, tmp_path_factory):
    """A student, and an index of it that is filled again for every example."""
    student = STUDENTS.get(request.param, STUDENTS["nearest"])
    counted = student.feature_weights("asymmetric").part_kinds
    formats = {name: value for name, value in FORMATS.items() if name[:-8] in (*counted, "vec")}
    more = {"num_shards": 3} if request.param == "sharded" else {}
    return student, Index.create(tmp_path_factory.mktemp("index") / "i", student, **formats, **more)


@settings(max_examples=examples(15))
@given(listed=passages_lists, query=sentences | st.just(CHINESE), task=st.sampled_from(["asymmetric", "symmetric"]))
def test_scores_are_those_of_the_index(indexed, listed, query, task):
    student, index = indexed
    index.delete(index.view.list_passages())
    passages = [Passage(f"p{n}", text, title) for n, (text, title) in enumerate(listed)]
    index.upsert(passages)
    expected = {one.passage.id: one.score for one in index.search(query, top_k=len(passages), exact=True, task=task)}
    scorer = TextScorer(student, index.scoring_corpus(student, task))
    (read,), _ = scorer.read_queries([query])
    scores = scorer.score(read, scorer.read_texts([passage.full_text for passage in passages]))
    np.testing.assert_allclose(scores, [expected[passage.id] for passage in passages], rtol=1e-6, atol=1e-6)
    reverse = scorer.read_texts([passage.full_text for passage in passages[::-1]])
    np.testing.assert_array_equal(scorer.score(read, reverse), scores[::-1])


@settings(max_examples=examples(15))
@given(listed=st.lists(texts, min_size=1, max_size=8), other=texts, query=sentences)
def test_without_an_index_a_score_depends_on_no_other_text(listed, other, query):
    for name in ("vectors", "tokens", "all", "paper"):
        scorer = TextScorer(STUDENTS[name])
        (read,), _ = scorer.read_queries([query])
        scores = scorer.score(read, scorer.read_texts(listed))
        np.testing.assert_array_equal(scorer.score(read, scorer.read_texts([other, *listed]))[1:], scores)


@pytest.mark.parametrize("kind", ["vectors", "words", "tokens", "all"])
@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
def test_a_ranking_of_a_student_is_that_of_its_index(tmp_path, kind, task):
    student = real_student(tmp_path, kind)
    index = Index.create(tmp_path / "index", student)
    long = ". ".join(text.capitalize() for text in TEXTS[:9])
    several = [*TEXTS[:6], TEXTS[2], "", long, CHINESE, f"{TEXTS[1]} fig."]
    passages = [Passage(f"p{n}", text, title="the cat" if n % 3 else "") for n, text in enumerate(several)]
    index.upsert(passages)
    query = f"{TEXTS[0]} fig"
    expected = {one.passage.id: one.score for one in index.search(query, top_k=99, task=task)}
    ranking = student.rank(query, passages, index=index, task=task)
    scores = {one.passage.id: one.score for one in ranking}
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        assert score == pytest.approx(expected[name], rel=1e-4, abs=1e-3), name
    texts = [passage.full_text for passage in passages]
    predicted = student.predict([(query, text) for text in texts], index=index, task=task)
    np.testing.assert_allclose(predicted, [scores[passage.id] for passage in passages], rtol=1e-4, atol=1e-3)
    if kind != "vectors" and task == "asymmetric":
        alone = {one.passage.id: one.score for one in student.rank(query, passages, task=task)}
        assert alone != pytest.approx(scores, rel=1e-3)  # words are as rare as in the background
        vectors = student.encode_passages(texts).vectors
        plain = student.score(student.encode_queries([query]).vectors[0], vectors, task)
        assert not np.allclose(plain, [alone[passage.id] for passage in passages], rtol=1e-3)


def test_pairs_of_several_queries_in_any_order(tmp_path):
    student = real_student(tmp_path, "tokens")
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[3], TEXTS[1]), (TEXTS[0], TEXTS[2]), (TEXTS[0], TEXTS[1])]
    scores = student.predict(pairs)
    for (query, text), score in zip(pairs, scores, strict=True):
        assert score == pytest.approx(student.rank(query, [text])[0].score, rel=1e-4, abs=1e-4)
    assert student.predict([]).shape == (0,)


def test_wrong_arguments_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    student = real_student(tmp_path, "words")
    with pytest.raises(InputError, match="top_k is 0"):
        student.rank("a", ["b"], top_k=0)
    with pytest.raises(InputError, match=r"pairs\[0\] is 'ab'"):
        student.predict(["ab"])
    index = Index.create(tmp_path / "others", FakeStudent())
    with pytest.raises(IndexMismatchError, match="fake-student"):
        student.rank("a", ["b"], index=index)
    with pytest.raises(IndexMismatchError, match="fake-student"):
        student.predict([("a", "b")], index=index)


def test_the_best_are_the_first_of_all(tmp_path):
    student = real_student(tmp_path, "tokens")
    everything = student.rank(TEXTS[0], TEXTS[:8])
    best = student.rank(TEXTS[0], TEXTS[:8], top_k=3)
    assert best.passages == everything.passages[:3]
    assert best.num_candidates == 8
