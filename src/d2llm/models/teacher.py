"""The teacher: an LLM that reads query and passage together and is asked for yes or no.

Source: Liao et al., "D2LLM", ACL 2024, section 3.1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from d2llm.core.errors import AnswerTokenError, InputError, MismatchError, ModelError
from d2llm.core.fingerprint import fingerprint_files, fingerprint_json
from d2llm.core.manifest import read_manifest, write_manifest
from d2llm.core.recipe import LoraConfig, TeacherConfig
from d2llm.core.types import Task
from d2llm.models.answers import AnswerHead
from d2llm.models.device import choose_device, choose_dtype, use_plain_attention_on_cpu
from d2llm.models.inference import inference
from d2llm.models.judge import Judgements, TextPair
from d2llm.models.lora import adapter_state, attach_lora, join_adapters, load_adapter_state, merge_adapter
from d2llm.models.prompts import Prompt, load_prompt
from d2llm.models.sources import (
    fingerprint_model,
    load_pretrained,
    load_tensors,
    load_tokenizer,
    locate_model,
    readable_tokens,
)
from d2llm.models.teacher_identity import (
    TEACHER_FORMAT_VERSION,
    TEACHER_KIND,
    find_tuned_teacher,
    fingerprint_prompt,
)
from d2llm.ops.batching import pad_right, token_budget_batches
from d2llm.ops.pooling import last_positions, to_right_padding

_log = logging.getLogger(__name__)

KIND = TEACHER_KIND
FORMAT_VERSION = TEACHER_FORMAT_VERSION
_ADAPTER_FILE = "adapter.safetensors"
_BATCH_TOKENS, _BATCH_PAIRS = 4096, 64


class Teacher(nn.Module):
    """A causal LLM as cross-encoder: one pass a pair, the answer read from the score token, nothing generated."""

    def __init__(self, config: TeacherConfig, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        """Load the LLM that ``config.model`` names: pretrained weights, a folder that ``save`` wrote, or a shipped one.

        Raises:
            ModelNotFoundError: no usable weights there.
            ModelError: the model is no causal language model, or the tuned adapter cannot be read.
            MismatchError: the folder's teacher was tuned on other weights than its base model's name gives here.
            AnswerTokenError: an answer word is not one distinct token after the prompt.
            InputError: no such prompt set, or ``max_tokens`` is more than the model reads.
        """
        super().__init__()
        from transformers import AutoModelForCausalLM

        tuned = find_tuned_teacher(config.model)
        manifest = read_manifest(tuned, KIND, FORMAT_VERSION) if tuned else {}
        self.config = TeacherConfig.model_validate(manifest["config"]) if tuned else config
        asked = config.model_fields_set & {"prompt", "max_tokens"}  # what is left at its default asks for nothing
        if any(getattr(self.config, name) != getattr(config, name) for name in asked):
            _log.warning(
                "%s was tuned with prompt '%s' and max_tokens %d, which are used instead of '%s' and %d",
                *(tuned, self.config.prompt, self.config.max_tokens, config.prompt, config.max_tokens),
            )
        self.compute_dtype = compute_dtype
        self.location = locate_model(self.config.model)
        self.base_fingerprint = fingerprint_model(self.location)
        if tuned and manifest["base_fingerprint"] != self.base_fingerprint:
            raise MismatchError(
                f"{tuned}: the teacher was tuned on weights {manifest['base_fingerprint']} of '{self.config.model}', "
                f"but here that name gives {self.base_fingerprint}; use the same weights"
            )
        self.fingerprint: str = manifest.get("fingerprint", self.base_fingerprint)
        self.tokenizer = load_tokenizer(self.location)
        whole: Any = load_pretrained(AutoModelForCausalLM, self.location, dtype=compute_dtype)
        whole = whole.to(device).eval().requires_grad_(False)
        self.model: nn.Module = whole.base_model
        self._merged_adapter: dict[str, Tensor] = (
            load_tensors(tuned / _ADAPTER_FILE, remedy="restore the teacher's folder or tune it again") if tuned else {}
        )
        merge_adapter(self.model, self._merged_adapter)
        self._head = AnswerHead(whole)
        self._check_length(whole.config)
        self._special_ids = self._leading_special_ids()
        self._lora: LoraConfig | None = None
        self.prompts: dict[Task, Prompt] = {
            "symmetric": load_prompt(self.config.prompt, "symmetric"),
            "asymmetric": load_prompt(self.config.prompt, "asymmetric"),
        }
        self._answer_ids = {task: self._find_answers(prompt) for task, prompt in self.prompts.items()}
        self._require_causal()

    @classmethod
    def load(
        cls, config: TeacherConfig, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> Teacher:
        """Load a teacher on the device and in the number format that this machine is fast with, or as asked."""
        chosen = choose_device(device)
        return cls(config, device=chosen, compute_dtype=choose_dtype(chosen, dtype))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dim(self) -> int:
        """Width of the features."""
        return int(cast(Any, self.model).config.get_text_config().hidden_size)

    def prompt_fingerprint(self, task: Task) -> str:
        """Identity of the question put for ``task`` (the truncation length is part of it)."""
        return fingerprint_prompt(self.config, task)

    def tokenize(self, pairs: Sequence[TextPair], task: Task) -> tuple[list[list[int]], int]:
        """Token ids of each whole input, and how many pairs lost text to the length limit.

        What is over the limit is cut from the end of the passage; a query that alone would leave the passage less than
        half of the room is cut to that half. The prompt and the position of the answer are never touched.

        Raises:
            InputError: the prompt alone fills ``max_tokens``.
        """
        prompt = self.prompts[task]
        head = self._special_ids + self._ids([prompt.head])[0]
        middle, tail = self._ids([prompt.middle, prompt.tail])
        room = self.config.max_tokens - len(head) - len(middle) - len(tail)
        if room < 2:
            raise InputError(
                f"max_tokens is {self.config.max_tokens}, but prompt '{self.config.prompt}' alone takes "
                f"{self.config.max_tokens - room} tokens; raise max_tokens or use a shorter prompt"
            )
        # Each text is tokenized once however many pairs it is in.
        distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
        ids_of = dict(zip(distinct, self._ids(distinct), strict=True))
        inputs: list[list[int]] = []
        num_truncated = 0
        for query, passage in pairs:
            query_ids, passage_ids = ids_of[query], ids_of[passage]
            kept_query = query_ids[: max(room // 2, room - len(passage_ids))]
            kept_passage = passage_ids[: room - len(kept_query)]
            num_truncated += len(kept_query) < len(query_ids) or len(kept_passage) < len(passage_ids)
            inputs.append([*head, *kept_query, *middle, *kept_passage, *tail])
        return inputs, num_truncated

    def forward(
        self, token_ids: Int[Tensor, "pairs tokens"], mask: Bool[Tensor, "pairs tokens"], task: Task
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, "pairs dim"]]:
        """Log-odds logit_yes - logit_no, and the last-layer state of the score token, both float32.

        Of the language-model head only the two answer rows are used: no tensor of the vocabulary's size is made.
        """
        token_ids, mask = to_right_padding(token_ids, mask)
        with torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            states = self.model(input_ids=token_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        features = states[rows, last_positions(mask)].float()
        logits = self._head(features, self._answer_ids[task])
        return logits[:, 0] - logits[:, 1], features

    def judge(
        self,
        pairs: Sequence[TextPair],
        task: Task,
        *,
        with_features: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Judgements:
        """Judge pairs, in batches of like length; the result is in the order of ``pairs``.

        Args:
            pairs: query text and full passage text.
            task: which question to ask.
            with_features: also return the features, [pairs, dim].
            advance: called with the number of pairs finished.
        """
        inputs, num_truncated = self.tokenize(pairs, task)
        lengths = [len(ids) for ids in inputs]
        log_odds = np.empty(len(pairs), dtype=np.float32)
        features = np.empty((len(pairs), self.dim), dtype=np.float32) if with_features else None
        for batch in token_budget_batches(lengths, max_tokens=_BATCH_TOKENS, max_items=_BATCH_PAIRS):
            with inference(self):
                batch_odds, batch_features = self(*self.pad([inputs[index] for index in batch]), task)
            log_odds[batch] = batch_odds.cpu().numpy()
            if features is not None:
                features[batch] = batch_features.cpu().numpy()
            if advance is not None:
                advance(len(batch))
        return Judgements(log_odds, features, num_truncated, sum(lengths))

    def pad(self, inputs: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "pairs tokens"], Bool[Tensor, "pairs tokens"]]:
        """Inputs as one right-padded tensor, and its mask."""
        return pad_right(inputs, cast(int, self.tokenizer.pad_token_id or 0), self.device)

    def prepare_training(self, lora: LoraConfig, *, seed: int = 0) -> None:
        """Attach trainable adapters; everything else stays frozen."""
        self._lora = lora
        attach_lora(self.model, lora, seed=seed)
        use_plain_attention_on_cpu(self.model)

    def tuned_state(self) -> dict[str, Tensor]:
        """What tuning changed since the pretrained weights, as an adapter of plain tensors."""
        return join_adapters(self._merged_adapter, adapter_state(self.model))

    def load_tuned_state(self, state: dict[str, Tensor]) -> None:
        """Put tensors made by ``tuned_state`` into the attached adapters."""
        load_adapter_state(self.model, state)

    def save(self, folder: Path, content: dict[str, Any]) -> str:
        """Write adapter and manifest into an existing folder; returns the tuned teacher's fingerprint.

        Args:
            folder: where to write; ``TeacherConfig(model=str(folder))`` loads it again.
            content: what the manifest should say besides (data, figures).
        """
        save_file(self.tuned_state(), folder / _ADAPTER_FILE)
        self.fingerprint = fingerprint_json([self.base_fingerprint, fingerprint_files([folder / _ADAPTER_FILE])])
        write_manifest(
            folder,
            KIND,
            FORMAT_VERSION,
            {
                **content,
                "fingerprint": self.fingerprint,
                "base_fingerprint": self.base_fingerprint,
                "config": self.config.model_dump(),
                "lora": self._lora.model_dump() if self._lora else None,
            },
        )
        return self.fingerprint

    def _check_length(self, model_config: Any) -> None:
        readable = readable_tokens(model_config)
        if readable is not None and self.config.max_tokens > readable:
            raise InputError(
                f"max_tokens is {self.config.max_tokens}, but '{self.config.model}' reads at most {readable} tokens; "
                f"set max_tokens to {readable} or less"
            )

    def _require_causal(self) -> None:
        """What an encoder says at the last position is no answer; told by whether a token sees the one after it."""
        yes, no = self._answer_ids["asymmetric"]
        with inference(self):
            inputs = torch.tensor([[yes, yes], [yes, no]], device=self.device)
            first = self.model(input_ids=inputs, use_cache=False).last_hidden_state[:, 0].float()
        if (first[0] - first[1]).norm() > 0.01 * first[0].norm():
            raise ModelError(f"'{self.config.model}' is no causal language model: its tokens see the ones after them")

    def _leading_special_ids(self) -> list[int]:
        """What the tokenizer puts before a text; what it puts after one has no place before the answer."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        marks = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        return [token_id for token_id, _ in takewhile(lambda item: item[1], marks)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return cast(
            "list[list[int]]",
            self.tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"],
        )

    def _find_answers(self, prompt: Prompt) -> tuple[int, int]:
        tail, with_yes, with_no = self._ids([prompt.tail, prompt.tail + prompt.yes, prompt.tail + prompt.no])
        found: list[int] = []
        for word, ids in ((prompt.yes, with_yes), (prompt.no, with_no)):
            if ids[: len(tail)] != tail or len(ids) != len(tail) + 1:
                tokens = self.tokenizer.convert_ids_to_tokens(self._ids([word])[0])
                raise AnswerTokenError(
                    f"the answer word {word!r} of prompt '{self.config.prompt}' is not one token after the prompt for "
                    f"the tokenizer of '{self.config.model}': alone it gives {tokens}; use a prompt file with answer "
                    "words that are one token each (mind the space before the word)"
                )
            found.append(ids[-1])
        if found[0] == found[1]:
            raise AnswerTokenError(
                f"the answer words {prompt.yes!r} and {prompt.no!r} are the same token for the tokenizer of "
                f"'{self.config.model}'; use a prompt file with two distinct words"
            )
        return found[0], found[1]
