"""A student as a model of mteb, the benchmark library, such that the interaction (IEM) counts.

mteb scores most models by the cosine of their vectors. Two of its interfaces let a model do more: ``SearchProtocol``
(retrieval and reranking), and ``similarity_pairwise`` (pair classification, STS), which gets vectors alone. What these
are of, and which branch of the IEM the task needs, therefore travels with them (``_PairVectors``).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.extras import require
from d2llm.core.fingerprint import fingerprint_passages
from d2llm.core.types import Passage, Query, Task
from d2llm.integrations.mteb_meta import model_meta
from d2llm.integrations.mteb_tasks import PAIR_TYPES, branch_of
from d2llm.models.backbone import EncodedTexts
from d2llm.models.interaction import TASKS
from d2llm.models.student import Student
from d2llm.ops.selection import ids_at, top_rows
from d2llm.retrieval.cosine import AnchorStudent
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.protocols import SearchStudent
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.store.index_manifest import FORMAT_VERSION
from d2llm.store.vector_formats import make_format

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.types import PromptType

_log = logging.getLogger(__name__)

_DEFAULT_CANDIDATES, _DEFAULT_FORMAT = 1000, "bfloat16"
_Side = Literal["query", "passage"]


@dataclass(frozen=True, slots=True)
class _Source:
    """What vectors were made of."""

    texts: Sequence[str]
    side: _Side
    task: Task


class _PairVectors(np.ndarray):
    """Vectors [n, dim] of a pair task; an array made from them (a slice, a sum) has no source any more."""

    source: _Source | None = None


class D2LLMModel:
    """A student as mteb's ``SearchProtocol`` and ``EncoderProtocol``: give it to ``mteb.evaluate``.

    mteb's prompts and its batch size play no part: the student has its own prefixes and batches.

    Args:
        student: encodes and scores.
        meta: what mteb writes down about the model.
        num_candidates: passages that get the full score, per query; at least as many as mteb asks for (1,000).
        vector_format: how the vectors of a corpus are stored.
        tasks: name of an mteb task -> branch of the IEM, where ``mteb_tasks.branch_of`` is wrong.
        work_folder: where the indexes are kept, and found again; None means a temporary folder for each.

    Raises:
        InputError: an unknown branch or dtype.
    """

    def __init__(
        self,
        student: SearchStudent,
        meta: ModelMeta,
        *,
        num_candidates: int = _DEFAULT_CANDIDATES,
        vector_format: str = _DEFAULT_FORMAT,
        tasks: Mapping[str, Task] | None = None,
        work_folder: Path | None = None,
    ) -> None:
        make_format(vector_format, student.vector_dim)
        for name, task in (tasks or {}).items():
            if task not in TASKS:
                raise InputError(f"task {name!r}: {task!r} is no branch of the IEM; use one of {', '.join(TASKS)}")
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
        """What mteb writes down about the model."""
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
            InputError: no passages, or ``encode_kwargs`` asks for another precision.
            DuplicateIdError: two passages share an id.
        """
        _refuse_precision(encode_kwargs)
        passages = [Passage(row["id"], row["text"], row.get("title") or "") for row in corpus]
        content = fingerprint_passages(passages)
        name = f"{self._student.fingerprint}-{content}-{self._vector_format}-{FORMAT_VERSION}"
        target = self._index_parent() / name
        if not target.exists():
            # mteb's own default is to show progress, which is ours in a terminal
            show_progress = None if encode_kwargs.get("show_progress_bar", True) else False
            encode(passages, self._student, target, vector_format=self._vector_format, show_progress=show_progress)
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
        """Rank passages for each query: those that the anchor proposes, or exactly those in ``top_ranked``.

        Returns:
            query id -> passage id -> score, best first. Equal scores differ in the last bit, so that mteb, which
            orders by score alone, keeps our order (by passage id).

        Raises:
            InputError: nothing was indexed, a query has no text or is a conversation, or ``top_ranked`` names an
                unknown passage.
            ModelError: a score is not a number.
        """
        _refuse_precision(encode_kwargs)
        if self._index is None:
            raise InputError("there is no index to search; call index(corpus, ...) first")
        asked = [_query(row) for row in queries]
        task = branch_of(task_metadata, self._tasks)
        if top_ranked is not None:
            return self._rerank(asked, top_ranked, task, top_k)
        searcher = Searcher(self._index.view, self._student, SearchSettings(task, top_k, self._num_candidates))
        show_progress = None if encode_kwargs.get("show_progress_bar", True) else False
        return {
            ranking.query.id: _falling([(place.passage.id, place.score) for place in ranking.passages])
            for ranking in searcher.rank(asked, show_progress=show_progress)
        }

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

        ``prompt_type`` says whether they are queries or passages. Where mteb leaves it open, texts are passages, which
        may be longer; in a pair task the first ones of the pairs are queries, the second ones passages.

        Raises:
            InputError: another precision was asked for.
        """
        _refuse_precision(kwargs)
        texts = [text for batch in inputs for text in batch["text"]]
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
        """Cosines [n, m] (a tensor); mteb's tasks that ask for them are not pair tasks, and the IEM takes no part."""
        similarity_functions = require("mteb.similarity_functions", extra="mteb", purpose="the mteb model")
        return similarity_functions.cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(
        self, embeddings1: NDArray[np.float32], embeddings2: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The student's logits [n] of the pairs of a pair task; what ``encode`` gave for either side, as it was.

        The first text is the query, unless mteb declared it a passage and the second one a query. A text that
        ``encode`` took for the other side is encoded again.

        Raises:
            InputError: the vectors are not those that ``encode`` gave (a cache, a slice).
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

    def _index_parent(self) -> Path:
        if self._work_folder is not None:
            return self._work_folder
        self._temporary = tempfile.TemporaryDirectory(prefix="d2llm-mteb-")  # the last one's goes with it
        return Path(self._temporary.name)

    def _rerank(
        self, queries: Sequence[Query], top_ranked: Mapping[str, Sequence[str]], task: Task, top_k: int
    ) -> dict[str, dict[str, float]]:
        assert self._index is not None
        view = self._index.view
        rows = view.live_rows()
        row_of = dict(zip(view.ids(rows), rows.tolist(), strict=True))
        without = sum(not top_ranked.get(query.id) for query in queries)
        if without:
            _log.warning("%d of %d queries have no passages to rerank; they get no ranking", without, len(queries))
        vectors = self._student.encode_queries([query.text for query in queries]).vectors
        rankings: dict[str, dict[str, float]] = {}
        for query, vector in zip(queries, vectors, strict=True):
            ids = list(dict.fromkeys(top_ranked.get(query.id, ())))
            unknown = [passage_id for passage_id in ids if passage_id not in row_of]
            if unknown:
                raise InputError(
                    f"query {query.id!r}: {len(unknown)} passages to rerank, the first {unknown[0]!r}, "
                    "are not in the corpus; check the task's data"
                )
            passages = view.vectors(np.array([row_of[passage_id] for passage_id in ids], np.int64))
            scores = self._student.score(vector, passages, task)
            _refuse_nan(scores, f"query {query.id!r}")
            places = top_rows(scores, top_k, partial(ids_at, ids)).tolist()
            rankings[query.id] = _falling([(ids[place], float(scores[place])) for place in places])
        return rankings

    def _as_side(self, source: _Source, vectors: NDArray[np.float32], side: _Side) -> NDArray[np.float32]:
        return vectors if source.side == side else self._encode(source.texts, side).vectors

    def _encode(self, texts: Sequence[str], side: _Side) -> EncodedTexts:
        return self._student.encode_queries(texts) if side == "query" else self._student.encode_passages(texts)


def load_mteb_model(
    folder_or_name: str | Path = "d2llm-minilm",
    *,
    device: str | None = None,
    num_candidates: int = _DEFAULT_CANDIDATES,
    vector_format: str = _DEFAULT_FORMAT,
    interaction: bool = True,
    tasks: Mapping[str, Task] | None = None,
    work_folder: Path | None = None,
    meta: Mapping[str, Any] | None = None,
) -> D2LLMModel:
    """A student, ready for ``mteb.evaluate``. mteb files its results under the name and the student's fingerprint.

    Settings other than the default ones are filed apart (mteb's "experiments"), so results never mix.

    Args:
        folder_or_name: what ``d2llm distill`` wrote, or the name of a shipped student.
        device: None means the best one there is.
        num_candidates: passages that get the full score, per query.
        vector_format: how the vectors of a corpus are stored.
        interaction: False leaves the inner-product part alone: what the IEM is measured against.
        tasks: as for ``D2LLMModel``.
        work_folder: as for ``D2LLMModel``.
        meta: fields of mteb's ``ModelMeta`` that say more or other than d2llm knows of the student, for example
            ``{"languages": ["zho-Hans"], "license": "apache-2.0", "training_datasets": {"T2Retrieval"}}``.

    Raises:
        MissingExtraError: mteb is not installed.
        ModelNotFoundError: no such student.
        InputError: ``meta`` or a setting is not valid, or ``interaction=False`` for a head without an inner product.
    """
    require("mteb", extra="mteb", purpose="the mteb model")
    student = Student.load(folder_or_name, device=device)
    if not interaction and not student.has_anchor:
        raise InputError("this student has the head 'paper', which scores by the interaction alone; keep it on")
    settings = {
        "num_candidates": (num_candidates, _DEFAULT_CANDIDATES),
        "vector_format": (vector_format, _DEFAULT_FORMAT),
        "interaction": (interaction, True),
        "tasks": (dict(tasks or {}), {}),
    }
    changed = {name: value for name, (value, default) in settings.items() if value != default}
    return D2LLMModel(
        student if interaction else AnchorStudent(student),
        model_meta(student, folder_or_name, changed, meta or {}),
        num_candidates=num_candidates,
        vector_format=vector_format,
        tasks=tasks,
        work_folder=work_folder,
    )


def _query(row: Mapping[str, Any]) -> Query:
    """A query as mteb joins it with its instruction."""
    text, instruction = row["text"], row.get("instruction")
    if not isinstance(text, str):
        raise InputError(f"query {row['id']!r} is a conversation, which d2llm does not search for; leave the task out")
    return Query(row["id"], f"{text} {instruction}" if instruction else text)


def _falling(ranking: Sequence[tuple[str, float]]) -> dict[str, float]:
    """A ranking as passage id -> score, each score below the one before also in trec_eval's float32."""
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
            "these vectors do not say which texts they are of; use the arrays that encode gave, without a cache "
            "(mteb's CachedEmbeddingWrapper) between"
        )
    return source


def _refuse_precision(encode_kwargs: Mapping[str, Any]) -> None:
    if encode_kwargs.get("precision") is not None:  # mteb would file the results under it
        raise InputError(
            f"encode_kwargs has precision {encode_kwargs['precision']!r}, which this model does not have; remove it"
        )


def _refuse_nan(scores: NDArray[np.float32], where: str) -> None:
    num_wrong = int(np.isnan(scores).sum())
    if num_wrong:
        raise ModelError(f"{where}: {num_wrong} of {len(scores)} scores are NaN; check the student")


def _report_truncated(num_truncated: int, num_texts: int, task_metadata: TaskMetadata) -> None:
    if num_truncated:
        _log.warning(
            "%s: %d of %d texts were too long and were read in part", task_metadata.name, num_truncated, num_texts
        )
