"""An instruction before the queries of one data set is what a prefix of the backbone is for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from d2llm.core.errors import DataFormatError, InputError, RecipeError
from d2llm.data.beir import read_beir
from d2llm.data.plan import TrainingPlan
from d2llm.data.run_folder import training_source
from d2llm.recipe import DataConfig, ScoreFeaturesConfig
from d2llm.recipe.recipe import parse_recipe, shaping_settings
from tiny_data import tiny_recipe
from tiny_distill import Workspace, log_of
from tiny_models import tiny_student_config

INSTRUCTION = "which text answers: "


def test_a_set_with_an_instruction_is_trained_and_measured_as_with_a_prefix(tmp_path: Path) -> None:
    workspace, settings = Workspace(tmp_path), {"epochs": 1, "clustered": True, "residual": {"epochs": 1}}
    plain = tiny_student_config(workspace.model)
    backbone = plain.backbone.model_copy(update={"query_prefix": INSTRUCTION})
    told = replace(workspace.source, instruction=INSTRUCTION)
    by_prefix = workspace.run(tmp_path / "prefix", student=plain.model_copy(update={"backbone": backbone}), **settings)
    by_instruction = workspace.run(tmp_path / "instruction", student=plain, source=told, **settings)
    without = workspace.run(tmp_path / "without", student=plain, **settings)
    assert by_instruction.dev == by_prefix.dev
    losses, same, others = (
        [line.get("loss") for line in log_of(tmp_path / name)] for name in ("instruction", "prefix", "without")
    )
    assert losses == same != others
    assert without.fingerprint != by_instruction.fingerprint


def test_queries_with_an_instruction_of_their_own_are_read_after_that(tmp_path: Path) -> None:
    workspace, settings = Workspace(tmp_path), {"epochs": 1, "clustered": True, "residual": {"epochs": 1}}
    source, student = workspace.source, tiny_student_config(workspace.model)
    queries = {name: replace(query, instruction=INSTRUCTION) for name, query in source.dataset.queries.items()}
    told = replace(source, dataset=replace(source.dataset, queries=queries))
    of_set = workspace.run(
        tmp_path / "set", student=student, source=replace(source, instruction=INSTRUCTION), **settings
    )
    of_queries = workspace.run(
        tmp_path / "queries", student=student, source=replace(told, instruction="for others: "), **settings
    )
    assert of_queries.dev == of_set.dev
    assert [line.get("loss") for line in log_of(tmp_path / "queries")] == [
        line.get("loss") for line in log_of(tmp_path / "set")
    ]
    words = {"score_features": ScoreFeaturesConfig(maxsim=True, in_training=True)}
    counted = tiny_recipe(student, epochs=1).model_copy(update=words)
    with pytest.raises(InputError, match=r"queries of tiny have an instruction, .*in_training compares all"):
        workspace.run(tmp_path / "words", source=told, recipe=counted)


def test_a_query_has_its_own_instruction_or_that_of_its_set_or_the_prefix(tmp_path: Path) -> None:
    (tmp_path / "faq" / "qrels").mkdir(parents=True)
    (tmp_path / "faq" / "corpus.jsonl").write_text('{"_id": "p", "text": "Cows drink water."}\n')
    lines = ['{"_id": "q", "text": "cows drink?"}', '{"_id": "r", "text": "water", "instruction": "task: a | query: "}']
    (tmp_path / "faq" / "queries.jsonl").write_text("\n".join(lines))
    (tmp_path / "faq" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\tp\t1\nr\tp\t1\n")
    plain = training_source(DataConfig(path=str(tmp_path / "faq")), TrainingPlan((), {"dataset": "faq"}))
    assert plain.instructed_queries(["q", "r"], "query: ") == ["query: cows drink?", "task: a | query: water"]
    told = replace(plain, instruction="")
    assert told.instructed_queries(["r", "q"], "query: ") == ["task: a | query: water", "cows drink?"]
    assert plain.query_text("r") == "water"  # what words and the teacher read
    (tmp_path / "faq" / "queries.jsonl").write_text('{"_id": "q", "text": "t", "instruction": 3}')
    with pytest.raises(DataFormatError, match="instruction"):
        read_beir(tmp_path / "faq")


def test_a_recipe_gives_it_to_its_data_set(tmp_path: Path) -> None:
    (tmp_path / "faq" / "qrels").mkdir(parents=True)
    (tmp_path / "faq" / "corpus.jsonl").write_text('{"_id": "p", "text": "Cows drink water."}\n')
    (tmp_path / "faq" / "queries.jsonl").write_text('{"_id": "q", "text": "what do cows drink?"}\n')
    (tmp_path / "faq" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\tp\t1\n")
    data = DataConfig(path=str(tmp_path / "faq"), instruction=INSTRUCTION)
    assert training_source(data, TrainingPlan((), {"dataset": "faq"})).instruction == INSTRUCTION
    recipe = {"data": [{"path": "faq", "instruction": INSTRUCTION}, {"path": "other"}]}
    shaping = shaping_settings(parse_recipe(recipe))["data"]
    assert (shaping["faq"]["instruction"], shaping["other"]["instruction"]) == (INSTRUCTION, None)
    with pytest.raises(RecipeError, match=r"in_training compares all: delete one of them"):
        parse_recipe(recipe | {"score_features": {"maxsim": True, "in_training": True}})
