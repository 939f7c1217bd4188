"""A bi-encoder of sentence-transformers as a student that was not trained: the cosine of its vectors, and words.

A student reads texts with one model of ``transformers``, a pooling and two prefixes. A model of the library that does
the same has the same vectors here, which is checked with a few texts; one that does more (dense layers, other routes
for queries) is refused rather than approximated.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.manifest import FILE_NAME
from d2llm.models.backbone import Backbone
from d2llm.models.external import ExternalBiEncoder, load_external
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.student import Student
from d2llm.models.student_files import MODULES_FILE, read_student_manifest
from d2llm.recipe import AutoPooling, BackboneConfig, Frozen, InteractionConfig, Pooling, StudentConfig

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WORDS_WEIGHT = 0.7
"""Weight of the BM25 of a passage's best window, as a fraction of the most that its query allows, beside cosines.

Measured (docs/log, 2026-11-29): level from .5 to 1.5 for a model whose unrelated texts have cosines of 0.
"""
_TEXTS = (
    "Green tea needs water of 80 degrees.",
    "The parliament passed a law on fishing.",
    "How do I sort a list in Python?",
    "Her brother plays the violin.",
    "symptoms of a vitamin D deficiency",
    "The train to Vienna leaves at noon.",
    "Shares fell after the bank's report.",
    "a good recipe for tomato soup " * 400,
)
"""About different things; the last is longer than most models read."""
_TOLERANCE = 1e-4  # of cosines
_TOKENS = 512  # for a model without a limit
_UNNAMED = "sentence-transformers"  # what a student says of a model that was not in a folder


def is_bi_encoder(model: object) -> bool:
    """Whether this is a ``SentenceTransformer``, or the folder of one that is no student of d2llm."""
    if isinstance(model, str | Path):
        folder = Path(model)
        return (folder / MODULES_FILE).is_file() and not (folder / FILE_NAME).is_file()
    return any(kind.__name__ == "SentenceTransformer" for kind in type(model).__mro__)


def write_untrained(model: SentenceTransformer | str | Path, folder: Path) -> Path:
    """Write a student with the vectors of a ``SentenceTransformer``, or of the folder of one; return its folder.

    Its score is 20 times the cosine, and in asymmetric search BM25 with a default weight: the closer the model puts
    unrelated texts, the less. ``d2llm fit-scores`` fits the weight to judged queries, and training changes the
    vectors. A student that the same model made before is kept as it is.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        InputError: the model has no cosine, or does more than a student can; or another student is in the folder.
        ModelError: it cannot be read.

    Example::

        student = Student.load(write_untrained("models/all-MiniLM-L6-v2", Path("my-student")))
    """
    with TemporaryDirectory() as temporary:
        source, name = str(model), str(Path(model).resolve()) if isinstance(model, str | Path) else _UNNAMED
        if not isinstance(model, str | Path):
            source = temporary
            model.save(temporary, create_model_card=False)
        external = load_external(source, device="cpu")
        if not isinstance(external, ExternalBiEncoder) or external.config.similarity != "cosine":
            raise InputError(f"{name}: a student that is not trained scores by cosines, and this model does not")
        student = _with_backbone_of(source, name, external)
        words = TaskFeatureWeights(
            weights={"window_bm25_fraction": _check(student, external, name)}, dev={}, num_queries={}
        )
        student.score_features = ScoreFeatures(tasks={"asymmetric": words})
        if not (folder / FILE_NAME).is_file():
            student.save(folder, merge=True)
        elif read_student_manifest(folder)[0]["fingerprint"] != student.fingerprint:
            raise InputError(f"{folder}: holds another student than this model makes; remove it, or take another name")
    return folder


@contextmanager
def untrained_beside(model: SentenceTransformer | str | Path, folder: Path) -> Generator[Path]:
    """``write_untrained`` for what a block makes of it; if the block fails, a student that was written goes again."""
    is_new = not folder.exists()
    try:
        yield write_untrained(model, folder)
    except BaseException:
        if is_new:
            rmtree(folder, ignore_errors=True)
        raise


def _with_backbone_of(folder: str, name: str, external: ExternalBiEncoder) -> Student:
    limit = external.max_tokens or _TOKENS
    query_prompt, passage_prompt = external.prompts
    config = BackboneConfig(
        model=folder,
        tuning=Frozen(),
        max_query_tokens=limit,
        max_passage_tokens=limit,
        query_prefix=query_prompt,
        passage_prefix=passage_prompt,
    )
    backbone = Backbone.load(config, AutoPooling(), device="cpu", dtype="float32")
    # The fingerprint must not depend on a folder that may be temporary, but on the pooling that the folder names.
    lasting, pooling = config.model_copy(update={"model": name}), Pooling.of(backbone.own_pooling.kind)
    interaction = InteractionConfig(head="cosine")
    return Student(StudentConfig(backbone=lasting, pooling=pooling, interaction=interaction), backbone)


def _check(student: Student, external: ExternalBiEncoder, name: str) -> float:
    """Check that a student has a model's vectors; return the weight of words."""
    length = student.vector_dim**0.5  # of this head's vectors; those of a model with a cosine have length 1
    passages = student.encode_passages(_TEXTS).vectors / length
    queries = student.encode_queries(_TEXTS).vectors / length
    theirs = external.encode_passages(_TEXTS).vectors, external.encode_queries(_TEXTS).vectors
    for vectors, expected in zip((passages, queries), theirs, strict=True):
        if vectors.shape != expected.shape or (1 - (vectors * expected).sum(axis=1) > _TOLERANCE).any():
            raise InputError(
                f"{name}: a student cannot have this model's vectors, because it does more than to pool the states of "
                "a transformer (dense layers, other routes for queries, ...); use it as a baseline (d2llm evaluate)"
            )
    unrelated = (passages @ passages.T)[np.triu_indices(len(passages), 1)].mean()
    (scale,) = np.exp([parameter.item() for parameter in student.interaction.parameters()])  # of the cosine
    return float(WORDS_WEIGHT * scale * (1 - unrelated))
