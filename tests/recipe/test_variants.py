"""Recipe variants: each is valid for the shipped recipes and changes the model or its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from d2llm.core.errors import RecipeError
from d2llm.data.collation import LabelledSource, collate, epoch_batches
from d2llm.data.labels import LabelStore
from d2llm.models.backbone import Backbone
from d2llm.models.student import Student
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.recipe import (
    ChangedPooling,
    Full,
    InteractionConfig,
    Lora,
    Pooling,
    Pretraining,
    Recipe,
    ResidualConfig,
    ScoreFeaturesConfig,
    StudentConfig,
    TrainingConfig,
)
from d2llm.recipe.losses import LOSSES
from d2llm.recipe.recipe import load_recipe, parse_recipe
from d2llm.recipe.variants import VARIANTS, Variant, find_variant
from d2llm.training.ablation_report import BASE
from tiny_distill import Workspace, losses_of, score_batch
from tiny_models import write_tiny_model

# Variants that change nothing in a shipped recipe.
UNCHANGED = {
    "d2llm-llm-teacher": {
        *("without-words", "dot-head", "rich", "warm-start", "width-512", "one-stage", "no-gates"),
        *("without-li", "not-quiet"),
    },
    "d2llm": {
        *("dot-head", "rich", "warm-start", "width-512", "gates", "without-ci", "without-ph", "without-hi"),
        *("without-fi", "list-imitation"),
    },
    "d2llm-paper": {
        *("without-words", "paper-head", "concat", "cold-start", "width-512", "one-stage", "no-gates", "gates"),
        *("without-li", "not-quiet"),
    },
}
TAUGHT = {"labels", "live_teacher"}
RECIPES = sorted(UNCHANGED)
Built = tuple[dict[str, tuple[int, ...]], str, set[str], TrainingConfig, ScoreFeaturesConfig, tuple[int, ...], int]


def narrow(pooling: Pooling) -> Pooling:
    """The pooling for the tiny backbone, which is 32 wide."""
    sizes = {"num_heads": 4, "dim": 8}
    update: dict[str, Any] = {name: size for name, size in sizes.items() if name in type(pooling).model_fields}
    if isinstance(pooling, ChangedPooling):
        update["pooling"] = narrow(pooling.pooling)
    return pooling.model_copy(update=update)


def kinds(recipe: Recipe) -> list[str]:
    return [stage.kind for stage in recipe.student.pooling.stages]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Built]:
    """Builds a recipe's student on a tiny backbone and returns its shapes, pooling, losses and training settings."""
    tiny_run = Workspace(tmp_path_factory.mktemp("variants"))
    model = write_tiny_model(tmp_path_factory.mktemp("six") / "model", "modernbert", num_hidden_layers=6)
    decoder = write_tiny_model(tmp_path_factory.mktemp("decoder") / "model", "llama", num_hidden_layers=6)
    identity = identify_local_teacher(tiny_run.teacher)
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts["asymmetric"]}
    store = LabelStore(tiny_run.labels, **key, dataset=tiny_run.source.dataset.name)
    labelled = LabelledSource.join(tiny_run.source, store)
    batches = epoch_batches([labelled], epoch=0, batch_queries=4, num_hard=2, num_easy=1, seed=0)
    batch = collate(*batches[0])
    batch = replace(batch, pair_inputs={"in_batch_imitation": np.zeros(batch.positive.shape, np.float32)})
    backbones: dict[StudentConfig, Backbone] = {}
    losses: dict[tuple[str, str], set[str]] = {}

    def build(recipe: Recipe) -> Built:
        chosen = str(decoder if recipe.student.backbone.bidirectional else model)
        config = recipe.student.model_copy(
            update={
                "backbone": recipe.student.backbone.model_copy(update={"model": chosen}),
                "pooling": narrow(recipe.student.pooling),
            }
        )
        key = config.model_copy(update={"interaction": InteractionConfig()})
        if key not in backbones:
            backbones[key] = Backbone.load(config.backbone, config.pooling, device="cpu", dtype="float32")
        student = Student(config, backbones[key])
        shapes = {
            f"{part}.{name}": tuple(parameter.shape)
            for part, module in (("pooling", student.pooling), ("interaction", student.interaction))
            for name, parameter in module.state_dict().items()
        }
        kind = config.interaction.head, recipe.losses.model_dump_json()
        if kind not in losses:
            losses[kind] = set(losses_of(score_batch(student, batch), batch, recipe.losses))
        return (
            shapes,
            student.backbone.own_pooling.kind,
            losses[kind],
            recipe.training,
            recipe.score_features,
            (
                {kind: loss for kind, loss in recipe.losses.root.items() if loss.of_vectors},
                recipe.student.backbone.has_two_adapters,
            ),
            student.backbone.model.config.num_hidden_layers,
        )

    return build


@pytest.mark.parametrize("name", RECIPES)
def test_every_variant_changes_the_model_or_its_training(name: str, build: Callable[[Recipe], Built]) -> None:
    recipe = load_recipe(name)
    base = build(recipe)
    built_variants: dict[str, Built] = {variant: build(VARIANTS[variant].apply(recipe)) for variant in VARIANTS}
    assert {variant for variant, built in built_variants.items() if built == base} == UNCHANGED[name]
    all_losses = base[2]
    removed = {
        "without-ci": {"contrastive_imitation"},
        "without-ph": {"rank_imitation_positive_hard"},
        "without-hi": {"rank_imitation_hard_easy"},
        "without-fi": {"feature_imitation"},
        "without-li": {"list_imitation"},
        "no-imitation": {loss for loss in all_losses if LOSSES.find(loss).needs & TAUGHT},
    }
    for variant in VARIANTS.values():
        if variant.group == "losses":
            [loss] = variant.imitation or {}
            assert built_variants[variant.name][2] == all_losses - removed["no-imitation"] | {loss}
    for variant, losses in removed.items():
        assert built_variants[variant] == (base[0], base[1], all_losses - losses, *base[3:])
        assert losses <= all_losses or variant in UNCHANGED[name]
    assert built_variants["cosine"][:3] == ({"interaction.log_scale": ()}, "mean", {"in_batch_cross_entropy"})
    assert set(built_variants["cosine-for-iem"][0]) > {"interaction.log_scale", "pooling.pma.seeds"}
    for pooling in ("mean", "weighted_mean", "last"):
        shapes, backbone_pooling, *_ = built_variants[f"{pooling.replace('_', '-')}-pooling"]
        assert backbone_pooling == pooling
        assert {n for n in shapes if n.startswith("pooling")} == set()
        assert {n: s for n, s in base[0].items() if n.startswith("interaction")} == shapes
    assert {n.split(".")[2] for n in built_variants["one-branch"][0] if n.startswith("interaction.branches")} == {
        "shared"
    }
    for width in (128, 512, 1024):
        shapes = built_variants[f"width-{width}"][0]
        assert shapes["interaction.first.weight"][0] == width
        assert shapes["interaction.output.weight"] == (1, width)
    for features, parts in (("concat", 2), ("product", 3), ("difference", 3), ("rich", 4)):
        assert built_variants[features][0]["interaction.first.weight"][1] == parts * 32
    assert "pooling.gate" in built_variants["warm-start"][0]
    assert "pooling.gate" not in built_variants["cold-start"][0]
    assert not any("dots" in n for n in built_variants["paper-head"][0])
    assert any("dots" in n for n in built_variants["dot-head"][0])


@pytest.mark.parametrize("name", RECIPES)
def test_a_variant_changes_only_its_settings(name: str) -> None:
    recipe = load_recipe(name)
    for variant in VARIANTS.values():
        changed = variant.apply(recipe)
        assert changed.name == f"{name}-{variant.name}"
        overrides = {section: values for section, values in variant.settings.items() if section != "losses"}
        if callable(made := overrides.get("student", {}).get("pooling")):
            pooling = made(recipe.student.pooling.model_dump())
            overrides["student"] = overrides["student"] | {"pooling": pooling.model_dump()}
        if stages := overrides.get("training", {}).get("pretraining"):
            stages = tuple(Pretraining.of(stage).model_dump() for stage in stages)
            overrides["training"] = overrides["training"] | {"pretraining": stages}
        before, after = (leaves(each.model_dump(exclude={"losses"})) for each in (recipe, changed))
        expected = before | leaves(overrides) | {("name",): changed.name}
        for path in {path[:-1] for path in leaves(overrides) if path[-1] == "kind" and before.get(path) != after[path]}:
            # A section of another kind: what the variant does not say has its default.
            before_kind = {each for each in expected if each[: len(path)] == path and each not in leaves(overrides)}
            expected = {each: value for each, value in expected.items() if each not in before_kind}
            expected = {each: value for each, value in after.items() if each[: len(path)] == path} | expected
        if not changed.training.residual.epochs:  # no second stage, so nothing else to say about it
            expected |= leaves(ResidualConfig(epochs=0).model_dump(), ("training", "residual"))
        assert after == expected
        named = {*variant.settings.get("losses", {}), *(variant.imitation or {})}
        for kind in recipe.losses.root.keys() | changed.losses.root.keys() | named:
            replaced = variant.imitation is not None and LOSSES.find(kind).needs & TAUGHT
            if kind not in named and not replaced:
                assert changed.losses.root.get(kind) == recipe.losses.root.get(kind)
        for kind, weight in (variant.imitation or {}).items():
            assert changed.losses.weight(kind) == (weight["weight"] if isinstance(weight, dict) else weight)


def leaves(values: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Values by their path; a list counts as one value."""
    if not isinstance(values, dict):
        return {path: values}
    return {k: v for key, value in values.items() for k, v in leaves(value, (*path, key)).items()}


def test_only_other_losses_need_a_teacher_if_the_recipe_does_not() -> None:
    recipe = VARIANTS["no-imitation"].apply(load_recipe("d2llm"))
    needing = [variant for variant in VARIANTS.values() if variant.apply(recipe).losses.imitates]
    combined = {"dual-head", "subclass-imitation", "relabelled", "relabelled-others"}
    assert {variant.group for variant in needing if variant.name not in combined} == {"losses"}
    assert "in-batch-imitation" not in {variant.name for variant in needing}  # its teacher needs no labels


def test_names_are_valid_for_folders_and_command_lines() -> None:
    assert BASE not in VARIANTS
    for name, variant in VARIANTS.items():
        assert name == variant.name
        assert name.replace("-", "").isalnum()
        assert name == name.lower()
    groups = [variant.group for variant in VARIANTS.values()]
    assert groups == sorted(groups, key=("baseline", "published", "losses", "own").index)
    assert len({variant.title for variant in VARIANTS.values()}) == len(VARIANTS)


def test_an_unknown_variant_suggests_the_nearest() -> None:
    assert find_variant("without-ci") is VARIANTS["without-ci"]
    with pytest.raises(RecipeError, match=r"no variant 'witout-ci'; did you mean 'without-ci'\?"):
        find_variant("witout-ci")
    with pytest.raises(RecipeError, match="no variant 'xyzzy'; there are: cosine, paper, without-ci"):
        find_variant("xyzzy")


def test_a_combination_has_the_changes_of_both_in_their_order() -> None:
    recipe = load_recipe("d2llm-small")
    both = find_variant("plackett-luce+width-128+width-1024").apply(recipe)
    assert both.name == "d2llm-small-plackett-luce+width-128+width-1024"
    assert set(both.losses.root) == {*recipe.losses.root} - {"list_imitation"} | {"plackett_luce"}
    assert both.student.interaction.hidden_dim == 1024
    one_after_other = VARIANTS["multivariate"].apply(VARIANTS["plackett-luce"].apply(recipe))
    assert (
        find_variant("plackett-luce+multivariate").apply(recipe).model_copy(update={"name": one_after_other.name})
        == one_after_other
    )
    with pytest.raises(RecipeError, match="no variant 'plackett-luc'; did you mean 'plackett-luce'"):
        find_variant("plackett-luc+multivariate")


def test_an_invalid_variant_error_names_the_variant() -> None:
    invalid = Variant("wrong", "own", "no width", {"student": {"interaction": {"hidden_dim": 0}}})
    with pytest.raises(RecipeError, match=r"variant 'wrong': student.interaction.hidden_dim"):
        invalid.apply(load_recipe("d2llm-paper"))


def test_variants_apply_to_recipes_whose_settings_they_exclude() -> None:
    """Widths of the vectors with the head that has none, whitening without what it whitens, Ditto with other means."""
    recipe = load_recipe("d2llm")
    ditto = Variant(
        "ditto",
        "own",
        "Ditto, whitened and nested",
        {
            "student": {"pooling": {"kind": "whitening", "pooling": {"kind": "ditto", "layer": 0, "head": 1}}},
            "losses": {"nested_cross_entropy": {"dims": (64,)}},
        },
    ).apply(recipe)
    for name in ("paper", "paper-head", "dual-head"):
        assert not VARIANTS[name].apply(ditto).losses.weight("nested_cross_entropy")
        assert VARIANTS[name].apply(VARIANTS["nested-depths"].apply(recipe)).losses.depths == ()
    for name in ("mean", "last", "weighted-mean"):
        assert kinds(VARIANTS[f"{name}-pooling"].apply(ditto)) == [name.replace("-", "_")]
    assert kinds(VARIANTS["cosine"].apply(ditto)) == ["ditto"]
    whitened = VARIANTS["whitening"].apply(recipe)
    assert kinds(whitened) == ["pma", "whitening", "auto"]
    assert kinds(VARIANTS["cold-start"].apply(whitened)) == ["pma"]
    projected = VARIANTS["projection-128"].apply(whitened)
    assert kinds(projected) == ["projection", "pma", "auto"]
    assert kinds(VARIANTS["cold-start"].apply(projected)) == ["projection", "pma"]
    assert kinds(VARIANTS["bidirectional"].apply(projected)) == ["projection", "pma", "mean"]
    two = VARIANTS["two-adapters"].apply(recipe)
    assert two.student.backbone.has_two_adapters
    assert not VARIANTS["simcse"].apply(two).student.backbone.has_two_adapters
    full = parse_recipe(recipe.model_dump() | {"student": {"backbone": {"tuning": "full"}}})
    assert VARIANTS["simcse"].apply(full).student.backbone.tuning == Full()  # which has no adapters to make one
    assert VARIANTS["two-adapters"].apply(full).student.backbone.tuning == Lora(adapters="two")
    assert VARIANTS["two-adapters"].apply(VARIANTS["simcse"].apply(recipe)).training.pretraining == ()
    assert kinds(VARIANTS["whitening"].apply(projected)) == ["pma", "whitening", "auto"]
    assert kinds(VARIANTS["whitened-mean-pooling"].apply(projected)) == ["whitening", "auto"]
