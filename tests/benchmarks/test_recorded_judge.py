"""What a large language model really graded, replayed through the endpoint protocol, arrives as it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recorded_judge import RECORDED, mean_grades, read_graded_lists, recorded_judge, recorded_teacher

from d2llm.data.beir import read_beir
from d2llm.models.teachers.judge import load_judge

SETS = sorted(path.stem for path in RECORDED.glob("*.jsonl"))


@pytest.mark.parametrize("name", SETS)
def test_recorded_lists_are_complete(name: str) -> None:
    lists = read_graded_lists(name)
    assert all(len(each.passages) == len(each.grades) == len({*each.passages}) == 20 for each in lists)
    assert all(0 <= grade <= 100 for each in lists for grade in each.grades)
    assert len({(each.query_id, each.judging) for each in lists}) == len(lists)
    dev = {each.query_id: {*each.passages} for each in lists if each.split == "dev" and each.judging == 1}
    again = {each.query_id: {*each.passages} for each in lists if each.judging == 2}
    assert again == dev
    assert not dev.keys() & {each.query_id for each in lists if each.split == "train"}


@pytest.mark.parametrize("name", ["covidqa", "banking77"])
def test_a_graded_teacher_repeats_what_was_recorded(shared_data: Path, name: str) -> None:
    dataset = read_beir(shared_data / name, splits=["train", "dev"])
    lists = [each for each in read_graded_lists(name) if each.split == "dev"][:20]
    expected = mean_grades(
        [each for each in read_graded_lists(name) if each.query_id in {one.query_id for one in lists}]
    )
    pairs = [(each.query_id, passage_id) for each in lists for passage_id in each.passages]
    unknown = ("what do cows drink", "Cows drink water.")
    with recorded_judge(shared_data / name) as url:
        judge = load_judge(recorded_teacher(url))
        texts = [(dataset.queries[query].text, dataset.passages[passage].full_text) for query, passage in pairs]
        result = judge.judge([*texts, unknown], lists[0].task)
    assert result.num_undecided == 1
    assert result.grades is not None
    assert np.isnan(result.grades[-1])
    np.testing.assert_allclose(result.grades[:-1], [expected[query][passage] for query, passage in pairs], rtol=1e-5)
