"""The verb ``evaluate`` on retrieval sets: what is kept and taken over, and what it refuses."""

from __future__ import annotations

import pytest

from d2llm.core.errors import DataFormatError, IndexMismatchError, InputError
from d2llm.data.beir import read_beir
from d2llm.evaluation.setting import Contenders, EvaluationSettings
from d2llm.retrieval.cosine import CosineStudent
from d2llm.retrieval.encode import encode
from e2e.command_line import write_data, write_qrels
from fake_models import FakeStudent, FakeTeacher, Interruption
from tiny_evaluations import everyone, figures, make_dataset, make_words, measure, run


@pytest.fixture(autouse=True)
def few_permutations(monkeypatch):
    """Where the p-values themselves are not tested; reports that a module shares are made before this."""
    monkeypatch.setattr("d2llm.evaluation.figures.NUM_PERMUTATIONS", 100)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few():
    return make_words(num_passages=40, num_queries=12)


def counted(contenders):
    """Passages encoded by each student, and pairs judged."""
    inner = contenders.tuned_cosine._encoder
    students = (contenders.student, contenders.untuned, inner, contenders.paper_head)
    return [student.encoded_passages for student in students], len(contenders.teacher.pairs)


def test_a_second_evaluation_takes_everything_over(few, tmp_path):
    first = everyone()
    before = measure(few, first, tmp_path, teacher_queries=4, teacher_depth=10)
    assert counted(first)[0] == [40] * 4
    # 4 pools of 10; for the time the first is judged once more, and then each alone.
    assert counted(first)[1] == 4 * 10 + 10 + 4 * 10
    again = everyone()
    after = measure(few, again, tmp_path, teacher_queries=4, teacher_depth=10)
    assert counted(again) == ([0] * 4, 0)
    assert after.rows == before.rows
    assert after.comparisons == before.comparisons
    assert after.details == before.details
    assert after.agreement == before.agreement
    assert after.notes == (*before.notes, "13 parts were measured by an earlier run")


def test_a_deeper_pool_is_judged_only_where_it_is_new(few, tmp_path):
    measure(few, everyone(), tmp_path, teacher_queries=4, teacher_depth=10)
    deeper = everyone()
    measure(few, deeper, tmp_path, teacher_queries=4, teacher_depth=15)
    assert len(deeper.teacher.pairs) == 4 * 5 + 15 + 4 * 15  # the new ones, and the time of the deeper pool


def test_a_changed_student_is_measured_anew(few, tmp_path):
    measure(few, everyone(), tmp_path)
    other = everyone(student=FakeStudent(fingerprint="other"))
    report = measure(few, other, tmp_path)
    assert counted(other)[0] == [40, 0, 0, 0]
    assert figures(report.row("D2LLM")) == figures(measure(few, other).row("D2LLM"))


def test_a_label_store_spares_the_teacher_and_is_not_written(few, tmp_path):
    measure(few, everyone(), tmp_path / "one", teacher_queries=4, teacher_depth=10)
    (store,) = (tmp_path / "one" / "judgements").iterdir()
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    spared = everyone()
    report = measure(few, spared, tmp_path / "two", labels=store, teacher_queries=4, teacher_depth=10)
    assert len(spared.teacher.pairs) == 10 + 4 * 10  # for the time alone
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "two" / "judgements").exists()
    asked_all = measure(few, everyone(), teacher_queries=4, teacher_depth=10)
    assert figures(report.rows[-1]) == figures(asked_all.rows[-1])
    some = everyone()
    measure(few, some, tmp_path / "three", labels=store, teacher_queries=4, teacher_depth=12)
    assert len(some.teacher.pairs) == 4 * 2 + 12 + 4 * 12


def test_labels_of_another_teacher_do_not_count(few, tmp_path):
    measure(few, everyone(), tmp_path / "one", teacher_queries=4, teacher_depth=10)
    (store,) = (tmp_path / "one" / "judgements").iterdir()
    other = everyone(teacher=FakeTeacher(fingerprint="other"))
    measure(few, other, tmp_path / "two", labels=store, teacher_queries=4, teacher_depth=10)
    assert len(other.teacher.pairs) == 90


def test_interrupted_while_the_teacher_judges_it_goes_on(few, tmp_path, monkeypatch):
    monkeypatch.setattr("d2llm.evaluation.judging._SHARD_SECONDS", 0)
    monkeypatch.setattr("d2llm.evaluation.judging._PAIRS_AT_ONCE", 80)
    stopped = everyone(teacher=FakeTeacher(fail_after=100))
    with pytest.raises(Interruption):
        measure(few, stopped, tmp_path, teacher_depth=10, teacher_queries=None)
    assert counted(stopped) == ([40] * 4, 80)  # of the first eight queries
    resumed = everyone()
    report = measure(few, resumed, tmp_path, teacher_depth=10, teacher_queries=None)
    assert counted(resumed) == ([0] * 4, 120 - 80 + 10 + 5 * 10)
    assert not set(stopped.teacher.pairs) & set(resumed.teacher.pairs[:40])
    whole = measure(few, everyone(), teacher_depth=10, teacher_queries=None)
    assert [figures(row) for row in report.rows] == [figures(row) for row in whole.rows]
    assert report.sample_rows == ()  # the teacher answered all


def test_interrupted_while_a_student_encodes_it_goes_on(few, tmp_path, monkeypatch):
    monkeypatch.setattr("d2llm.retrieval.upserting.BLOCK_PASSAGES", 15)
    stopped = everyone(paper_head=FakeStudent(fingerprint="paper", head="paper", fail_after=30))
    with pytest.raises(Interruption):
        measure(few, stopped, tmp_path)
    assert counted(stopped) == ([0, 40, 40, 30], 0)
    resumed = everyone()
    report = measure(few, resumed, tmp_path)
    assert counted(resumed)[0] == [40, 0, 0, 10]
    whole = measure(few, everyone())
    assert [figures(row) for row in report.rows] == [figures(row) for row in whole.rows]


def test_the_seed_draws_the_sample():
    def asked(seed):
        teacher = FakeTeacher()
        report = measure(make_dataset(), everyone(teacher=teacher), teacher_queries=2, seed=seed)
        assert {row.num_items for row in report.sample_rows} == {2}
        return frozenset(text for text, _ in teacher.pairs)

    assert asked(1) == asked(1) != asked(4)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_settings():
    for name, value in (("top_k", 99), ("num_candidates", 0), ("teacher_depth", 0), ("teacher_queries", 0)):
        least = 100 if name == "top_k" else 1
        with pytest.raises(InputError, match=f"{name} is {value}, but must be at least {least}"):
            EvaluationSettings(**{name: value})
    with pytest.raises(InputError, match="latency_queries is 0"):
        EvaluationSettings(latency_queries=0)


def test_bad_judgements():
    student = Contenders(FakeStudent())
    with pytest.raises(DataFormatError, match="split 'dev' was not read; read: test"):
        measure(make_dataset(), student, split="dev")
    for qrels in ({}, {"q1": {"gone": 1}}, {"q1": {"a": 0}, "q2": {"b": 0}}):
        with pytest.raises(DataFormatError, match=f"none of its {len(qrels)} queries has a relevant passage"):
            measure(make_dataset(qrels), student)


def test_judgements_of_unknown_ids_are_counted(tmp_path):
    folder = write_data(tmp_path / "data")
    write_qrels(folder, "test", [("q16", "s16"), ("q17", "gone"), ("nobody", "s1")])
    report = measure(read_beir(folder), Contenders(FakeStudent()))
    assert (report.num_items, report.num_left_out) == (1, 2)
    assert "test: 1 judgements point to unknown queries, first 1: nobody" in " ".join(report.notes)
    assert "test: 1 judgements point to unknown passages, first 1: gone" in " ".join(report.notes)


@pytest.mark.parametrize("baseline", ["cosine_tuned", "teacher", "external"])
def test_a_baseline_that_is_not_there_is_refused_before_any_work(baseline):
    student = FakeStudent()
    with pytest.raises(
        InputError, match=f"the baseline '{baseline}' is not among the rows .*: anchor, bm25, d2llm, fitted_sum, hyb"
    ):
        measure(make_dataset(), Contenders(student), baseline=baseline)
    assert student.encoded_passages == 0


def test_an_index_of_another_student_in_the_way(tmp_path):
    words = make_dataset()
    measure(words, Contenders(FakeStudent()), tmp_path)
    (index,) = (tmp_path / "indexes").iterdir()
    encode(list(words.passages.values()), FakeStudent(fingerprint="stranger"), index, overwrite=True)
    for path in (tmp_path / "measured").iterdir():
        path.unlink()
    with pytest.raises(IndexMismatchError, match="made by student stranger, but the student given is fake-student"):
        measure(words, Contenders(FakeStudent()), tmp_path)


def test_labels_that_are_not_there(tmp_path):
    with pytest.raises(DataFormatError, match="nowhere: holds no teacher labels; give the folder that d2llm label"):
        measure(make_dataset(), everyone(), labels=tmp_path / "nowhere")


def test_names_that_rows_would_share():
    encoder = CosineStudent(FakeStudent())
    with pytest.raises(InputError, match="two systems have the same name, which their rows would share: x; rename"):
        Contenders(FakeStudent(), bi_encoders={"x": encoder}, runs=[run("x", {"q1": ["a"]})])
    with pytest.raises(InputError, match="share: BM25; rename one"):
        Contenders(FakeStudent(), runs=[run("BM25", {"q1": ["a"]})])


def test_vectors_in_fewer_bits_are_rows_of_their_own(few):
    report = measure(few, everyone(), stored_as=("float32", "float16"))
    by_name = {row.name: row for row in report.rows}
    plain, coded = by_name["D2LLM"], by_name["D2LLM, float32 vectors"]
    assert (coded.kind, plain.kind) == ("shortcut", "d2llm")
    assert coded.cost.bytes_per_passage == 2 * plain.cost.bytes_per_passage
    assert figures(coded)["nDCG@10"] == pytest.approx(figures(plain)["nDCG@10"], abs=0.05)
    with pytest.raises(InputError, match=r"no vector format 'int7'.*int8"):
        EvaluationSettings(stored_as=("int7",))
