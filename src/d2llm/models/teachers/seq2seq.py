"""A sequence-to-sequence reranker as a teacher: the answer is the decoder's first word.

Source: Nogueira et al., "Document Ranking with a Pretrained Sequence-to-Sequence Model", EMNLP Findings 2020 (MonoT5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d2llm.core.types import TASKS, Task
from d2llm.models.teachers.local import LocalTeacher, fit_pairs
from d2llm.models.teachers.pair_teacher import TextPair
from d2llm.models.teachers.prompts import Prompt, load_prompt
from d2llm.models.teachers.questions import find_answers
from d2llm.recipe import LocalTeacherConfig, PromptedTeacherConfig


class Seq2SeqTeacher(LocalTeacher):
    """Reads the whole prompt with the encoder and runs one step of the decoder; nothing is generated."""

    kind = "seq2seq"
    _auto_class = "AutoModelForSeq2SeqLM"

    def __init__(self, config: LocalTeacherConfig, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        """Load the model; see ``LocalTeacher``."""
        super().__init__(config, device=device, compute_dtype=compute_dtype)
        asked = cast(PromptedTeacherConfig, self.config)
        self.prompts: dict[Task, Prompt] = {task: load_prompt(asked.prompt, task) for task in TASKS}
        advice = "use prompt 'monot5' or a prompt file with answer words that are one token each"
        self._answer_ids = {
            task: find_answers(asked, self.tokenizer, prompt, "", advice) for task, prompt in self.prompts.items()
        }

    @property
    def dim(self) -> int:
        """Width of the features: the decoder's state that gives the first word."""
        return int(cast(Any, self.model).config.hidden_size)

    def tokenize(self, pairs: Sequence[TextPair], task: Task) -> tuple[list[list[int]], int]:
        """Token ids of each complete input, tokenized in one piece, and how many pairs were cut.

        Raises:
            InputError: the prompt alone fills ``max_tokens``.
        """
        prompt = self.prompts[task]

        def encode(chosen: Sequence[TextPair]) -> list[list[int]]:
            texts = [prompt.fill(query, passage) for query, passage in chosen]
            return cast("list[list[int]]", self.tokenizer(texts, truncation=False, verbose=False)["input_ids"])

        return fit_pairs(pairs, self.tokenizer, encode, max_tokens=self.config.max_tokens)

    def forward(
        self, token_ids: Int[Tensor, "pairs tokens"], mask: Bool[Tensor, "pairs tokens"], task: Task
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, "pairs dim"]]:
        """Log-odds logit_yes - logit_no of the decoder's first word, and its last-layer state there, both float32."""
        model = cast(Any, self.model)
        start = torch.full((len(token_ids), 1), model.config.decoder_start_token_id, device=token_ids.device)
        with self._number_format():
            encoder_outputs = model.get_encoder()(input_ids=token_ids, attention_mask=mask.long())
            output = model(
                encoder_outputs=encoder_outputs,
                attention_mask=mask.long(),
                decoder_input_ids=start,
                use_cache=False,
                output_hidden_states=True,
            )
        yes, no = self._answer_ids[task]
        logits = output.logits[:, 0].float()
        return logits[:, yes] - logits[:, no], output.decoder_hidden_states[-1][:, 0].float()
