"""Labelling with a real (tiny) teacher: labels are its scores, and finished work is never scored again."""

from __future__ import annotations

import dataclasses
import itertools
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from d2llm.core.errors import InputError, LabelMismatchError
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, TrainingSource
from d2llm.models.student import Student
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.recipe import LabellingConfig, TeacherConfig
from d2llm.training.label import LabelReport, disagreements, label, mistakes, robust_sample
from prepared_process import PreparedProcess, script
from tiny_data import make_plan, topics
from tiny_models import randomise, tiny_student_config, tiny_teacher_config, write_tiny_model

NUM_QUERIES = 40  # more than one batch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def source() -> TrainingSource:
    return topics(num_train=NUM_QUERIES)


def run(source: TrainingSource, store: Path, teacher: TeacherConfig, **options: object) -> LabelReport:
    return label([source], store, teacher=teacher, device="cpu", dtype="float32", **options)


def open_labels(source: TrainingSource, store: Path, teacher: TeacherConfig) -> LabelStore:
    identity = identify_local_teacher(teacher)
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts[source.task], "dataset": source.dataset.name}
    return LabelStore.open_for_reading(store, **key)


def num_pairs(source: TrainingSource) -> int:
    return sum(len(entry.passage_ids) for entry in source.plan.entries)


def with_entries(source: TrainingSource, entries: list[PlanEntry]) -> TrainingSource:
    return dataclasses.replace(source, plan=make_plan(entries))


@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
def test_labels_are_the_teachers_log_odds_and_feature_cosines(model: Path, tmp_path: Path, task: str) -> None:
    data = dataclasses.replace(topics(num_train=NUM_QUERIES), task=task)
    config = tiny_teacher_config(model)
    report = run(data, tmp_path, config)
    assert (report.queries, report.pairs, report.finished_queries) == (NUM_QUERIES, num_pairs(data), 0)
    assert report.num_truncated == 0
    labels = open_labels(data, tmp_path, config)
    assert len(labels) == NUM_QUERIES
    assert labels.num_pairs == num_pairs(data)
    assert labels.num_duplicates == 0

    teacher = CausalTeacher.load(config, device="cpu", dtype="float32")
    assert report.teacher == teacher.fingerprint
    for entry in data.plan.entries[::7]:
        pairs = [(data.query_text(entry.query_id), data.passage_text(p)) for p in entry.passage_ids]
        scores = teacher.score_pairs(pairs, task, with_features=True)
        assert scores.log_odds.std() > 0.01
        log_odds = labels.log_odds(entry.query_id)
        assert list(log_odds) == list(entry.passage_ids)
        np.testing.assert_allclose(list(log_odds.values()), scores.log_odds, rtol=1e-4, atol=1e-5)

        gram = labels.gram(entry.query_id)
        assert gram is not None
        assert gram[0] == entry.positives + entry.hard_negatives
        features = scores.features[: len(gram[0])].astype(np.float64)
        norms = np.sqrt((features**2).sum(axis=1))
        np.testing.assert_allclose(gram[1], features @ features.T / np.outer(norms, norms), rtol=0, atol=1e-5)


def test_truncated_texts_are_counted(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    subset = with_entries(source, list(source.plan.entries[:3]))
    pairs = [
        (subset.query_text(e.query_id), subset.passage_text(p)) for e in subset.plan.entries for p in e.passage_ids
    ]
    token_ids = CausalTeacher.load(tiny_teacher_config(model), device="cpu").tokenize(pairs, "asymmetric")[0]
    limit = sorted(map(len, token_ids))[len(token_ids) // 2]
    report = run(subset, tmp_path, tiny_teacher_config(model, max_tokens=limit))
    assert report.num_truncated == sum(len(ids) > limit for ids in token_ids) > 0
    assert report.tokens == sum(min(len(ids), limit) for ids in token_ids)


def assert_same_labels(one: LabelStore, two: LabelStore) -> None:
    """Compare two stores up to the rounding that comes from differently composed batches."""
    assert one.query_ids == two.query_ids
    for query_id in one.query_ids:
        first, second = one.log_odds(query_id), two.log_odds(query_id)
        assert list(first) == list(second)
        np.testing.assert_allclose(list(first.values()), list(second.values()), rtol=0, atol=1e-4)
        first_gram, second_gram = one.gram(query_id), two.gram(query_id)
        assert first_gram is not None
        assert second_gram is not None
        assert first_gram[0] == second_gram[0]
        np.testing.assert_allclose(first_gram[1], second_gram[1], rtol=0, atol=1e-5)


def test_each_teacher_and_prompt_has_labels_of_its_own(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    subset = with_entries(source, list(source.plan.entries[:4]))
    store = tmp_path / "store"
    configs = [
        tiny_teacher_config(model),
        tiny_teacher_config(model, prompt="paper", max_tokens=256),
        tiny_teacher_config(model, max_tokens=100),
        tiny_teacher_config(write_tiny_model(tmp_path / "other", seed=1)),
    ]
    for config in configs[:-1]:
        assert run(subset, store, config).pairs == num_pairs(subset)
    with pytest.raises(LabelMismatchError, match=identify_local_teacher(configs[-1]).fingerprint):
        open_labels(subset, store, configs[-1])
    assert run(subset, store, configs[-1]).pairs == num_pairs(subset)
    query_id = subset.plan.entries[0].query_id
    log_odds = [tuple(open_labels(subset, store, config).log_odds(query_id).values()) for config in configs]
    assert len({log_odds[0], log_odds[1], log_odds[3]}) == 3
    assert all(open_labels(subset, store, config).num_duplicates == 0 for config in configs)
    # The same texts under the other task are judged anew as well.
    other_task = dataclasses.replace(subset, task="symmetric")
    assert run(other_task, store, configs[0]).pairs == num_pairs(subset)


# --- plans that change ------------------------------------------------------------------------------------------------


def test_only_new_easy_negatives_are_judged(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    config = tiny_teacher_config(model)
    entry = source.plan.entries[0]
    run(with_entries(source, [entry]), tmp_path, config)
    before = open_labels(source, tmp_path, config)
    unused = [p for p in source.dataset.passages if p not in entry.passage_ids][:2]
    extended = with_entries(source, [dataclasses.replace(entry, easy_negatives=entry.easy_negatives + tuple(unused))])
    assert run(extended, tmp_path, config).pairs == 2
    after = open_labels(source, tmp_path, config)
    assert after.num_duplicates == 0
    assert set(after.log_odds(entry.query_id)) == {*entry.passage_ids, *unused}
    assert np.array_equal(after.gram(entry.query_id)[1], before.gram(entry.query_id)[1])
    assert run(extended, tmp_path, config).pairs == 0


def test_an_easy_negative_that_became_hard_gets_its_cosines(model, source, tmp_path):
    """All of its labels exist, but the Gram matrix lacks a row."""
    config = tiny_teacher_config(model)
    entry = next(e for e in source.plan.entries if e.easy_negatives)
    run(with_entries(source, [entry]), tmp_path, config)
    changed = dataclasses.replace(
        entry, hard_negatives=entry.hard_negatives + entry.easy_negatives[:1], easy_negatives=entry.easy_negatives[1:]
    )
    assert run(with_entries(source, [changed]), tmp_path, config).pairs == len(changed.passage_ids)
    labels = open_labels(source, tmp_path, config)
    assert labels.missing_cosines(entry.query_id, changed.positives + changed.hard_negatives) == []
    assert run(with_entries(source, [changed]), tmp_path, config).pairs == 0


def test_sources_with_the_same_name_are_rejected_up_front(model: Path, tmp_path: Path) -> None:
    sources = [topics(num_train=2, name="one"), topics(num_train=2, name="one")]
    with pytest.raises(InputError, match="two data sets have the same name: one, one"):
        label(sources, tmp_path / "store", teacher=tiny_teacher_config(model), device="cpu")
    assert not (tmp_path / "store").exists()


def test_sources_in_one_store_are_kept_apart_though_they_share_query_ids(model: Path, tmp_path: Path) -> None:
    sources = [topics(num_train=3, name="one"), topics(num_train=5, shift=2, name="two", task="symmetric")]
    config = tiny_teacher_config(model)
    report = label(sources, tmp_path, teacher=config, device="cpu", dtype="float32")
    assert report.queries == 8
    assert [len(open_labels(data, tmp_path, config)) for data in sources] == [3, 5]


# --- killed runs ------------------------------------------------------------------------------------------------------

LABEL_FOREVER = """
import sys, time
from pathlib import Path
import d2llm.training.label as verb
from d2llm.evaluation import pool_scores
from d2llm.models.teachers.causal import CausalTeacher
from tiny_data import topics
from tiny_models import tiny_teacher_config

pool_scores._PAIRS_AT_ONCE, pool_scores._SHARD_SECONDS = 36, 0.0  # of four queries
score = CausalTeacher.score_until_error

def slowly(self, pairs, task, **options):
    time.sleep(0.05)  # so that the kill comes between shards as well as in the middle of one
    with open(sys.argv[3], "a") as file:
        file.write(f"{{len(pairs)}}\\n")
    return score(self, pairs, task, **options)

CausalTeacher.score_until_error = slowly
teacher = tiny_teacher_config(Path(sys.argv[1]))
verb.label([topics(num_train={num})], Path(sys.argv[2]), teacher=teacher, device="cpu", dtype="float32")
"""


def test_a_killed_run_resumes_without_repeating_work(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    config = tiny_teacher_config(model)
    store, judged = tmp_path / "store", tmp_path / "judged"
    code = LABEL_FOREVER.format(num=NUM_QUERIES)
    with PreparedProcess(script, code, str(model), str(store), str(judged)) as process:
        process.until(lambda: len(list(store.glob("labels/[0-9]*.parquet"))) >= 3, "three shards")
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    before = open_labels(source, store, config)
    finished, finished_pairs = len(before), before.num_pairs
    assert 12 <= finished < NUM_QUERIES
    report = run(source, store, config)
    assert report.finished_queries == finished
    assert report.queries == NUM_QUERIES - finished
    assert report.pairs == num_pairs(source) - finished_pairs
    # Beyond its finished shards, the killed process had judged at most one batch of four queries.
    wasted = sum(int(line) for line in judged.read_text().splitlines()) - finished_pairs
    assert 0 <= wasted <= max(sum(len(e.passage_ids) for e in source.plan.entries[n : n + 4]) for n in range(0, 40, 4))

    after = open_labels(source, store, config)
    assert after.num_duplicates == 0
    rows = pq.read_table(store / "labels").num_rows
    assert rows == num_pairs(source)
    run(source, tmp_path / "undisturbed", config)
    assert_same_labels(open_labels(source, tmp_path / "undisturbed", config), after)


def test_with_a_limit_the_queries_on_which_two_students_disagree_are_labelled(source, model, tmp_path):
    encoder = write_tiny_model(tmp_path / "encoder", "bert")
    students = []
    for seed in (0, 1):
        student = Student.create(tiny_student_config(encoder), device="cpu", dtype="float32", seed=seed)
        randomise(student.interaction, seed=seed)
        randomise(student.pooling, seed=seed)
        student.save(tmp_path / f"student{seed}")
        students.append(student)
    values = disagreements(source, *students)
    for entry in source.plan.entries:  # Kendall's distance, pair by pair
        names = entry.positives + entry.hard_negatives
        texts = [source.passage_text(name) for name in names]
        first, second = (
            student.score(
                student.encode_queries([source.query_text(entry.query_id)]).vectors[0],
                student.encode_passages(texts).vectors,
                source.task,
            )
            for student in students
        )
        pairs = list(itertools.combinations(range(len(names)), 2))
        swapped = sum((first[a] > first[b]) != (second[a] > second[b]) for a, b in pairs)
        assert values[entry.query_id] == pytest.approx(swapped / len(pairs), abs=0.05)
    assert len(set(values.values())) > 3
    assert set(disagreements(source, students[0], students[0]).values()) == {0.0}

    limited = dataclasses.replace(source, max_labelled=5)
    config = tiny_teacher_config(model)
    names = (str(tmp_path / "student0"), str(tmp_path / "student1"))
    assert run(limited, tmp_path / "labels", config, settings=LabellingConfig(compared_students=names)).queries == 5
    labels = open_labels(source, tmp_path / "labels", config)
    labelled = {entry.query_id for entry in source.plan.entries if labels.log_odds(entry.query_id)}
    assert len(labelled) == 5
    assert min(values[name] for name in labelled) >= sorted(values.values())[-5]
    assert run(limited, tmp_path / "labels", config, settings=LabellingConfig(compared_students=names)).pairs == 0


def test_with_a_limit_the_queries_that_a_student_gets_wrong_most_surely_are_labelled(source, model, tmp_path):
    student = Student.create(tiny_student_config(write_tiny_model(tmp_path / "encoder", "bert")), device="cpu", seed=0)
    randomise(student.interaction, seed=0)
    student.save(tmp_path / "student")
    values = mistakes(source, student)
    for entry in source.plan.entries:
        texts = [source.passage_text(name) for name in entry.positives + entry.hard_negatives]
        ranking = student.rank(source.query_text(entry.query_id), texts, task=source.task)
        assert (values[entry.query_id] > 0) == (int(ranking[0].passage.id) > len(entry.positives))
    assert min(values.values()) < 0 < max(values.values())

    settings = LabellingConfig(mistaken_student=str(tmp_path / "student"))
    config = tiny_teacher_config(model)
    run(dataclasses.replace(source, max_labelled=5), tmp_path / "labels", config, settings=settings)
    labels = open_labels(source, tmp_path / "labels", config)
    labelled = {entry.query_id for entry in source.plan.entries if labels.log_odds(entry.query_id)}
    assert labelled == {*sorted(values, key=lambda name: -values[name])[:5]}
    with pytest.raises(InputError, match="mistaken_student and unsure_student each choose"):
        LabellingConfig(mistaken_student="one", unsure_student="one")

    # A teacher without errors is asked where the two best passages are nearest to each other.
    settings = LabellingConfig(unsure_student=str(tmp_path / "student"), teacher_errors=0)
    run(dataclasses.replace(source, max_labelled=5), tmp_path / "unsure", config, settings=settings)
    labels = open_labels(source, tmp_path / "unsure", config)
    margins = {}
    for entry in source.plan.entries:
        texts = [source.passage_text(name) for name in entry.positives + entry.hard_negatives]
        ranking = student.rank(source.query_text(entry.query_id), texts, task=source.task)
        chances = np.exp([result.score for result in ranking])
        margins[entry.query_id] = (chances[0] - chances[1]) / chances.sum()
    labelled = {entry.query_id for entry in source.plan.entries if labels.log_odds(entry.query_id)}
    assert labelled == {*sorted(margins, key=margins.__getitem__)[:5]}
    assert len({*robust_sample(source, student, 7, teacher_errors=0.5)}) == 7
