"""A sequence-classification cross-encoder as a teacher: the log-odds are its own score.

With a single output, the log-odds are that output. With several classes (natural language inference), one class means
yes: log-odds = log p / (1 - p) = its logit minus the logsumexp of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from d2llm.core.errors import ModelError
from d2llm.core.types import Task
from d2llm.models.device import inference
from d2llm.models.teachers.local import LocalTeacher, fit_pairs
from d2llm.models.teachers.pair_teacher import TextPair
from d2llm.recipe import ClassifierTeacherConfig, LocalTeacherConfig

_TokenAndType = tuple[int, int]
_HEADS = ("classifier", "head", "score", "bert.pooler", "pooler")  # names of the layers on top of the encoder


class ClassifierTeacher(LocalTeacher):
    """Query and passage as a text pair, joined by the model's tokenizer; no prompt."""

    kind = "classifier"
    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: LocalTeacherConfig, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        """Load the model; see ``LocalTeacher``.

        Raises:
            ModelError: there are several classes, and ``positive_label`` does not say which of them means yes.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)  # for the initial weights of a new head
            super().__init__(config, device=device, compute_dtype=compute_dtype)
        self._positive = self._find_positive()
        self._has_types = "token_type_ids" in self.tokenizer.model_input_names
        self._state: Tensor | None = None
        self._last_linear().register_forward_pre_hook(self._keep_state)
        rows, _ = self.tokenize([("a", "b")], "symmetric")  # a trial, to see whether there is a pooled state
        with inference(self):
            _, features = self(*self.pad(rows), "symmetric")
        self._dim = None if features is None else features.shape[1]

    @property
    def dim(self) -> int | None:
        """Width of the features, the pooled state that feeds the last layer; None if the model pools after it."""
        return self._dim

    def tokenize(self, pairs: Sequence[TextPair], task: Task) -> tuple[list[list[_TokenAndType]], int]:
        """Pairs of token id and token type for each input, and how many pairs lost text to the limit.

        Raises:
            InputError: the special tokens alone fill ``max_tokens``.
        """

        def encode(chosen: Sequence[TextPair]) -> list[list[_TokenAndType]]:
            queries, passages = [query for query, _ in chosen], [passage for _, passage in chosen]
            tokens = self.tokenizer(queries, passages, truncation=False, return_token_type_ids=True, verbose=False)
            rows = zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)
            return [list(zip(*row, strict=True)) for row in rows]

        return fit_pairs(pairs, self.tokenizer, encode, max_tokens=self.config.max_tokens)

    def pad(self, inputs: Sequence[Sequence[Any]]) -> tuple[Tensor, ...]:
        """Tokens, mask and token types as right-padded tensors."""
        ids, mask = self._pad([[token for token, _ in row] for row in inputs])
        types, _ = self._pad([[kind for _, kind in row] for row in inputs])
        return ids, mask, types * mask

    def forward(
        self,
        token_ids: Int[Tensor, "pairs tokens"],
        mask: Bool[Tensor, "pairs tokens"],
        token_types: Int[Tensor, "pairs tokens"],
        task: Task,
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, "pairs dim"] | None]:
        """Log-odds, and the pooled state if the model has one, both float32."""
        types = {"token_type_ids": token_types} if self._has_types else {}
        with self._number_format():
            logits = self.model(input_ids=token_ids, attention_mask=mask.long(), **types).logits.float()
        state, self._state = self._state, None
        features = state.float() if state is not None and state.ndim == 2 else None
        if logits.shape[1] == 1:
            return logits[:, 0], features
        others = torch.cat([logits[:, : self._positive], logits[:, self._positive + 1 :]], dim=1)
        return logits[:, self._positive] - others.logsumexp(dim=1), features

    def _head_options(self) -> dict[str, Any]:
        if not cast(ClassifierTeacherConfig, self.config).new_head:
            return {"needs_pooler": True}
        return {"needs_pooler": True, "may_lack": _HEADS, "num_labels": 1}

    def _find_positive(self) -> int:
        names: dict[int, str] = cast(Any, self.model).config.id2label
        label = cast(ClassifierTeacherConfig, self.config).positive_label
        if len(names) == 1 and label is None:
            return 0
        outputs = [index for index, name in names.items() if label is not None and name.lower() == label.lower()]
        if outputs:
            return outputs[0]
        if len(names) == 1:
            raise ModelError(f"'{self.config.model}' has one output and no classes; leave positive_label out")
        raise ModelError(
            f"'{self.config.model}' has the classes {', '.join(names.values())}; set the teacher's positive_label to "
            f"the one that means yes (it is {label!r})"
        )

    def _last_linear(self) -> nn.Linear:
        """The layer that computes the class logits."""
        num_labels = int(cast(Any, self.model).config.num_labels)
        layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        return next(layer for layer in reversed(layers) if layer.out_features == num_labels)

    def _keep_state(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        self._state = inputs[0]
