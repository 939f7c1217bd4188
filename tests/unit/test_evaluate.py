import json
from math import log2
from pathlib import Path

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.pipeline.evaluate import evaluate
from fake_models import FakeStudent, FakeTeacher

PASSAGES = {
    "a": Passage("a", "the cat sleeps on the sofa"),
    "b": Passage("b", "a dog runs in the garden"),
    "c": Passage("c", "fish swim in the sea"),
    "d": Passage("d", "birds fly over the sea"),
    "e": Passage("e", "horses eat grass in the garden"),
}
QUERIES = {
    "q1": Query("q1", "cat sleeps"),
    "q2": Query("q2", "dog garden"),
    "q3": Query("q3", "zebra"),
    "q4": Query("q4", "sea fish"),
}
QRELS = {
    "q1": {"a": 1, "gone": 1},
    "q2": {"e": 1, "b": 0},
    "q3": {"c": 1},
    "q4": {"c": 2, "d": 1},
    "left": {"gone": 1},
    "nobody": {"a": 1},
}


def make_dataset(qrels=QRELS):
    queries = QUERIES | {"left": Query("left", "cat")}
    return Dataset("zoo", Path("zoo"), PASSAGES, queries, {"test": qrels}, ("test: 1 odd thing",))


@pytest.fixture(scope="module")
def report():
    return evaluate(
        make_dataset(), student=FakeStudent(), baseline=FakeStudent(fingerprint="base"), teacher=FakeTeacher()
    )


def test_bm25_row_by_hand(report):
    # BM25 puts a first for q1, b before e for q2 (two terms against one), finds nothing for q3, c before d for q4.
    row = report.row("BM25")
    assert row.measures["nDCG@10"] == pytest.approx((1 + 1 / log2(3) + 0 + 1) / 4)
    assert row.measures["MRR@10"] == pytest.approx((1 + 1 / 2 + 0 + 1) / 4)
    assert row.measures["Recall@100"] == pytest.approx(3 / 4)
    assert row.num_queries == 4


def test_teacher_row_by_hand(report):
    # Pool: the whole corpus. Shared words: q1 a 2; q2 b 2, e 1; q3 none, so ids decide and c is third; q4 c 2, d 1.
    row = report.rows[-1]
    assert row.name.startswith("teacher")
    assert row.measures["nDCG@10"] == pytest.approx((1 + 1 / log2(3) + 1 / log2(4) + 1) / 4)
    assert row.measures["MRR@10"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1) / 4)
    assert row.measures["Recall@100"] == 1


def test_student_rows_against_numpy(report):
    def expected(fingerprint, scorer):
        student = FakeStudent(fingerprint=fingerprint)
        vectors = student.encode_passages([p.text for p in PASSAGES.values()]).vectors.astype(np.float64)
        reciprocal = []
        for query_id, relevant in (("q1", "a"), ("q2", "e"), ("q3", "c"), ("q4", "cd")):
            query = student.encode_queries([QUERIES[query_id].text]).vectors[0].astype(np.float64)
            order = np.argsort(-scorer(query, vectors))
            reciprocal.append(1 / (1 + min(order.tolist().index("abcde".index(name)) for name in relevant)))
        return np.mean(reciprocal)

    def cosine(query, vectors):
        return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)

    def full(query, vectors):
        return 2 * vectors @ query + np.tanh(vectors[:, 0] * query[1])

    names = [row.name for row in report.rows]
    assert names[:4] == ["BM25", "cosine, untuned minilm", "cosine, D2LLM vectors", "D2LLM"]
    assert report.rows[1].measures["MRR@10"] == pytest.approx(expected("base", cosine))
    assert report.rows[2].measures["MRR@10"] == pytest.approx(expected("fake-student", lambda q, v: v @ q))
    assert report.rows[3].measures["MRR@10"] == pytest.approx(expected("fake-student", full))
    assert all(row.milliseconds_per_query > 0 for row in report.rows)
    assert [row.bytes_per_passage for row in report.rows[1:4]] == [32, 32, 32]
    assert report.rows[0].bytes_per_passage > 0
    assert report.rows[4].bytes_per_passage is None


def test_what_is_counted(report):
    assert (report.num_queries, report.num_left_out, report.num_passages) == (4, 2, 5)
    assert report.missing == ()
    assert report.sample_rows == ()
    assert "test: 1 odd thing" in report.notes
    assert report.settings["student"] == "fake-student"


def test_significance(report):
    test = report.significance
    assert (test.first, test.second, test.measure) == ("D2LLM", "cosine, untuned minilm", "nDCG@10")
    assert test.difference == pytest.approx(report.rows[3].measures["nDCG@10"] - report.rows[1].measures["nDCG@10"])
    assert 0 < test.p_value <= 1


def test_report_is_json(report):
    read = json.loads(json.dumps(report.to_json()))
    assert read["rows"][3]["name"] == "D2LLM"
    assert read["rows"][3]["measures"] == report.row("D2LLM").measures
    with pytest.raises(KeyError):
        report.row("nobody")


def test_rows_that_cannot_be_made_say_why():
    report = evaluate(make_dataset(), student=FakeStudent(head="paper"))
    assert [row.name for row in report.rows] == ["BM25", "D2LLM"]
    reasons = {row.name: row.reason for row in report.missing}
    assert reasons["cosine, untuned"] == "no untuned encoder was given"
    assert "'paper' has no inner-product part" in reasons["cosine, D2LLM vectors"]
    assert reasons["teacher (reranking BM25 ∪ D2LLM, top 20)"] == "no teacher was given"
    assert report.significance is None


def test_teacher_on_a_sample_stands_beside_the_others_on_it():
    teacher = FakeTeacher()
    report = evaluate(make_dataset(), student=FakeStudent(), teacher=teacher, teacher_queries=2, seed=1)
    asked = {text for text, _ in teacher.pairs}
    assert len(asked) == 2
    assert report.rows[-1].num_queries == 2
    assert {row.num_queries for row in report.rows[:-1]} == {4}
    assert [row.name for row in report.sample_rows] == [row.name for row in report.rows]
    assert {row.num_queries for row in report.sample_rows} == {2}
    assert report.sample_rows[-1] == report.rows[-1]
    # The sampled rows are those of an evaluation on just these queries.
    chosen = {
        query_id: grades for query_id, grades in QRELS.items() if QUERIES.get(query_id, Query("", "")).text in asked
    }
    alone = evaluate(make_dataset(chosen), student=FakeStudent(), teacher=FakeTeacher())
    assert [row.measures for row in report.sample_rows] == [row.measures for row in alone.rows]
    again = FakeTeacher()
    evaluate(make_dataset(), student=FakeStudent(), teacher=again, teacher_queries=2, seed=1)
    assert again.pairs == teacher.pairs


def test_teacher_sees_the_union_and_the_rest_follows():
    teacher = FakeTeacher()
    report = evaluate(make_dataset(), student=FakeStudent(), teacher=teacher, teacher_depth=1)
    for query in QUERIES.values():
        assert 1 <= len([pair for pair in teacher.pairs if pair[0] == query.text]) <= 2
    assert report.rows[-1].measures["Recall@100"] == 1  # judged or not, all five are in the ranking


def test_indexes_are_kept_and_found_again(tmp_path):
    student, other = FakeStudent(), FakeStudent()
    first = evaluate(make_dataset(), student=student, work_folder=tmp_path)
    second = evaluate(make_dataset(), student=other, work_folder=tmp_path)
    assert (student.encoded_passages, other.encoded_passages) == (5, 0)  # anchor and full score share one index
    assert [row.measures for row in first.rows] == [row.measures for row in second.rows]


def test_truncated_texts_are_noted():
    report = evaluate(make_dataset(), student=FakeStudent(max_words=5))
    assert report.notes == ("test: 1 odd thing", "D2LLM: 3 passages were truncated")  # a, b and e have six words


def test_bad_requests():
    student = FakeStudent()
    with pytest.raises(InputError, match="top_k is 99, but must be at least 100"):
        evaluate(make_dataset(), student=student, top_k=99)
    with pytest.raises(InputError, match="teacher_queries is 0"):
        evaluate(make_dataset(), student=student, teacher_queries=0)
    with pytest.raises(DataFormatError, match="split 'dev' was not read; read: test"):
        evaluate(make_dataset(), student=student, split="dev")
    with pytest.raises(DataFormatError, match="none of its 1 queries has a relevant passage"):
        evaluate(make_dataset({"q1": {"gone": 1}}), student=student)
