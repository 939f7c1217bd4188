"""The section ``[student.pooling]``: how the states of a text's tokens become its vector.

Each kind is a class with settings of its own. Kinds can be nested: ``{ kind = "projection", dim = 128, pooling =
"mean" }`` changes the vectors of another pooling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from d2llm.core.registry import Registry, modules_in
from d2llm.recipe.sections import SectionOfKind

if TYPE_CHECKING:
    from torch import Tensor

    from d2llm.models.backbone import Backbone
    from d2llm.models.pooling import TextPooling


class Pooling(SectionOfKind):
    """How the states of a text's tokens become its vector.

    A kind without weights has ``pool``. One with weights has ``module`` instead, which makes a ``TextPooling``.

    Example::

        class Largest(Pooling, kind="largest"):
            \"\"\"The largest value of each component.\"\"\"

            def pool(self, states, mask):
                return states.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)

        config = StudentConfig(pooling="largest")
    """

    kinds = Registry(
        "pooling",
        {"auto": "d2llm.recipe.pooling"}
        | dict.fromkeys(("mean", "first", "last"), "d2llm.ops.pooling")
        | modules_in("methods/poolings"),
        "d2llm.poolings",
    )
    default_kind = "pma"
    reads_tokens: ClassVar[bool] = True
    """Whether it reads states of tokens, which a remote backbone does not have."""
    reads_attention: ClassVar[bool] = False
    """Whether it weighs the states by the model's attention (``weigh``)."""
    reads_layers: ClassVar[bool] = False
    """Whether it reads the states after other layers too (``weigh``)."""
    takes_one_token: ClassVar[bool] = False
    """Whether the vector is the state of a single token, so that a part of a text cannot be pooled."""

    @property
    def inner(self) -> Pooling | None:
        """The pooling whose vectors this one changes, if there is one."""
        return None

    @property
    def stages(self) -> tuple[Pooling, ...]:
        """This pooling, the one whose vectors it changes, and so on."""
        return (self, *(() if self.inner is None else self.inner.stages))

    @property
    def is_trained(self) -> bool:
        """Whether it has weights to train, itself or in the pooling that it changes."""
        return type(self).pool is Pooling.pool

    @property
    def weightless(self) -> Pooling:
        """The pooling without weights in it, for what reads or trains the backbone alone; ``auto`` if there is none."""
        return AutoPooling() if self.is_trained else self

    @property
    def weighing(self) -> Pooling | None:
        """The stage that makes its states of the model's attention or of several layers, if there is one."""
        return next((stage for stage in self.stages if stage.reads_attention or stage.reads_layers), None)

    def without_gated(self) -> Pooling:
        """The same without what is added to other vectors with a gate (``TextPooling.gate``)."""
        return self

    def check_model(self, model_config: Any, name: str) -> None:
        """Check that a model fits, given its configuration in ``transformers`` and its name; else an ``InputError``."""

    def weigh(
        self,
        states: Tensor,
        mask: Tensor,
        output: Any,
    ) -> Tensor:
        """The states to pool, from the last states and what else the model gives.

        Args:
            states: [batch, tokens, dim].
            mask: [batch, tokens], true for real tokens.
            output: the model's: ``attentions`` of each layer [batch, heads, tokens, tokens] (``reads_attention``), and
                ``hidden_states`` [batch, tokens, dim] before the first layer and after each (``reads_layers``).
        """
        raise NotImplementedError

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Vectors [batch, dim] of any length, from states [batch, tokens, dim], padded on the right, and their mask."""
        raise NotImplementedError

    def module(self, backbone: Backbone) -> TextPooling | None:  # noqa: ARG002
        """What pools the states of a backbone; None if ``pool`` does.

        Raises:
            InputError: the backbone does not fit.
        """
        return None


class AutoPooling(Pooling, kind="auto"):
    """The model's own setting; without one, the mean for encoders and the last token for decoders."""

    reads_tokens: ClassVar[bool] = False  # a remote backbone's own vectors are finished

    @property
    def is_trained(self) -> bool:
        """False."""
        return False


class ChangedPooling(Pooling):
    """The base of poolings that change the vectors of another."""

    pooling: Pooling = AutoPooling()
    """The pooling whose vectors are changed."""

    @property
    def inner(self) -> Pooling | None:
        """The pooling whose vectors are changed."""
        return self.pooling

    @property
    def weightless(self) -> Pooling:
        """That of ``pooling``."""
        return self.pooling.weightless

    def without_gated(self) -> Pooling:
        """The same over ``pooling`` without it."""
        return self.model_copy(update={"pooling": self.pooling.without_gated()})
