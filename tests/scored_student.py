"""A tiny student with random weights whose score counts what the test wants."""

from __future__ import annotations

import numpy as np
import torch

from d2llm.models.document_expansion import DocumentExpansion
from d2llm.models.fitted_part import TermWeights
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights, WordsFactor
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from sharded_index import WORDS
from tiny_models import write_trained_student

FACTOR = {"slopes": (0.2, 0.0, -0.5, 0.3), "offset": 0.1, "lowest": -3.0, "highest": 3.0}


def real_student(folder, kind):
    """A tiny student with random weights and what ``kind`` names."""
    student = Student.load(write_trained_student(folder, query_prefix="rain "), device="cpu", dtype="float32")
    weights = {"window_bm25_fraction": 3.0, "bm25": 0.2}
    if kind != "words":
        rarity = [0.0, 0.0, 0.0, *[1.0] * (len(student.backbone.tokenizer) - 3)]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student.token_projection = TokenProjection(student.backbone.dim, 8, rarity)
        weights |= {"maxsim": 4.0}
    if kind == "all":
        weights |= {"window_vectors": 0.5}
        width = student.backbone.dim
        student.term_weights = TermWeights(
            weights=(0.1,) * width, offset=0.8, usual=0.7, num_words={"tiny": 9}, explained={"tiny": 0.5}
        )
        rng = np.random.default_rng(0)
        num = len(WORDS)
        student.document_expansion = DocumentExpansion(
            terms=WORDS,
            usual=np.full(num, 0.1, np.float32),
            middle=np.zeros(student.vector_dim, np.float32),
            weights=rng.standard_normal((student.vector_dim, num)).astype(np.float32) / 10,
            rarity=np.ones(num, np.float32),
            num_passages={"tiny": 9},
            explained={"tiny": 0.5},
        )
    fitted = TaskFeatureWeights(weights=weights, words_factor=WordsFactor(**FACTOR), dev={}, num_queries={})
    student.score_features = ScoreFeatures(tasks={} if kind == "vectors" else {"asymmetric": fitted})
    return student
