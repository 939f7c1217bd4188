"""The section ``[training.pretraining]``: what a backbone learns from texts without labels, before distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from d2llm.core.registry import Registry, modules_in
from d2llm.recipe.kinds import SectionOfKind
from d2llm.recipe.sections import WarmUpConfig

if TYPE_CHECKING:
    from d2llm.models.backbone import Backbone
    from d2llm.recipe.recipe import Recipe
    from d2llm.training.pretrain import PretrainingTask


class Pretraining(SectionOfKind, WarmUpConfig):
    """The stage before distillation: trains the backbone on texts without labels (``training.pretrain``).

    The texts are passages and train queries of the recipe's data sets. Each kind is a subclass with settings of its
    own; docs/recipes.md has what each brought.

    Example::

        recipe = Recipe(training={"pretraining": {"kind": "simcse", "epochs": 2}})
    """

    needs = frozenset({"texts"})
    kinds = Registry("pretraining", modules_in("methods/pretraining"), "d2llm.pretraining")
    usual_dropout: ClassVar[float] = 0.0
    """The default of ``dropout``."""

    max_passages: int = Field(default=5_000, ge=1)
    """Passages of each data set, and at most as many of its train queries, drawn at random."""
    max_tokens: int = Field(default=64, ge=4)
    """Longer texts are cut to so many tokens."""
    epochs: int = Field(default=1, ge=1)
    batch_texts: int = Field(default=32, ge=2)
    learning_rate: float | None = Field(default=None, gt=0)
    """By default 1e-4 for all weights (``backbone.tuning = "full"``), and 1e-3 for adapters."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout in all layers of the backbone that have one, also where only adapters are trained. By default 0.1 for
    ``simcse`` and ``mirror``, and none for the others."""

    @property
    def dropout_rate(self) -> float:
        """``dropout``, or the kind's default."""
        return self.usual_dropout if self.dropout is None else self.dropout

    def rate_for(self, tuning: str) -> float:
        """``learning_rate``, or its default for what is trained."""
        return self.learning_rate or (1e-4 if tuning == "full" else 1e-3)

    def check(self, recipe: Recipe) -> None:
        """Check that the rest of the recipe fits; raises a ``ValueError`` that says what to change."""

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt, with a backbone.

        Raises:
            InputError: this backbone cannot learn it.
        """
        raise NotImplementedError
