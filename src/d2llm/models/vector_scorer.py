"""Scoring vectors with a student's head: all of a search that remains once texts are vectors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from d2llm.core.types import Task, default_task
from d2llm.models.device import inference
from d2llm.models.interaction import CosineHead, Interaction
from d2llm.models.protocols import PlainStudent, why_no_interaction
from d2llm.models.scorer import HeadWeights, QueryScorer

SCORE_BLOCK = 480
"""Passages that the interaction scores at a time on a CPU.

At width 512 in bfloat16, the activations of 480 passages take 480 KB, half of a core's own cache in today's servers.
Blocks are padded to a multiple of 96 (``scorer``), so this is one.
"""
_ACCELERATOR_BLOCK = 32_768  # the same on an accelerator


class VectorScorer(nn.Module):
    """Scores passages' vectors for a query's vector. ``Student`` also makes the vectors.

    Subclasses set ``interaction``, the head.
    """

    interaction: Interaction | CosineHead

    def __init__(self) -> None:
        super().__init__()
        self._kept_weights: dict[Task, HeadWeights] = {}

    @property
    def fingerprint(self) -> str:
        """That of the student."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where vectors are scored."""
        raise NotImplementedError

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number format of the products."""
        raise NotImplementedError

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        """The tasks of the data that the student was trained on; empty if it was not, or they are not known."""
        return ()

    def without_backbone(self) -> VectorScorer:
        """A copy that only scores, on the CPU: small, and it can be pickled."""
        return _HeadAlone(copy.deepcopy(self.interaction).cpu(), self.fingerprint, self.compute_dtype)

    @property
    def has_dot(self) -> bool:
        """Whether the score has an inner-product part that an index can search (heads ``dot`` and ``cosine``)."""
        return self.interaction.has_dot

    def query_vectors(
        self, query_vectors: Float32[np.ndarray, "queries dim"], task: Task | None = None
    ) -> Float32[np.ndarray, "queries dim"]:
        """The vectors whose inner product with a passage's vector is that of the score (dot head only).

        By default they are those of the task that the student was trained for, or asymmetric ones.

        Raises:
            InputError: the head is ``paper``.
        """
        with inference(self):
            queries = torch.from_numpy(query_vectors).to(self.device)
            return self.interaction.query_vectors(queries, task or default_task(self.trained_tasks)).cpu().numpy()

    def passage_bound(self, passage_vectors: Float[np.ndarray, "passages dim"]) -> Float[np.ndarray, " passages"]:
        """The passages' part r_p(b) of the bound of a pair, in (0, 1]; the query's part is ``QueryScorer.bound``."""
        head = self.interaction
        if isinstance(head, CosineHead):
            return np.ones(len(passage_vectors), np.float32)
        with inference(self):
            return head.passage_bound(torch.from_numpy(passage_vectors).to(self.device)).cpu().numpy()

    def why_no_interaction(self, task: Task) -> str | None:
        """Why the interaction adds nothing to the score of any pair in a task; None if it adds something."""
        head = self.interaction
        if isinstance(head, CosineHead):
            return why_no_interaction(head.kind, None, task)
        weight = float(head.interaction_weight(task)) if head.has_interaction(task) else None
        return why_no_interaction("dot" if head.has_dot else "paper", weight, task)

    def prepare(
        self, query_vector: Float32[np.ndarray, " dim"], task: Task, *, interaction_weight: float | None = None
    ) -> QueryScorer:
        """A scorer of this query against any passages; everything that depends on the query alone is computed here.

        The scorer uses the current weights: after training, prepare a new one. ``interaction_weight`` is the weight r
        of the interaction, by default the student's own for the task.
        """
        head, weights = self.interaction, None
        query = torch.from_numpy(query_vector).to(self.device)
        if isinstance(head, Interaction) and head.changes_scores(task, interaction_weight=interaction_weight):
            weights = self._scoring_weights(head, task, query)
        block = SCORE_BLOCK if query.device.type == "cpu" else _ACCELERATOR_BLOCK
        return QueryScorer(head, weights, query, task, block, interaction_weight=interaction_weight)

    def score(
        self,
        query_vector: Float32[np.ndarray, " dim"],
        passage_vectors: Float[np.ndarray, "passages dim"] | Float[Tensor, "passages dim"],
        task: Task,
        *,
        interaction_weight: float | None = None,
    ) -> Float32[np.ndarray, " passages"]:
        """Final logits of one query against passages; bfloat16 tensors are scored without conversion.

        ``interaction_weight`` is the weight r of the interaction, by default the student's own for the task.
        """
        return self.prepare(query_vector, task, interaction_weight=interaction_weight)(passage_vectors)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out cast weights: a copy casts its weights itself."""
        return {**self.__dict__, "_kept_weights": {}}

    def _scoring_weights(self, head: Interaction, task: Task, query: Float[Tensor, " dim"]) -> HeadWeights:
        if head.is_generated:
            with torch.inference_mode():
                return HeadWeights(head, task, self.compute_dtype, query)
        kept = self._kept_weights.get(task)
        if kept is None or not kept.is_of(head, self.compute_dtype):
            with torch.inference_mode():
                kept = self._kept_weights[task] = HeadWeights(head, task, self.compute_dtype)
        return kept


class _HeadAlone(VectorScorer, PlainStudent):
    """A student's head, which knows nothing of texts."""

    def __init__(self, interaction: Interaction | CosineHead, fingerprint: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.interaction = interaction
        self._fingerprint, self._dtype = fingerprint, dtype
        self.eval()

    @property
    def fingerprint(self) -> str:
        """That of the student."""
        return self._fingerprint

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def compute_dtype(self) -> torch.dtype:
        """That of the student."""
        return self._dtype
