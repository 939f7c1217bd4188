"""The weights of the score features in a search of an index (``models.score_features``)."""

from __future__ import annotations

from collections.abc import Mapping

from d2llm.core.errors import IndexMismatchError, InputError
from d2llm.core.types import PART_NAMES, ScoreFeature, Task
from d2llm.models.protocols import SearchStudent
from d2llm.models.score_features import FeatureWeights
from d2llm.retrieval.segments import IndexView


def weights_for(
    index: IndexView,
    student: SearchStudent,
    task: Task,
    requested: FeatureWeights | Mapping[ScoreFeature, float] | None = None,
) -> FeatureWeights:
    """The weights for a search of an index: those requested, else the student's for what the index stores.

    Raises:
        InputError: windows or tokens have a weight, but the index does not store their vectors.
        IndexMismatchError: tokens have a weight, and their vectors in the index were made by another projection.
    """
    if requested is not None and not isinstance(requested, FeatureWeights):
        requested = FeatureWeights(terms=dict(requested))
    stored = index.part_kinds
    weights = student.feature_weights(task, stored=stored) if requested is None else requested
    for kind in weights.part_kinds - stored:
        raise InputError(
            f"{kind}_vectors have a weight, but this index stores no {PART_NAMES[kind]}; index the corpus again with "
            f"--{kind}-vectors (in Python, {kind}_vectors='int4'), or leave that weight out"
        )
    if "token" in weights.part_kinds:
        projection = student.token_fingerprint
        if projection is None:
            raise InputError(
                "maxsim has a weight, but this student has no token embeddings; train them with `d2llm "
                "fit-tokens`, or leave that weight out"
            )
        if projection != index.token_projection:
            raise IndexMismatchError(
                f"this index has the token embeddings of projection {index.token_projection}, but the student has "
                f"{projection}; index the corpus again, or search with other score features"
            )
    return weights
