"""The gate's table: a cross-encoder orders the same dev lists as all other systems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recorded_gate import CROSS_ENCODER, compared, main, merged, rows, table
from recorded_judge import RECORDED, read_graded_lists, sets_with_dev

from d2llm.core.files import new_folder
from d2llm.data.trec import read_run
from d2llm.models.teachers.classifier import ClassifierTeacher
from d2llm.models.teachers.identity import TEACHER_KIND
from d2llm.recipe import LoraConfig, TeacherConfig
from d2llm.recipe.recipe import load_recipe
from tiny_models import write_tiny_model

SET = "banking77"
RECIPE = RECORDED.parent / "graded_lists" / "cross-encoder.toml"


@pytest.fixture
def cross_encoder(tmp_path: Path) -> Path:
    """A teacher as tune-teacher writes it, but with random weights."""
    backbone = write_tiny_model(tmp_path / "bert", "bert")
    config = TeacherConfig(model=str(backbone), kind="classifier", new_head=True, max_tokens=64)
    model = ClassifierTeacher.load(config, device="cpu", dtype="float32")
    model.prepare_training(LoraConfig(), tuning="full")
    with new_folder(tmp_path / "teacher", kind=TEACHER_KIND) as folder:
        model.save(folder, {})
    return tmp_path / "teacher"


def test_a_cross_encoder_orders_the_dev_lists_and_gets_a_column_beside_what_was_measured_before(
    shared_data, cross_encoder, tmp_path, monkeypatch, capsys
):
    earlier = {"mean": 0.5, "teacher_minus": 0.3, "low": 0.2, "high": 0.4, "p": 0.01}
    result, runs = tmp_path / "gate.json", tmp_path / "runs"
    result.write_text(
        json.dumps({"measure": "nDCG@10", "sets": {SET: {"BM25": earlier}, "wikiqa": {"D2LLM": earlier}}})
    )
    options = ["--teacher", "cross-encoder", str(cross_encoder), "--device", "cpu", "--json", str(result)]
    monkeypatch.setattr("sys.argv", ["recorded_gate.py", str(shared_data), str(runs), SET, *options])
    main()

    lists = {each.query_id: each for each in read_graded_lists(SET) if each.split == "dev"}
    run = read_run(runs / SET / f"{CROSS_ENCODER}.run")
    assert run.name == CROSS_ENCODER
    assert {query: {*ranking} for query, ranking in run.rankings.items()} == {
        query: {*each.passages} for query, each in lists.items()
    }
    assert len({score for scores in run.scores.values() for score in scores.values()}) > 1000  # it read the texts

    values = rows(shared_data, runs, SET)
    assert values[CROSS_ENCODER] != values["teacher"]
    found = json.loads(result.read_text())["sets"]
    assert found[SET][CROSS_ENCODER] == pytest.approx(compared(values, CROSS_ENCODER))
    assert found[SET][CROSS_ENCODER]["low"] <= found[SET][CROSS_ENCODER]["teacher_minus"]
    assert found[SET]["BM25"] == earlier
    assert found["wikiqa"] == {"D2LLM": earlier}
    lines = capsys.readouterr().out.splitlines()
    assert lines == table(found)
    heads = [cell.strip() for cell in lines[0].split("|")]
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[heads.index(CROSS_ENCODER)] == f"{found[SET][CROSS_ENCODER]['mean']:.3f}"
    assert cells[heads.index("D2LLM")] == "-"
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_what_is_measured_again_replaces_an_earlier_figure(tmp_path: Path) -> None:
    result = tmp_path / "gate.json"
    assert merged(result, {SET: {"D2LLM": {"mean": 0.2}}}) == {SET: {"D2LLM": {"mean": 0.2}}}
    result.write_text(json.dumps({"measure": "nDCG@10", "sets": {SET: {"D2LLM": {"mean": 0.1}}}}))
    assert merged(result, {SET: {"D2LLM": {"mean": 0.2}}}) == {SET: {"D2LLM": {"mean": 0.2}}}


def test_the_recipe_of_the_cross_encoder_tunes_all_weights_on_the_sets_of_the_gate() -> None:
    recipe = load_recipe(str(RECIPE))
    assert sorted(Path(data.path).name for data in recipe.data) == sets_with_dev()
    for data in recipe.data:
        assert {data.task} == {each.task for each in read_graded_lists(data.path)}
    assert recipe.teacher.new_head
    assert recipe.teacher_tuning.tuning == "full"
    assert not recipe.filters_with_tuned_teacher
