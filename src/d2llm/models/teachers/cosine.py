"""A bi-encoder as a teacher: the score of two vectors serves as uncalibrated log-odds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME, read_manifest
from d2llm.core.progress import Advance
from d2llm.core.shipped import find_shipped
from d2llm.core.types import TASKS, Task
from d2llm.models.row_features import score_by_query
from d2llm.models.sources import find_model, fingerprint_model
from d2llm.models.student import Student, find_student
from d2llm.models.student_files import FORMAT_VERSION, KIND
from d2llm.models.teachers.pair_teacher import TeacherScores, TextPair
from d2llm.models.tokens import TextKind
from d2llm.recipe import (
    BackboneConfig,
    StudentConfig,
    TeacherConfig,
    TeacherIdentity,
    shaping_student_settings,
    untuned_config,
)

_CACHED_NUMBERS = 1 << 24  # size of the cache of vectors: 64 MB of float32


class CosineTeacher:
    """A student, or a backbone's own cosine, used as a teacher. It has no features.

    ``log_odds`` are the student's own logits, t cos(a, b) for a cosine; ``ops.ensemble`` calibrates them. Each text is
    encoded once per call, and the most recently used vectors are kept for the next call.
    """

    def __init__(self, student: Student, *, fingerprint: str | None = None) -> None:
        """Wrap a student; ``fingerprint`` defaults to the student's."""
        self.student = student
        self._fingerprint = fingerprint or student.fingerprint
        self._cache: dict[TextKind, dict[str, _Encoded]] = {"query": {}, "passage": {}}  # the oldest use first

    @classmethod
    def load(cls, config: TeacherConfig, *, device: str | None = None, dtype: str | None = None) -> CosineTeacher:
        """Load a student (folder or name), or else the cosine of a pretrained backbone with its own pooling.

        The teacher's ``prompt`` and ``max_tokens`` do not apply: a student has its own limits, a backbone the defaults.

        Raises:
            ModelNotFoundError: there is neither a student nor pretrained weights.
            ModelError: the weights are not those of a bi-encoder.
        """
        if _is_student(config.model):
            return cls(Student.load(config.model, device=device, dtype=dtype))
        student = Student.create(_plain_student(config.model), device=device, dtype=dtype)
        return cls(student, fingerprint=cls.identify(config).fingerprint)

    @staticmethod
    def identify(config: TeacherConfig) -> TeacherIdentity:
        """The identity of ``load(config)``, computed without loading the model.

        Raises:
            ModelNotFoundError: there is neither a student nor pretrained weights.
        """
        prompts: dict[Task, str] = {task: _question(task) for task in TASKS}
        if _is_student(config.model):
            manifest = read_manifest(find_student(config.model), KIND, FORMAT_VERSION)
            return TeacherIdentity(str(manifest["fingerprint"]), prompts)
        settings = shaping_student_settings(_plain_student(config.model).model_dump(mode="json"))
        settings["backbone"]["model"] = fingerprint_model(find_model(config.model))
        return TeacherIdentity(fingerprint_json(["cosine", settings]), prompts)

    @property
    def fingerprint(self) -> str:
        """The student's own fingerprint, which changes with its weights."""
        return self._fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """Differs by task: there is no prompt, but the two tasks may be scored differently."""
        return _question(task)

    def score_pairs(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> TeacherScores:
        """Score pairs by their vectors; ``advance`` is called with the number of pairs of each query."""
        queries, num_query_tokens = self._encode([query for query, _ in pairs], "query")
        passages, num_passage_tokens = self._encode([passage for _, passage in pairs], "passage")
        query_vectors = {text: encoded.vector for text, encoded in queries.items()}
        passage_vectors = {text: encoded.vector for text, encoded in passages.items()}
        log_odds = score_by_query(self.student, pairs, query_vectors, passage_vectors, task, advance)
        num_truncated = sum(queries[query].is_cut or passages[passage].is_cut for query, passage in pairs)
        return TeacherScores(log_odds, None, num_truncated, num_query_tokens + num_passage_tokens)

    def _encode(self, texts: Sequence[str], kind: TextKind) -> tuple[dict[str, _Encoded], int]:
        """Each distinct text with its vector, and how many tokens were read for those that were not cached."""
        cache, num_tokens = self._cache[kind], 0
        if new := [text for text in dict.fromkeys(texts) if text not in cache]:
            encoded = (self.student.encode_queries if kind == "query" else self.student.encode_passages)(new)
            num_tokens = encoded.num_tokens
            # Copies, because a cached row would keep the whole array alive.
            vectors = (vector.copy() for vector in encoded.vectors)
            cut = set(encoded.truncated)
            pairs = zip(new, vectors, strict=True)
            cache |= {text: _Encoded(vector, index in cut) for index, (text, vector) in enumerate(pairs)}
        used = {text: cache.pop(text) for text in dict.fromkeys(texts)}
        cache |= used
        for text in list(cache)[: -(_CACHED_NUMBERS // self.student.vector_dim)]:
            del cache[text]
        return used, num_tokens


@dataclass(frozen=True, slots=True)
class _Encoded:
    """The vector [dim] of a text, and whether the text was cut."""

    vector: NDArray[np.float32]
    is_cut: bool


def _is_student(model: str) -> bool:
    return (Path(model) / FILE_NAME).is_file() or find_shipped(model, "students") is not None


def _plain_student(model: str) -> StudentConfig:
    return untuned_config(StudentConfig(backbone=BackboneConfig(model=model)))


def _question(task: Task) -> str:
    return f"vectors-{task}"
