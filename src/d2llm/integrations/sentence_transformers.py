"""A student as a ``SentenceTransformer`` (its vectors), and its full score as a ``CrossEncoder``.

``StudentWithTokens`` is the other way round: a ``MultiVectorEncoder`` makes the token embeddings of an index.

A saved model is a normal sentence-transformers folder. Its first module is a class of this package, which the library
imports only with ``SentenceTransformer(folder, trust_remote_code=True)``. No code is loaded from the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.progress import showing_progress
from d2llm.core.types import PART_KINDS, PartKind, ScoreFeature, Task
from d2llm.integrations.texts import rank_texts, require_dot, require_texts, task_of
from d2llm.models.protocols import PairScorer, task_for
from d2llm.models.score_features import FeatureWeights
from d2llm.models.student import Student
from d2llm.models.tokens import EncodedTexts, TextKind, TokenVectors
from d2llm.retrieval.cosine import ForwardingStudent
from d2llm.retrieval.index import Index

require("sentence_transformers", extra="sentence-transformers", purpose="a student in sentence-transformers")

from sentence_transformers import CrossEncoderModelCardData, MultiVectorEncoder, SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import InputModule  # noqa: E402

_log = logging.getLogger(__name__)
_STUDENT_FOLDER = "student"


class _QueryPrompt(str):
    """The prompt named "query": it says that the texts are queries, even if it has no letters."""

    __slots__ = ()


class StudentModule(InputModule):
    """Backbone, pooling (PMA) and the inner product's side of queries, as one module of a ``SentenceTransformer``.

    ``encode_query`` returns ``Student.query_vectors``, as does ``encode`` with the prompt named "query"; everything
    else is encoded as a passage.

    Args:
        student: the student that encodes.
        task: the branch of the head that queries are encoded for; by default what the student was trained for.

    Raises:
        InputError: the student's head has no inner product, or it encodes texts with another engine than torch.
    """

    save_in_root = False
    config_keys: list[str] = ["task"]  # noqa: RUF012 - as the library declares it

    def __init__(self, student: Student, task: Task | None = None) -> None:
        super().__init__()
        require_dot(student)
        if student.engine != "torch":
            raise InputError("sentence-transformers computes in torch; load the student with engine='torch'")
        self.student = student
        self.task: Task = task_for(student, task)
        self.tokenizer = student.backbone.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Maximum number of tokens of a passage; longer passages are truncated, with a warning in the log."""
        return self.student.config.backbone.max_passage_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if value != self.max_seq_length:
            raise InputError(
                f"a student reads at most {self.max_seq_length} tokens of a passage, as it was trained; shorten the "
                "texts instead of setting max_seq_length"
            )

    def get_embedding_dimension(self) -> int:
        """Width of a text's vector."""
        return self.student.vector_dim

    def on_model_ready(self, model: Any) -> None:
        """Let the model's prompt for queries say what it is for."""
        model.prompts["query"] = _QueryPrompt(model.prompts.get("query") or "")

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Token ids of prompt (None: the student's own prefix) and text, truncated to the limit for their kind.

        The texts are queries if ``task`` is "query", or without a ``task`` if the prompt is that of queries.

        Raises:
            InputError: something is not a text, or there are other options or tasks.
        """
        require_texts(inputs)
        _refuse_given(options, "which has its own tokenizer")
        if task not in (None, "query", "document"):
            raise InputError(f"task is {task!r}; use 'query' or 'document', or leave it out")
        kind = "query" if task == "query" or (task is None and self._is_for_queries(prompt)) else "passage"
        limit = self.student.max_query_tokens if kind == "query" else None
        tokenized = self.student.backbone.tokenize(inputs, kind, prefix=prompt, limit=limit)
        if tokenized.num_truncated:
            _log.warning(
                "%d of %d texts were too long and were read in part", tokenized.num_truncated, len(tokenized.ids)
            )
        ids, mask = self.student.backbone.pad(tokenized.ids)
        return {"input_ids": ids, "attention_mask": mask, "is_query": kind == "query"}

    def _is_for_queries(self, prompt: str | None) -> bool:
        backbone = self.student.config.backbone
        is_prefix = prompt == backbone.query_prefix and prompt != backbone.passage_prefix
        return isinstance(prompt, _QueryPrompt) or is_prefix

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StudentModule:
        """Change weights as ``half()`` and ``to()`` ask; of the head, only where it is: it computes in float32."""

        def moved(weight: Tensor) -> Tensor:
            changed = fn(weight)
            return weight.to(changed.device) if weight.is_floating_point() else changed

        for name, part in self.student.named_children():
            part._apply(fn if name == "backbone" else moved, recurse)
        return self

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002 - the interface's
        """Add the vectors [texts, dim] as ``sentence_embedding``, and the token states as ``token_embeddings``."""
        states, mask = self.student.backbone(features["input_ids"], features["attention_mask"])
        vectors: Tensor = self.student.pool(states, mask)
        if features["is_query"]:
            vectors = self.student.interaction.query_vectors(vectors, self.task)
        return {**features, "token_embeddings": states, "attention_mask": mask, "sentence_embedding": vectors}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the student with all its weights, always as safetensors, and the task."""
        self.student.save(Path(output_path) / _STUDENT_FOLDER, merge=True)
        self.save_config(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,  # noqa: ARG003 - part of the interface
        **kwargs: Any,
    ) -> StudentModule:
        """Load what ``save`` wrote; of ``model_kwargs``, there is ``dtype`` alone (or ``torch_dtype``, its older name).

        Raises:
            ModelNotFoundError: there is no student.
            InputError: other options were given, or another ``backend``.
        """
        backend = kwargs.get("backend") or "torch"
        if backend != "torch":
            raise InputError(
                f"backend is {backend!r}, but a student in sentence-transformers runs in torch alone; leave it out, or "
                f"use d2llm itself: Student.load(..., engine={backend!r})"
            )
        options = dict(kwargs.get("model_kwargs") or {})
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        options.pop("torch_dtype", None)
        for name in ("processor_kwargs", "config_kwargs"):
            options |= kwargs.get(name) or {}
        _refuse_given(options, "of whose loading only dtype can be chosen")
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        config = cls.load_config(model_name_or_path, **where)
        folder = Path(cls.load_dir_path(model_name_or_path, **where) or model_name_or_path)
        return cls(Student.load(folder / _STUDENT_FOLDER, dtype=None if dtype == "auto" else dtype), **config)


def as_sentence_transformer(student: Student, *, task: Task | None = None) -> SentenceTransformer:
    """A student as a model of sentence-transformers, whose similarity of query and passage is that of the score.

    Use ``encode_query`` (or ``encode`` with ``prompt_name="query"``) for queries and ``encode_document`` for passages;
    plain ``encode`` encodes passages. ``half()`` and ``to()`` change the backbone; the head computes in float32. The
    interaction is not used; ``StudentCrossEncoder`` uses it.

    Args:
        student: the student; the model shares its weights.
        task: the branch of the head; by default that of what the student was trained for.

    Raises:
        InputError: the student's head has no inner product, or it encodes texts with another engine than torch.
    """
    backbone = student.config.backbone
    return SentenceTransformer(
        modules=[StudentModule(student, task)],
        device=str(student.backbone.device),
        prompts={"query": backbone.query_prefix, "document": backbone.passage_prefix},
        similarity_fn_name="dot",
    )


class StudentWithTokens(ForwardingStudent):
    """A student whose token embeddings a ``MultiVectorEncoder`` makes, such as a ColBERT model or one of PyLate.

    An index of it stores the model's embeddings of passages, and its score counts MaxSim, the mean of a query's best
    products. Each text is read twice. An index cannot load it again by itself: open it with ``Index.open(folder,
    student)``.

    Args:
        student: makes the vectors, and counts words; its own token embeddings are not used.
        model: the model, its folder, or its name on the Hub.
        weight: of MaxSim in the score, by default that of the cosine in the score of a student that was not trained.

    Raises:
        InputError: the weight is not above 0.

    Example::

        student = StudentWithTokens(Student.load("d2llm-minilm"), "lightonai/LateOn")
        index = Index.create("docs.index", student)
    """

    def __init__(self, student: Student, model: MultiVectorEncoder | str | Path, *, weight: float = 20.0) -> None:
        super().__init__(student)
        if weight <= 0:
            raise InputError(f"weight is {weight}; give one above 0, or use the student alone")
        self.backbone = student.backbone
        self._model = MultiVectorEncoder(str(model)) if isinstance(model, str | Path) else model
        self._weight = weight
        self.token_fingerprint = _fingerprint(self._model)
        self._dim = self._model.encode_document("a", convert_to_numpy=True).shape[1]
        self.token_dim, self.quality = self._dim, student.quality

    @property
    def trained_tasks(self) -> tuple[Task, ...]:
        """Those of the student."""
        return tuple(self._student.trained_tasks)

    def prepare(self, query_vector: NDArray[np.float32], task: Task) -> PairScorer | None:
        """The student's scorer."""
        return self._student.prepare(query_vector, task)

    def why_no_interaction(self, task: Task) -> str | None:
        """As the student says."""
        return self._student.why_no_interaction(task)

    def passage_bound(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Those of the student."""
        return self._student.passage_bound(passage_vectors)

    def feature_weights(self, task: Task, *, stored: Collection[PartKind] | PartKind = PART_KINDS) -> FeatureWeights:
        """The student's weights for an index without token embeddings, and that of MaxSim if it has them."""
        kinds: set[PartKind] = {stored} if isinstance(stored, str) else {*stored}
        weights = self._student.feature_weights(task, stored=kinds - {"token"})
        terms: dict[ScoreFeature, float] = {"maxsim": self._weight} if "token" in kinds else {}
        return weights.model_copy(update={"terms": weights.terms | terms})

    def encode_with_tokens(
        self,
        texts: Sequence[str],
        kind: TextKind,
        *,
        instruction: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> EncodedTexts:
        """The student's vectors of texts, and the model's of their tokens; an ``instruction`` is a prompt for both."""
        if kind == "query":
            read = self.encode_queries(texts, instruction=instruction, advance=advance)
            encode = self._model.encode_query
        else:
            read, encode = self.encode_passages(texts, advance=advance), self._model.encode_document
        # An index expects vectors of this norm, so that it can compare the score features of students.
        norm = np.float32(self._dim**0.5)
        tokens = encode(list(texts), prompt=instruction, convert_to_numpy=True, show_progress_bar=False)
        rows = [norm * np.asarray(vectors, np.float32) for vectors in tokens]
        return replace(read, tokens=TokenVectors.join(rows, self._dim))


class StudentCrossEncoder:
    """The student's full score (``Student.rank``) with the methods of the library's ``CrossEncoder``.

    Unlike a cross-encoder, it encodes each distinct text once, on its own. Scores are logits, like those of a
    cross-encoder with one output and no activation.

    Args:
        student: the student that encodes and scores.
        task: the branch of the IEM; by default that of the index, or of what the student was trained for.
        index: an index that the student made, which knows how rare words are; by default tables that ship do.
        activation_fn: default function that is applied to the logits (a tensor).
    """

    num_labels = 1

    def __init__(
        self,
        student: Student,
        *,
        task: Task | None = None,
        index: Index | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.student = student
        self.index = index
        self.task: Task = task_of(student, task, index)
        self.activation_fn: Callable[[Tensor], Tensor] = activation_fn or torch.nn.Identity()
        self.model_card_data = CrossEncoderModelCardData()  # the library's evaluators write their results here

    def predict(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,  # noqa: ARG002 - the student has its own batches
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        apply_softmax: bool | None = False,  # noqa: ARG002 - there is only one output
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
        pool: object = None,
        chunk_size: int | None = None,
    ) -> NDArray[np.float32] | Tensor | list[Tensor] | np.float32:
        """Scores [n] of (query, passage) pairs, or one number for a single pair.

        ``inputs`` is a list (or array) of pairs, or one pair. The result is an array; with ``convert_to_tensor`` one
        tensor; without ``convert_to_numpy`` a list of tensors. ``activation_fn`` replaces the model's own. By default a
        terminal shows a progress bar. Batch size and softmax are ignored; prompt, device, pool and chunk size must be
        None.

        Raises:
            InputError: an input is not a pair of texts, or an argument that must be None is given.
            ModelError: a score is not a number.
        """
        _refuse(prompt_name=prompt_name, prompt=prompt, device=device, pool=pool, chunk_size=chunk_size)
        if isinstance(inputs, Mapping | str):
            raise InputError(f"pairs of texts are needed, but {type(inputs).__name__} was given ({inputs!r:.60})")
        if hasattr(inputs, "to_numpy") and hasattr(inputs, "columns"):  # a table, whose entries are its columns
            inputs = inputs.to_numpy()
        items: list[Any] = inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
        is_single = bool(items) and isinstance(items[0], str)
        pairs = [_pair(pair) for pair in ([items] if is_single else items)]
        with torch.inference_mode(), showing_progress(show_progress_bar):
            logits = torch.from_numpy(self.student.predict(pairs, index=self.index, task=self.task))
            scores = (activation_fn or self.activation_fn)(logits)
        if convert_to_tensor:
            return scores[0] if is_single else scores
        if convert_to_numpy:
            return scores.numpy()[0] if is_single else scores.numpy()
        return scores[0] if is_single else list(scores)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,  # noqa: ARG002 - the student has its own batches
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        device: str | None = None,
        pool: object = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Documents by their score for a query, best first: ``corpus_id`` (input position), ``score`` and ``text``.

        The best ``top_k`` documents (None: all), with their ``text`` if ``return_documents``. ``activation_fn`` is
        applied to the scores; the order is that of the logits. Other arguments are as in ``predict``.

        Raises:
            InputError: something is not a text, ``top_k`` is below 1, or an argument that must be None is given.
            ModelError: a score is not a number.
        """
        _refuse(prompt_name=prompt_name, prompt=prompt, device=device, pool=pool, chunk_size=chunk_size)
        with showing_progress(show_progress_bar):
            ranked = rank_texts(self.student, query, documents, self.task, top_k, self.index)
        scores: list[float] = (activation_fn or self.activation_fn)(torch.tensor([s for _, s in ranked])).tolist()
        return [
            {"corpus_id": row, "score": score} | ({"text": documents[row]} if return_documents else {})
            for (row, _), score in zip(ranked, scores, strict=True)
        ]


def _fingerprint(model: MultiVectorEncoder) -> str:
    """Hash of a model's weights, settings and prompts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    modules: list[Any] = [*model]
    settings = [module.get_config_dict() for module in modules if hasattr(module, "get_config_dict")]
    digest.update(json.dumps([settings, model.prompts], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _refuse(**arguments: object) -> None:
    _refuse_given(arguments, "which has its own prefixes and computes where it was loaded")


def _refuse_given(arguments: Mapping[str, object], reason: str) -> None:
    names = [name for name, value in arguments.items() if value is not None]
    if names:
        raise InputError(f"{', '.join(names)}: not for a student, {reason}; leave it out")


def _pair(pair: Any) -> tuple[str, str]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(cast("Sequence[object]", pair)) != 2:
        raise InputError(f"a pair of two texts is needed, but {pair!r:.80} was given")
    require_texts([*pair])
    return pair[0], pair[1]
