"""The causal teacher: an LLM that reads query and passage together and answers yes or no.

Source: Liao et al., "D2LLM", ACL 2024, section 3.1.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from d2llm.core.errors import ModelError
from d2llm.core.fallbacks import count_fallback
from d2llm.core.types import Task
from d2llm.models.device import inference
from d2llm.models.teachers.local import Answers, LocalTeacher
from d2llm.models.teachers.pair_teacher import TeacherScores, TextPair
from d2llm.models.teachers.questions import Question, Questions
from d2llm.models.teachers.shared_prefix import SharedPrefixes, why_not_shared
from d2llm.ops.pooling import last_positions, to_right_padding
from d2llm.recipe import LocalTeacherConfig, PromptedTeacherConfig

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
        """Width of the features."""
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

    def score_pairs(
        self,
        pairs: Sequence[TextPair],
        task: Task,
        *,
        with_features: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> TeacherScores:
        """Score pairs, in batches of similar length; arguments and result as for ``PairTeacher.score_pairs``.

        Pairs of the same query share the work of reading it, so pass them in one call.
        """
        inputs, num_truncated = self._questions.inputs(pairs, task)
        answers = Answers(len(pairs), self.dim if with_features else None)
        groups = self._sharing(inputs)
        for prefixes, places in groups:
            self._score_shared(prefixes, places, inputs, task, answers, advance)
        shared = {place for _, places in groups for place in places}
        unshared = [place for place in range(len(inputs)) if place not in shared]
        self._score_whole([[*prefix, *suffix] for prefix, suffix in inputs], unshared, task, answers, advance)
        num_tokens = sum(len(prefix) + len(suffix) for prefix, suffix in inputs)
        return TeacherScores(answers.log_odds, answers.features, num_truncated, num_tokens)

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
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (prefix, _) in enumerate(inputs):
            if counts[prefix] > 1:
                places.setdefault(prefix, []).append(place)
        if not places or self.why_not_shared():
            return []
        return [(group, [place for prefix in group for place in places[prefix]]) for group in _groups(list(places))]

    def _score_shared(
        self,
        prefixes: list[tuple[int, ...]],
        places: list[int],
        inputs: Sequence[Question],
        task: Task,
        answers: Answers,
        advance: Callable[[int], None] | None,
    ) -> None:
        """Read the prefixes once, then the rest of each input after its prefix."""
        row_of = {prefix: row for row, prefix in enumerate(prefixes)}
        with inference(self), self._number_format():
            shared = SharedPrefixes(self.model, prefixes, padding=self._padding, device=self.device)
            for chosen in self._batches(places, [len(inputs[place][1]) for place in places]):
                rows = [row_of[inputs[place][0]] for place in chosen]
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
