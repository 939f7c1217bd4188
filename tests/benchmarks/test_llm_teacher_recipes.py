"""The recipes of ``benchmarks/llm_teacher``: one teacher and one set of labels for two students."""

from pathlib import Path
from typing import Any

import pytest

from d2llm.recipe import Recipe
from d2llm.recipe.recipe import load_recipe
from d2llm.recipe.variants import VARIANTS

FOLDER = Path(__file__).parents[2] / "benchmarks" / "llm_teacher"


@pytest.fixture
def dot() -> Recipe:
    return load_recipe(FOLDER / "squad-sent-banking77.toml")


@pytest.fixture
def paper() -> Recipe:
    return load_recipe(FOLDER / "paper-head.toml")


def test_both_recipes_share_plans_teacher_and_labels(dot: Recipe, paper: Recipe) -> None:
    def shared(recipe: Recipe) -> dict[str, Any]:
        return recipe.model_dump(include={"seed", "teacher", "teacher_tuning", "data", "mining", "gate", "labelling"})

    assert shared(dot) == shared(paper)


def test_the_published_head_is_that_of_the_shipped_recipe(paper: Recipe) -> None:
    shipped = load_recipe("d2llm-paper")
    assert (paper.student, paper.losses) == (shipped.student, shipped.losses)
    differing = {
        name for name, value in paper.training.model_dump().items() if value != getattr(shipped.training, name)
    } - {"pretraining", "residual", "tokens"}
    assert differing == {"warmup_steps", "num_hard", "num_easy", "dev_queries", "dev_passages"}


def test_the_plans_have_the_negatives_that_training_draws(dot: Recipe, paper: Recipe) -> None:
    for recipe in (dot, paper):
        assert recipe.training.num_hard <= recipe.mining.num_hard
        assert recipe.training.num_easy <= recipe.mining.num_easy


def test_every_published_ablation_changes_the_recipe(dot: Recipe) -> None:
    published = [variant for variant in VARIANTS.values() if variant.group == "published"]
    assert len(published) == 8
    for variant in published:
        assert variant.apply(dot).model_copy(update={"name": dot.name}) != dot, variant.name
