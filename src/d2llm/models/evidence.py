"""Evidence: what a score stands on beside the vectors.

    z(q, p) = t <U y_q, V y_p> + sum_j w_j e_j(q, p) + B r_q r_p tanh(g(y_q, y_p))

One vector does not hold all that a teacher reads in a passage. e are other views of it, each of things that an index
stores of the passage once: its words (BM25) and the words of its best window, both as they are and divided by the
query's limit, which no passage reaches. The weights w are at least 0, each task's own, and fitted on dev
(``pipeline.fit_evidence``). BM25 needs a corpus, so a pair that is scored outside an index has the score of its
vectors alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from d2llm.core.recipe import EvidenceConfig
from d2llm.core.types import EvidenceTerm, Task
from d2llm.models.interaction import TASKS


class Evidence(nn.Module):
    """The weights of the evidence in one student's score: 0 until they are fitted."""

    def __init__(self, config: EvidenceConfig) -> None:
        super().__init__()
        self.terms = config.terms
        for task in TASKS:
            self.register_buffer(f"weights_{task}", torch.zeros(len(self.terms)))

    def weights(self, task: Task) -> dict[EvidenceTerm, float]:
        """Those of one task that are not 0, in the order of ``terms``."""
        values = self.get_buffer(f"weights_{task}").tolist()
        return {term: weight for term, weight in zip(self.terms, values, strict=True) if weight}

    def set_weights(self, task: Task, weights: Mapping[EvidenceTerm, float]) -> None:
        """Set those of one task; what is not named has weight 0."""
        buffer = self.get_buffer(f"weights_{task}")
        buffer.copy_(torch.tensor([weights.get(term, 0.0) for term in self.terms]))
