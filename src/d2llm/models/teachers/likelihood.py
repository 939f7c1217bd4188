"""Query likelihood: how likely a language model is to write the query for the passage.

Sachan et al., "Improving Passage Retrieval with Zero-Shot Question Generation" (UPR), EMNLP 2022 (arXiv 2204.07496).
The model continues what a tuned writer reads (``models.writers.local``): the passage, then the kind of the query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import Advance
from d2llm.core.types import TASKS, Task
from d2llm.models.device import inference
from d2llm.models.sources import find_model, fingerprint_model
from d2llm.models.teachers.pair_teacher import IdentifiedTeacher, TeacherScores, TextPair
from d2llm.models.writers.local import LocalWriter, read_tuned_writer
from d2llm.models.writers.writer import Assignment, kind_of_query
from d2llm.ops.batching import token_budget_batches
from d2llm.recipe import LikelihoodTeacherConfig, LocalWriterConfig, TeacherIdentity

_BATCH_TOKENS, _BATCH_PAIRS = 4_096, 16  # the logits of a query's tokens have the size of the vocabulary
_NOTHING = "-"  # stands for a passage without text


class LikelihoodTeacher(IdentifiedTeacher):
    """The mean log-probability, in nats, of a query's tokens after the passage, which compares passages of a query."""

    ranks_lists = True

    def __init__(self, config: LikelihoodTeacherConfig, writer: LocalWriter) -> None:
        """Judge by what ``writer`` would write; ``config`` names the same model."""
        self.writer = writer
        self._identity = self.identify(config)

    @classmethod
    def load(
        cls,
        config: LikelihoodTeacherConfig,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> LikelihoodTeacher:
        """Load its model; raises the same errors as ``LocalWriter``."""
        limits = dict.fromkeys(config.model_fields_set & {"max_passage_tokens"}, config.max_passage_tokens)
        settings = LocalWriterConfig.model_validate({"model": config.model, **limits})
        return cls(config, LocalWriter.load(settings, device=device, dtype=dtype))

    @staticmethod
    def identify(config: LikelihoodTeacherConfig) -> TeacherIdentity:
        tuned = read_tuned_writer(config.model)
        weights = fingerprint_model(find_model(config.model)) if tuned is None else tuned.fingerprint
        limit = config.max_passage_tokens if tuned is None else tuned.max_passage_tokens
        return TeacherIdentity(weights, dict.fromkeys(TASKS, fingerprint_json(["likelihood", limit])))

    def score_pairs(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> TeacherScores:
        """Score pairs (``PairTeacher.score_pairs``); ``task`` makes no difference, and there are no features."""
        assignments = [Assignment(text if text.strip() else _NOTHING, kind_of_query(query)) for query, text in pairs]
        prompts, is_cut = self.writer.encode_tuned(assignments)
        targets = [ids[:-1] or ids for ids in self.writer.encode_targets([query for query, _ in pairs])]
        values = np.empty(len(pairs), np.float32)
        lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
        for batch in token_budget_batches(lengths, max_tokens=_BATCH_TOKENS, max_items=_BATCH_PAIRS):
            of_batch = [targets[index] for index in batch]
            with inference(self.writer.whole):
                losses = self.writer.query_losses([prompts[index] for index in batch], of_batch).cpu().numpy()
            values[batch] = -losses / [len(target) for target in of_batch]
            if advance is not None:
                advance(len(batch))
        return TeacherScores(values, None, num_truncated=sum(is_cut), num_tokens=sum(lengths))
