"""The causal teacher: an LLM that reads query and passage together and answers yes or no.

Source: Liao et al., "D2LLM", ACL 2024, section 3.1.

The candidates of a query differ only in their passages, and the prompt begins with the query. Special tokens, prompt
head, query and middle are therefore read once per query; passage and question once per pair, on top of the query's keys
and values. Up to rounding, the result is the same as reading each input whole.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from d2llm.core.errors import ModelError
from d2llm.core.fallbacks import count_fallback
from d2llm.core.progress import Advance
from d2llm.core.types import Task
from d2llm.models.device import inference
from d2llm.models.teachers.local import Answers, LocalTeacher
from d2llm.models.teachers.pair_teacher import TextPair
from d2llm.models.teachers.questions import Question, Questions
from d2llm.ops.batching import pad_right
from d2llm.ops.pooling import last_positions, to_right_padding
from d2llm.recipe import LocalTeacherConfig, PromptedTeacherConfig

_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError, KeyError)
"""Errors raised by architectures whose caches hold more than keys and values."""


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values of some prefixes; those of the tokens that follow are used but not stored."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix and the tokens after it."""
        del args, kwargs
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class SharedPrefixes:
    """Keys and values of some prefixes, one row each, padded on the left.

    With left padding, the text that follows comes directly after its prefix, so that sliding windows, which count
    positions in the cache, stay correct.
    """

    def __init__(self, model: Any, prefixes: Sequence[Sequence[int]], *, padding: int, device: torch.device) -> None:
        """Read the token ids of at least one prefix with a causal model of ``transformers`` without its head."""
        self._model, self._padding, self._device = model, padding, device
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        width = max(map(len, prefixes))
        ids = [[padding] * (width - len(row)) + list(row) for row in prefixes]
        self._lengths = torch.tensor([len(row) for row in prefixes], device=device)
        self._mask = torch.arange(width, device=device) >= (width - self._lengths)[:, None]
        self._cache = DynamicCache()
        self._forward(torch.tensor(ids, device=device), self._mask, self._cache, 0)

    def last_states(self, rows: Sequence[int], suffixes: Sequence[Sequence[int]]) -> Float[Tensor, "pairs dim"]:
        """The last layer's state of each suffix's last token, where suffix i follows prefix ``rows[i]``."""
        chosen = torch.tensor(rows, device=self._device)
        layers = cast("list[Any]", self._cache.layers)
        cache = Cache(layers=[_PrefixLayer(_take(layer.keys, chosen), _take(layer.values, chosen)) for layer in layers])
        width = max(map(len, suffixes))  # not the next multiple of 8: for short texts that would add 10 %
        ids, mask = (padded[:, :width] for padded in pad_right(suffixes, self._padding, self._device))
        states = self._forward(ids, torch.cat([self._mask[chosen], mask], dim=1), cache, self._lengths[chosen])
        return states[torch.arange(len(states), device=self._device), last_positions(mask)]

    def _forward(
        self,
        ids: Int[Tensor, "rows tokens"],
        mask: Bool[Tensor, "rows places"],
        cache: Any,
        num_before: Int[Tensor, " rows"] | int,
    ) -> Float[Tensor, "rows tokens dim"]:
        """Read tokens after those in the cache (``num_before`` tokens per row); ``mask`` covers both."""
        positions: dict[str, Tensor] = {}
        if self._takes_positions:
            new_mask = mask[:, -ids.shape[1] :].long()
            before = num_before[:, None] if isinstance(num_before, Tensor) else num_before
            positions["position_ids"] = (before + new_mask.cumsum(1) - 1).clamp(min=0)
        output = self._model(
            input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **positions
        )
        return output.last_hidden_state.to(self._device)


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows of one layer, which may be on another device than the inputs."""
    return values[rows.to(values.device)]


def why_not_shared(model: Any, tokens: Sequence[int], *, padding: int, device: torch.device) -> str:
    """Why ``model`` cannot continue from a shared prefix, determined by a trial with 20 tokens; empty if it can."""
    prefixes, suffixes = [tokens[:3], tokens[3:11]], [tokens[11:15], tokens[11:20], tokens[8:13]]
    rows = [0, 1, 1]
    try:
        shared = SharedPrefixes(model, prefixes, padding=padding, device=device).last_states(rows, suffixes)
    except _REFUSALS as error:
        return f"its cache cannot be shared ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    for row, suffix, state in zip(rows, suffixes, shared, strict=True):
        whole = model(input_ids=torch.tensor([[*prefixes[row], *suffix]], device=device), use_cache=False)
        expected = whole.last_hidden_state[0, -1].float()
        if (state.float() - expected).norm() > 0.03 * expected.norm():  # bfloat16 rounds by up to a hundredth
            return "its states after a shared prefix differ from those of the whole text"
    return ""


_log = logging.getLogger(__name__)

_PREFIX_TOKENS = 2048  # total length of the prefixes whose keys and values are held at a time


class CausalTeacher(LocalTeacher):
    """A causal LLM as a cross-encoder: one pass per pair, the answer read at the score token, nothing generated.

    Everything before the passage is read once per query and shared by all its candidates (``shared_prefix``).
    """

    kind = "causal"
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: LocalTeacherConfig, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        """Load the LLM; see ``LocalTeacher``.

        Raises:
            ModelError: the model is not a causal language model.
        """
        super().__init__(config, device=device, compute_dtype=compute_dtype)
        self._head = AnswerHead(self._whole[0])
        self._questions = Questions(cast(PromptedTeacherConfig, self.config), self.tokenizer)
        self._answer_ids = self._questions.answer_ids
        self._require_causal()
        self._no_sharing: str | None = None

    @property
    def dim(self) -> int:
        return int(cast(Any, self.model).config.get_text_config().hidden_size)

    def tokenize(self, pairs: Sequence[TextPair], task: Task) -> tuple[list[list[int]], int]:
        """Token ids of each complete input, and how many pairs lost text to the length limit (``Questions.inputs``)."""
        inputs, num_truncated = self._questions.inputs(pairs, task)
        return [[*prefix, *suffix] for prefix, suffix in inputs], num_truncated

    def forward(
        self, token_ids: Int[Tensor, "pairs tokens"], mask: Bool[Tensor, "pairs tokens"], task: Task
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, "pairs dim"]]:
        """Log-odds logit_yes - logit_no, and the last-layer state of the score token, both float32.

        Only the two answer rows of the language-model head are used, so no tensor of the vocabulary's size is created.
        """
        token_ids, mask = to_right_padding(token_ids, mask)
        with self._number_format():
            states = self.model(input_ids=token_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        states = states.to(self.device)  # the last layer may be on another GPU
        rows = torch.arange(len(states), device=states.device)
        return self._answer(states[rows, last_positions(mask)], task)

    def _score(self, pairs: Sequence[TextPair], task: Task, answers: Answers, advance: Advance | None) -> None:
        """Pairs of the same query share the work of reading it."""
        inputs, answers.num_truncated = self._questions.inputs(pairs, task)
        answers.num_tokens = sum(len(prefix) + len(suffix) for prefix, suffix in inputs)
        groups = self._sharing(inputs)
        for prefixes, indices in groups:
            self._score_shared(prefixes, indices, inputs, task, answers, advance)
        shared = {index for _, indices in groups for index in indices}
        unshared = [index for index in range(len(inputs)) if index not in shared]
        self._score_whole([[*prefix, *suffix] for prefix, suffix in inputs], unshared, task, answers, advance)

    def why_not_shared(self) -> str:
        """Why this architecture cannot share the work of reading a query; empty if it can."""
        if self._no_sharing is None:
            text = "The quick brown fox jumps over the lazy dog while two old cats sleep in the sun. " * 2
            tokens = self._questions.ids([text])
            with inference(self), self._number_format():
                self._no_sharing = why_not_shared(self.model, tokens[0], padding=self._padding, device=self.device)
            if self._no_sharing:
                count_fallback("shared prefixes of a teacher")
                _log.info("'%s' reads every pair from the start: %s", self.config.model, self._no_sharing)
        return self._no_sharing

    def _scoring_part(self, whole: Any) -> nn.Module:
        return whole.base_model

    def _answer(
        self, states: Float[Tensor, "pairs dim"], task: Task
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, "pairs dim"]]:
        features = states.float()
        logits = self._head(features, self._answer_ids[task])
        return logits[:, 0] - logits[:, 1], features

    def _sharing(self, inputs: Sequence[Question]) -> list[tuple[list[tuple[int, ...]], list[int]]]:
        """Groups of prefixes that several inputs share, and the indices of these inputs."""
        counts = Counter(prefix for prefix, _ in inputs)
        by_prefix: dict[tuple[int, ...], list[int]] = {}
        for index, (prefix, _) in enumerate(inputs):
            if counts[prefix] > 1:
                by_prefix.setdefault(prefix, []).append(index)
        if not by_prefix or self.why_not_shared():
            return []
        return [
            (group, [index for prefix in group for index in by_prefix[prefix]]) for group in _groups(list(by_prefix))
        ]

    def _score_shared(
        self,
        prefixes: list[tuple[int, ...]],
        indices: list[int],
        inputs: Sequence[Question],
        task: Task,
        answers: Answers,
        advance: Advance | None,
    ) -> None:
        """Read the prefixes once, then the rest of each input after its prefix."""
        row_of = {prefix: row for row, prefix in enumerate(prefixes)}
        with inference(self), self._number_format():
            shared = SharedPrefixes(self.model, prefixes, padding=self._padding, device=self.device)
            for chosen in self._batches(indices, [len(inputs[index][1]) for index in indices]):
                rows = [row_of[inputs[index][0]] for index in chosen]
                answers.put(chosen, *self._answer(shared.last_states(rows, [inputs[p][1] for p in chosen]), task))
                if advance is not None:
                    advance(len(chosen))

    def _require_causal(self) -> None:
        """Refuse a model that is not causal, in which a token attends to the next one."""
        yes, no = self._answer_ids["asymmetric"]
        with inference(self):
            inputs = torch.tensor([[yes, yes], [yes, no]], device=self.device)
            first = self.model(input_ids=inputs, use_cache=False).last_hidden_state[:, 0].float()
        if (first[0] - first[1]).norm() > 0.01 * first[0].norm():
            raise ModelError(f"'{self.config.model}' is not a causal language model: its tokens attend to later ones")


def _groups(prefixes: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prefixes in order, in groups of at most ``_PREFIX_TOKENS`` tokens."""
    group: list[tuple[int, ...]] = []
    longest = 0
    for prefix in prefixes:
        longest = max(longest, len(prefix))
        if group and longest * (len(group) + 1) > _PREFIX_TOKENS:
            yield group
            group, longest = [], len(prefix)
        group.append(prefix)
    if group:
        yield group


class AnswerHead(nn.Module):
    """Logits of only a few tokens, without a tensor of the vocabulary's size.

    Does what the model's own ``forward`` does between the last state and the logits: the linear layer with or without
    bias, the constant factor of some models (Cohere, Granite, Falcon-H1), the soft cap of others (Gemma).
    """

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        config = language_model.config.get_text_config()
        self._linear = cast(nn.Linear, language_model.get_output_embeddings())
        self._scale = _scale(config)
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        self._softcap: float | None = softcap

    def forward(
        self, states: Float[Tensor, "pairs dim"], token_ids: tuple[int, ...] | None = None
    ) -> Float[Tensor, "pairs answers"]:
        """Logits of the tokens ``token_ids`` (None: of all tokens) after each state, float32."""
        rows = slice(None) if token_ids is None else [*token_ids]
        bias = cast("Tensor | None", self._linear.bias)
        logits = nn.functional.linear(
            states.float(),
            self._linear.weight[rows].to(states.device).float(),
            None if bias is None else bias[rows].to(states.device).float(),
        )
        logits = logits * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


def _scale(config: Any) -> float:
    """The constant factor of a model's logits."""
    scaling = getattr(config, "logits_scaling", None) or 1.0
    if config.model_type != "hyperclovax":  # all other models divide by it
        scaling = 1.0 / scaling
    return (
        scaling * (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    )
