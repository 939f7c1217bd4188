"""The section ``[losses]`` of a recipe: the terms of the objective, each with a weight and settings of its own.

A loss is a class: its settings, its formula, what it needs. Its kind is a key of the section, and the value is its
weight, or a table with its settings. What the section does not name takes no part::

    [losses]
    in_batch_cross_entropy = 0.5
    list_imitation = 0.5

    [losses.nested_cross_entropy]
    dims = [64, 128, 256]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import (
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    RootModel,
    SerializationInfo,
    SerializeAsAny,
    ValidationError,
    model_serializer,
    model_validator,
)

from d2llm.core.inputs import shown
from d2llm.core.problems import describe_errors, described
from d2llm.core.registry import Need, Registered, Registry, modules_in
from d2llm.recipe.sections import Section

if TYPE_CHECKING:
    from torch import Tensor

    from d2llm.models.student import Student
    from d2llm.recipe import Recipe
    from d2llm.training.losses import LossInput, Preparation

LOSSES: Registry[Loss] = Registry(
    "loss",
    dict.fromkeys(
        (
            "in_batch_cross_entropy",
            "dot_cross_entropy",
            "token_cross_entropy",
            "pair_cross_entropy",
            "list_imitation",
            "contrastive_imitation",
            "rank_imitation_positive_hard",
            "rank_imitation_hard_easy",
            "feature_imitation",
        ),
        "d2llm.training.losses",
    )
    | modules_in("methods/losses"),
    "d2llm.losses",
)
"""All losses by kind."""


class Loss(Registered, Section):
    """One term of the objective. A subclass names its kind, by which recipes name it, and is called for each batch.

    It returns a tensor without dimensions, or None if the batch has nothing for it.

    Example::

        class Spread(Loss, kind="spread"):
            \"\"\"Scores of candidates should not all be equal.\"\"\"

            def __call__(self, inputs):
                return -inputs.logits[inputs.candidates].var()

        recipe = Recipe(losses={"in_batch_cross_entropy": 1.0, "spread": 0.1})
    """

    kinds: ClassVar[Registry[Any]] = LOSSES
    of_pairs: ClassVar[bool] = False
    """Whether it is computed for labelled pairs, and only for them; otherwise, only for queries with lists."""
    of_vectors: ClassVar[bool] = False
    """Whether only the vectors learn from it, so that it is left out of the second stage, which keeps them."""
    of_products: ClassVar[bool] = False
    """Whether it compares vectors by inner products, which some heads do not have (``LossInput.for_products``)."""
    least_hard: ClassVar[int] = 0
    """Of how many hard negatives of a query it is made at least."""
    not_shaping: ClassVar[frozenset[str]] = frozenset()
    """Settings that do not change the student, because what they lead to is compared instead (``prepare``)."""

    weight: float = Field(default=1.0, ge=0)

    @property
    def learns_from(self) -> frozenset[Need]:
        """What it needs with these settings."""
        return self.needs

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers after which it needs each text's vector too (``LossInput.vectors_after``)."""
        return ()

    def check(self, recipe: Recipe) -> None:
        """Check that the rest of the recipe fits; raises a ``ValueError`` that says what to change."""
        if (drawn := recipe.training.num_hard) < self.least_hard:
            raise ValueError(
                f"losses.{self.kind} compares hard negatives, and training.num_hard is {drawn}: set it to "
                f"{self.least_hard} or more, or delete {self.kind}"
            )
        if self.of_products and recipe.student.interaction.head == "paper":
            raise ValueError(
                f"losses.{self.kind} needs inner products, which the head 'paper' does not have: set "
                f'student.interaction.head = "dot" or "cosine", or delete {self.kind}'
            )

    def check_student(self, student: Student, *, has_lists: bool) -> None:
        """Check that the untrained student, whose weights may be missing, and the data sets fit.

        ``has_lists``: whether a data set has queries with lists, and not only labelled pairs. Raises an ``InputError``.
        """

    def prepare(self, preparation: Preparation) -> dict[str, Any]:
        """Before the first step: add what the loss needs of each batch to the data sets (``add_pair_input``).

        Returns, as JSON, what else the result depends on.
        """
        return {}

    def without_imitation(self) -> Loss:
        """The same loss without what it learns from a teacher; with weight 0 if nothing is left."""
        return self.model_copy(update={"weight": 0.0})

    def record(self, *, is_trained: bool) -> dict[str, Any]:
        """What the student's manifest says of it; ``is_trained``: the student is not the one at the start."""
        return {}

    def __call__(self, inputs: LossInput) -> Tensor | None:
        """The loss of a batch, before its weight, differentiable; None if it has none for this student or batch."""
        raise NotImplementedError


RECOMMENDED: Mapping[str, float] = {"list_imitation": 0.5, "in_batch_cross_entropy": 0.5, "pair_cross_entropy": 1.0}
"""The losses of a recipe without the section."""


class Objective(RootModel[dict[str, SerializeAsAny[Loss]]]):
    """The losses of a recipe by kind, and no others; 0 leaves one out."""

    model_config = ConfigDict(frozen=True)

    root: dict[str, SerializeAsAny[Loss]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _find_losses(cls, values: Any) -> Any:
        if isinstance(values, Objective):
            return values.root
        if not isinstance(values, Mapping):
            raise described(lambda key: f"{key} is {shown(values)}, but must be a table: write [{key}]")
        named = cast("Mapping[str, Any]", values).items()
        losses = {kind: _loss(kind, value) for kind, value in named if value != 0 or kind not in LOSSES.kinds}
        return {kind: loss for kind, loss in losses.items() if loss.weight > 0}

    @model_serializer
    def _written(self, info: SerializationInfo) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for kind, loss in self.root.items():
            others = {name: field for name, field in type(loss).model_fields.items() if name != "weight"}
            is_plain = all(getattr(loss, name) == field.get_default() for name, field in others.items())
            written[kind] = loss.weight if is_plain else loss.model_dump(mode=info.mode)
        return written

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Every loss as a weight or a table, for editors (``d2llm recipe schema``)."""
        described = handler(schema)
        described.pop("additionalProperties", None)
        weight = {"type": "number", "minimum": 0}
        found = {kind: LOSSES.find(kind) for kind in LOSSES.kinds}
        losses = {
            kind: {"anyOf": [weight, handler(loss.__pydantic_core_schema__)], "description": loss.__doc__}
            for kind, loss in found.items()
        }
        return described | {"properties": losses, "additionalProperties": False}

    @property
    def needs(self) -> frozenset[Need]:
        """What they learn from, together."""
        return frozenset[Need]().union(*(loss.learns_from for loss in self.root.values()))

    @property
    def imitates(self) -> bool:
        """Whether any loss needs a teacher's labels; if not, a student is trained on the data sets' own judgements."""
        return "labels" in self.needs

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers after which some loss needs vectors, in ascending order."""
        return tuple(sorted({depth for loss in self.root.values() for depth in loss.depths}))

    def weight(self, kind: str) -> float:
        """The weight of a loss; 0 for one that takes no part."""
        return self.root[kind].weight if kind in self.root else 0.0

    def with_losses(self, changes: Mapping[str, Any]) -> Objective:
        """The same objective with some losses changed: kind -> weight, some settings, or a loss."""
        changed: dict[str, Any] = {**self.root}
        for kind, value in changes.items():
            settings = self.root[kind].model_dump() if kind in self.root and isinstance(value, Mapping) else {}
            changed[kind] = settings | dict(value) if isinstance(value, Mapping) else value
        return Objective(changed)

    def with_imitation(self, changes: Mapping[str, Any], *, of_pairs: bool = True) -> Objective:
        """The same with these losses as its only imitation of a teacher.

        ``of_pairs``: replace the imitation of labelled pairs too.
        """
        imitating = {
            kind: loss.without_imitation()
            for kind, loss in self.root.items()
            if loss.learns_from & {"labels", "live_teacher"} and (of_pairs or not loss.of_pairs)
        }
        return self.with_losses(imitating | dict(changes))

    def shaping(self) -> dict[str, Any]:
        """The settings of the losses that a student depends on, as JSON."""
        return {
            kind: loss.model_dump(mode="json", exclude={*loss.not_shaping}) for kind, loss in sorted(self.root.items())
        }


def _loss(kind: str, value: Any) -> Loss:
    try:
        cls = LOSSES.find(kind)
    except ValueError as error:
        message = str(error)
        raise described(lambda key: f"{key}: {message}") from error
    if isinstance(value, cls):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = {"weight": value}
    if not isinstance(value, Mapping):
        needed = "must be a weight, such as 0.5, or a table of its settings"
        raise described(lambda key: f"{key}.{kind} is {shown(value)}, but {needed}")
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        problems = error
        raise described(lambda key: describe_errors(problems, cls, key, kind)) from error
