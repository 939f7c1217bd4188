"""Several teachers whose rankings of a query's passages are fused by reciprocal ranks, as in Gecko.

Lee et al., "Gecko: Versatile Text Embeddings Distilled from Large Language Models", 2024 (arXiv 2403.20327), fuse the
rankings by query likelihood and by relevance:

    R(q, p) = 1 / r_QL(q, p) + 1 / r_RC(q, p),    r the rank from 1 among the passages of q.

The log-odds are log R, whose softmax gives each passage its part of the query's R.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import TASKS, Task
from d2llm.models.teachers.ensemble import EnsembleTeacher
from d2llm.models.teachers.pair_teacher import PairTeacher, TextPair, identify_teacher, load_teacher
from d2llm.ops.pair_measures import mean_ranks
from d2llm.recipe import FusedTeacherConfig, TeacherConfig, TeacherIdentity


class FusedTeacher(EnsembleTeacher):
    """log R of each pair, over the passages of its query in one call; passages that a teacher ties share a rank."""

    def __init__(self, members: Sequence[PairTeacher]) -> None:
        """Fuse the rankings of ``members``."""
        super().__init__(members, {})
        self.ranks_lists = True

    @classmethod
    def load(cls, config: TeacherConfig, *, device: str | None = None, dtype: str | None = None) -> FusedTeacher:
        """Load all of ``config.teachers``."""
        return cls([load_teacher(one, device=device, dtype=dtype) for one in _teachers(config)])

    @staticmethod
    def identify(config: TeacherConfig) -> TeacherIdentity:
        """The identity of ``load(config)``, computed without loading a model."""
        identities = [identify_teacher(one) for one in _teachers(config)]
        prompts: dict[Task, str] = {task: fingerprint_json([one.prompts[task] for one in identities]) for task in TASKS}
        return TeacherIdentity(_fingerprint([one.fingerprint for one in identities]), prompts)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the members."""
        return _fingerprint([member.fingerprint for member in self.members])

    def prompt_fingerprint(self, task: Task) -> str:
        """Identity of the questions to all members."""
        return fingerprint_json([member.prompt_fingerprint(task) for member in self.members])

    def _counting(self, task: Task) -> list[int]:
        del task
        return [*range(len(self.members))]

    def _joined(self, pairs: Sequence[TextPair], scores: NDArray[np.float32], task: Task) -> NDArray[np.float64]:
        del task
        by_query: dict[str, list[int]] = {}
        for index, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(index)
        fused = np.empty(len(pairs))
        for rows in by_query.values():
            fused[rows] = sum(1 / mean_ranks(-values.astype(np.float64)) for values in scores[rows].T)
        return np.log(fused)


def _teachers(config: TeacherConfig) -> Sequence[TeacherConfig]:
    assert isinstance(config, FusedTeacherConfig)
    return config.teachers


def _fingerprint(members: Sequence[str]) -> str:
    return fingerprint_json(["reciprocal ranks", *members])
