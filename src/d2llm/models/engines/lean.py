"""A student without torch and transformers, for a process that only encodes a few texts, such as a CLI search.

Importing torch takes as long as everything else in such a search together, and transformers twice as long. This is
the same encoder, with NumPy, on the weights and the adapter in their files. Only plain BERT models with the usual
poolings are supported: ``open_lean`` returns None for all others, which are then loaded as a ``Student``. A test checks
that both give the same vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.inputs import texts_of
from d2llm.core.progress import Advance
from d2llm.core.types import PART_KINDS, EngineName, PartKind, Task, default_task
from d2llm.models import student_files as files
from d2llm.models.document_expansion import DocumentExpansion, LearnedWords
from d2llm.models.engines.lean_bert import LeanBert
from d2llm.models.engines.lean_head import LeanHead
from d2llm.models.engines.lean_layers import Arrays, LeanPooling, project_tokens, to_sphere
from d2llm.models.fitted_part import PassageQuality, TermWeights, Widths
from d2llm.models.hub import find_student
from d2llm.models.protocols import PairScorer, PlainStudent, why_no_interaction
from d2llm.models.score_features import FeatureWeights, ScoreFeatures
from d2llm.models.sources import load_arrays
from d2llm.models.tokens import (
    NO_TOKENS,
    EncodedTexts,
    StoredProjection,
    TextKind,
    TokenizedTexts,
    TokenVectors,
    search_query_tokens,
    tokenize_search,
)
from d2llm.recipe import CustomBackbone, StudentConfig

if TYPE_CHECKING:
    from d2llm.models.student import Student


class LeanStudent(PlainStudent):
    """Encodes texts one by one and scores their vectors, as the ``Student`` in the same folder does in float32."""

    has_dot = True

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        config: StudentConfig,
        *,
        backbone: LeanBert,
        pooling: LeanPooling,
        head: LeanHead,
    ) -> None:
        self.config, self.backbone = config, backbone
        self.fingerprint: str = manifest["fingerprint"]
        self.vector_dim = backbone.dim
        self.max_query_tokens = search_query_tokens(config.backbone)
        self._manifest, self._pooling, self._head = manifest, pooling, head
        widths = Widths(self.vector_dim, backbone.dim)
        self._score_features = ScoreFeatures.read(folder, self.fingerprint, widths) or ScoreFeatures()
        self.quality = PassageQuality.read(folder, self.fingerprint, widths)
        self.document_expansion = DocumentExpansion.read(folder, self.fingerprint, widths)
        self._projection = StoredProjection.read(folder, self.fingerprint, widths)
        if self._projection is not None:
            self.token_dim, self.token_fingerprint = len(self._projection.weight), self._projection.fingerprint

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        return files.trained_tasks(self._manifest)

    def tokenize(self, texts: Sequence[str], kind: TextKind, *, instruction: str | None = None) -> TokenizedTexts:
        return tokenize_search(self.backbone, texts, kind, instruction=instruction, limit=self.max_query_tokens)

    def encode_queries(
        self, texts: Sequence[str], *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        return self._encode(texts, "query", instruction, advance, None)

    def encode_passages(self, texts: Sequence[str], *, advance: Advance | None = None) -> EncodedTexts:
        return self._encode(texts, "passage", None, advance, None)

    def encode_with_tokens(
        self, texts: Sequence[str], kind: TextKind, *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        """Vectors of texts and of their tokens.

        Raises:
            InputError: this student has no projection of tokens.
        """
        if self._projection is None:
            raise InputError(NO_TOKENS)
        return self._encode(texts, kind, instruction, advance, self._projection)

    def _encode(
        self,
        texts: Sequence[str],
        kind: TextKind,
        instruction: str | None,
        advance: Advance | None,
        projection: StoredProjection | None,
    ) -> EncodedTexts:
        texts = texts_of(texts)
        tokenized = self.tokenize(texts, kind, instruction=instruction)
        starts = [0] * len(texts)
        if projection is not None and instruction is not None:
            starts = self.backbone.first_own_tokens(texts, instruction)
        vectors, tokens = np.zeros((len(texts), self.vector_dim), np.float32), list[NDArray[np.float32]]()
        for row, (ids, start) in enumerate(zip(tokenized.ids, starts, strict=True)):
            states = self.backbone.states(ids)
            vectors[row] = self._pool(states)
            if projection is not None:
                kept, fraction = projection.chosen(ids[start:], kind)
                token_states = states[start:][kept]
                tokens.append(project_tokens(token_states, projection.weight) * np.float32(fraction))
            if advance is not None:
                advance(1)
        lengths = tuple(tokenized.lengths)
        joined = None if projection is None else TokenVectors.join(tokens, len(projection.weight))
        return EncodedTexts(vectors, tokenized.truncated, sum(lengths), lengths, joined)

    def _pool(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        vector = self._pooling(states)
        return to_sphere(vector) if self.config.interaction.head == "cosine" else vector

    def query_vectors(self, query_vectors: NDArray[np.float32], task: Task | None = None) -> NDArray[np.float32]:
        return self._head.query_vectors(query_vectors, task or default_task(self.trained_tasks))

    def prepare(self, query_vector: NDArray[np.float32], task: Task) -> PairScorer:
        return self._head.scorer(query_vector, task)

    def score(
        self,
        query_vector: NDArray[np.float32],
        passage_vectors: NDArray[np.float32],
        task: Task,
    ) -> NDArray[np.float32]:
        return self.prepare(query_vector, task)(passage_vectors)

    def passage_bound(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._head.passage_bound(passage_vectors)

    def why_no_interaction(self, task: Task) -> str | None:
        config = self.config.interaction
        return why_no_interaction(config.head, self._head.weight(task) if task in config.tasks else None, task)

    def feature_weights(self, task: Task, *, stored: Collection[PartKind] | PartKind = PART_KINDS) -> FeatureWeights:
        return self._score_features.weights(task, stored=[stored] if isinstance(stored, str) else stored)


def load_to_search(
    folder_or_name: str | Path,
    *,
    lean: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    engine: EngineName = "auto",
) -> Student | LeanStudent:
    """The student that ``Student.load`` gives with these arguments, or a lean one if that can be.

    Nothing is exported for the engine ``auto``: it is torch until there is a graph (``engines.prepared_engine``).
    """
    if lean and (student := open_lean(folder_or_name, device=device, dtype=dtype, engine=engine)) is not None:
        return student
    from d2llm.models.engines.engines import prepared_engine
    from d2llm.models.student import Student

    prepared = prepared_engine(engine, folder_or_name, device=device, dtype=dtype)
    return Student.load(folder_or_name, device=device, dtype=dtype, engine=prepared)


def open_lean(
    folder_or_name: str | Path, *, device: str | None = None, dtype: str | None = None, engine: EngineName = "auto"
) -> LeanStudent | None:
    """The student that ``Student.load`` would load, if it can be read without torch; None if not.

    None also stands for what ``Student.load`` reports: damaged files, weights that do not fit.

    Raises:
        ModelNotFoundError: there is no such student, or not the model that it was made from.
        DataFormatError: its manifest, or the file of a fitted part, is damaged.
        MismatchError: the pretrained backbone is not the one that the student was trained on.
    """
    if device not in (None, "cpu") or dtype not in (None, "float32") or engine not in ("auto", "torch"):
        return None
    folder = find_student(folder_or_name)
    manifest, config = files.read_student_manifest(folder)
    backbone = config.backbone
    if isinstance(backbone, CustomBackbone) or backbone.why_not_merged or backbone.bidirectional:
        return None
    asks_torch = (TermWeights.file_name, LearnedWords.folder_name)  # about the words of queries
    if config.interaction.head == "paper" or any((folder / name).exists() for name in asks_torch):
        return None
    merged = folder / files.BACKBONE_FOLDER
    adapter: Arrays = {}
    if merged.is_dir():
        backbone = backbone.model_copy(update={"model": str(merged), "layers": None})
    elif (folder / files.ADAPTER_FILE).is_file():
        adapter = load_arrays(folder / files.ADAPTER_FILE, remedy=files.RESTORE)
    model = LeanBert.open(backbone, merged if merged.is_dir() else folder, adapter)
    if model is None:
        return None
    arrays = load_arrays(folder / files.HEAD_FILE, remedy=files.RESTORE)
    weights = {
        part: {name: array for name, array in arrays.items() if name.startswith(part)}
        for part in ("pooling.", "interaction.")
    }
    pooling = LeanPooling(config.pooling, manifest["pooling"], model.dim, weights["pooling."])
    head = LeanHead(config.interaction, model.dim, weights["interaction."])
    if not pooling.fits or not head.fits:
        return None
    if not merged.is_dir():
        files.require_same_base(folder, manifest, model)
    return LeanStudent(folder, manifest, config, backbone=model, pooling=pooling, head=head)
