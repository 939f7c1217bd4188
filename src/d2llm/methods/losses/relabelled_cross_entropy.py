"""In-batch cross-entropy after a teacher has chosen the positive and the hard negative of each query (Gecko)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from d2llm.core.progress import remarks
from d2llm.data.collation import LabelledSource
from d2llm.training.losses import InBatchCrossEntropy, Preparation

Negatives = Literal["lowest", "others"]


class RelabelledCrossEntropy(InBatchCrossEntropy, kind="relabelled_cross_entropy"):
    """In-batch cross-entropy with positive and hard negative chosen by the teacher (Gecko); judgements do not count."""

    paper = "Lee et al. 2024, arXiv 2403.20327 (Gecko)"
    needs = frozenset({"labels"})
    measured = (
        "written queries, two seeds: medquad .746, with `others` .741; covidqa .388, .417; the worst negative: no gain "
        "([log](log/2026-11.md#2026-11-30-positives-that-a-teacher-chooses-gecko)); static vectors +.001 ([one "
        "seed](log/2026-11.md#2026-11-30-the-last-files-of-figures-and-which-of-two-maps-and-a-variance))"
    )

    negatives: Negatives = "lowest"
    """The hard negative: the passage that the teacher finds worst, or ``others``, drawn among all but the positive."""

    def prepare(self, preparation: Preparation) -> dict[str, Any]:
        preparation.sources[:] = [relabelled(source, self.negatives) for source in preparation.sources]
        return {}


def relabelled(labelled: LabelledSource, negatives: Negatives) -> LabelledSource:
    """The same queries, each with the passage as positive that the teacher finds best among its positives and hard
    negatives, and as hard negatives the one that it finds worst, or all others.

    Of equals, those that come first in the plan count as better. Lee et al., "Gecko", 2024 (arXiv 2403.20327), section
    3.2: p+ = argmax R(q, p), p- = p_N or drawn from the others, R from the teachers (kind ``fused``). Labelled pairs,
    and queries without labels, keep theirs. The paper's same-tower negatives are left out.
    """
    entries = [*labelled.entries]
    num_changed = 0
    for index, entry in enumerate(entries):
        log_odds = labelled.labels.log_odds(entry.query_id)
        listed = entry.positives + entry.hard_negatives
        if entry.targets or any(passage_id not in log_odds for passage_id in listed):
            continue
        best, *others = sorted(listed, key=lambda passage_id: -log_odds[passage_id])
        num_changed += best not in entry.positives
        hard = tuple(others if negatives == "others" else others[-1:])
        entries[index] = replace(entry, positives=(best,), hard_negatives=hard, preferred=())
    name = labelled.source.dataset.name
    remarks.info("%s: the teacher finds another passage best for %d of %d queries", name, num_changed, len(entries))
    return replace(labelled, entries=tuple(entries))
