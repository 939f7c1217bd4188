"""The student: backbone, pooling and interaction combined; encodes each text once and scores vectors.

Source: Liao et al., "D2LLM", ACL 2024, section 3.2.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from d2llm.core.errors import InputError
from d2llm.core.files import new_folder, write_json
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.inputs import check_count, pairs_of, path_of, strings_of, texts_of
from d2llm.core.manifest import source_of, write_manifest
from d2llm.core.types import PART_KINDS, TASKS, EngineName, PartKind, RankedPassage, Ranking, Task
from d2llm.data.python_records import PassageLike, QueryLike, one_query_of, passages_of
from d2llm.models import student_files as files
from d2llm.models.backbone import Backbone, open_backbone
from d2llm.models.device import checkpoint_layers, choose_device
from d2llm.models.document_expansion import DocumentExpansion, LearnedWords
from d2llm.models.engines.engines import choose_engine, choose_products
from d2llm.models.export.sentence_transformers import (
    base_of_adapter,
    task_of_plain,
    why_not_plain,
    write_plain_form,
)
from d2llm.models.fitted_part import PassageQuality, TermWeights, Widths
from d2llm.models.hub import PushReport, fetch_student, find_student, push_student
from d2llm.models.interaction import Interaction, make_head
from d2llm.models.lora import peft_config, with_peft_names, with_plain_names
from d2llm.models.model_card import model_card
from d2llm.models.pooling import make_pooling, with_gated, without_gated
from d2llm.models.probabilities import ProbabilityCalibration
from d2llm.models.score_features import FeatureWeights, ScoreFeatures
from d2llm.models.sources import load_tensors
from d2llm.models.student_encoder import StudentEncoder
from d2llm.models.text_scores import ScoringIndex, TextScorer
from d2llm.models.token_vectors import TokenProjection
from d2llm.ops.selection import check_scores, ids_at, top_rows
from d2llm.recipe import StudentConfig

_FITTED_PARTS = {
    "calibration": ProbabilityCalibration,
    "score_features": ScoreFeatures,
    "token_projection": TokenProjection,
    "term_weights": TermWeights,
    "document_expansion": DocumentExpansion,
    "quality": PassageQuality,
}
"""What is fitted to a student after its training, by attribute."""


class Student(StudentEncoder):
    """A model that encodes queries and passages separately, and scores pairs of them from what it encoded.

    A backbone and its pooling (PMA is pooling by multihead attention) make one vector for each text. The score is their
    inner product and what the interaction emulation module (IEM), a small network on both vectors, adds to it.

    Attributes:
        source: folder or name from which it can be loaded again; None if there is none.
        score_features: weights of the score features that an index adds (``models.score_features``).
        calibration: turns scores into probabilities (``models.probabilities``).
        token_projection: makes token embeddings (``models.token_vectors``).
        term_weights: how much each word of a query counts in BM25 (``models.fitted_part``).
        document_expansion: words that an index adds to a passage (``models.document_expansion``, ``learned_words``).
        quality: how likely a passage is to answer any query (``models.fitted_part``).

    Each of the last five is missing or empty if it was not fitted.

    Example:
        >>> from d2llm import Student
        >>> student = Student.load("d2llm-minilm", device="cpu")
        >>> student.encode_query("what do bees make?").shape
        (384,)
        >>> student.rank("what do bees make?", ["Tea is hot.", "Bees make honey."])[0].passage.text
        'Bees make honey.'
    """

    def __init__(self, config: StudentConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.pooling = make_pooling(config.pooling, backbone).to(backbone.device)
            self.interaction = make_head(config.interaction, self.pooling.dim).to(backbone.device)
        self.source: str | None = None
        self._saved_fingerprint: str | None = None
        self._recorded: dict[str, Any] = {}
        self._forget_fitted()
        self._has_merged_weights = False
        self.eval()

    @classmethod
    def create(
        cls,
        config: StudentConfig,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        seed: int = 0,
    ) -> Student:
        """An untrained student; with the default (warm, dot) configuration it scores as the backbone's cosine."""
        return cls(config, Backbone.load(config.backbone, config.pooling, device=device, dtype=dtype), seed=seed)

    @classmethod
    def load(
        cls,
        folder_or_name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        engine: EngineName = "torch",
    ) -> Student:
        """Load a student that ``save`` wrote: a folder, the name of one shipped with d2llm, or a name on the Hub.

        A name on the Hub is ``owner/name`` or ``owner/name@revision``; ``find_student`` says when the Hub is contacted.

        Args:
            folder_or_name: which student.
            device: device to run on; by default the fastest here.
            dtype: number format of the products; by default the fastest here.
            engine: engine that encodes texts (``models.engines.engines``).

        Raises:
            InputError: the engine cannot be used with this device or number format.
            MissingExtraError: the engine is not installed.
            ModelNotFoundError: no such folder, no shipped student of that name, and none that can be read on the Hub.
            DataFormatError: the manifest is not that of a student.
            ModelError: the weights cannot be read, or do not fit the configuration.
            MismatchError: the pretrained backbone is not the one that the student was trained on.
        """
        folder = find_student(folder_or_name)
        manifest, config = files.read_student_manifest(folder)
        merged = (folder / files.BACKBONE_FOLDER).is_dir()
        planned = choose_engine(engine, config, device=device, dtype=dtype)
        chosen = choose_device(device if planned == "torch" else "cpu")
        products = choose_products(planned, chosen, dtype)
        source = folder / files.BACKBONE_FOLDER if merged else config.backbone.model
        cut: dict[str, Any] = {"layers": None} if merged else {}  # merged weights are those of the kept layers only
        backbone = open_backbone(
            config.backbone.model_copy(update={"model": str(source)} | cut),
            config.pooling,
            device=chosen,
            compute_dtype=products if planned == "torch" else torch.float32,  # which the export to a graph requires
            auto_pooling=manifest["pooling"],
            student=folder,
        )
        if not merged:
            files.require_same_base(folder, manifest, backbone)
            if (folder / files.ADAPTER_FILE).is_file():
                adapter = load_tensors(folder / files.ADAPTER_FILE, remedy=files.RESTORE)
                backbone.load_tuned_state(with_plain_names(adapter), merge=True)
        student = cls(config, backbone)
        files.load_head(folder, student._head)
        student._saved_fingerprint = manifest["fingerprint"]
        student._recorded = manifest
        student._has_merged_weights = merged
        for name, part in _FITTED_PARTS.items():
            read = part.read(folder, manifest["fingerprint"], Widths(student.vector_dim, backbone.dim))
            if read is not None:
                setattr(student, name, read)
        if (words := folder / LearnedWords.folder_name).is_dir():
            student.document_expansion = LearnedWords(cls.load(words, device=device, dtype=dtype))
        if student.token_projection is not None:
            student.token_projection.to(chosen)
        student.use_engine("torch" if planned == "torch" else engine, dtype=products)
        student.source = source_of(folder_or_name)
        return student

    @classmethod
    def from_pretrained(
        cls, repo_id_or_folder: str | Path, *, revision: str | None = None, token: str | None = None, **options: Any
    ) -> Student:
        """``load`` with separate arguments for the revision and the account's token (see ``hub.fetch_student``).

        ``options`` are those of ``load``.

        Raises:
            InputError: a revision is given for a folder, which has none.
        """
        local = Path(repo_id_or_folder).is_dir()
        if local and revision is not None:
            raise InputError(f"{repo_id_or_folder}: a folder has no revisions; leave out revision='{revision}'")
        source = repo_id_or_folder
        if not local and (revision is not None or token is not None):
            source = fetch_student(str(repo_id_or_folder), revision=revision, token=token)
        student = cls.load(source, **options)
        if not local:
            student.source = str(repo_id_or_folder) if revision is None else f"{repo_id_or_folder}@{revision}"
        return student

    def push_to_hub(self, repo_id: str, *, merge: bool | None = None, **options: Any) -> PushReport:
        """Push the student to the Hub; ``options`` as for ``hub.push_student``.

        ``merge`` is as for ``save``, but defaults to true if plain sentence-transformers can load a merged copy.

        Raises:
            InputError: the repository cannot be written, or others could not load the pushed student.
        """
        merge = True if merge is None and why_not_plain(self.config) is None else merge
        source = self.source
        with TemporaryDirectory() as folder:
            try:
                self.save(Path(folder) / files.KIND, merge=merge)
            finally:
                self.source = source
            return push_student(Path(folder) / files.KIND, repo_id, **options)

    def save(self, folder: str | Path, *, merge: bool | None = None, content: dict[str, Any] | None = None) -> None:
        """Write the student as a folder, atomically: safetensors, ``manifest.json``, tokenizer and card.

        Args:
            folder: where to write; a student already there is replaced.
            merge: write all weights of the backbone, with tuning merged, instead of the adapter and the backbone's
                name. By default only if there is no adapter, because of full tuning or because the student was loaded
                from a merged copy. Plain sentence-transformers can read a merged copy, unless ``why_not_plain`` says
                otherwise; and one with an adapter, if the Hub has the backbone's weights (``base_of_adapter``).
            content: additional fields for the manifest (recipe, data, figures); by default those of the manifest that
                the student was loaded from, if it was not trained since.

        Raises:
            InputError: ``folder`` holds something else, or ``merge=False`` for a student loaded from a merged copy.
        """
        merge = self._has_merged_weights or self.backbone.is_saved_whole if merge is None else merge
        if self._has_merged_weights and not merge:
            raise InputError("this student was loaded from a merged copy and has no adapter; save it with merge=True")
        content = self._recorded if content is None else content
        with new_folder(path_of(folder, "folder"), kind=files.KIND) as temporary:
            save_file(files.head_tensors(self._head), temporary / files.HEAD_FILE)
            self.backbone.tokenizer.save_pretrained(temporary if not merge else temporary / files.BACKBONE_FOLDER)
            if merge:
                self.backbone.save_merged(temporary / files.BACKBONE_FOLDER)
            elif adapter := self.backbone.tuned_state():
                save_file(with_peft_names(adapter), temporary / files.ADAPTER_FILE)
                if (base := base_of_adapter(self.config)) is not None:
                    write_json(temporary / files.ADAPTER_CONFIG_FILE, peft_config(adapter, base))
            if merge or (temporary / files.ADAPTER_CONFIG_FILE).is_file():
                task = task_of_plain(content)
                write_plain_form(temporary, self.config, self.backbone.own_pooling.kind, self.interaction, task)
            manifest = {
                **content,
                "fingerprint": self.fingerprint,
                "config": self.config.model_dump(mode="json"),
                "pooling": self.backbone.own_pooling.kind,
                "base_fingerprint": self.backbone.fingerprint_base(),
            }
            manifest[files.CONTENT_HASH] = files.content_sha256(temporary, manifest)
            for name in _FITTED_PARTS:
                if part := getattr(self, name):
                    part.write(temporary, self.fingerprint)
            manifest[files.FILES] = files.saved_files(temporary)
            write_manifest(temporary, files.KIND, files.FORMAT_VERSION, manifest)
            (temporary / files.CARD_FILE).write_text(model_card(temporary, manifest), encoding="utf-8")
        self.source = source_of(folder)

    def __repr__(self) -> str:
        """What it is, in one line; ``print(student.backbone)`` and so on show its modules."""
        named = self.source or "not saved"
        tasks = f"trained for {' and '.join(self.trained_tasks)} search" if self.trained_tasks else "not trained"
        model = self.config.backbone.model
        name = Path(model).name if Path(model).is_absolute() else model
        return f"Student({named}, backbone {name}, {self.vector_dim} dimensions, {tasks}, on {self.device})"

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and weights, computed when it is first saved; the same for a merged copy."""
        if self._saved_fingerprint is not None:
            return self._saved_fingerprint
        tensors = files.head_tensors(self._head) | self.backbone.tuned_state()
        return files.fingerprint_student(self.config.model_dump(mode="json"), self.backbone.fingerprint_base(), tensors)

    @property
    def _head(self) -> dict[str, nn.Module]:
        """The student's parts other than its backbone."""
        return {"pooling": self.pooling, "interaction": self.interaction}

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        """Tasks of its training data; empty if untrained."""
        return files.trained_tasks(self._recorded)

    @property
    def nested_dims(self) -> tuple[int, ...]:
        """Smaller widths that the vectors may be cut to, as they were trained (``losses.nested_cross_entropy``)."""
        return tuple(self._recorded.get("nested_dims", ()))

    @property
    def nested_depths(self) -> tuple[int, ...]:
        """Numbers of layers to which ``cut`` may reduce the backbone (``losses.nested_cross_entropy``)."""
        return tuple(self._recorded.get("nested_depths", ()))

    def cut(self, depth: int) -> Student:
        """A smaller and faster copy, whose backbone has only its first ``depth`` layers.

        It scores by the inner product alone (r = 0), without score features, token embeddings, probabilities, quality,
        weights of words and added words, because all these were fitted to what comes after all layers. ``d2llm
        fit-scores`` fits all but the token embeddings again.

        Raises:
            InputError: the student was not trained for this depth.
        """
        if depth not in self.nested_depths:
            depths = " or ".join(map(str, self.nested_depths))
            remedy = f"cut it to {depths}" if depths else "train one with losses.nested_cross_entropy.layers"
            raise InputError(f"this student was not trained to be cut to {depth} layers; {remedy}")
        layers = self.config.backbone.layers
        kept = layers[:depth] if isinstance(layers, tuple) else depth
        recorded = {name: value for name, value in self._recorded.items() if name in ("recipe", "tasks", "nested_dims")}
        if shallower := [shallow for shallow in self.nested_depths if shallow < depth]:
            recorded["nested_depths"] = shallower
        student = self.changed_copy(depth, recorded | {"cut_from": self.fingerprint})
        student.backbone.cut(depth)
        backbone = self.config.backbone.model_copy(update={"layers": kept})
        student.config = self.config.model_copy(update={"backbone": backbone})
        if isinstance(student.interaction, Interaction) and student.interaction.has_dot:
            for task in student.interaction.config.tasks:
                student.interaction.interaction_weight(task).zero_()
        return student

    def changed_copy(self, change: Any, recorded: dict[str, Any] | None, *, merged: bool = False) -> Student:
        """A copy whose weights the caller changes.

        Args:
            change: JSON that tells the change from others; the copy's fingerprint depends on it.
            recorded: what the copy's manifest is to have beside the usual fields, without what was fitted to this
                student's scores. None, if vectors stay the same: as here, with it.
            merged: the copy is saved with all weights of its backbone, because its change is no adapter.

        Raises:
            InputError: the student encodes with another engine than torch, or ``merged`` and it has no one set of
                weights (``BackboneConfig.why_not_merged``).
        """
        if self._engine is not None:
            raise InputError("the weights of a compiled student cannot be changed; load it with engine='torch'")
        if merged:
            self.backbone.require_merged("a student with other weights")
        student = copy.deepcopy(self)
        student.source = None
        student._has_merged_weights |= merged
        # Merged weights have no adapter to compute a fingerprint from.
        key = fingerprint_json([self.fingerprint, change]) if student._has_merged_weights else None
        student._saved_fingerprint = key
        if recorded is not None:
            student._recorded = recorded
            student._forget_fitted()
        return student

    def drop_idle_parts(self) -> tuple[str, ...]:
        """Remove the parts that add nothing to any vector or score, so that a saved folder does not have them.

        These are PMA beside another pooling with a gate of 0, the interaction of each task in which its
        weight r is 0 or its output is 0 for all pairs, and gates of the bound that are the same for all texts. Vectors
        and scores stay the same up to rounding, and everything that was fitted to them remains; the fingerprint is
        another one, because the configuration is. A student without PMA can be loaded by plain sentence-transformers
        (``save`` with ``merge=True``). Returns what was removed, in words.

        Raises:
            InputError: the student encodes with another engine than torch.
        """
        if self._engine is not None:
            raise InputError("the parts of a compiled student cannot be removed; load it with engine='torch'")
        before = self.fingerprint
        dropped: list[str] = []
        gated = self.pooling.gated
        if gated is not None and gated.gate is not None and not float(gated.gate.detach()):
            dropped.append("PMA")
            self.pooling = without_gated(self.pooling)
            self.config = self.config.model_copy(update={"pooling": self.config.pooling.without_gated()})
        if isinstance(self.interaction, Interaction):
            dropped += self.interaction.drop_idle()
            self.config = self.config.model_copy(update={"interaction": self.interaction.config})
        if not dropped:
            return ()
        self._kept_weights = {}
        self.source = None
        # Merged weights have no adapter to compute a fingerprint from.
        self._saved_fingerprint = fingerprint_json([before, dropped]) if self._has_merged_weights else None
        self._recorded |= {"reduced_from": before}
        return tuple(dropped)

    def add_missing_parts(self, config: StudentConfig, *, seed: int = 0) -> None:
        """Add the parts of ``config`` that ``drop_idle_parts`` removes and that this student lacks, untrained.

        They add nothing until they are trained: PMA with a gate of 0, interactions whose output is constant. Gates of
        the bound are open, and the bound is as much larger.
        """
        current, wanted = self.config, config
        pooling = wanted.pooling if wanted.pooling.without_gated() == current.pooling else current.pooling
        interaction = current.interaction
        if interaction.head == wanted.interaction.head == "dot":
            tasks = {*interaction.tasks, *wanted.interaction.tasks}
            update = {"tasks": tuple(task for task in TASKS if task in tasks)}
            update |= {"gates": interaction.gates or wanted.interaction.gates}
            interaction = interaction.model_copy(update=update)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if pooling != current.pooling:
                self.pooling = with_gated(self.pooling, make_pooling(pooling, self.backbone).to(self.device))
            if isinstance(self.interaction, Interaction) and interaction != current.interaction:
                self.interaction = self.interaction.extended(interaction)
        self.config = current.model_copy(update={"pooling": pooling, "interaction": interaction})
        self._kept_weights = {}

    def feature_weights(self, task: Task, *, stored: Collection[PartKind] | PartKind = PART_KINDS) -> FeatureWeights:
        """The weights of the terms that an index adds to the score of the vectors; empty if it adds none.

        ``stored`` are the parts of passages whose vectors the index has.
        """
        kinds = cast("list[PartKind]", strings_of(stored, "stored"))
        return self.score_features.weights(task, stored=kinds)

    def prepare_training(self, *, backbone: bool = True, gradient_checkpointing: bool = False, seed: int = 0) -> None:
        """Make trainable what the configuration says; a loaded student continues from its merged weights.

        Without ``backbone``, only pooling and interaction are, and the backbone stays as it was tuned. With
        ``gradient_checkpointing``, the backward pass computes each layer again instead of keeping its activations.

        Raises:
            ModelError: the backbone has no layers that can be computed again.
        """
        # Training makes it another student, so nothing recorded about the loaded one remains valid.
        self.source = None
        self._saved_fingerprint = None
        self._recorded = {}
        self._forget_fitted()
        self._engine = None
        self._products = None
        if backbone:
            self.backbone.prepare_training(seed=seed)
        if backbone and gradient_checkpointing:
            checkpoint_layers(self.backbone, self.config.backbone.model)

    def _forget_fitted(self) -> None:
        """Drop everything that was fitted to this student, for a student whose vectors and scores are others."""
        self.calibration = ProbabilityCalibration()
        self.score_features = ScoreFeatures()
        self.token_projection: TokenProjection | None = None
        self.quality: PassageQuality | None = None
        self.term_weights: TermWeights | None = None
        self.document_expansion: DocumentExpansion | LearnedWords | None = None

    def fit_pooling(self, passages: Sequence[str]) -> None:
        """Fit what ``pooling`` takes from passages (whitening, projection) before training, if it takes anything.

        Args:
            passages: typical ones, some ten times as many as vectors have dimensions.

        Raises:
            InputError: this student was trained already, or there are too few passages.
        """
        passages = texts_of(passages, "passages")
        pooling = self.pooling
        fitted = [stage for stage in pooling.stages if stage.is_fitted_to_passages]
        if fitted and self._saved_fingerprint is not None:
            raise InputError("this student was loaded, and its vectors would change; fit the pooling of a new student")
        try:
            for stage in reversed(fitted):
                if stage.inner is not None:
                    self.pooling = stage.inner
                stage.fit_texts(passages, self.encode_passages)
        finally:
            self.pooling = pooling

    def rank(
        self,
        query: QueryLike,
        passages: Iterable[PassageLike | str] | PassageLike | str,
        *,
        top_k: int | None = None,
        index: ScoringIndex | None = None,
        task: Task | None = None,
        instruction: str | None = None,
    ) -> Ranking:
        """Rank passages for a query without putting them into an index; best first.

        The score, a logit, is the one that the passages would have in an index: of vectors, words, token embeddings and
        interaction, whichever the student counts (``score_features``). How rare words are is known from ``index`` or,
        without one, from tables that ship with d2llm (``store.background_words``).

        Args:
            query: a text, a ``Query``, or a dictionary with ``text``.
            passages: texts, whose ids are their numbers from 1; or passages, dictionaries, rows, or a table.
            top_k: how many to return; by default all.
            index: an ``Index`` that this student made; the scores are those of its searches.
            task: by default that of the index, else the one that the student was trained for, or asymmetric.
            instruction: put before the query in place of ``backbone.query_prefix``.

        Raises:
            InputError: there is not exactly one query, something is no passage, or ``top_k`` is below 1.
            IndexMismatchError: another student made the index.
            ModelError: a score is NaN.

        Example:
            >>> from d2llm import Student
            >>> student = Student.load("d2llm-minilm", device="cpu")
            >>> ranking = student.rank("what do bees make?", ["Green tea needs hot water.", "Bees make honey."])
            >>> [result.passage.text for result in ranking]
            ['Bees make honey.', 'Green tea needs hot water.']
            >>> student.rank("what do bees make?", ["Tea is hot.", "Bees make honey."], top_k=1)[0].passage.id
            '2'
        """
        check_count(top_k, "top_k", optional=True)
        asked = one_query_of(query, "a ranking")
        given = list(passages_of(passages, texts=True))
        scorer = TextScorer.of(self, index, task)
        begin = time.perf_counter()
        (read_query,), read = scorer.read_queries([asked.text], instruction=instruction)
        texts = scorer.read_texts([passage.full_text for passage in given])
        self._warn_of_cut(len(texts.encoded.truncated), len(given))
        encoded = time.perf_counter()
        scores = check_scores(scorer.score(read_query, texts), asked.id)
        order = top_rows(scores, top_k or len(given), partial(ids_at, [passage.id for passage in given]))
        results = tuple(
            RankedPassage(rank, given[row], float(scores[row])) for rank, row in enumerate(order.tolist(), start=1)
        )
        seconds = {"encode": encoded - begin, "score": time.perf_counter() - encoded}
        return Ranking(asked, results, len(given), seconds, truncated=bool(len(read.truncated)))

    def predict(
        self,
        pairs: Iterable[tuple[str, str]] | tuple[str, str],
        *,
        index: ScoringIndex | None = None,
        task: Task | None = None,
        with_features: bool = True,
    ) -> NDArray[np.float32]:
        """The scores [n] of pairs (query, passage) of texts, or of one pair, as in ``rank``.

        Each distinct text is read once.

        Texts longer than the student reads are cut, and the log says how many.

        Words and token embeddings order the passages of one query; how much they add depends on the query. To tell
        pairs of different queries apart, such as paraphrases from other pairs, the vectors alone are often better:
        ``with_features=False``.

        Raises:
            InputError: something is not a pair of texts.
            IndexMismatchError: another student made the index.
            ModelError: a score is NaN.

        Example:
            >>> from d2llm import Student
            >>> student = Student.load("d2llm-minilm", device="cpu")
            >>> honey, tea = student.predict([("what do bees make?", text) for text in ("Honey.", "Tea is hot.")])
            >>> bool(honey > tea)
            True
        """
        is_one = isinstance(pairs, tuple) and all(isinstance(part, str) for part in pairs)
        checked = pairs_of(cast("Any", [pairs] if is_one else pairs), "pairs")
        read = TextScorer.of(self, index, task).read_pairs(checked)
        self._warn_of_cut(read.num_truncated, len(read.queries) + len(read.texts))
        return check_scores(read.scores(with_features=with_features)).astype(np.float32)


def merge_student(folder: Path, copy: Path) -> None:
    """Write the student in ``folder`` to ``copy`` with all weights of its backbone, in float32.

    Everything else in the folder is copied too: the fields of the manifest, the card, a licence.

    Raises:
        D2LLMError: the student cannot be loaded (``Student.load``).
    """
    Student.load(folder, device="cpu", dtype="float32").save(copy, merge=True)
    for path in folder.iterdir():
        is_written = any((copy / part / path.name).exists() for part in ("", files.BACKBONE_FOLDER))
        if path.suffix == ".md" or (path.is_file() and path.name not in files.ADAPTER_FILES and not is_written):
            shutil.copyfile(path, copy / path.name)
