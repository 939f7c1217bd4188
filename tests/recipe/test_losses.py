"""The section ``[losses]``: kinds by name, settings of each, defaults, and losses that are not ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2llm.core.errors import InputError, RecipeError
from d2llm.recipe import Recipe
from d2llm.recipe.losses import LOSSES, Loss, Objective
from d2llm.recipe.recipe import load_recipe_text, shaping_settings
from d2llm.training.losses import batch_losses
from tiny_distill import Workspace, log_of


def losses_of(text: str) -> Objective:
    return load_recipe_text(f"[losses]\n{text}", where="recipe.toml").losses


@pytest.mark.parametrize("kind", LOSSES.shipped)
def test_every_loss_is_found_under_its_kind_and_says_what_it_is(kind: str) -> None:
    cls = LOSSES.find(kind)
    assert cls.kind == kind
    assert cls.__doc__ is not None
    assert cls.__doc__ != Loss.__doc__
    assert all(field.annotation is not None for field in cls.model_fields.values())
    if cls.__module__.startswith("d2llm.methods"):
        assert cls.paper


def test_a_weight_or_a_table_and_what_is_not_named_takes_no_part() -> None:
    objective = losses_of("list_imitation = 0.5\ncontrastive_imitation = { temperature = 0.7 }\nfeature_imitation = 0")
    assert objective.weight("list_imitation") == 0.5
    assert objective.root["contrastive_imitation"].model_dump() == {
        "weight": 1.0,
        "normalisation": "mean",
        "temperature": 0.7,
    }
    assert objective.root.keys() == {"list_imitation", "contrastive_imitation"}
    assert objective.weight("in_batch_cross_entropy") == 0.0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("margin_mze = 1.0", "recipe.toml: losses: no loss 'margin_mze'; did you mean 'margin_mse'?"),
        ("margin_mze = 0.0", "did you mean 'margin_mse'?"),
        ("margin_mse = nan", "losses.margin_mse.weight is nan (float), but must be a finite number"),
        ("margin_mse = true", "losses.margin_mse is True (bool), but must be a weight"),
        (
            "contrastive_imitation = { temprature = 1 }",
            "unknown key 'losses.contrastive_imitation.temprature'; did you mean",
        ),
        ("in_batch_imitation = 0.5", "losses.in_batch_imitation.teacher is missing; set it"),
    ],
)
def test_a_wrong_loss_says_where_and_what_to_do(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        losses_of(text)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_is_written_and_read_again_unchanged() -> None:
    text = "feature_imitation = 0\nmargin_mse = 0.25\nin_batch_imitation = { teacher = 'd2llm-minilm', weight = 2 }"
    recipe = load_recipe_text(f"[losses]\n{text}", where="recipe.toml")
    for mode in ("json", "python"):
        values = recipe.model_dump(mode=mode)
        assert values["losses"]["margin_mse"] == 0.25
        assert values["losses"]["in_batch_imitation"] == {
            "weight": 2.0,
            "teacher": "d2llm-minilm",
            "scores": "all",
            "temperature": 1.0,
        }
        assert Recipe.model_validate(values) == recipe


def test_what_leads_to_the_inputs_of_a_loss_does_not_shape_the_student() -> None:
    text = "soft_expansion = { passages = 'PATH', weight = 2 }"
    first, second = (
        shaping_settings(load_recipe_text(f"[losses]\n{text.replace('PATH', path)}", where="r")) for path in "ab"
    )
    assert first == second
    assert first["losses"]["soft_expansion"] == {"weight": 2.0}


def test_imitation_is_replaced_for_lists_and_for_pairs() -> None:
    objective = Objective({"pair_cross_entropy": {"teacher_weight": 0.5}, "nested_cross_entropy": {"dims": (8,)}})
    assert objective.imitates
    lists = objective.with_imitation({"ranknet": 2.0}, of_pairs=False)
    assert {kind for kind, loss in lists.root.items() if "labels" in loss.learns_from} == {
        "ranknet",
        "pair_cross_entropy",
    }
    none = objective.with_imitation({})
    assert not none.imitates
    assert none.root["pair_cross_entropy"].weight == 1.0
    assert none.weight("nested_cross_entropy") == 1.0


class Spread(Loss, kind="spread_for_a_test"):
    """Scores of candidates should not all be equal."""

    power: int = 2

    def __call__(self, inputs):
        return -(inputs.logits[inputs.candidates].float().std() ** self.power)


def test_a_loss_of_one_s_own_is_used_like_any_other(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    losses = Objective({"spread_for_a_test": {"weight": 0.5, "power": 1}})
    assert Recipe(losses={"spread_for_a_test": Spread(weight=0.5, power=1)}).losses == losses
    recipe = Recipe(losses=losses).model_dump(mode="json")["losses"]
    assert recipe["spread_for_a_test"] == {"weight": 0.5, "power": 1}
    report = workspace.run(tmp_path / "taught", losses=losses, epochs=1)
    values = [line["spread_for_a_test"] for line in log_of(tmp_path / "taught") if "loss" in line]
    assert len(values) == report.steps
    assert all(value < 0 for value in values)


def test_a_kind_that_ships_cannot_be_taken() -> None:
    with pytest.raises(ValueError, match=r"there is a loss 'margin_mse' in d2llm\.methods"):
        type("Other", (Loss,), {"__doc__": "Another.", "__module__": __name__}, kind="margin_mse")


def test_another_package_adds_a_loss_by_an_entry_point(tmp_path: Path) -> None:
    """Installed as pip would leave it: a module and its metadata on the path."""
    (tmp_path / "their_loss.py").write_text(
        "from d2llm.recipe.losses import Loss\n\n\n"
        "class Theirs(Loss, kind='theirs'):\n"
        "    '''The mean square of the scores.'''\n\n"
        "    def __call__(self, inputs):\n"
        "        return inputs.logits.square().mean()\n"
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[d2llm.losses]\ntheirs = their_loss:Theirs\nbroken = their_loss:Nothing\nwrong = their_loss:Theirs\n"
    )
    program = (
        "from d2llm.recipe.losses import LOSSES, Objective\n"
        "assert 'theirs' in LOSSES.kinds\n"
        "print(Objective({'theirs': 0.5}).root['theirs'])\n"
        "for kind in ('broken', 'wrong'):\n"
        "    try:\n"
        "        Objective({kind: 1.0})\n"
        "    except ValueError as error:\n"
        "        print(error.errors()[0]['msg'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, broken, wrong = done.stdout.splitlines()
    assert first == "Theirs(weight=0.5)"
    assert "the loss 'broken' of their-package cannot be imported" in broken
    assert "has the entry point d2llm.losses: wrong = their_loss:Theirs, which is no loss of kind 'wrong'" in wrong


@pytest.mark.slow
def test_what_others_published_is_imported_only_if_it_is_named() -> None:
    program = (
        "import sys\nfrom d2llm.recipe import Recipe\nimport d2llm.training.distill\n"
        "methods = lambda: {name for name in sys.modules if name.startswith('d2llm.methods.')}\n"
        "assert not methods()\n"
        "Recipe()\n"
        "defaults = {'backbones', 'backbones.minilm', 'poolings', 'poolings.pma'}\n"
        "assert methods() == {f'd2llm.methods.{name}' for name in defaults}\n"
        "Recipe(losses={'ranknet': 1.0})\n"
        "assert 'd2llm.methods.losses.ranknet' in sys.modules\n"
        "assert 'd2llm.methods.losses.sinkhorn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_loss_that_is_not_finished_says_so() -> None:
    class Unfinished(Loss, kind="unfinished_for_a_test"):
        """Has no formula."""

    with pytest.raises(NotImplementedError):
        Unfinished()(torch.zeros(1))


def test_a_loss_of_several_values_says_so() -> None:
    class Rowwise(Loss, kind="rowwise_for_a_test"):
        """A value for each query."""

        def __call__(self, inputs):
            return torch.zeros(3)

    of_lists: Any = SimpleNamespace(batch=SimpleNamespace(targets=None))
    with pytest.raises(
        InputError, match=r"losses\.rowwise_for_a_test is a tensor of shape \[3\], but must be one number"
    ):
        batch_losses({"rowwise_for_a_test": Rowwise()}, of_lists)
