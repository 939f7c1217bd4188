"""Labelling with a real (tiny) teacher: the labels are its judgement, and nothing finished is judged twice."""

from __future__ import annotations

import dataclasses
import random
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from d2llm.core.errors import InputError, LabelMismatchError
from d2llm.core.recipe import TeacherConfig
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry
from d2llm.data.training import TrainingSource
from d2llm.models.teachers.causal import Teacher
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.training.label import LabelReport, label
from prepared_process import PreparedProcess, script
from tiny_data import make_plan, topics
from tiny_models import tiny_teacher_config, write_tiny_model

NUM_QUERIES = 40  # more than are judged at once


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def source() -> TrainingSource:
    return topics(num_train=NUM_QUERIES)


def run(source: TrainingSource, store: Path, teacher: TeacherConfig, **options: object) -> LabelReport:
    return label([source], store, teacher=teacher, device="cpu", dtype="float32", show_progress=False, **options)


def opened(source: TrainingSource, store: Path, teacher: TeacherConfig) -> LabelStore:
    identity = identify_local_teacher(teacher)
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts[source.task], "dataset": source.dataset.name}
    return LabelStore.open_for_reading(store, **key)


def num_pairs(source: TrainingSource) -> int:
    return sum(len(entry.passage_ids) for entry in source.plan.entries)


def with_entries(source: TrainingSource, entries: list[PlanEntry]) -> TrainingSource:
    return dataclasses.replace(source, plan=make_plan(entries))


@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
def test_labels_are_what_the_teacher_says_and_cosines_of_its_features(model: Path, tmp_path: Path, task: str) -> None:
    made = dataclasses.replace(topics(num_train=NUM_QUERIES), task=task)
    config = tiny_teacher_config(model)
    report = run(made, tmp_path, config)
    assert (report.queries, report.pairs, report.finished_queries) == (NUM_QUERIES, num_pairs(made), 0)
    assert report.num_truncated == 0
    labels = opened(made, tmp_path, config)
    assert len(labels) == NUM_QUERIES
    assert labels.num_pairs == num_pairs(made)
    assert labels.num_duplicates == 0

    teacher = Teacher.load(config, device="cpu", dtype="float32")
    assert report.teacher == teacher.fingerprint
    for entry in made.plan.entries[::7]:
        pairs = [(made.query_text(entry.query_id), made.passage_text(p)) for p in entry.passage_ids]
        judged = teacher.judge(pairs, task, with_features=True)
        assert judged.log_odds.std() > 0.01
        found = labels.log_odds(entry.query_id)
        assert list(found) == list(entry.passage_ids)
        np.testing.assert_allclose(list(found.values()), judged.log_odds, rtol=1e-4, atol=1e-5)

        stored = labels.gram(entry.query_id)
        assert stored is not None
        assert stored[0] == entry.positives + entry.hard_negatives
        features = judged.features[: len(stored[0])].astype(np.float64)
        norms = np.sqrt((features**2).sum(axis=1))
        np.testing.assert_allclose(stored[1], features @ features.T / np.outer(norms, norms), rtol=0, atol=1e-5)


def test_cut_texts_are_counted(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    some = with_entries(source, list(source.plan.entries[:3]))
    pairs = [(some.query_text(e.query_id), some.passage_text(p)) for e in some.plan.entries for p in e.passage_ids]
    whole = Teacher.load(tiny_teacher_config(model), device="cpu").tokenize(pairs, "asymmetric")[0]
    limit = sorted(map(len, whole))[len(whole) // 2]
    report = run(some, tmp_path, tiny_teacher_config(model, max_tokens=limit))
    assert report.num_truncated == sum(len(ids) > limit for ids in whole) > 0
    assert report.tokens == sum(min(len(ids), limit) for ids in whole)


def test_a_second_run_judges_nothing(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    config = tiny_teacher_config(model)
    run(source, tmp_path, config)
    shards = sorted(path.name for path in (tmp_path / "labels").iterdir())
    report = run(source, tmp_path, config)
    assert (report.queries, report.pairs, report.finished_queries) == (0, 0, NUM_QUERIES)
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == shards


def test_a_shuffled_plan_gives_the_same_labels(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    config = tiny_teacher_config(model)
    entries = list(source.plan.entries)
    random.Random(1).shuffle(entries)
    run(source, tmp_path / "one", config)
    run(with_entries(source, entries), tmp_path / "two", config)
    assert_same_labels(opened(source, tmp_path / "one", config), opened(source, tmp_path / "two", config))


def assert_same_labels(one: LabelStore, two: LabelStore) -> None:
    """Equal but for what another make-up of the batches does to the last digits."""
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


def test_another_teacher_or_prompt_gives_labels_of_its_own(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    some = with_entries(source, list(source.plan.entries[:4]))
    store = tmp_path / "store"
    configs = [
        tiny_teacher_config(model),
        tiny_teacher_config(model, prompt="paper", max_tokens=256),
        tiny_teacher_config(model, max_tokens=100),
        tiny_teacher_config(write_tiny_model(tmp_path / "other", seed=1)),
    ]
    for config in configs[:-1]:
        assert run(some, store, config).pairs == num_pairs(some)
    with pytest.raises(LabelMismatchError, match=identify_local_teacher(configs[-1]).fingerprint):
        opened(some, store, configs[-1])
    assert run(some, store, configs[-1]).pairs == num_pairs(some)
    query_id = some.plan.entries[0].query_id
    seen = [tuple(opened(some, store, config).log_odds(query_id).values()) for config in configs]
    assert len({seen[0], seen[1], seen[3]}) == 3
    assert all(opened(some, store, config).num_duplicates == 0 for config in configs)
    # The same question asked for the other task is another question too.
    other_task = dataclasses.replace(some, task="symmetric")
    assert run(other_task, store, configs[0]).pairs == num_pairs(some)


# --- plans that change ------------------------------------------------------------------------------------------------


def test_new_easy_negatives_are_judged_alone(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    config = tiny_teacher_config(model)
    entry = source.plan.entries[0]
    run(with_entries(source, [entry]), tmp_path, config)
    before = opened(source, tmp_path, config)
    unused = [p for p in source.dataset.passages if p not in entry.passage_ids][:2]
    more = with_entries(source, [dataclasses.replace(entry, easy_negatives=entry.easy_negatives + tuple(unused))])
    assert run(more, tmp_path, config).pairs == 2
    after = opened(source, tmp_path, config)
    assert after.num_duplicates == 0
    assert set(after.log_odds(entry.query_id)) == {*entry.passage_ids, *unused}
    assert np.array_equal(after.gram(entry.query_id)[1], before.gram(entry.query_id)[1])
    assert run(more, tmp_path, config).pairs == 0


def test_an_easy_negative_that_became_hard_gets_its_cosines(
    model: Path, source: TrainingSource, tmp_path: Path
) -> None:
    """All its labels are there, but the Gram matrix lacks a row."""
    config = tiny_teacher_config(model)
    entry = next(e for e in source.plan.entries if e.easy_negatives)
    run(with_entries(source, [entry]), tmp_path, config)
    turned = dataclasses.replace(
        entry, hard_negatives=entry.hard_negatives + entry.easy_negatives[:1], easy_negatives=entry.easy_negatives[1:]
    )
    assert run(with_entries(source, [turned]), tmp_path, config).pairs == len(turned.passage_ids)
    labels = opened(source, tmp_path, config)
    assert labels.missing_cosines(entry.query_id, turned.positives + turned.hard_negatives) == []
    assert run(with_entries(source, [turned]), tmp_path, config).pairs == 0


def test_sources_of_one_name_are_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    sources = [topics(num_train=2, name="one"), topics(num_train=2, name="one")]
    with pytest.raises(InputError, match="two data sets have the same name: one, one"):
        label(sources, tmp_path / "store", teacher=tiny_teacher_config(model), device="cpu")
    assert not (tmp_path / "store").exists()


def test_query_ids_that_two_data_sets_share_are_kept_apart(model: Path, tmp_path: Path) -> None:
    sources = [topics(num_train=2, name="one"), topics(num_train=3, name="two")]
    config = tiny_teacher_config(model)
    report = label(sources, tmp_path, teacher=config, device="cpu", dtype="float32", show_progress=False)
    assert report.queries == 5
    assert [len(opened(made, tmp_path, config)) for made in sources] == [2, 3]


def test_several_sources_in_one_store(model: Path, tmp_path: Path) -> None:
    sources = [topics(num_train=3, name="one"), topics(num_train=5, shift=2, name="two", task="symmetric")]
    config = tiny_teacher_config(model)
    report = label(sources, tmp_path, teacher=config, device="cpu", dtype="float32", show_progress=False)
    assert report.queries == 8
    assert [len(opened(made, tmp_path, config)) for made in sources] == [3, 5]


# --- killed -----------------------------------------------------------------------------------------------------------

LABEL_FOREVER = """
import sys, time
from pathlib import Path
import d2llm.training.label as verb
from d2llm.evaluation import judging
from d2llm.models.teachers.causal import Teacher
from tiny_data import topics
from tiny_models import tiny_teacher_config

judging._PAIRS_AT_ONCE, judging._SHARD_SECONDS = 36, 0.0  # of four queries
judge = Teacher.judge

def slowly(self, pairs, task, **options):
    time.sleep(0.05)  # so that the kill comes between shards as well as in the middle of one
    with open(sys.argv[3], "a") as file:
        file.write(f"{{len(pairs)}}\\n")
    return judge(self, pairs, task, **options)

Teacher.judge = slowly
teacher = tiny_teacher_config(Path(sys.argv[1]))
verb.label([topics(num_train={num})], Path(sys.argv[2]), teacher=teacher, device="cpu", dtype="float32")
"""


def test_killed_and_resumed_judges_nothing_finished_twice(model: Path, source: TrainingSource, tmp_path: Path) -> None:
    config = tiny_teacher_config(model)
    store, judged = tmp_path / "store", tmp_path / "judged"
    code = LABEL_FOREVER.format(num=NUM_QUERIES)
    with PreparedProcess(script, code, str(model), str(store), str(judged)) as process:
        process.until(lambda: len(list(store.glob("labels/[0-9]*.parquet"))) >= 3, "three shards")
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    before = opened(source, store, config)
    finished, finished_pairs = len(before), before.num_pairs
    assert 12 <= finished < NUM_QUERIES
    report = run(source, store, config)
    assert report.finished_queries == finished
    assert report.queries == NUM_QUERIES - finished
    assert report.pairs == num_pairs(source) - finished_pairs
    # What the killed process judged beyond its finished shards is at most what it had in hand.
    wasted = sum(int(line) for line in judged.read_text().splitlines()) - finished_pairs
    assert 0 <= wasted <= max(sum(len(e.passage_ids) for e in source.plan.entries[n : n + 4]) for n in range(0, 40, 4))

    after = opened(source, store, config)
    assert after.num_duplicates == 0
    rows = pq.read_table(store / "labels").num_rows
    assert rows == num_pairs(source)
    run(source, tmp_path / "undisturbed", config)
    assert_same_labels(opened(source, tmp_path / "undisturbed", config), after)
