"""``d2llm evaluate`` on retrieval sets: which results are reused, and which input is rejected."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from d2llm.core import progress
from d2llm.core.errors import DataFormatError, IndexMismatchError, InputError, OutOfTimeError
from d2llm.core.time_limit import time_limit
from d2llm.data.beir import read_beir
from d2llm.evaluation import systems
from d2llm.evaluation.contenders import Contenders
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.models.student import Student
from d2llm.retrieval.cosine import CosineStudent
from d2llm.retrieval.encode import encode
from d2llm.store.index_manifest import Chunking, write_chunking
from e2e.command_line import write_data, write_qrels
from fake_models import FakeStudent, FakeTeacher, Interruption
from tiny_evaluations import everyone, figures, make_dataset, make_words, measure, run, with_indexes_of


@pytest.fixture(autouse=True)
def few_permutations(monkeypatch):
    """Speeds up tests that do not check p-values; module-scoped fixtures are made before this applies."""
    monkeypatch.setattr("d2llm.evaluation.figures.NUM_PERMUTATIONS", 100)


# --- reused results ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset():
    return make_words(num_passages=40, num_queries=12)


SAMPLE = {"teacher_queries": 4, "teacher_depth": 10}


@pytest.fixture(scope="module")
def measured(dataset, tmp_path_factory):
    """A first evaluation: its work folder, its contenders and its report."""
    folder, contenders = tmp_path_factory.mktemp("measured"), everyone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2llm.evaluation.figures.NUM_PERMUTATIONS", 100)
        return folder, contenders, measure(dataset, contenders, folder, **SAMPLE)


@pytest.fixture
def work(measured, tmp_path):
    """A copy of the first evaluation's work folder."""
    return shutil.copytree(measured[0], tmp_path / "work")


def count_work(contenders):
    """Number of passages encoded by each student, and number of pairs judged."""
    inner = contenders.tuned_cosine._encoder
    students = (contenders.student, contenders.untuned, inner, contenders.paper_head)
    return [student.encoded_passages for student in students], len(contenders.teacher.pairs)


def test_a_second_evaluation_reuses_all_results(dataset, measured, work):
    _, first, before = measured
    assert count_work(first)[0] == [40] * 4
    # 4 pools of 10; to measure the time, the first pool is judged again, then each pool on its own.
    assert count_work(first)[1] == 4 * 10 + 10 + 4 * 10
    second = everyone()
    after = measure(dataset, second, work, **SAMPLE)
    assert count_work(second) == ([0] * 4, 0)
    assert after.rows == before.rows
    assert after.comparisons == before.comparisons
    assert after.details == before.details
    assert after.agreement == before.agreement
    assert after.notes == (*before.notes, "14 parts were measured by an earlier run")


def test_a_deeper_pool_judges_only_its_new_pairs(dataset, work):
    deeper = everyone()
    measure(dataset, deeper, work, teacher_queries=4, teacher_depth=15)
    assert len(deeper.teacher.pairs) == 4 * 5 + 15 + 4 * 15  # the new pairs, and timing the deeper pool


def test_a_changed_student_is_measured_anew(dataset, work):
    other = everyone(student=FakeStudent(fingerprint="other"))
    report = measure(dataset, other, work, **SAMPLE)
    assert count_work(other)[0] == [40, 0, 0, 0]
    alone = measure(dataset, Contenders(FakeStudent(fingerprint="other")))
    assert figures(report.row("D2LLM")) == figures(alone.row("D2LLM"))


def test_a_label_store_is_reused_but_not_modified(dataset, measured, work, tmp_path):
    (store,) = (work / "labels").iterdir()
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    fully_labelled = everyone()
    two, three = (with_indexes_of(work, tmp_path / name) for name in ("two", "three"))
    report = measure(dataset, fully_labelled, two, labels=store, **SAMPLE)
    assert len(fully_labelled.teacher.pairs) == 10 + 4 * 10  # only to measure the time
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert not (two / "labels").exists()
    without_store = measured[2]
    assert figures(report.rows[-1]) == figures(without_store.rows[-1])
    partly_labelled = everyone()
    measure(dataset, partly_labelled, three, labels=store, teacher_queries=4, teacher_depth=12)
    assert len(partly_labelled.teacher.pairs) == 4 * 2 + 12 + 4 * 12


def test_labels_of_another_teacher_are_ignored(dataset, work, tmp_path):
    (store,) = (work / "labels").iterdir()
    other = everyone(teacher=FakeTeacher(fingerprint="other"))
    measure(dataset, other, with_indexes_of(work, tmp_path / "two"), labels=store, **SAMPLE)
    assert len(other.teacher.pairs) == 90


def test_interrupted_judging_is_resumed(dataset, work, tmp_path, monkeypatch):
    monkeypatch.setattr("d2llm.evaluation.pool_scores._SHARD_SECONDS", 0)
    monkeypatch.setattr("d2llm.evaluation.pool_scores._PAIRS_AT_ONCE", 80)
    interrupted = everyone(teacher=FakeTeacher(fail_after=100))
    folder = tmp_path / "interrupted"
    with pytest.raises(Interruption):
        measure(dataset, interrupted, folder, teacher_depth=10, teacher_queries=None)
    assert count_work(interrupted) == ([40] * 4, 80)  # the pairs of the first eight queries
    resumed = everyone()
    report = measure(dataset, resumed, folder, teacher_depth=10, teacher_queries=None)
    assert count_work(resumed) == ([0] * 4, 120 - 80 + 10 + 5 * 10)
    assert not set(interrupted.teacher.pairs) & set(resumed.teacher.pairs[:40])
    apart = with_indexes_of(work, tmp_path / "uninterrupted")
    uninterrupted = measure(dataset, everyone(), apart, teacher_depth=10, teacher_queries=None)
    assert [figures(row) for row in report.rows] == [figures(row) for row in uninterrupted.rows]
    assert report.sample_rows == ()  # the teacher scored all queries


def test_interrupted_encoding_is_resumed(dataset, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("d2llm.retrieval.upserting.BLOCK_PASSAGES", 15)
    interrupted = everyone(paper_head=FakeStudent(fingerprint="paper", head="paper", fail_after=30))
    with pytest.raises(Interruption):
        measure(dataset, interrupted, tmp_path, **SAMPLE)
    assert count_work(interrupted) == ([0, 40, 40, 30], 0)
    resumed = everyone()
    report = measure(dataset, resumed, tmp_path, **SAMPLE)
    assert count_work(resumed)[0] == [40, 0, 0, 10]
    uninterrupted = measured[2]
    assert [figures(row) for row in report.rows] == [figures(row) for row in uninterrupted.rows]


def test_an_evaluation_that_is_out_of_time_continues(dataset, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("d2llm.retrieval.upserting.BLOCK_PASSAGES", 15)
    with time_limit(-1.0), pytest.raises(OutOfTimeError):
        measure(dataset, everyone(), tmp_path, **SAMPLE)
    num_calls = 0

    def check_time():
        nonlocal num_calls
        num_calls += 1
        if num_calls > 5:  # in the middle of the second index
            raise OutOfTimeError

    stopped = everyone()
    with monkeypatch.context() as patch:
        patch.setattr(progress, "check_time", check_time)
        with pytest.raises(OutOfTimeError):
            measure(dataset, stopped, tmp_path, **SAMPLE)
    assert 0 < sum(count_work(stopped)[0]) < 4 * 40
    resumed = everyone()
    report = measure(dataset, resumed, tmp_path, **SAMPLE)
    assert sum(count_work(resumed)[0]) < 4 * 40
    assert [figures(row) for row in report.rows] == [figures(row) for row in measured[2].rows]


def test_an_index_of_the_corpus_is_searched_instead_of_a_new_one(dataset, measured, tmp_path):
    passages, student = list(dataset.passages.values()), everyone().student
    encode(passages, student, tmp_path / "index")
    again = everyone()
    report = measure(dataset, again, tmp_path / "work", indexes=[tmp_path / "index"], **SAMPLE)
    assert count_work(again)[0] == [0, 40, 40, 40]
    assert figures(report.row("D2LLM")) == figures(measured[2].row("D2LLM"))
    assert not any("was not searched" in note for note in report.notes)


def test_an_index_with_vectors_of_tokens_is_searched_instead_of_a_new_one(dataset, tmp_path, monkeypatch):
    student = Student.load("d2llm-minilm", device="cpu")  # whose score counts tokens
    encode(list(dataset.passages.values()), student, tmp_path / "index", window_vectors=None)
    monkeypatch.setattr(systems, "encode", lambda *_, **__: pytest.fail("the corpus was encoded again"))
    report = measure(
        dataset, Contenders(student=student), tmp_path / "work", indexes=[tmp_path / "index"], score_parts=False
    )
    names = {row.name for row in report.rows}
    assert {"BM25", "D2LLM"} <= names
    assert not any("without" in name or "fitted here" in name for name in names)  # no parts of the score are asked for
    assert not any("was not searched" in note for note in report.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": slice(1, None)},
        {"vector_format": "float32"},
        {"student": FakeStudent(fingerprint="other")},
        {"num_shards": 2},
    ],
)
def test_an_index_with_something_else_is_not_searched(dataset, tmp_path, change):
    options = {"corpus": slice(None), "student": everyone().student, **change}
    passages = list(dataset.passages.values())[options.pop("corpus")]
    encode(passages, options.pop("student"), tmp_path / "index", **options)
    contenders = everyone()
    report = measure(dataset, contenders, tmp_path / "work", indexes=[tmp_path / "index"], **SAMPLE)
    assert count_work(contenders)[0] == [40] * 4
    assert any(note.startswith(f"{tmp_path / 'index'} was not searched") for note in report.notes)


def test_an_index_whose_passages_were_read_with_their_neighbours_is_not_searched(dataset, tmp_path):
    contenders = everyone()
    encode(list(dataset.passages.values()), everyone().student, tmp_path / "index")
    write_chunking(tmp_path / "index", Chunking(64, late=True))
    measure(dataset, contenders, tmp_path / "work", indexes=[tmp_path / "index"], **SAMPLE)
    assert count_work(contenders)[0] == [40] * 4


def test_a_changed_text_makes_an_index_one_of_another_corpus(dataset, tmp_path):
    contenders = everyone()
    first, *others = dataset.passages.values()
    encode([replace(first, text="Another text."), *others], everyone().student, tmp_path / "index")
    measure(dataset, contenders, tmp_path / "work", indexes=[tmp_path / "index"], **SAMPLE)
    assert count_work(contenders)[0] == [40] * 4


def test_the_seed_determines_the_sample():
    def judged_queries(seed):
        teacher = FakeTeacher()
        report = measure(make_dataset(), Contenders(FakeStudent(), teacher=teacher), teacher_queries=2, seed=seed)
        assert {row.num_items for row in report.sample_rows} == {2}
        return frozenset(text for text, _ in teacher.pairs)

    assert judged_queries(1) == judged_queries(1) != judged_queries(4)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_settings_out_of_range_are_rejected():
    for name, value in (("top_k", 99), ("num_candidates", 0), ("teacher_depth", 0)):
        least = 100 if name == "top_k" else 1
        with pytest.raises(InputError, match=f"{name} is {value}, but must be at least {least}"):
            EvaluationSettings(**{name: value})
    with pytest.raises(InputError, match="latency_queries is 0"):
        EvaluationSettings(latency_queries=0)


def test_unusable_judgements_are_rejected():
    student = Contenders(FakeStudent())
    for qrels in ({}, {"q1": {"gone": 1}}, {"q1": {"a": 0}, "q2": {"b": 0}}):
        with pytest.raises(DataFormatError, match=f"none of its {len(qrels)} queries has a relevant passage"):
            measure(make_dataset(qrels), student)


def test_judgements_with_unknown_ids_are_counted(tmp_path):
    folder = write_data(tmp_path / "data")
    write_qrels(folder, "test", [("q16", "s16"), ("q17", "gone"), ("nobody", "s1")])
    report = measure(read_beir(folder), Contenders(FakeStudent()))
    assert (report.num_items, report.num_left_out) == (1, 2)
    assert "test: 1 judgement of unknown queries not counted, first 1: nobody" in " ".join(report.notes)
    assert "test: 1 judgement of unknown passages not counted, first 1: gone" in " ".join(report.notes)


@pytest.mark.parametrize("baseline", ["cosine_tuned", "teacher", "external"])
def test_a_missing_baseline_is_refused_before_any_work(baseline):
    student = FakeStudent()
    with pytest.raises(
        InputError, match=f"the baseline '{baseline}' is not among the rows .*: bm25, d2llm, dot, fitted_sum, hyb"
    ):
        measure(make_dataset(), Contenders(student), baseline=baseline)
    assert student.encoded_passages == 0


def test_an_index_of_another_student_is_an_error(tmp_path):
    words = make_dataset()
    measure(words, Contenders(FakeStudent()), tmp_path)
    (index,) = (tmp_path / "indexes").iterdir()
    encode(list(words.passages.values()), FakeStudent(fingerprint="stranger"), index, overwrite=True)
    for path in (tmp_path / "measured").iterdir():
        path.unlink()
    with pytest.raises(IndexMismatchError, match="made by student stranger, but the student given is fake-student"):
        measure(words, Contenders(FakeStudent()), tmp_path)


def test_duplicate_row_names_are_rejected():
    encoder = CosineStudent(FakeStudent())
    with pytest.raises(InputError, match="two systems have the same name, which their rows would share: x; rename"):
        Contenders(FakeStudent(), bi_encoders={"x": encoder}, runs=[run("x", {"q1": ["a"]})])
    with pytest.raises(InputError, match="share: BM25; rename one"):
        Contenders(FakeStudent(), runs=[run("BM25", {"q1": ["a"]})])


def test_vectors_in_fewer_bits_get_their_own_rows(dataset):
    report = measure(dataset, Contenders(FakeStudent()), stored_as=("float32", "float16"))
    by_name = {row.name: row for row in report.rows}
    plain, coded = by_name["D2LLM"], by_name["D2LLM, float32 vectors"]
    assert (coded.kind, plain.kind) == ("shortcut", "d2llm")
    assert coded.cost.bytes_per_passage == 2 * plain.cost.bytes_per_passage
    assert figures(coded)["nDCG@10"] == pytest.approx(figures(plain)["nDCG@10"], abs=0.05)
    with pytest.raises(InputError, match=r"vector format 'int7' is unknown.*int8"):
        EvaluationSettings(stored_as=("int7",))
