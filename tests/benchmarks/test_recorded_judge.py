"""What a large language model really graded arrives as it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recorded_judge import RECORDED, mean_grades, read_graded_lists, recorded_teacher, sets_with_dev

from d2llm.data.beir import read_beir
from d2llm.models.teachers.pair_teacher import load_teacher

PAIRS = dict.fromkeys(
    ("atec", "lcqmc", "mrpc", "ocnli", "pawsx-zh", "rte", "sick", "sick-nli", "stsb", "stsb-zh"), (1500, 200)
) | {"pawsx-zh": (1473, 200), "rte": (1500, 174), "written-contrasts": (3535, 965), "written-natural": (3660, 840)}
"""Numbers of train and dev pairs."""
LISTS = sorted({path.stem for path in RECORDED.glob("*.jsonl")} - {*PAIRS})


@pytest.mark.parametrize("name", PAIRS)
def test_recorded_pairs_are_complete(name: str) -> None:
    pairs = read_graded_lists(name)
    assert all(len(each.passages) == len(each.grades) == 1 and each.judging == 1 for each in pairs)
    assert all(0 <= each.grades[0] <= 100 for each in pairs)
    assert len({(each.query_id, each.passages) for each in pairs}) == len(pairs)
    assert tuple(sum(each.split == split for each in pairs) for split in ("train", "dev")) == PAIRS[name]
    assert all(each.query_id.startswith(f"{each.split}/") for each in pairs)


@pytest.mark.parametrize("name", LISTS)
def test_recorded_lists_are_complete(name: str) -> None:
    lists = read_graded_lists(name)
    assert all(len(each.passages) == len(each.grades) == len({*each.passages}) == 20 for each in lists)
    assert all(0 <= grade <= 100 for each in lists for grade in each.grades)
    assert len({(each.query_id, each.judging) for each in lists}) == len(lists)
    dev = {each.query_id: {*each.passages} for each in lists if each.split == "dev" and each.judging == 1}
    again = {each.query_id: {*each.passages} for each in lists if each.judging == 2}
    assert again == dev
    assert not dev.keys() & {each.query_id for each in lists if each.split == "train"}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDED.glob("long/*.jsonl")))
def test_the_longer_lists_are_passages_of_dev_queries_that_were_not_graded_before(name: str) -> None:
    graded = {each.query_id: {*each.passages} for each in read_graded_lists(name) if each.split == "dev"}
    lists = read_graded_lists(f"long/{name}")
    assert len({each.query_id for each in lists}) == len(lists) >= 14
    assert all(each.split == "dev" and len(each.passages) == len(each.grades) for each in lists)
    assert all(0 <= grade <= 100 for each in lists for grade in each.grades)
    pairs = [(each.query_id, passage) for each in lists for passage in each.passages]
    assert len({*pairs}) == len(pairs)
    assert not [pair for pair in pairs if pair[1] in graded[pair[0]]]


def test_the_gate_and_the_table_of_agreement_take_the_sets_that_have_dev_lists() -> None:
    assert sets_with_dev() == ["banking77", "covidqa", "medquad", "nfcorpus", "squad-sent", "stackfaq", "wikiqa"]


@pytest.mark.parametrize("name", ["covidqa", "banking77"])
def test_a_graded_teacher_repeats_what_was_recorded(shared_data: Path, name: str) -> None:
    dataset = read_beir(shared_data / name, splits=["train", "dev"])
    lists = [each for each in read_graded_lists(name) if each.split == "dev"][:20]
    expected = mean_grades(
        [each for each in read_graded_lists(name) if each.query_id in {one.query_id for one in lists}]
    )
    pairs = [(each.query_id, passage_id) for each in lists for passage_id in each.passages]
    unknown = ("what do cows drink", "Cows drink water.")
    teacher = load_teacher(recorded_teacher(shared_data / name))
    texts = [(dataset.queries[query].text, dataset.passages[passage].full_text) for query, passage in pairs]
    result = teacher.score_pairs([*texts, unknown], lists[0].task)
    assert result.num_undecided == 1
    assert result.grades is not None
    assert np.isnan(result.grades[-1])
    np.testing.assert_allclose(result.grades[:-1], [expected[query][passage] for query, passage in pairs], rtol=1e-5)


def test_passages_outside_the_lists_get_the_given_grade_and_unknown_queries_none(shared_data: Path) -> None:
    dataset = read_beir(shared_data / "covidqa", splits=["train", "dev"])
    one = next(each for each in read_graded_lists("covidqa") if each.split == "train")
    outside = next(passage_id for passage_id in dataset.passages if passage_id not in one.passages)
    query = dataset.queries[one.query_id].text
    pairs = [(query, dataset.passages[passage_id].full_text) for passage_id in (*one.passages, outside)]
    teacher = load_teacher(recorded_teacher(shared_data / "covidqa", unlisted=3))
    result = teacher.score_pairs([*pairs, ("what do cows drink", "Grass.")], one.task)
    assert result.grades is not None
    np.testing.assert_allclose(result.grades[:-1], [*one.grades, 3], rtol=1e-5)
    assert np.isnan(result.grades[-1])
    assert result.num_undecided == 1
