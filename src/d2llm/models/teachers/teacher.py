"""``Teacher``: the public face of every kind of teacher (``pair_teacher.PairTeacher``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_choice, pairs_of, path_of
from d2llm.core.progress import Advance
from d2llm.core.types import TASKS, Task
from d2llm.models.teachers.pair_teacher import (
    InterruptibleTeacher,
    PairTeacher,
    PartialScores,
    TextPair,
    gives_grades,
    load_teacher,
    ranks_lists,
    score_until_error,
)
from d2llm.recipe import TeacherConfig
from d2llm.recipe.recipe import named_teacher


class Teacher(InterruptibleTeacher):
    """A language model that reads a query and a passage together and says how likely the answer is yes.

    Load one with ``load``. It is accepted wherever d2llm takes a teacher, as in ``Index.measure_error``.

    Attributes:
        config: what was loaded.
        ranks_lists: whether scores compare only passages of one query that were scored in one call.
        gives_grades: whether its scores are made of grades.

    Example:
        >>> from d2llm import Teacher
        >>> teacher = Teacher.load("cosine:d2llm-minilm", device="cpu")
        >>> scores = teacher.score([("what do bees make?", "Bees make honey."), ("what do bees make?", "Tea is hot.")])
        >>> bool(scores[0] > scores[1])
        True
    """

    def __init__(self, teacher: PairTeacher, config: TeacherConfig) -> None:
        self._open_teacher: PairTeacher | None = teacher
        self.config = config
        self.ranks_lists, self.gives_grades = ranks_lists(teacher), gives_grades(teacher)

    @classmethod
    def load(cls, model: str | Path | TeacherConfig, *, device: str | None = None, dtype: str | None = None) -> Teacher:
        """Load a teacher.

        Args:
            model: a folder, a name on the Hub, ``smollm2``, or one of these after the kind of teacher, as in
                ``seq2seq:castorini/monot5-base-msmarco``; or the section ``[teacher]`` of a recipe.
            device: by default the best one here.
            dtype: number format of the weights; by default the fastest on that device.

        Raises:
            ModelNotFoundError: there are no usable weights.
            ModelError: the model is not a teacher of that kind.
            InputError: its head is new and was never tuned, or there is no such kind.

        Example:
            >>> from d2llm import Teacher
            >>> Teacher.load("cosine:d2llm-minilm", device="cpu")
            Teacher(d2llm-minilm, kind cosine, fingerprint ...)
        """
        config = model if isinstance(model, TeacherConfig) else named_teacher(str(path_of(model, "model")))
        return cls(load_teacher(config, device=device, dtype=dtype), config)

    def score(self, pairs: Sequence[TextPair], task: Task = "asymmetric") -> Float32[np.ndarray, " pairs"]:
        """Log-odds of yes over no [pairs], in the order of the pairs; above 0 is yes. A sigmoid makes probabilities.

        Args:
            pairs: a query and a passage's full text each.
            task: ``asymmetric`` asks whether the passage answers the query, ``symmetric`` whether both mean the same.

        Raises:
            InputError: something is not a pair of texts.
            ModelError: the model fails; of a remote teacher, after the retries of its settings.

        Example:
            >>> from d2llm import Teacher
            >>> with Teacher.load("cosine:d2llm-minilm", device="cpu") as teacher:
            ...     teacher.score([("Bees make honey.", "Honey is made by bees.")], "symmetric") > 0
            array([ True])
        """
        check_choice(task, "task", TASKS)
        return self.score_pairs(pairs, task).log_odds

    @property
    def fingerprint(self) -> str:
        """Equal if and only if two teachers are the same."""
        return self._teacher.fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """Equal if and only if two teachers ask the same question."""
        return self._teacher.prompt_fingerprint(task)

    def score_until_error(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> PartialScores:
        """Scores with all that is known about them (``InterruptibleTeacher``)."""
        return score_until_error(
            self._teacher, pairs_of(pairs, "pairs"), task, with_features=with_features, advance=advance
        )

    def close(self) -> None:
        """Let go of the model, or of its connections. A ``with`` block does this at its end."""
        self._open_teacher = None

    def __enter__(self) -> Teacher:
        _ = self._teacher  # refuses a closed one
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _teacher(self) -> PairTeacher:
        if self._open_teacher is None:
            raise InputError(f"this Teacher ({self.config.model}) was closed; load it again with Teacher.load")
        return self._open_teacher

    def __repr__(self) -> str:
        state = "closed" if self._open_teacher is None else f"fingerprint {self.fingerprint[:12]}"
        return f"Teacher({self.config.model}, kind {self.config.kind}, {state})"
