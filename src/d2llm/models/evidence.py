"""Evidence: what a score stands on beside the vectors of whole texts.

    z(q, p) = t <U y_q, V y_p> + sum_j w_j e_j(q, p) + B r_q r_p tanh(g(y_q, y_p, e))

One vector does not hold all that a teacher reads in a passage. e are three more views of it, each of things that are
stored of the passage once: its best part (the largest inner product of a window's vector), its words (BM25) and the
words of its best part, the last two as they are and divided by the query's limit, which no passage reaches. The weights
w are at least 0; a part with weight 0 is left out. They are each task's own, and may depend on the query:

    w_j(q) = w_j exp(c tanh(f(y_q, s_q))_j),   s_q = ln(1 + words), sum and maximum of their idf, share unknown
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2llm.core.recipe import EvidenceConfig
from d2llm.core.types import EvidenceTerm, Task
from d2llm.models.interaction import TASKS, at_least_float32

NUM_STATISTICS = 4
_HIDDEN = 32
_LARGEST_FACTOR = 1.5  # c: a query can raise or lower a weight by e^1.5, 4.5 times
_UNITS: dict[EvidenceTerm, float] = {
    "windows": 20.0,
    "words": 10.0,
    "words_share": 1.0,
    "window_words": 10.0,
    "window_words_share": 1.0,
}
"""What is large for a part: the interaction sees parts in these units."""


class Evidence(nn.Module):
    """The weights of the parts of one student's score."""

    def __init__(self, config: EvidenceConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.terms = config.terms
        for task in TASKS:
            self.register_buffer(f"weights_{task}", torch.zeros(len(self.terms)))
        self.gate: nn.Sequential | None = None
        if config.query_weights and self.terms:
            last = nn.Linear(_HIDDEN, len(self.terms))
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.gate = nn.Sequential(nn.Linear(dim + NUM_STATISTICS, _HIDDEN), nn.ReLU(), last)

    def task_weights(self, task: Task) -> Float[Tensor, " terms"]:
        """The weights of one task, before a query changes them; a buffer that may be written."""
        return self.get_buffer(f"weights_{task}")

    def weights(
        self, queries: Float[Tensor, "queries dim"], statistics: Float[Tensor, "queries 4"], task: Task
    ) -> Float[Tensor, "queries terms"]:
        """The weights for some queries.

        Args:
            queries: their vectors, of norm near sqrt(dim).
            statistics: of their words (``index.words.QueryWords.statistics``).
            task: whose weights.
        """
        weights = self.task_weights(task).expand(len(queries), -1)
        if self.gate is None:
            return weights
        with torch.autocast(queries.device.type, enabled=False):
            number, total, largest, unknown = at_least_float32(statistics).unbind(1)
            seen = torch.stack([torch.log1p(number), torch.log1p(total) / 3, largest / 8, unknown], dim=1)
            vectors = at_least_float32(queries) / queries.shape[1] ** 0.5
            return weights * torch.exp(_LARGEST_FACTOR * torch.tanh(self.gate(torch.cat([vectors, seen], dim=1))))

    def logits(
        self,
        terms: Float[Tensor, "queries passages terms"],
        queries: Float[Tensor, "queries dim"],
        statistics: Float[Tensor, "queries 4"],
        task: Task,
    ) -> Float[Tensor, "queries passages"]:
        """What the parts add to the scores of queries with passages."""
        return (at_least_float32(terms) * self.weights(queries, statistics, task)[:, None]).sum(2)

    def in_units(self, terms: Float[Tensor, "*pairs terms"]) -> Float[Tensor, "*pairs terms"]:
        """The parts as the interaction sees them, most of them between 0 and 1."""
        return at_least_float32(terms) / torch.tensor([_UNITS[term] for term in self.terms], device=terms.device)
