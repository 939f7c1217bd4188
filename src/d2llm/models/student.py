"""The student: backbone, pooling and interaction joined; encodes each text once and scores vectors.

Source: Liao et al., "D2LLM", ACL 2024, section 3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from d2llm.core.errors import DataFormatError, InputError, MismatchError, ModelError, ModelNotFoundError
from d2llm.core.files import new_folder
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.manifest import read_manifest, write_manifest
from d2llm.core.recipe import StudentConfig
from d2llm.core.shipped import shipped_models
from d2llm.core.types import Task, WholeText
from d2llm.models.backbone import Backbone, TextKind, TokenizedTexts
from d2llm.models.device import choose_device, choose_dtype
from d2llm.models.inference import inference
from d2llm.models.interaction import CosineHead, Interaction, make_head
from d2llm.models.late_chunking import ChunkReader, EncodedChunks, Span
from d2llm.models.pooling import TextPooling, to_sphere
from d2llm.models.scorer import HeadWeights, QueryScorer
from d2llm.models.sources import load_tensors
from d2llm.ops.batching import token_budget_batches

KIND = "student"
FORMAT_VERSION = 1
_HEAD_FILE, _ADAPTER_FILE, _BACKBONE_FOLDER = "head.safetensors", "adapter.safetensors", "backbone"
_BATCH_TOKENS, _BATCH_TEXTS = 8192, 256
# Passages that the interaction scores at a time. At width 512 in bfloat16 the activations of 512 are 512 KB, half of a
# core's own cache in today's servers.
SCORE_BLOCK = 512
_ACCELERATOR_BLOCK = 32_768
_RESTORE = "restore the student's folder"


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Vectors of n texts, the places of those cut to the length limit, and how many tokens were read."""

    vectors: Float32[np.ndarray, "texts dim"]
    truncated: tuple[int, ...]
    num_tokens: int

    @property
    def num_truncated(self) -> int:
        """How many texts lost their end."""
        return len(self.truncated)


class Student(nn.Module):
    """Backbone + PMA make one vector of each text; the IEM scores a query's vector against passages' vectors."""

    def __init__(self, config: StudentConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.pooling = TextPooling(config.pooling, backbone.dim).to(backbone.device)
            self.interaction = make_head(config.interaction, backbone.dim).to(backbone.device)
        self._saved_fingerprint: str | None = None
        self._has_merged_weights = False
        self._kept_weights: dict[Task, HeadWeights] = {}
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
    ) -> Student:
        """Load what ``save`` wrote: a folder, or the name of a student shipped with d2llm. Needs no ``peft``.

        Raises:
            ModelNotFoundError: no such folder and no shipped student of that name.
            DataFormatError: its manifest is not a student's.
            ModelError: its weights cannot be read, or do not fit its configuration.
            MismatchError: the pretrained backbone is not the one that the student was trained on.
        """
        folder = find_student(folder_or_name)
        manifest, config = _read_student_manifest(folder)
        merged = (folder / _BACKBONE_FOLDER).is_dir()
        chosen = choose_device(device)
        source = folder / _BACKBONE_FOLDER if merged else config.backbone.model
        backbone = Backbone(
            config.backbone.model_copy(update={"model": str(source), "pooling": manifest["pooling"]}),
            device=chosen,
            compute_dtype=choose_dtype(chosen, dtype),
        )
        if not merged:
            _require_same_base(folder, manifest, backbone)
            if (folder / _ADAPTER_FILE).is_file():
                backbone.load_tuned_state(load_tensors(folder / _ADAPTER_FILE, remedy=_RESTORE), merge=True)
        student = cls(config, backbone)
        head = load_tensors(folder / _HEAD_FILE, remedy=_RESTORE)
        try:
            student._load_head(head)
        except RuntimeError as error:
            raise ModelError(
                f"{folder / _HEAD_FILE} does not fit the student's configuration ({' '.join(str(error).split())}); "
                "restore the student's folder"
            ) from error
        student._saved_fingerprint = manifest["fingerprint"]
        student._has_merged_weights = merged
        return student

    def save(self, folder: Path, *, merge: bool | None = None, content: dict[str, Any] | None = None) -> None:
        """Write the student as a folder, atomically: safetensors, ``manifest.json`` and tokenizer.

        Args:
            folder: where to write; a student already there is replaced.
            merge: keep all weights of the backbone, tuning merged in, rather than the adapter beside the backbone's
                name. By default only where full tuning, or a merged copy that was loaded, leaves no adapter.
            content: what the manifest should say besides (recipe, data, figures).

        Raises:
            InputError: ``folder`` holds something else, or ``merge=False`` for a student loaded from a merged copy.
        """
        merge = self._has_merged_weights or self.config.backbone.tuning == "full" if merge is None else merge
        if self._has_merged_weights and not merge:
            raise InputError("this student was loaded from a merged copy and has no adapter; save it with merge=True")
        with new_folder(folder, kind=KIND) as temporary:
            save_file(self._head_state(), temporary / _HEAD_FILE)
            self.backbone.tokenizer.save_pretrained(temporary if not merge else temporary / _BACKBONE_FOLDER)
            if merge:
                self.backbone.model.config.save_pretrained(temporary / _BACKBONE_FOLDER)
                weights = {name: tensor.contiguous() for name, tensor in self.backbone.merged_weights().items()}
                save_file(weights, temporary / _BACKBONE_FOLDER / "model.safetensors", metadata={"format": "pt"})
            elif adapter := self.backbone.tuned_state():
                save_file(adapter, temporary / _ADAPTER_FILE)
            write_manifest(
                temporary,
                KIND,
                FORMAT_VERSION,
                {
                    **(content or {}),
                    "fingerprint": self.fingerprint,
                    "config": self.config.model_dump(),
                    "pooling": self.backbone.pooling,
                    "base_fingerprint": self.backbone.fingerprint_base(),
                },
            )

    @property
    def fingerprint(self) -> str:
        """Content hash of configuration and weights; the same for a merged and an unmerged copy."""
        if self._saved_fingerprint is not None:
            return self._saved_fingerprint
        digest = hashlib.sha256()
        for name, tensor in sorted((self._head_state() | self.backbone.tuned_state()).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        config = self.config.model_dump(mode="json")
        config["backbone"]["model"] = self.backbone.fingerprint_base()
        return fingerprint_json([config, digest.hexdigest()])

    @property
    def vector_dim(self) -> int:
        """Width of a text's vector."""
        return self.backbone.dim

    @property
    def has_anchor(self) -> bool:
        """Whether the score has an inner-product part that an index can follow (heads ``anchored`` and ``cosine``)."""
        return self.interaction.has_anchor

    def prepare_training(self, *, seed: int = 0) -> None:
        """Make trainable what the configuration says; a loaded student is trained on from its merged weights."""
        self._saved_fingerprint = None  # from here on it is another student
        self.backbone.prepare_training(seed=seed)

    def forward(self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        """Vectors [batch, dim] of tokenized texts, float32."""
        return self.pool(*self.backbone(token_ids, mask))

    def pool(self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        """Vectors [batch, dim] of the backbone's states, right-padded."""
        vectors = self.pooling(states, mask, self.backbone.pool(states, mask))
        return to_sphere(vectors) if self.config.interaction.head == "cosine" else vectors

    def encode_queries(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        """Vectors of queries; ``advance`` is called with the number of texts finished."""
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
            seen = (
                "an inner product alone" if isinstance(head, CosineHead) else f"the features '{head.config.features}'"
            )
            raise InputError(
                f"this student's head sees {seen} of a query and a passage, so its products depend on the query and "
                "nothing is gained by storing W_p b; only a head with the features 'concat' gains"
            )
        with inference(self):
            vectors = torch.from_numpy(passage_vectors).to(self.backbone.device)
            return head.project_passages(vectors).to(torch.bfloat16).cpu()

    def prepare(self, query_vector: Float32[np.ndarray, " dim"], task: Task) -> QueryScorer:
        """What scores this query with any passages; all that depends on the query alone is computed here.

        The scorer is of the weights as they are now: after training prepare another.
        """
        query = torch.from_numpy(query_vector).to(self.backbone.device)
        weights = None if isinstance(self.interaction, CosineHead) else self._scoring_weights(self.interaction, task)
        block = SCORE_BLOCK if query.device.type == "cpu" else _ACCELERATOR_BLOCK
        return QueryScorer(self.interaction, weights, query, task, block)

    def score(
        self,
        query_vector: Float32[np.ndarray, " dim"],
        passage_vectors: Float[np.ndarray, "passages dim"] | Float[Tensor, "passages dim"],
        task: Task,
    ) -> Float32[np.ndarray, " passages"]:
        """Final logits of one query against passages, by the IEM; bfloat16 tensors are scored as they are."""
        return self.prepare(query_vector, task)(passage_vectors)

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
        """A copy casts its weights itself: oneDNN's own layout can neither be copied nor pickled."""
        return {**self.__dict__, "_kept_weights": {}}

    def _scoring_weights(self, head: Interaction, task: Task) -> HeadWeights:
        kept = self._kept_weights.get(task)
        if kept is None or not kept.is_of(head, self.backbone.compute_dtype):
            with torch.inference_mode():
                kept = self._kept_weights[task] = HeadWeights(head, task, self.backbone.compute_dtype)
        return kept

    def tokenize(self, texts: Sequence[str], kind: TextKind) -> TokenizedTexts:
        """Token ids of each text, cut to the limit of its kind; cuts are counted."""
        return self.backbone.tokenize(texts, kind)

    def _encode(self, texts: Sequence[str], kind: TextKind, advance: Callable[[int], None] | None) -> EncodedTexts:
        tokenized = self.tokenize(texts, kind)
        vectors = np.empty((len(texts), self.vector_dim), dtype=np.float32)
        for batch in token_budget_batches(tokenized.lengths, max_tokens=_BATCH_TOKENS, max_items=_BATCH_TEXTS):
            with inference(self):
                encoded: Float[Tensor, "batch dim"] = self(*self.backbone.pad([tokenized.ids[i] for i in batch]))
            vectors[batch] = encoded.cpu().numpy()
            if advance is not None:
                advance(len(batch))
        return EncodedTexts(vectors, tokenized.truncated, sum(tokenized.lengths))

    def _head_state(self) -> dict[str, Tensor]:
        parts = {"pooling": self.pooling, "interaction": self.interaction}
        return {
            f"{part}.{name}": tensor.detach().cpu().contiguous()
            for part, module in parts.items()
            for name, tensor in module.state_dict().items()
        }

    def _load_head(self, state: dict[str, Tensor]) -> None:
        for part, module in (("pooling", self.pooling), ("interaction", self.interaction)):
            prefix = part + "."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def find_student(folder_or_name: str | Path) -> Path:
    """The folder of a student: what ``save`` wrote, or a student shipped with d2llm by its name.

    Raises:
        ModelNotFoundError: neither.
    """
    folder = Path(folder_or_name)
    if (folder / MANIFEST).is_file():
        return folder
    shipped = shipped_models("students")
    if str(folder_or_name) in shipped:
        return shipped[str(folder_or_name)]
    raise ModelNotFoundError(
        f"no student at '{folder_or_name}': give a folder that `d2llm distill` wrote"
        + (f", or one of the shipped students: {', '.join(shipped)}" if shipped else "")
    )


def _read_student_manifest(folder: Path) -> tuple[dict[str, Any], StudentConfig]:
    manifest = read_manifest(folder, KIND, FORMAT_VERSION)
    missing = {"config", "fingerprint", "base_fingerprint", "pooling"} - manifest.keys()
    if missing:
        raise DataFormatError(folder / MANIFEST, f"lacks {', '.join(sorted(missing))}; restore the student's folder")
    try:
        return manifest, StudentConfig.model_validate(manifest["config"])
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataFormatError(
            folder / MANIFEST, f"its configuration cannot be read ({problems}); update d2llm or restore the folder"
        ) from error


def _require_same_base(folder: Path, manifest: dict[str, Any], backbone: Backbone) -> None:
    found = backbone.fingerprint_base()
    if found != manifest["base_fingerprint"]:
        raise MismatchError(
            f"{folder}: the student was trained on backbone weights {manifest['base_fingerprint']} of "
            f"'{manifest['config']['backbone']['model']}', but here that name gives {found}; install the same weights"
        )
