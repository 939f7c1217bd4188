"""``d2llm recipe check`` and ``schema``, and ``d2llm methods``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from d2llm.core.shipped import shipped_recipes
from d2llm.core.toml import parse_toml
from d2llm.recipe.losses import LOSSES
from d2llm.reports.methods import SECTIONS
from e2e.command_line import fail, succeed, succeed_with_report

SHIPPED = shipped_recipes()


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Draft7Validator:
    path = tmp_path_factory.mktemp("schema") / "recipe.json"
    succeed("recipe", "schema", "--out", path)
    described = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(succeed("recipe", "schema").stdout) == described
    Draft7Validator.check_schema(described)
    return Draft7Validator(described)


def test_a_recipe_is_shown_by_what_it_changes() -> None:
    output = succeed("recipe", "check", "d2llm-joint").output
    rows = [cells for line in output.splitlines() if len(cells := line.split("\t")) == 3]
    shown = {name: (value, default) for name, value, default in rows}
    assert shown["losses.token_cross_entropy"] == ("0.5", "–")
    assert shown["losses.list_imitation"] == ("0", "0.5")
    assert shown["training.batch_queries"] == ("64", "32")
    assert "training.weight_decay" not in shown  # as by default
    assert "d2llm-joint is valid; data sets: squad-sent (asymmetric)" in " ".join(output.split())


def test_values_are_shown_as_recipes_write_them(tmp_path: Path) -> None:
    recipe = tmp_path / "some.toml"
    recipe.write_text('[score_features]\nbm25 = true\n[student.interaction]\ntasks = ["symmetric"]')
    output = succeed("recipe", "check", recipe).output
    assert "\ttrue\t" in output
    assert '["symmetric"]' in output
    recipe.write_text("")
    assert "setting" not in succeed("recipe", "check", recipe).output  # no table without rows


def test_two_data_sets_of_one_name_are_refused_as_by_a_run(tmp_path: Path) -> None:
    recipe = tmp_path / "twice.toml"
    recipe.write_text('[[data]]\npath = "a/tea"\n[[data]]\npath = "b/tea"')
    fail("recipe", "check", recipe, containing=["two data sets have the same folder name; copy or link one"])


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("layers = 60", "layers is 60, but 'minilm' has 6"),
        ("layers = [0, 60]", "layers names layer 60"),
        ("max_passage_tokens = 100000", "reads at most 512 tokens"),
        ('model = "smollm2"\n[[training.pretraining]]\nkind = "mirror"', "'smollm2' has no token for masked text"),
        ("[losses]\nnested_cross_entropy = { dims = [64, 384] }", "names 384, but the student's vectors have 384"),
        ("[losses]\nnested_cross_entropy = { layers = [6] }", "names 6, but the student's backbone has 6 layers"),
        ("[student.pooling]\nkind = 'pma'\nnum_heads = 7", "width 384 is not a multiple of it"),
        ("[student.pooling]\nkind = 'projection'\ndim = 512", "the vectors to project have only 384 components"),
        ("layers = 4\n[training.pretraining]\nkind = 'relations'\nteacher = 'smollm2'", "'smollm2' reads other tokens"),
        (
            "layers = 4\n[training.pretraining]\nkind = 'relations'\nrelation_heads = 5",
            "queries, keys or values of width",
        ),
        ("layers = 4\n[training.pretraining]\nkind = 'relations'\nteacher_layer = 6", "has only layers 0 to 5"),
    ],
)
def test_what_the_backbone_cannot_do_is_refused(tmp_path: Path, setting: str, problem: str) -> None:
    recipe = tmp_path / "wrong.toml"
    recipe.write_text(f"[student.backbone]\n{setting}")
    fail("recipe", "check", recipe, containing=[problem])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[student.backbone]\nmodel = "./gone"', "student.backbone.model: ./gone: no such folder"),
        ('[training]\nstart = "d2llm-minilmm"', "training.start: no student at 'd2llm-minilmm'"),
        ('[mining]\nstudent = "a/b/c"', "mining.student: no student at 'a/b/c'"),
        ('[labelling]\ncompared_students = ["d2llm-minilm", "x"]', "labelling.compared_students: no student at 'x'"),
        ('[losses]\nin_batch_imitation = { teacher = "x" }', "losses.in_batch_imitation.teacher: no student at 'x'"),
        (
            '[losses]\nsoft_expansion = { passages = "x.jsonl" }',
            "losses.soft_expansion.passages: x.jsonl: no such file",
        ),
        ('[teacher]\nmodel = "/gone"', "teacher.model: /gone: no such folder"),
        (
            "[[training.pretraining]]\nkind = 'simcse'\n[[training.pretraining]]\nkind = 'vectors'\nteacher = './gone'",
            "training.pretraining[1].teacher: ./gone: no such folder",
        ),
        (
            "[training.pretraining]\nkind = 'mexma'\ntranslations = './gone'",
            "training.pretraining[0].translations: ./gone: no such file or folder",
        ),
        ('[teacher]\nprompt = "papre"', "teacher.prompt: no prompt set 'papre'"),
        ('[teacher_tuning]\nlabels = "gone"', "teacher_tuning.labels: gone: no such file or folder"),
        (
            '[training]\npretraining = ["simcse", { kind = "simcse", corpus = "gone" }]',
            "training.pretraining[1].corpus: gone: no such file or folder",
        ),
    ],
)
def test_what_a_recipe_names_and_is_not_there_is_a_warning(tmp_path: Path, text: str, problem: str) -> None:
    recipe = tmp_path / "some.toml"
    recipe.write_text(text)
    assert f"warning: {recipe}: {problem}" in succeed("recipe", "check", recipe).stderr


def test_what_may_be_elsewhere_is_named_by_a_check(tmp_path: Path) -> None:
    recipe = tmp_path / "some.toml"
    recipe.write_text('[[data]]\npath = "gone"\n[[data]]\npath = "hf://a/b"\n[training]\nstart = "owner/name"')
    shown = succeed("recipe", "check", recipe).stderr
    assert "Hub or its cache, so not checked: training.start = 'owner/name'" in shown
    assert "data: gone: not here; give --data to a run" in shown
    recipe.write_text('[losses]\npair_cross_entropy = 1\n[teacher]\nmodel = "/gone"')  # nobody asks this teacher
    assert "gone" not in succeed("recipe", "check", recipe).stderr


def test_the_shipped_recipes_are_valid() -> None:
    succeed("recipe", "check", *SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_schema_holds_for_the_recipes_that_ship(schema: Draft7Validator, name: str) -> None:
    assert [*schema.iter_errors(parse_toml(SHIPPED[name].read_text(encoding="utf-8"), where=name))] == []


@pytest.mark.parametrize(
    "text",
    [
        "[losses]\nmargin_mze = 1.0",
        "[losses]\nmargin_mse = -1.0",
        "[losses]\ncontrastive_imitation = { temprature = 1.0 }",
        "[losses.in_batch_imitation]\nweight = 1.0",
        "[training]\nepoch = 3",
        "[training]\nepochs = 0",
        '[student.backbone]\ntuning = "half"',
    ],
)
def test_the_schema_refuses_what_a_run_would_refuse(schema: Draft7Validator, text: str) -> None:
    assert [*schema.iter_errors(parse_toml(text, where=""))]


def test_the_schema_explains_every_setting(schema: Draft7Validator) -> None:
    definitions = schema.schema["$defs"]
    unknown = definitions["TrainingConfig"]["properties"]["in_batch_labels"]["description"]
    assert unknown.startswith("Have the teacher score every query of a batch")
    assert {*definitions["Objective"]["properties"]} >= {*LOSSES.shipped}
    assert all(each["description"] for each in definitions["Objective"]["properties"].values())


def test_methods_are_listed_with_what_they_need_their_papers_and_what_was_measured(tmp_path: Path) -> None:
    _, report = succeed_with_report("methods", folder=tmp_path)
    sections = report["result"]
    assert {*sections} == {*SECTIONS}
    assert all({*sections[section]} == {*registry.kinds} for section, registry in SECTIONS.items())
    mirror, margins = sections["training.pretraining"]["mirror"], sections["losses"]["margin_mse"]
    assert mirror["paper"] == "Liu et al. 2021, arXiv 2104.08027 (Mirror-BERT)"
    assert mirror["ablations"] == ["mirror"]
    assert mirror["settings"]["masked_tokens"] == {
        "type": "whole number ≥ 1",
        "default": "3",
        "help": "How many neighbouring tokens are masked.",
    }
    assert margins["needs"] == "labels"
    assert margins["paper"] == "Hofstätter et al. 2020, arXiv 2010.02666"
    assert {*sections["losses"]["nested_cross_entropy"]["settings"]} == {
        "weight",
        "dims",
        "layers",
        "sampled",
        "alignment",
    }
    text = " ".join(succeed("methods").output.split())
    assert "Margin-MSE" in text
    assert "](" not in text


def test_a_method_is_shown_in_full_wherever_its_kind_is_one(tmp_path: Path) -> None:
    result, report = succeed_with_report("methods", "remote", folder=tmp_path)
    assert {section: [*kinds] for section, kinds in report["result"].items()} == {
        "student.backbone": ["remote"],
        "teacher": ["remote"],
        "writer": ["remote"],
    }
    settings = report["result"]["writer"]["remote"]["settings"]
    assert settings["remote"] == {"type": "table", "default": "must be given", "help": ""}
    assert settings["remote.api"]["type"] == "completions | chat"
    assert settings["temperature"]["default"] == "none"
    _, report = succeed_with_report("methods", "loss", folder=tmp_path)
    assert [*report["result"]] == ["losses"]
    fail("methods", "losss", containing=["no method or section 'losss'; did you mean 'losses'?"])
    text = " ".join(result.output.split())
    assert "docs/log/2026-11.md#2026-11-20-a-remote-teacher-beside-the-local-one" in text
    assert "remote.api_key_env" in text
    assert "Base address, up to /v1." in text
