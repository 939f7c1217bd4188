"""Vectors that rank as words do (SPAR)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from d2llm.models.score_features import FeatureWeights
from d2llm.ops.losses import list_imitation
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput, Preparation
from d2llm.training.score_features import WordScores


class WordImitation(Loss, kind="word_imitation"):
    """The distribution of BM25 over all candidates of the batch (after SPAR).

    SPAR has a model that learns this alone, and concatenates its vectors with those of another. An index here has BM25
    itself beside its vectors, so two models are not concatenated.
    """

    paper = "Chen et al., EMNLP Findings 2022, arXiv 2110.06918 (SPAR)"
    costs = "BM25 of the training queries; judgements are not needed"
    measured = (
        "half beside half judgements -.063 against judgements alone (.672 and .735; wikiqa -.063, banking77 -.063; "
        "[one seed](log/2026-11.md#2026-11-30-learned-words-splade-dsr-spar-and-condenser), vectors alone); static "
        "vectors -.009 ([one seed](log/2026-11.md#2026-11-30-the-last-files-of-figures-and-which-of-two-maps-and-a-"
        "variance))"
    )
    of_vectors: ClassVar[bool] = True

    temperature: float = Field(default=1.0, gt=0)
    """Divides BM25: below 1, its first passages count more. SPAR has its first ten as positives of a contrast."""

    def prepare(self, preparation: Preparation) -> dict[str, Any]:
        for labelled in preparation.with_lists:
            words = WordScores(labelled.source.dataset, FeatureWeights(terms={"bm25": 1.0}))
            preparation.add_pair_input(self.kind, labelled, words)
        return {}

    def __call__(self, inputs: LossInput) -> Tensor | None:
        scores = inputs.pair_input(self.kind)
        if scores is None:
            return None
        return list_imitation(inputs.logits, scores, inputs.candidates, temperature=self.temperature)
