"""A language model reads the first passages as vectors and ranks them (``models.listwise_reader``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from d2llm.core.types import DEFAULT_RERANKED_PASSAGES, Task
from d2llm.models.listwise_reader import ListwiseReader
from d2llm.models.protocols import SearchStudent
from d2llm.retrieval.reranker import Candidates, OpenReranker, Reranked, Reranker
from d2llm.retrieval.segments import IndexView


class Listwise(Reranker, kind="listwise"):
    """A language model reads the first passages as vectors and ranks them (PE-Rank).

    Passages that it leaves out, and those below ``num_passages``, keep the student's order, below the others. The score
    of a passage is 1 / place.
    """

    paper = "Liu et al. 2024, arXiv 2406.14848 (PE-Rank)"
    costs = "a language model that `d2llm tune-reader` trains for the student's vectors"
    measured = (
        "smollm2 after 6,000 lists: nDCG@10 .715 on banking77, .257 on squad-sent, where the student has .892 and .843 "
        "([one run, lists of 20](recipes.md#a-language-model-that-reads-passages-as-vectors))"
    )

    model: str
    """A folder from ``d2llm tune-reader``."""
    num_passages: int = Field(default=DEFAULT_RERANKED_PASSAGES, ge=1)
    """How many passages it reads per query."""

    def open(self, *, device: str | None = None, dtype: str | None = None) -> OpenListwise:
        """Load the language model."""
        return OpenListwise(self, ListwiseReader.load(self.model, device=device, dtype=dtype))


@dataclass(frozen=True)
class OpenListwise(OpenReranker):
    """A listwise reranker with its language model."""

    settings: Listwise
    reader: ListwiseReader

    def for_index(self, index: IndexView, student: SearchStudent, task: Task) -> OpenListwise:
        """Itself.

        Raises:
            MismatchError: it reads vectors of another student.
        """
        del index, task
        self.reader.require_student(student.fingerprint)
        return self

    def rerank(self, query: str, candidates: Candidates) -> Reranked:
        """1 / place; the reader knows no task, and reads as many for any ``top_k``."""
        read, others = np.split(candidates.best_first, [self.settings.num_passages])
        (drawn,) = self.reader.rank([query], [candidates.vectors(read)])
        scores = np.empty(len(candidates.scores))
        scores[np.concatenate([read[drawn.order], others])] = 1 / np.arange(1, len(scores) + 1)
        return Reranked(scores, read)
