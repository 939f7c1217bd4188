"""A tiny student whose score counts everything, texts of several sentences, and made-up speeds."""

from __future__ import annotations

import functools

import numpy as np

from d2llm.core.types import Passage
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection, skipped_tokens
from d2llm.sizing.speeds import Speed, Speeds, TeacherSpeed
from tiny_models import write_trained_student


def token_student(folder) -> Student:
    """A student with token embeddings that counts words, windows and tokens."""
    student = Student.load(write_trained_student(folder, max_passage_tokens=500))
    vocabulary = len(student.backbone.tokenizer)
    skipped = set(skipped_tokens(student.backbone.tokenizer))
    rarity = [0.0 if token in skipped else 1.0 for token in range(vocabulary)]
    student.token_projection = TokenProjection(student.vector_dim, 16, rarity).eval()
    weights = {"bm25": 0.1, "window_bm25": 0.1, "window_vectors": 0.5, "maxsim": 2.0}
    task = TaskFeatureWeights(weights=weights, dev={}, num_queries={})
    student.score_features = ScoreFeatures(tasks={"asymmetric": task})
    return student


@functools.cache
def passages(number: int, seed: int = 0) -> tuple[Passage, ...]:
    """Passages of one to five sentences, of two thousand made-up words."""
    random = np.random.default_rng(0)
    syllables = [a + b for a in "bdfglmnprst" for b in "aeiou"]
    words = ["".join(random.choice(syllables, random.integers(1, 5))) for _ in range(2_000)]
    random = np.random.default_rng(seed)
    made: list[Passage] = []
    for row in range(number):
        sentences = [
            " ".join(random.choice(words, random.integers(4, 12))).capitalize() + "."
            for _ in range(random.integers(1, 6))
        ]
        made.append(Passage(f"passage-{row:06}", " ".join(sentences)))
    return tuple(made)


def _speed(value: float) -> Speed:
    return Speed(value=value, source="a test")


def made_up_speeds(student: str) -> Speeds:
    """Round numbers: a test can work out every time by hand."""
    return Speeds(
        machine="a machine",
        threads=1,
        student=student,
        passage_tokens=_speed(1_000),
        query_ms=_speed(10),
        scan_bytes={"bfloat16": _speed(1e9), "int8": _speed(1e9)},
        products={"bfloat16": _speed(1e8), "int3": _speed(1e8), "int8": _speed(1e8)},
        visited_rows=_speed(1e6),
        segment_ms=_speed(0.1),
        words_ms=_speed(0.2),
        postings=_speed(1e8),
        candidate_words=_speed(1e7),
        compared_tokens={"int4": _speed(1.6e8)},
        interaction_pairs=_speed(1e5),
        result_ms=_speed(2),
        written_text_bytes=_speed(1e6),
        linked_rows=_speed(1e3),
        teachers={"smollm2": TeacherSpeed(value=10, source="a test", pair_tokens=100, passage_tokens=40)},
        slow_ratio=_speed(2),
        process_bytes=_speed(2**29),
    )
