"""Facts about texts, worked out by hand."""

from __future__ import annotations

import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import Passage
from d2llm.models.student import Student
from d2llm.sizing.texts import TextFacts, read_text_facts, shipped_text_facts, word_queries
from sizing.sized_index import passages
from tiny_models import write_trained_student


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return Student.load(write_trained_student(tmp_path_factory.mktemp("student")))


def test_facts_of_equal_passages(student):
    text = "The cat sat. The cat slept. A dog ran."
    facts = read_text_facts(
        [Passage(str(number), text) for number in range(4_000)], student, "equal", queries=["cat dog"]
    )
    assert facts.source == "equal"
    assert facts.text_bytes == len(text)
    assert facts.tokens == len(student.tokenize([text], "passage").ids[0])
    assert (facts.words, facts.distinct_words) == (9, 7)
    assert (facts.sentences, facts.windows) == (3, 2)
    assert facts.token_vectors == 0  # the student has none
    assert facts.query_postings == 2
    assert facts.candidate_length == 1
    assert (facts.vocabulary, facts.vocabulary_words, facts.vocabulary_growth) == (7, 36_000, 0)
    assert facts.row_bytes > 30
    assert facts.lengths == pytest.approx([1.0] * 20)
    assert facts.stored_text == pytest.approx(1, abs=0.1)  # so short texts are not compressed


def test_what_a_student_would_cut_is_counted(student):
    text = "cat dog " * 200
    facts = read_text_facts([Passage(str(number), text) for number in range(20)], student, "long")
    assert facts.tokens > 400 > student.config.backbone.max_passage_tokens


def test_a_few_long_passages_are_cut_though_the_mean_is_short(student):
    short, long = "cat dog " * 4, "cat dog " * 100  # of 38 and 2 passages
    texts = [*[short] * 38, *[long] * 2]
    facts = read_text_facts([Passage(str(number), text) for number, text in enumerate(texts)], student, "forty")
    few, many = (len(student.backbone.tokenize([text], "passage", limit=1 << 20).ids[0]) for text in (short, long))
    assert facts.tokens == pytest.approx((38 * few + 2 * many) / 40)
    assert len(facts.lengths) == 20
    assert facts.lengths[:-1] == pytest.approx([few / facts.tokens] * 19)
    assert facts.lengths[-1] == pytest.approx(many / facts.tokens)
    assert facts.read_tokens(1 << 20) == pytest.approx(facts.tokens)
    assert facts.read_tokens(50) == pytest.approx((38 * few + 2 * 50) / 40)
    # Twice as long, all of them: the short ones still fit.
    assert facts.at(2 * facts.tokens).read_tokens(50) == pytest.approx((38 * 2 * few + 2 * 50) / 40)


def test_other_lengths():
    facts = shipped_text_facts()
    same = facts.at(facts.tokens)
    left_out = {"source", "lengths"}
    assert same.model_dump(exclude=left_out) == pytest.approx(facts.model_dump(exclude=left_out))
    assert same.lengths == facts.lengths
    double = facts.at(2 * facts.tokens)
    assert (double.words, double.sentences) == (2 * facts.words, 2 * facts.sentences)
    assert facts.distinct_words < double.distinct_words < 2 * facts.distinct_words
    assert double.windows == facts.windows + facts.sentences
    assert facts.at(1).windows == 0
    assert facts.terms(4 * facts.vocabulary_words) == pytest.approx(facts.vocabulary * 4**facts.vocabulary_growth)


def test_candidates_by_words_are_longer():
    facts = shipped_text_facts().model_copy(update={"candidate_length": 3.0})
    assert facts.of_candidates(counts_words=True).words == pytest.approx(2 * facts.words)
    assert facts.of_candidates(counts_words=False) == facts


def test_too_few_passages_and_passages_without_words(student):
    with pytest.raises(InputError, match="corpus: 19 passages are too few for a sample"):
        read_text_facts(passages(19), student, "corpus")
    with pytest.raises(InputError, match="corpus: its passages have no words"):
        read_text_facts([Passage(str(number), "...") for number in range(20)], student, "corpus")


def test_queries_are_words_in_a_row():
    [query] = word_queries([" ".join(map(str, range(30)))])
    assert query == "15 16 17 18 19 20 21 22 23 24"


def test_facts_are_kept_as_json():
    facts = shipped_text_facts()
    assert TextFacts.model_validate_json(facts.model_dump_json()) == facts
