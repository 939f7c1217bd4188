"""Recorded grades in place of a graded teacher's endpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from d2llm import Run
from d2llm.core.errors import D2LLMError
from d2llm.data.beir import read_beir
from d2llm.data.labels import LabelStore
from d2llm.data.plan import read_plan
from d2llm.models.teachers.pair_teacher import identify_teacher, load_teacher
from d2llm.recipe import TeacherConfig
from e2e.command_line import fail, succeed, succeed_with_report, write_lines
from list_endpoint import recipe_with_teacher

REMOTE = {"url": "http://127.0.0.1:9/v1"}


def teacher(lists: Path, *data: Path, **settings: object) -> TeacherConfig:
    recorded = {"lists": str(lists), "data": [*map(str, data)], **settings}
    return TeacherConfig.model_validate({"kind": "graded", "model": "large", "recorded": recorded})


def test_judge_repeats_texts_and_ids(workspace: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists.jsonl"
    write_lines(lists, [{"query": "cats?", "passages": ["they  purr", "no"], "grades": [94, 10.0]}])
    _, report = succeed_with_report("judge", "cats?", "no", "they purr", "--recorded", lists, folder=tmp_path)
    assert [each["log_odds"] for each in report["result"]["scores"]] == pytest.approx([-5, 2])
    remarks = succeed("judge", "dogs?", "no", "--recorded", lists).stderr
    assert (
        "not every pair was recorded, the others count as undecided (log-odds 0); the first is of query 'dogs?'"
        in remarks
    )
    write_lines(lists, [{"query_id": "q0", "passages": ["s0"], "grades": [grade]} for grade in (80, 84)])
    dataset = read_beir(workspace / "everyday")
    texts = (dataset.queries["q0"].text, dataset.passages["s0"].full_text)
    fail("judge", *texts, "--recorded", lists, containing=["lists.jsonl", "--data"])
    arguments = ("judge", *texts, "--recorded", lists, "--data", workspace / "everyday")
    _, report = succeed_with_report(*arguments, folder=tmp_path)
    assert report["result"]["scores"][0]["log_odds"] == pytest.approx(1)  # the mean of two
    assert (
        report["result"]["teacher"]
        == identify_teacher(teacher(lists).model_copy(update={"model": "recorded"})).fingerprint
    )
    fail("judge", "a", "b", "--recorded", lists, "--teacher", "cosine:minilm", containing=["graded:MODEL"])
    fail("judge", "a", "b", "--data", tmp_path, containing=["--recorded"])


def test_verbs_of_a_recipe_repeat_the_grades_and_count_what_was_not_recorded(workspace: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_with_teacher(workspace / "tiny.toml", 'kind = "graded"\nmodel = "large"'))
    where = (recipe, "--out", tmp_path / "run", "--dtype", "float32")
    succeed("mine", *where)
    plan = read_plan(next((tmp_path / "run" / "plans").glob("*")))
    lists = tmp_path / "everyday.jsonl"
    graded = [
        {
            "query_id": entry.query_id,
            "passages": entry.passage_ids[:-1],
            "grades": range(100)[: len(entry.passage_ids) - 1],
        }
        for entry in plan.entries
    ]
    write_lines(lists, [{**each, "grades": [*each["grades"]]} for each in graded])
    fail("label", *where, containing=["no address", "recorded"])
    result, report = succeed_with_report("label", *where, "--recorded", lists, folder=tmp_path)
    assert report["result"]["num_undecided"] == len(plan.entries)
    assert f"{len(plan.entries)} of them undecided" in result.stderr
    live = identify_teacher(TeacherConfig.model_validate({"kind": "graded", "model": "large", "remote": REMOTE}))
    key = {"teacher": live.fingerprint, "prompt": live.prompts["asymmetric"], "dataset": "everyday"}
    labels = LabelStore(tmp_path / "run" / "labels", **key)
    for entry in plan.entries:
        expected = {name: (grade - 70) / 12 for grade, name in enumerate(entry.passage_ids[:-1])}
        assert labels.log_odds(entry.query_id) == pytest.approx(expected | {entry.passage_ids[-1]: 0}, abs=1e-5)
    result, report = succeed_with_report("gate", *where, "--recorded", tmp_path, folder=tmp_path)
    assert report["result"]["num_undecided"] == report["result"]["num_scored"] > 0  # no dev query was recorded
    assert "count as undecided" in result.stderr
    _, report = succeed_with_report("run", *where, "--recorded", lists, folder=tmp_path)
    manifest = json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())
    assert manifest["teacher"] == live.fingerprint
    fail("label", workspace / "tiny.toml", *where[1:], "--recorded", lists, containing=['kind = "graded"'])
    assert Run(recipe, tmp_path / "run", recorded=lists).teacher.recorded is not None


def test_passages_that_a_list_lacks_can_have_a_grade(tmp_path: Path) -> None:
    lists = tmp_path / "lists.jsonl"
    write_lines(lists, [{"query": "q", "passages": ["a"], "grades": [90], "task": "symmetric"}])
    model = load_teacher(teacher(lists, unlisted=10))
    result = model.score_pairs([("q", "a"), ("q", "b"), ("other", "b")], "symmetric")
    np.testing.assert_allclose(result.log_odds, [20 / 12, -5, 0], rtol=1e-6)
    assert (result.num_undecided, result.features) == (1, None)
    assert model.score_pairs([("q", "a")], "asymmetric").num_undecided == 1  # another question
    plain = identify_teacher(teacher(lists))
    assert model.fingerprint == plain.fingerprint
    assert model.prompt_fingerprint("symmetric") != plain.prompts["symmetric"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"query_id": "q0", "passages": ["s0", "s1"], "grades": [1]}, "2 passages and 1 grades"),
        ({"query_id": "q0", "passages": ["s0"], "grades": [1, 2]}, "1 passages and 2 grades"),
        ({"query_id": "q0", "passages": ["s0", "s0"], "grades": [1, 2]}, "different"),
        ({"query_id": "q0", "passages": ["s0"], "grades": ["high"]}, "numbers from 0 to 100"),
        ({"query_id": "q0", "passages": ["s0"], "grades": [101]}, "numbers from 0 to 100"),
        ({"query_id": "q0", "passages": ["s0"], "grades": [True]}, "numbers from 0 to 100"),
        ({"query_id": "q0", "passages": ["s0"], "grades": [1], "task": "other"}, "'other'"),
        ({"passages": ["s0"], "grades": [1]}, "query_id"),
        ({"query_id": "nobody", "passages": ["s0"], "grades": [1]}, "no query 'nobody'"),
        ({"query_id": "q0", "passages": ["nothing"], "grades": [1]}, "no passage 'nothing'"),
    ],
)
def test_a_list_that_is_none_is_an_error_with_its_line(workspace, tmp_path, line: dict[str, object], problem: str):
    lists = tmp_path / "lists.jsonl"
    write_lines(lists, [{"query_id": "q0", "passages": ["s0"], "grades": [1]}, line])
    with pytest.raises(D2LLMError, match=f"lists.jsonl:2: .*{problem}"):
        load_teacher(teacher(lists, workspace / "everyday"))


def test_grades_of_labelled_pairs_are_found_by_split_and_number(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = [("a cat", "a dog", 0.0, "1"), ("a cat", "a kitten", 4.0, "2"), ("rain", "wet weather", 5.0, "3")]
    write_lines(
        pairs / "train.jsonl", [dict(zip(("query", "document", "score", "id"), row, strict=True)) for row in rows]
    )
    lists = tmp_path / "pairs-grades.jsonl"
    graded = [("train/1", "train/2", 70), ("train/3", "train/3", 94)]
    write_lines(lists, [{"query_id": one, "passages": [other], "grades": [grade]} for one, other, grade in graded])
    result = load_teacher(teacher(lists, pairs)).score_pairs(
        [("rain", "wet weather"), ("a cat", "a kitten")], "symmetric"
    )
    np.testing.assert_allclose(result.log_odds, [2, 0])
    assert result.num_undecided == 0
    write_lines(lists, [{"query_id": "train/2", "passages": ["train/2"], "grades": [1]}])
    with pytest.raises(D2LLMError, match="no query 'train/2'"):  # its text is that of pair 1
        load_teacher(teacher(lists, pairs))
