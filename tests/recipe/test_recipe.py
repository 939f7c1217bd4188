from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from d2llm.core.errors import RecipeError
from d2llm.core.problems import describe_errors
from d2llm.recipe import Lora, Pretraining, Recipe, TeacherConfig, TeacherTuningConfig
from d2llm.recipe.losses import Objective
from d2llm.recipe.recipe import (
    changed_recipe,
    changed_settings,
    load_recipe,
    parse_recipe,
    shaping_settings,
    tuning_settings,
)
from d2llm.recipe.sections import Section


def write_recipe(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as error:
        parse_recipe(values, where="r.toml")
    return str(error.value)


def test_adapters_are_the_recommended_ones_by_default_and_the_papers_in_its_recipe():
    """D2LLM paper: LoRA r 8, alpha 8, dropout 0.05."""
    published = load_recipe("d2llm-paper").student.backbone.tuning
    assert published == Lora(rank=8, alpha=8.0, dropout=0.05)
    assert load_recipe("d2llm").student.backbone.tuning == Lora() == Lora(rank=16, alpha=32.0, dropout=0.0)


def test_the_default_recipe_has_the_papers_model_and_the_recommended_losses():
    """Those of the recipe d2llm."""
    recipe = parse_recipe({})
    assert recipe == Recipe()
    training = recipe.training
    assert (training.warmup_fraction, training.warmup_steps, training.epochs) == (0.1, None, None)
    assert recipe.student.interaction.hidden_dim == 512
    assert recipe.student.backbone.max_passage_tokens == 250
    assert recipe.losses == load_recipe("d2llm").losses
    assert recipe.losses.model_dump() == {
        "list_imitation": 0.5,
        "in_batch_cross_entropy": 0.5,
        "pair_cross_entropy": 1.0,
    }


@pytest.mark.parametrize("as_type", [Path, str])
def test_a_recipe_file_is_loaded(tmp_path: Path, as_type: type):
    path = write_recipe(
        tmp_path,
        """
        name = "first"
        [student.backbone]
        model = "smollm2"
        tuning = { kind = "lora", rank = 4 }
        [[data]]
        path = "a"
        task = "symmetric"
        [[data]]
        path = "b"
        max_queries = 10
        """,
    )
    recipe = load_recipe(as_type(path))
    assert recipe.name == "first"
    assert recipe.student.backbone.model == "smollm2"
    assert recipe.student.backbone.tuning == Lora(rank=4)
    assert [(data.path, data.task, data.max_queries) for data in recipe.data] == [
        ("a", "symmetric", None),
        ("b", "asymmetric", 10),
    ]


def test_a_recipe_survives_dumping_and_parsing():
    recipe = parse_recipe({"data": [{"path": "a"}], "training": {"head_learning_rate": 0.01}})
    assert parse_recipe(recipe.model_dump()) == recipe
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def changed(**sections: Any) -> Recipe:
    return parse_recipe({"data": [{"path": "far/a", "task": "symmetric"}]} | sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "other"},
        {"data": [{"path": "moved/a", "task": "symmetric", "max_queries": 7}]},  # the plan holds the sample of queries
        {"training": {"checkpoint_every": 3, "checkpoint_minutes": 1.0, "graph_gib": 2.0, "trackers": []}},
        {"training": {"gradient_checkpointing": True}},
        {"mining": {"num_hard": 3}, "teacher_tuning": {"epochs": 2}, "gate": {"depth": 5}},
    ],
)
def test_settings_that_do_not_shape_the_student_may_change(sections: dict[str, Any]):
    assert shaping_settings(changed(**sections)) == shaping_settings(changed())


def test_changed_settings_are_named_with_both_values():
    edited = changed(
        seed=1,
        training={"learning_rate": 0.5, "interpolation": [0.5]},
        data=[{"path": "far/a", "task": "asymmetric"}],
        losses={"list_imitation": 0.5, "in_batch_cross_entropy": 0.75},
    )
    assert changed_settings(shaping_settings(changed()), shaping_settings(edited)) == [
        "data.a.task (was symmetric, is asymmetric)",
        "losses.in_batch_cross_entropy.weight (was 0.5, is 0.75)",
        "losses.pair_cross_entropy (was set, is not set)",
        "seed (was 0, is 1)",
        "training.interpolation (was [], is [0.5])",
        "training.learning_rate (was 0.0003, is 0.5)",
    ]
    remined = shaping_settings(changed(training={"remine": True}, mining={"num_hard": 3}))
    other = shaping_settings(changed(training={"remine": True}))
    assert changed_settings(remined, other) == ["mining.num_hard (was 3, is 8)"]


def test_recipes_are_compared_as_todays_schema_reads_them():
    """A setting that the writer of a recipe did not know has its default; one that no recipe has any more is named."""
    current = changed(training={"learning_rate": 0.5}).model_dump(mode="json")
    saved = changed(name="other").model_dump(mode="json")
    del saved["training"]["in_batch_labels"], saved["student"]["backbone"]["tuning"]["adapters"], saved["losses"]
    assert changed_recipe(saved, current) == ["training.learning_rate (was 0.0003, is 0.5)"]
    assert changed_recipe(saved, current, tuning_settings) == []
    saved["training"]["graph_tokens"] = 7
    (problem,) = changed_recipe(saved, current)
    assert "unknown key 'training.graph_tokens'" in problem
    assert "another version of d2llm" in problem


def test_settings_that_only_one_side_has_are_named():
    before, after = {"a": {"b": 1}, "c": 2, "e": {"f": 1}}, {"a": {"b": 1, "d": None}}
    changes = ["a.d (was not set, is None)", "c (was 2, is not set)", "e (was set, is not set)"]
    assert changed_settings(before, after) == changes
    edited = changed(
        data=[{"path": "a", "task": "symmetric"}, {"path": "far/b", "task": "symmetric"}],
        score_features={"bm25": True, "in_training": True},
        training={"remine": True},
    )
    assert changed_settings(shaping_settings(changed()), shaping_settings(edited)) == [
        "data.b (was not set, is set)",
        "mining (was not set, is set)",
        "score_features (was not set, is set)",
        "training.remine (was False, is True)",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "x"}, "Recipe: unknown key 'nmae'; did you mean 'name'?"),
        ({"data": [{"path": "x", "max_dev_queries": 1}]}, "Recipe: unknown key 'data.0.max_dev_queries'"),
        ({"losses": {"spraed": 1.0}}, "Recipe: losses: no loss 'spraed'"),
    ],
)
def test_a_wrong_value_in_python_is_an_error_of_recipes(values: dict[str, Any], message: str):
    with pytest.raises(RecipeError) as caught:
        Recipe(**values)
    assert str(caught.value).startswith(message)


def test_settings_are_given_by_name():
    with pytest.raises(RecipeError, match="Recipe takes settings by their names, as in name=5"):
        Recipe(5)  # pyright: ignore[reportCallIssue]


def test_recipes_are_immutable():
    with pytest.raises(RecipeError, match="TrainingConfig does not change; make another by model_copy"):
        Recipe().training.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"studnt": {}}, "r.toml: unknown key 'studnt'; did you mean 'student'?"),
        ({"training": {"epoch": 3}}, "r.toml: unknown key 'training.epoch'; did you mean 'epochs'?"),
        (
            {"student": {"backbone": {"tuning": {"rnk": 4}}}},
            "r.toml: unknown key 'student.backbone.tuning.rnk'; did you mean 'rank'?",
        ),
        (
            {"data": [{"path": "a", "max_query": 3}]},
            "r.toml: unknown key 'data.0.max_query'; did you mean 'max_queries'?",
        ),
        (
            {"data": [{"path": "a", "zzz": 3}]},
            (
                "r.toml: unknown key 'data.0.zzz'; "
                "known keys here: about, exclude_shared_passages, instruction, max_labelled, max_queries, path, task"
            ),
        ),
    ],
)
def test_an_unknown_key_suggests_the_nearest(values: dict[str, Any], message: str):
    assert error_of(values) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"epochs": 0}}, "training.epochs is 0, but must be at least 1"),
        ({"gate": {"alpha": float("nan")}}, "gate.alpha is nan (float), but must be a finite number"),
        ({"data": [{"path": "a", "task": "s"}]}, "data.0.task is 's' (str), but must be 'symmetric' or 'asymmetric'"),
        (
            {"data": [{"path": "a", "task": "symetric"}]},
            "data.0.task is 'symetric' (str), but must be 'symmetric' or 'asymmetric'; did you mean 'symmetric'?",
        ),
        ({"training": {"epochs": "3"}}, "training.epochs is '3' (str), but must be a whole number"),
        ({"training": {"epochs": True}}, "training.epochs is True (bool), but must be a whole number"),
        ({"training": {"remine": 1}}, "training.remine is 1 (int), but must be true or false"),
        ({"training": {"weight_decay": True}}, "training.weight_decay is True (bool), but must be a number"),
        (
            {"training": {"trackers": 5}},
            "training.trackers is 5 (int), but must be 'auto' or a list",
        ),
        (
            {"student": {"backbone": {"layers": True}}},
            "student.backbone.layers is True (bool), but must be a whole number or a list",
        ),
        (
            {"student": {"backbone": {"layers": [1, True]}}},
            "student.backbone.layers.1 is True (bool), but must be a whole number",
        ),
        ({"mining": {"sources": "bm25"}}, "mining.sources is 'bm25' (str), but must be a list"),
        ({"losses": {"margin_mse": {"weight": True}}}, "losses.margin_mse.weight is True (bool), but must be a number"),
        ({"losses": {"margin_mse": -1}}, "losses.margin_mse.weight is -1, but must be at least 0"),
        (
            {"losses": {"margin_mse": "much"}},
            "losses.margin_mse is 'much' (str), but must be a weight, such as 0.5, or",
        ),
        ({"losses": 0.5}, "losses is 0.5 (float), but must be a table: write [losses]"),
        ({"data": [{"task": "symmetric"}]}, "data.0.path is missing; set it"),
        ({"data": {"path": "a"}}, "data is {'path': 'a'} (dict), but must be a list of tables: write [[data]]"),
        ({"training": 5}, "training is 5 (int), but must be a table: write [training]"),
        ({"seed": 10**19}, "seed is 10000000000000000000, but must be at most 1e+18"),
        *(
            ({"name": name}, f"name: must be the name of a folder, without / and \\ (got {name!r})")
            for name in ("../../a", "/a", "..", "a\\b", "a\x1b[31m", "a\u202eb", "")
        ),
    ],
)
def test_a_bad_value_names_the_field_and_the_value(values: dict[str, Any], message: str):
    assert error_of(values).startswith(f"r.toml: {message}")


@pytest.mark.parametrize("value", [True, 2.5, "x", [], [None], {}, {"a": 1}, float("inf"), date(2026, 1, 1), 10**30])
def test_no_bad_value_is_described_in_the_words_of_pydantic(value: object):
    """Of any setting of any section."""

    def sections(base: type[Section]) -> Iterator[type[Section]]:
        for section in base.__subclasses__():
            yield section
            yield from sections(section)

    shipped = [section for section in sections(Section) if section.__module__.startswith("d2llm.recipe")]
    problems: set[str] = set()
    for section in shipped:
        for name in section.model_fields:
            try:
                section.model_validate({name: value})
            except ValidationError as error:
                problems.add(describe_errors(error, section, "section"))
    assert len(problems) > 50
    assert not [message for message in problems if re.search("[Ii]nput|valid |String should|constrained", message)]


def test_all_problems_are_named_at_once():
    message = error_of({"nmae": "x", "training": {"epochs": -1}})
    assert "did you mean 'name'?" in message
    assert "training.epochs" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read .*No such file"),
        *(
            (text, "not valid TOML: .*; correct it there")
            for text in ("name = ", "[training\nepochs = 1", "a = 1\na = 2")
        ),
        (b"name = '\xff'", "not valid UTF-8 .byte 8."),
        ("epochs = 3", "unknown key 'epochs'"),
        ("student = { interaction = { hidden_dim = 9223372036854775808 } }", "a whole number has 65 bits, but TOML's"),
    ],
)
def test_errors_of_a_file_name_the_file(tmp_path: Path, text: str | bytes | None, problem: str):
    path = tmp_path / "none.toml" if text is None else write_recipe(tmp_path, text)
    with pytest.raises(RecipeError, match=f"^{re.escape(str(path))}: {problem}"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "kind", "model"),
    [
        ("smollm2", "auto", "smollm2"),
        ("cosine:runs/student", "cosine", "runs/student"),
        ("owner/name:free", "auto", "owner/name:free"),
        ("cosine:", "auto", "cosine:"),
    ],
)
def test_a_teacher_name_may_have_a_kind_prefix(text: str, kind: str, model: str):
    remote = {"url": "http://127.0.0.1:1/v1", "top_logprobs": 5}
    base = TeacherConfig(model="before", kind="remote", prompt="short", max_tokens=64, remote=remote)
    named = base.named(text)
    kept = {} if kind == "cosine" else {"prompt": "short", "max_tokens": 64}
    assert named == TeacherConfig.model_validate({"model": model, "kind": kind, **kept})
    assert named.model_fields_set == {"model", *kept}
    graded = base.named("graded:x")
    assert graded == TeacherConfig(kind="graded", model="x", remote={"url": remote["url"]})  # its own prompt
    assert base.named("remote:x") == base.model_copy(update={"model": "x"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '[teacher]\nkind = "remote"\nquantization = "4bit"',
            "'teacher.quantization' of kind remote; .* kind auto, causal, seq2seq",
        ),
        (
            '[teacher]\nkind = "cosine"\ndevice_map = "auto"',
            "'teacher.device_map' of kind cosine; .* kind auto, causal, seq2seq",
        ),
        (
            '[teacher]\nkind = "ensemble"\ndtype = "float32"',
            "'teacher.dtype' of kind ensemble; it is a setting of kind",
        ),
        ('[teacher]\nkind = "vllm"\ndevice_map = "auto"', "unknown key 'teacher.device_map' of kind vllm"),
        ('[teacher]\nkind = "causal"\nenforce_eager = true', "'teacher.enforce_eager' of kind causal; .* kind vllm"),
        ('[teacher]\npositive_label = "yes"', "'teacher.positive_label' of kind auto; .* kind classifier"),
        ('[teacher]\nkind = "causl"', "teacher: no kind of teacher 'causl'; did you mean 'causal'"),
        ('[teacher]\nkind = "causal"\nmax_token = 5', "unknown key 'teacher.max_token'; did you mean 'max_tokens'"),
        ('[teacher]\nkind = "remote"', "teacher.remote is missing; set it"),
        (
            '[teacher]\nquantization = "4bit"\n[teacher_tuning]\ntuning = "full"',
            "teacher.quantization is 4bit, and quantised weights cannot be trained",
        ),
        ('[teacher_tuning]\ntuning = "full"\nquantization = "4bit"', "quantised weights cannot be trained: set tuning"),
        ("[teacher_tuning]\npair_weight = 0", "pair_weight is that of pairs beside lists: set loss"),
    ],
)
def test_settings_for_large_teachers_that_make_no_sense(tmp_path: Path, text: str, problem: str):
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write_recipe(tmp_path, text))


def test_a_loss_without_what_it_needs_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"losses\.in_batch_imitation\.teacher is missing; set it"):
        load_recipe(write_recipe(tmp_path, "[losses]\nin_batch_imitation = 0.5"))
    two = "[training]\ndual_head = true\n"
    for text, problem in (
        ('[student.interaction]\nhead = "cosine"', 'student.interaction.head is "cosine": set it to "dot"'),
        ("[losses]\nin_batch_cross_entropy = 1.0", "no imitation has a weight above 0"),
        ("[losses]\nlist_imitation = 1.0", "no cross-entropy has a weight above 0"),
    ):
        with pytest.raises(RecipeError, match=problem):
            load_recipe(write_recipe(tmp_path, two + text))
    assert load_recipe(write_recipe(tmp_path, two)).training.dual_head
    text = '[losses.in_batch_imitation]\nteacher = "d2llm-minilm"'
    assert load_recipe(write_recipe(tmp_path, text)).losses.weight("in_batch_imitation") == 1.0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('kind = "vectors"', "there is no backbone to imitate: name one as pretraining.teacher"),
        ('kind = "simcse"\ndropout = 0', "two readings of a text that differ by nothing else"),
        ('kind = "mirror"\nteacher = "minilm"', "unknown key 'training.pretraining.0.teacher'"),
        (
            'kind = "vectors"\nteacher = "minilm"\nteacher_layer = 1',
            "unknown key 'training.pretraining.0.teacher_layer'",
        ),
        ("epochs = 2", "training.pretraining.0.kind is missing; set it to one of: cocondenser, components"),
        ('kind = "simcse"\n[student.backbone]\ntuning = "frozen"', "student.backbone.tuning is frozen"),
        ('kind = "simcse"\n[training]\nstart = "d2llm-minilm"', "start names a student whose head fits"),
        ('kind = "simsce"', "no pretraining 'simsce'; did you mean 'simcse'"),
        ('kind = "masked_next_token"', "set student.backbone.bidirectional = true"),
        ('kind = "mutual_information"', "there is no backbone to imitate"),
    ],
)
def test_a_pretraining_without_what_it_needs_is_refused(tmp_path: Path, text: str, problem: str):
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write_recipe(tmp_path, "[training.pretraining]\n" + text))


def test_pretraining_has_defaults_for_each_kind(tmp_path: Path):
    text = '[student.backbone]\nlayers = 4\n[training.pretraining]\nkind = "vectors"'
    (taught,) = load_recipe(write_recipe(tmp_path, text)).training.pretraining
    (alone,) = load_recipe(write_recipe(tmp_path, '[training.pretraining]\nkind = "simcse"')).training.pretraining
    two = '[[training.pretraining]]\nkind = "words"\n[[training.pretraining]]\nkind = "simcse"'
    stages = load_recipe(write_recipe(tmp_path, two)).training.pretraining
    assert [stage.kind for stage in stages] == ["words", "simcse"]
    assert (taught.dropout_rate, alone.dropout_rate) == (0.0, 0.1)
    assert Pretraining.of("words").dropout_rate == 0.0
    assert (taught.rate_for("full"), taught.rate_for("lora")) == (1e-4, 1e-3)
    assert taught.model_copy(update={"learning_rate": 0.5, "dropout": 0.2}).rate_for("full") == 0.5


NESTED = "[losses.nested_cross_entropy]\n"


def test_subclasses_need_features_of_pairs():
    values = {"losses": {"subclass_imitation": 1.0}, "student": {"interaction": {"head": "cosine"}}}
    assert "needs the features of pairs, which the head 'cosine' does not have" in error_of(values)


@pytest.mark.parametrize("layers", ["[]", "[2, 1]", "[1, 1]", "0", "[-1]"])
def test_layers_that_make_no_sense(tmp_path: Path, layers: str):
    with pytest.raises(RecipeError, match="layers"):
        load_recipe(write_recipe(tmp_path, f"[student.backbone]\nlayers = {layers}"))


def test_layers_may_be_a_number_or_a_list(tmp_path: Path):
    for text, layers in (("4", 4), ("[0, 1, 3]", (0, 1, 3))):
        recipe = load_recipe(write_recipe(tmp_path, f"[student.backbone]\nlayers = {text}"))
        assert recipe.student.backbone.layers == layers


def test_an_unknown_loss_suggests_the_nearest(tmp_path: Path):
    with pytest.raises(RecipeError, match="margin_mse"):
        load_recipe(write_recipe(tmp_path, "[losses]\nmargin_mes = 1.0"))


@pytest.mark.parametrize("loss", ["feature_imitation", "subclass_imitation"])
def test_a_teacher_without_features_is_refused_where_they_are_imitated(loss: str) -> None:
    endpoint = {"remote": {"url": "http://127.0.0.1:1/v1"}}
    several = [{"kind": "likelihood"}, {"kind": "graded", **endpoint}]
    for teacher in (
        *({"kind": kind, **endpoint} for kind in ("remote", "graded", "listwise")),
        *({"kind": kind} for kind in ("vllm", "likelihood", "cosine")),
        {"kind": "fused", "teachers": several},
    ):
        kind = teacher["kind"]
        problem = error_of({"teacher": teacher, "losses": {loss: 1.0}})
        assert f"losses.{loss} imitates a teacher's features, and one of kind {kind} has none: set losses" in problem
    for teacher in (
        *({"kind": kind} for kind in ("auto", "causal", "seq2seq", "classifier", "ensemble")),
        {"kind": "fused", "teachers": [*several, {"kind": "causal"}]},
    ):
        assert parse_recipe({"teacher": teacher, "losses": {loss: 1.0}}).losses.weight(loss) == 1.0


@pytest.mark.parametrize(
    ("loss", "least"),
    [
        ("mixed_negatives", 2),
        ("passage_contrast", 1),
        ("rank_imitation_positive_hard", 1),
        ("rank_imitation_hard_easy", 1),
    ],
)
def test_a_loss_of_hard_negatives_needs_some(loss: str, least: int) -> None:
    values = {"losses": {loss: 1.0}, "training": {"num_hard": least - 1}}
    problem = f"losses.{loss} compares hard negatives, and training.num_hard is {least - 1}: set it to {least} or more"
    assert problem in error_of(values)
    parse_recipe({"losses": {loss: 1.0}, "training": {"num_hard": least}})


@pytest.mark.parametrize("losses", [{}, {"list_imitation": 0.0}])
def test_a_recipe_without_a_loss_is_refused(losses: dict[str, float]) -> None:
    assert "so nothing would be trained: name one" in error_of({"losses": losses})


def test_a_live_teacher_needs_no_labels():
    losses = Objective({"in_batch_imitation": {"teacher": "d2llm-minilm"}})
    assert not losses.imitates
    assert all(Objective({kind: 1.0}).imitates for kind in ("feature_imitation", "list_imitation", "ranknet"))


def test_quantised_weights_are_tuned_by_adapters_only_if_the_recipe_says_so(tmp_path: Path):
    full = load_recipe(write_recipe(tmp_path, '[teacher]\nquantization = "4bit"\n[teacher_tuning]\nepochs = 0'))
    assert full.teacher_tuning.base_quantization(full.teacher) == "4bit"
    text = '[teacher]\nquantization = "4bit"\n[teacher_tuning]\ntuning = "full"\nquantization = "none"'
    recipe = load_recipe(write_recipe(tmp_path, text))
    assert recipe.teacher_tuning.base_quantization(recipe.teacher) == "none"


def test_settings_of_a_tuning_leave_out_how_the_teacher_judges():
    tuning = TeacherTuningConfig()
    plain = tuning_settings(Recipe(teacher_tuning=tuning))
    judged = TeacherConfig(kind="vllm", dtype="bfloat16", tensor_parallel_size=2)
    checkpointed = tuning.model_copy(update={"gradient_checkpointing": True})
    assert tuning_settings(Recipe(teacher=judged, teacher_tuning=checkpointed)) == plain
    in_bits = tuning_settings(Recipe(teacher=TeacherConfig(quantization="4bit"), teacher_tuning=tuning))
    assert changed_settings(plain, in_bits) == ["teacher_tuning.quantization (was none, is 4bit)"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[student.pooling]\nkind = "ditto"\nlayer = 0', r"student\.pooling\.head is missing"),
        ('[student.pooling]\nkind = "mean"\nlayer = 0', "key 'student.pooling.layer' of kind mean; .* kind ditto"),
        ('[student.pooling]\nkind = "ditto"\nlayer = 0\nhead = -1', r"student\.pooling\.head"),
        (
            '[student.pooling]\nkind = "pma"\npooling = { kind = "ditto", layer = 0, head = 1 }',
            "PMA would read the changed ones",
        ),
        ('[student.pooling]\npooling = "whitening"\nwarm_start = false', "PMA without warm start does not use"),
        ('[student]\npooling = "wighted_mean"', "no pooling 'wighted_mean'; did you mean 'weighted_mean'"),
        (
            '[student.backbone]\ntuning = { kind = "full", adapters = "two" }',
            "unknown key 'student.backbone.tuning.adapters' of kind full; it is a setting of kind lora",
        ),
        ('[student.backbone]\ntuning = { adapters = "three" }', "'one' or 'two'"),
        ('[student.backbone]\ntuning = "half"', "no tuning 'half'; there are: lora, full, frozen"),
        (
            '[student.backbone]\ntuning = { adapters = "two" }\n[[data]]\npath = "pairs"\ntask = "symmetric"',
            "in every data set the two texts of a pair have the same role",
        ),
        (
            '[student.backbone]\ntuning = { adapters = "two" }\n[training.pretraining]\nkind = "simcse"',
            "trains one backbone for all texts",
        ),
        (
            '[student.pooling]\nkind = "projection"\ndim = 64\npooling = "whitening"',
            "after whitening they differ as much in all",
        ),
        ('[student.pooling]\nkind = "projection"\ndims = 64', "did you mean 'dim'"),
    ],
)
def test_poolings_that_make_no_sense(tmp_path: Path, text: str, problem: str):
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write_recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (NESTED + "dims = [64, 32]", "must name each width once, in ascending order"),
        (NESTED + "dims = [0]", r"losses\.nested_cross_entropy\.dims\.0"),
        (NESTED + "layers = [4, 2]", "must name each depth once, in ascending order"),
        (NESTED + "layer = [2]", "unknown key 'losses.nested_cross_entropy.layer'; did you mean 'layers'"),
        (NESTED + 'layers = [2]\n[student.interaction]\nhead = "paper"', "losses.nested_cross_entropy needs inner"),
        (NESTED + "layers = [2, 4]\n[student.backbone]\nlayers = 4", "names 4, but .* keeps only 4 layers"),
        (NESTED + "layers = [2]\n[student.backbone]\nlayers = [0, 5]", "names 2, but .* keeps only 2 layers"),
        (
            ("losses.nested_cross_entropy.layers = [2]\n[student]\npooling = { kind = 'ditto', layer = 0, head = 1 }"),
            "the pooling ditto reads layers that these may lack",
        ),
        ("[losses]\nnested_cross_entropy = 1.0", "so nothing would be trained"),
        (NESTED + "dims = [64]\nalignment = 1", "layers names none: set it"),
        (
            '[losses]\nangular_margin = 1.0\n[student.interaction]\nhead = "paper"',
            "losses.angular_margin needs inner products",
        ),
        (NESTED + 'dims = [64]\n[student.interaction]\nhead = "paper"', "the head 'paper' does not have"),
        (
            "[losses]\nlist_imitation = 1\nnested_cross_entropy.dims = [64]\n[training]\ndual_head = true\n",
            "training.dual_head combines two",
        ),
    ],
)
def test_nested_widths_that_make_no_sense(tmp_path: Path, text: str, problem: str):
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write_recipe(tmp_path, text))


FROZEN_VECTORS = '[student]\nbackbone = { tuning = "frozen" }\npooling = "auto"\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[training]\ncomplement_words = 0", "complement_words"),
        ("[training]\ncomplement_words = 20\nremine = true", "remine replaces them by those of the student"),
        ('[training]\ncomplement_words = 20\n[mining]\nsources = ["encoder"]', "mining.sources does not name bm25"),
        ("[training]\ncomplement_word = 20", "complement_words"),
        ("[losses]\nsoft_expansion = 0.5", r"losses\.soft_expansion\.passages is missing; set it"),
        (
            FROZEN_VECTORS + '[losses.soft_expansion]\npassages = "a.jsonl"',
            "those of a frozen backbone with its own pooling stay as they are",
        ),
    ],
)
def test_complements_and_expansions_that_make_no_sense(tmp_path: Path, text: str, problem: str):
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write_recipe(tmp_path, text))


def test_a_teacher_is_tuned_only_if_its_weights_can_be_trained_here() -> None:
    assert Recipe().tunes_teacher
    assert Recipe(teacher=TeacherConfig(kind="vllm", model="qwen")).tunes_teacher
    assert not Recipe.model_validate({"teacher_tuning": {"epochs": 0}}).tunes_teacher
    endpoint = {"model": "large", "remote": {"url": "http://127.0.0.1:1/v1"}}
    for kind in ("graded", "listwise", "remote"):
        recipe = Recipe.model_validate({"teacher": endpoint | {"kind": kind}, "mining": {"teacher_margin": 0.5}})
        assert not recipe.tunes_teacher
        assert not recipe.filters_with_tuned_teacher
