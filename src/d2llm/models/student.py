"""The student: backbone, pooling and interaction joined; encodes each text once and scores vectors.

Source: Liao et al., "D2LLM", ACL 2024, section 3.2.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.core.files import new_folder
from d2llm.core.manifest import write_manifest
from d2llm.core.recipe import StudentConfig
from d2llm.core.types import EngineName, Task, WholeText
from d2llm.models import student_files as files
from d2llm.models.backbone import Backbone, EncodedTexts, TextKind, TokenizedTexts, search_query_tokens
from d2llm.models.device import choose_device, inference
from d2llm.models.engines.core_workers import map_on_cores
from d2llm.models.engines.engines import Engine, choose_engine, choose_products, open_engine
from d2llm.models.evidence import NO_EVIDENCE, EvidenceWeights, read_evidence, write_evidence
from d2llm.models.export.sentence_transformers import task_of_plain, why_not_plain, write_plain_form
from d2llm.models.hub import PushReport, fetch_student, find_student, push_student
from d2llm.models.interaction import CosineHead, Interaction, make_head
from d2llm.models.late_chunking import ChunkReader, EncodedChunks, Span
from d2llm.models.model_card import model_card
from d2llm.models.pooling import TextPooling, to_sphere
from d2llm.models.probabilities import UNCALIBRATED, read_calibration, write_calibration
from d2llm.models.scorer import HeadWeights, QueryScorer
from d2llm.models.sources import load_tensors
from d2llm.ops.batching import token_budget_batches

_BATCH_TOKENS = 8192
# On a CPU: enough for the products; what lies between two layers stays in a core's cache, and little is padded.
_CPU_BATCH_TOKENS = 512
_BATCH_TEXTS = 256
SCORE_BLOCK = 512
"""Passages that the interaction scores at a time on a CPU.

At width 512 in bfloat16 the activations of 512 are 512 KB, half of a core's own cache in today's servers.
"""
_ACCELERATOR_BLOCK = 32_768  # the same on an accelerator


class Student(nn.Module):
    """Backbone + PMA make one vector of each text; the IEM scores a query's vector against passages' vectors.

    ``calibration`` turns scores into probabilities, if it was fitted (``models.probabilities``). ``evidence`` has the
    weights of what an index adds to the scores of its passages (``models.evidence``).
    """

    def __init__(self, config: StudentConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.max_query_tokens = search_query_tokens(config.backbone)  # may be set to less
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.pooling = TextPooling(config.pooling, backbone.dim).to(backbone.device)
            self.interaction = make_head(config.interaction, backbone.dim).to(backbone.device)
        self._saved_fingerprint: str | None = None
        self._recorded: dict[str, Any] = {}
        self.calibration = UNCALIBRATED
        self.evidence = NO_EVIDENCE
        self._has_merged_weights = False
        self._kept_weights: dict[Task, HeadWeights] = {}
        self._engine: Engine | None = None
        self._products: torch.dtype | None = None
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
        """An untrained student; with the default (warm, anchored) configuration it scores as the backbone's cosine."""
        return cls(config, Backbone.load(config.backbone, device=device, dtype=dtype), seed=seed)

    @classmethod
    def load(
        cls,
        folder_or_name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        engine: EngineName = "torch",
        lean: bool = False,
    ) -> Student:
        """Load what ``save`` wrote: a folder, a student shipped with d2llm by its name, or one on the Hub.

        A name on the Hub is ``owner/name`` or ``owner/name@revision``; ``find_student`` says when it is asked.

        Args:
            folder_or_name: which student.
            device: where to compute, by default the best here.
            dtype: number format of the products, by default what is fast here.
            engine: what encodes texts (``models.engines.engines``).
            lean: load no more than encodes and scores, where the backbone allows (``models.engines.lean``): quicker.

        Raises:
            InputError: the engine cannot be used with this device or number format.
            MissingExtraError: the engine is not installed.
            ModelNotFoundError: no such folder, no shipped student of that name, and none on the Hub that can be read.
            DataFormatError: its manifest is not a student's.
            ModelError: its weights cannot be read, or do not fit its configuration.
            MismatchError: the pretrained backbone is not the one that the student was trained on.
        """
        folder = find_student(folder_or_name)
        manifest, config = files.read_student_manifest(folder)
        merged = (folder / files.BACKBONE_FOLDER).is_dir()
        engine = choose_engine(engine, device=device, dtype=dtype)
        chosen = choose_device(device if engine == "torch" else "cpu")
        products = choose_products(engine, chosen, dtype)
        source = folder / files.BACKBONE_FOLDER if merged else config.backbone.model
        backbone = Backbone(
            config.backbone.model_copy(update={"model": str(source), "pooling": manifest["pooling"]}),
            device=chosen,
            compute_dtype=products if engine == "torch" else torch.float32,  # which graphs are recorded from
            lean_tokenizer=Path(source if merged else folder) if lean and engine == "torch" else None,
        )
        if not merged:
            files.require_same_base(folder, manifest, backbone)
            if (folder / files.ADAPTER_FILE).is_file():
                backbone.load_tuned_state(load_tensors(folder / files.ADAPTER_FILE, remedy=files.RESTORE), merge=True)
        student = cls(config, backbone)
        files.load_head(folder, student._head)
        student._saved_fingerprint = manifest["fingerprint"]
        student._recorded = {name: value for name, value in manifest.items() if name != files.MERGED_HASH}
        student._has_merged_weights = merged
        student.calibration = read_calibration(folder, manifest["fingerprint"])
        student.evidence = read_evidence(folder, manifest["fingerprint"])
        student.use_engine(engine, dtype=products)
        return student

    @classmethod
    def from_pretrained(
        cls, repo_id_or_folder: str | Path, *, revision: str | None = None, token: str | None = None, **options: Any
    ) -> Student:
        """``load`` with its ``options``, the name's revision and the account's token apart (``hub.fetch_student``).

        Raises:
            InputError: a revision of a folder, which has none.
        """
        local = Path(repo_id_or_folder).is_dir()
        if local and revision is not None:
            raise InputError(f"{repo_id_or_folder}: a folder has no revisions; leave out revision='{revision}'")
        asks_hub = not local and (revision is not None or token is not None)
        found = fetch_student(str(repo_id_or_folder), revision=revision, token=token) if asks_hub else repo_id_or_folder
        return cls.load(found, **options)

    def push_to_hub(self, repo_id: str, *, merge: bool | None = None, **options: Any) -> PushReport:
        """Put the student on the Hub; ``options`` are ``hub.push_student``'s.

        ``merge`` is ``save``'s, but by default also true where plain sentence-transformers can then read the student.

        Raises:
            InputError: the repository cannot be written, or others could not load what would be there.
        """
        merge = True if merge is None and why_not_plain(self.config) is None else merge
        with TemporaryDirectory() as folder:
            self.save(Path(folder) / files.KIND, merge=merge)
            return push_student(Path(folder) / files.KIND, repo_id, **options)

    def save(self, folder: Path, *, merge: bool | None = None, content: dict[str, Any] | None = None) -> None:
        """Write the student as a folder, atomically: safetensors, ``manifest.json``, tokenizer and card.

        Args:
            folder: where to write; a student already there is replaced.
            merge: keep all weights of the backbone, tuning merged in, rather than the adapter beside the backbone's
                name. By default only where full tuning, or a merged copy that was loaded, leaves no adapter. Plain
                sentence-transformers can then read it too, unless ``why_not_plain`` says otherwise.
            content: more for the manifest (recipe, data, figures); by default, for a student that was loaded and not
                trained since, what its own manifest had.

        Raises:
            InputError: ``folder`` holds something else, or ``merge=False`` for a student loaded from a merged copy.
        """
        merge = self._has_merged_weights or self.config.backbone.tuning == "full" if merge is None else merge
        if self._has_merged_weights and not merge:
            raise InputError("this student was loaded from a merged copy and has no adapter; save it with merge=True")
        content = self._recorded if content is None else content
        with new_folder(folder, kind=files.KIND) as temporary:
            save_file(files.head_tensors(self._head), temporary / files.HEAD_FILE)
            self.backbone.tokenizer.save_pretrained(temporary if not merge else temporary / files.BACKBONE_FOLDER)
            if merge:
                self.backbone.save_merged(temporary / files.BACKBONE_FOLDER)
                if why_not_plain(self.config) is None:
                    task = task_of_plain(content)
                    write_plain_form(temporary, self.config, self.backbone.pooling, self.interaction, task)
            elif adapter := self.backbone.tuned_state():
                save_file(adapter, temporary / files.ADAPTER_FILE)
            manifest = {
                **content,
                "fingerprint": self.fingerprint,
                "config": self.config.model_dump(mode="json"),
                "pooling": self.backbone.pooling,
                "base_fingerprint": self.backbone.fingerprint_base(),
            }
            write_calibration(temporary, self.calibration)
            write_evidence(temporary, self.evidence)
            write_manifest(temporary, files.KIND, files.FORMAT_VERSION, manifest)
            (temporary / files.CARD_FILE).write_text(model_card(temporary, manifest), encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """Content hash of configuration and weights; the same for a merged and an unmerged copy."""
        if self._saved_fingerprint is not None:
            return self._saved_fingerprint
        tensors = files.head_tensors(self._head) | self.backbone.tuned_state()
        return files.fingerprint_student(self.config.model_dump(mode="json"), self.backbone.fingerprint_base(), tensors)

    @property
    def _head(self) -> dict[str, nn.Module]:
        """What a student has beside its backbone."""
        return {"pooling": self.pooling, "interaction": self.interaction}

    @property
    def vector_dim(self) -> int:
        """Width of a text's vector."""
        return self.backbone.dim

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number format of the products: those that encode a text, with any engine, and those that score."""
        return self._products or self.backbone.compute_dtype

    @property
    def batch_tokens(self) -> int:
        """Tokens, padding included, that one core or an accelerator encodes at once."""
        return _CPU_BATCH_TOKENS if self.backbone.device.type == "cpu" else _BATCH_TOKENS

    @property
    def has_anchor(self) -> bool:
        """Whether the score has an inner-product part that an index can follow (heads ``anchored`` and ``cosine``)."""
        return self.interaction.has_anchor

    def evidence_weights(self, task: Task, *, windows: bool = True) -> EvidenceWeights:
        """What an index adds to the score of its passages, by weight; nothing where the vectors' score is all.

        ``windows``: an index that stores the vectors of windows.
        """
        return self.evidence.weights(task, windows=windows)

    def prepare_training(self, *, seed: int = 0) -> None:
        """Make trainable what the configuration says; a loaded student is trained on from its merged weights."""
        # From here on it is another student: nothing recorded about the loaded one holds.
        self._saved_fingerprint = None
        self._recorded = {}
        self.calibration = UNCALIBRATED
        self.evidence = NO_EVIDENCE
        self._engine = None
        self._products = None
        self.backbone.prepare_training(seed=seed)

    def use_engine(self, name: EngineName, *, dtype: torch.dtype | None = None) -> None:
        """Let this engine encode texts from now on, of the weights as they are now; scoring stays torch's.

        ``dtype`` is the number format of the products from now on, scoring's too; by default that of the weights.

        Raises:
            InputError: the weights are not float32 on the CPU, as every engine but torch needs them.
            MissingExtraError: it is not installed.
        """
        self._engine = open_engine(self, name, dtype=dtype or self.backbone.compute_dtype)
        self._products = dtype

    def forward(self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        """Vectors [batch, dim] of tokenized texts, float32."""
        return self.pool(*self.backbone(token_ids, mask))

    def pool(self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        """Vectors [batch, dim] of the backbone's states, right-padded."""
        vectors = self.pooling(states, mask, self.backbone.pool(states, mask))
        return to_sphere(vectors) if self.config.interaction.head == "cosine" else vectors

    def encode_queries(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        """Vectors of queries, read to ``max_query_tokens``; ``advance`` is called with the number of texts finished."""
        return self._encode(texts, "query", advance)

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        """Vectors of passages (title and text as one string); ``advance`` is called with the number finished."""
        return self._encode(texts, "passage", advance)

    @property
    def chunk_reader(self) -> ChunkReader:
        """Reads long texts whole and pools parts of them (late chunking).

        Raises:
            InputError: this student's pooling or tokenizer cannot.
        """
        return ChunkReader(self.backbone, self.pooling, self.pool)

    def encode_chunks(self, texts: Iterable[tuple[WholeText, Sequence[Span]]]) -> EncodedChunks:
        """Vectors of parts of long texts, each with all of its text around it (``ChunkReader.encode``)."""
        with inference(self):
            return self.chunk_reader.encode(texts)

    def anchor_queries(
        self, query_vectors: Float32[np.ndarray, "queries dim"], task: Task = "asymmetric"
    ) -> Float32[np.ndarray, "queries dim"]:
        """The vectors whose inner product with a passage's vector is the anchor logit (anchored head only).

        Raises:
            InputError: the head is ``paper``.
        """
        with inference(self):
            queries = torch.from_numpy(query_vectors).to(self.backbone.device)
            return self.interaction.anchor_queries(queries, task).cpu().numpy()

    def passage_reach(self, passage_vectors: Float[np.ndarray, "passages dim"]) -> Float[np.ndarray, " passages"]:
        """The passages' part r_p(b) of the bound of a pair, in (0, 1]; of the passage alone (``QueryScorer.reach``)."""
        head = self.interaction
        if isinstance(head, CosineHead):
            return np.ones(len(passage_vectors), np.float32)
        with inference(self):
            return head.passage_reach(torch.from_numpy(passage_vectors).to(self.backbone.device)).cpu().numpy()

    @property
    def can_project(self) -> bool:
        """Whether ``project_passages`` saves anything: the interaction's features are ``concat``."""
        return isinstance(self.interaction, Interaction) and self.interaction.config.features == "concat"

    def project_passages(
        self, passage_vectors: Float[np.ndarray, "passages dim"]
    ) -> BFloat16[Tensor, "passages hidden"]:
        """W_p b, what the interaction's first layer makes of passages whatever the query; the same for both tasks.

        ``QueryScorer`` takes it. Summed in float32, kept as bfloat16.

        Raises:
            InputError: the head is ``cosine``, or its features have a part that depends on the query too.
        """
        head = self.interaction
        if not self.can_project or isinstance(head, CosineHead):
            if isinstance(head, CosineHead):
                visible = "an inner product alone"
            else:
                visible = f"the features '{head.config.features}'"
            raise InputError(
                f"this student's head sees {visible} of a query and a passage, so its products depend on the query and "
                "nothing is gained by storing W_p b; only a head with the features 'concat' gains"
            )
        with inference(self):
            vectors = torch.from_numpy(passage_vectors).to(self.backbone.device)
            return head.project_passages(vectors).to(torch.bfloat16).cpu()

    def prepare(
        self, query_vector: Float32[np.ndarray, " dim"], task: Task, *, interaction_weight: float | None = None
    ) -> QueryScorer:
        """What scores this query with any passages; all that depends on the query alone is computed here.

        The scorer is of the weights as they are now: after training prepare another. ``interaction_weight`` is the
        weight r of the interaction, by default the student's own for the task.
        """
        query = torch.from_numpy(query_vector).to(self.backbone.device)
        weights = None if isinstance(self.interaction, CosineHead) else self._scoring_weights(self.interaction, task)
        block = SCORE_BLOCK if query.device.type == "cpu" else _ACCELERATOR_BLOCK
        return QueryScorer(self.interaction, weights, query, task, block, interaction_weight=interaction_weight)

    def score(
        self,
        query_vector: Float32[np.ndarray, " dim"],
        passage_vectors: Float[np.ndarray, "passages dim"] | Float[Tensor, "passages dim"],
        task: Task,
        *,
        interaction_weight: float | None = None,
    ) -> Float32[np.ndarray, " passages"]:
        """Final logits of one query against passages, by the IEM; bfloat16 tensors are scored as they are.

        ``interaction_weight`` is the weight r of the interaction, by default the student's own for the task.
        """
        return self.prepare(query_vector, task, interaction_weight=interaction_weight)(passage_vectors)

    def score_many(
        self,
        query_vectors: Float32[np.ndarray, "queries dim"],
        passage_vectors: Float[np.ndarray, "passages dim"] | Float[Tensor, "passages dim"],
        task: Task,
    ) -> Float32[np.ndarray, "queries passages"]:
        """Final logits of every query against the same passages, one query after the other.

        Queries could share only the product W_p b of the features ``concat``, one of three.
        """
        scores = [self.prepare(query, task)(passage_vectors) for query in query_vectors]
        return np.stack(scores) if scores else np.empty((0, len(passage_vectors)), np.float32)

    def __getstate__(self) -> dict[str, Any]:
        """A copy casts its weights itself and encodes with torch: what is compiled cannot be copied."""
        return {**self.__dict__, "_kept_weights": {}, "_engine": None, "_products": None}

    def _scoring_weights(self, head: Interaction, task: Task) -> HeadWeights:
        kept = self._kept_weights.get(task)
        if kept is None or not kept.is_of(head, self.compute_dtype):
            with torch.inference_mode():
                kept = self._kept_weights[task] = HeadWeights(head, task, self.compute_dtype)
        return kept

    def tokenize(self, texts: Sequence[str], kind: TextKind) -> TokenizedTexts:
        """Token ids of each text as a search reads it, cut to the limit of its kind; cuts are counted."""
        return self.backbone.tokenize(texts, kind, limit=self.max_query_tokens if kind == "query" else None)

    def encode_tokens(self, ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "batch dim"]:
        """Vectors of texts that ``tokenize`` read, as one batch; best of like length (``batch_tokens``)."""
        if self._engine is not None:
            return self._engine(ids)
        with inference(self):
            return self(*self.backbone.pad(ids)).cpu().numpy()

    def _encode(self, texts: Sequence[str], kind: TextKind, advance: Callable[[int], None] | None) -> EncodedTexts:
        tokenized = self.tokenize(texts, kind)
        vectors = np.empty((len(texts), self.vector_dim), dtype=np.float32)
        over_batches = map_on_cores if self.backbone.device.type == "cpu" else map
        batches = list(token_budget_batches(tokenized.lengths, max_tokens=self.batch_tokens, max_items=_BATCH_TEXTS))

        def read(batch: list[int]) -> Float32[np.ndarray, "batch dim"]:
            return self.encode_tokens([tokenized.ids[index] for index in batch])

        with inference(self):
            for batch, encoded in zip(batches, over_batches(read, batches), strict=True):
                vectors[batch] = encoded
                if advance is not None:
                    advance(len(batch))
        return EncodedTexts(vectors, tokenized.truncated, sum(tokenized.lengths), tuple(tokenized.lengths))


def merge_student(folder: Path, copy: Path) -> None:
    """Write the student in ``folder`` to ``copy`` with all weights of its backbone, in float32.

    Everything else in the folder goes along: what the manifest records, the card, a licence.

    Raises:
        D2LLMError: the student cannot be loaded (``Student.load``).
    """
    Student.load(folder, device="cpu", dtype="float32").save(copy, merge=True)
    for path in folder.iterdir():
        is_written = any((copy / part / path.name).exists() for part in ("", files.BACKBONE_FOLDER))
        if path.suffix == ".md" or (path.is_file() and path.name != files.ADAPTER_FILE and not is_written):
            shutil.copyfile(path, copy / path.name)
