"""One version of an index with the student that made it, and rankings of its passages."""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.types import Passage, Query, Ranking, Task
from d2llm.models.protocols import SearchStudent
from d2llm.models.score_features import FeatureWeights
from d2llm.ops.bm25_words import sentences
from d2llm.ops.words import words
from d2llm.retrieval.chunking import HEADING_SEPARATOR
from d2llm.retrieval.corrections import find_corrections
from d2llm.retrieval.cosine import DotStudent
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.feature_weights import weights_for
from d2llm.retrieval.index import Index
from d2llm.retrieval.local_segment import source_names
from d2llm.retrieval.reranker import OpenReranker
from d2llm.retrieval.scoring_corpus import IndexCorpus
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.retrieval.segments import IndexView
from d2llm.server.model_service import ModelService
from d2llm.server.ray_shards import ShardCluster
from d2llm.server.response_schemas import ScorePart
from d2llm.store.index_manifest import repeats_text
from d2llm.store.index_store import IndexStore
from d2llm.store.shards import Storage, is_sharded

_log = logging.getLogger(__name__)
_KEPT_SEARCHERS = 64  # per version: each holds the rows that its filter allows


@dataclass(frozen=True, slots=True)
class PendingSearch:
    """An encoded query waiting to be ranked, with its settings, and whether the IEM is used."""

    version: OpenVersion
    query: str
    vector: NDArray[np.float32]
    settings: SearchSettings
    iem: bool
    tokens: NDArray[np.float32] | None = None  # of the query, [tokens, token_dim], if the score counts them


class OpenVersion:
    """One version of an index, kept as long as a request uses it, with the searchers that its requests share."""

    def __init__(
        self,
        folder: Path,
        models: ModelService,
        before: OpenVersion | None = None,
        *,
        allow_missing: bool = False,
        cluster: ShardCluster | None = None,
    ) -> None:
        """Open the latest version and warm it up. Of files that ``before`` has read, only what is new is verified.

        Args:
            folder: folder of the index.
            models: its student.
            before: the version that this one replaces.
            allow_missing: shards that cannot be read are left out, and rankings name them.
            cluster: has the shards of a sharded index; None: they are read in this process.

        Raises:
            DataFormatError: there is no index, or it is damaged.
            IndexMismatchError: another student made it.
        """
        file = manifest_state(folder)  # read first, so that a later replacement is noticed
        self.folder = folder
        self.models = models
        self.student = cast("SearchStudent", models.student)
        self._stores: Sequence[IndexStore] = ()
        if cluster is not None and is_sharded(folder):
            remote = Storage.of_manifest(folder)
            remote.check_student(models.fingerprint)  # before actors open it
            self.view: IndexView = cluster.open(remote, models.student)
        else:
            index = Index.open(folder, self.student, allow_missing=allow_missing)
            known = {} if before is None else {store.folder: store.intact for store in before._stores}
            self._stores = index.storage.stores
            for store in self._stores:
                store.intact = known.get(store.folder, store.intact)
            self.view = index.view
        self.repeats_text = repeats_text(folder)
        # Of the version that was read: writers may have added newer ones.
        self.identity = identity_of(file, self.view.version, self.view.storage)
        self._allow_missing = allow_missing or self.view.is_remote
        for shard in self.view.missing:
            _log.error("%s: shard %d is left out of searches: %s", folder.name, shard.number, shard.problem)
        self._searchers: OrderedDict[tuple[SearchSettings, bool], Searcher] = OrderedDict()
        self._corpora: dict[Task, IndexCorpus] = {}
        self._choosing = threading.Lock()
        # Held while a shared searcher ranks: its cache for exact searches (``CachedBounds``) is for one thread at a
        # time, while the view and the student's head are for several. Shards on a cluster have caches of their own.
        self.ranking: AbstractContextManager[object] = nullcontext() if self.view.is_remote else threading.Lock()
        self.view.storage.check_student(models.fingerprint)
        if len(self.view):  # warm up: the first search of a version takes longer
            self.searcher(SearchSettings(top_k=1), iem=True).rank(
                ["warm"], vectors=np.zeros((1, models.dim), np.float32)
            )

    def weights(self, settings: SearchSettings, *, iem: bool) -> FeatureWeights:
        """The weights of the score features in a search."""
        student = self.student if iem else DotStudent(self.student)
        return weights_for(self.view, student, settings.task or self.view.task, settings.score_features)

    def corpus(self, task: Task) -> IndexCorpus:
        """The index as the corpus of texts that are not in it."""
        with self._choosing:
            if task not in self._corpora:
                self._corpora[task] = IndexCorpus(self.view, self.student, task, allow_missing=self._allow_missing)
            return self._corpora[task]

    def corrections(self, query: str, settings: SearchSettings, weights: FeatureWeights) -> dict[str, str]:
        """The typing errors in a query (``find_corrections``); none if words do not count, or a shard is away."""
        if not settings.corrects_words(counts_words=weights.counts_words):
            return {}
        try:
            return find_corrections([query], self.view.count_words)[0]
        except (D2LLMError, OSError):
            return {}

    def score_parts(self) -> list[ScorePart]:
        """What the student's score adds up in this index, for its task."""
        if not self.student.has_dot:
            return ["interaction"]
        weights = weights_for(self.view, self.student, self.view.task)
        counts: dict[ScorePart, bool] = {
            "dot": True,
            "windows": "window" in weights.part_kinds,
            "tokens": "token" in weights.part_kinds,
            "lexical": weights.counts_words,
            "interaction": self.models.student.why_no_interaction(self.view.task) is None,
        }
        return [part for part, is_counted in counts.items() if is_counted]

    @cached_property
    def example_queries(self) -> list[str]:
        """Queries to try."""
        return example_queries(self.view)

    def default_sources(self) -> list[str]:
        """The sources of candidates of a search that names none."""
        weights = weights_for(self.view, self.student, self.view.task)
        return source_names(SearchSettings(), weights, is_exact=not self.student.has_dot)

    def searcher(self, settings: SearchSettings, *, iem: bool) -> Searcher:
        """The shared searcher for these settings; use it within ``ranking``."""
        key = (settings, iem)
        with self._choosing:
            if key not in self._searchers:
                self._searchers[key] = self.new_searcher(settings, self.student, iem=iem)
                if len(self._searchers) > _KEPT_SEARCHERS:
                    self._searchers.popitem(last=False)
            self._searchers.move_to_end(key)
            return self._searchers[key]

    def new_searcher(self, settings: SearchSettings, student: SearchStudent, *, iem: bool, **more: Any) -> Searcher:
        """A searcher that is not shared, and can be used at the same time as others; ``more``: as of ``Searcher``."""
        student = student if iem else DotStudent(student)
        return Searcher(self.view, student, settings, allow_missing=self._allow_missing, **more)


def rank_together(searches: Sequence[PendingSearch]) -> list[Ranking | Exception]:
    """Rank queries; those with the same version and settings are ranked together."""
    together: dict[tuple[OpenVersion, SearchSettings, bool], list[int]] = {}
    for index, search in enumerate(searches):
        together.setdefault((search.version, search.settings, search.iem), []).append(index)
    results: dict[int, Ranking | Exception] = {}
    for (version, settings, iem), positions in together.items():
        try:
            searcher = version.searcher(settings, iem=iem)
        except D2LLMError as error:
            results |= dict.fromkeys(positions, error)
            continue
        queries = [Query(str(index), searches[index].query) for index in positions]
        chosen = [searches[index] for index in positions]
        vectors, tokens = np.stack([search.vector for search in chosen]), [search.tokens for search in chosen]
        with version.ranking:
            rankings = searcher.rank(queries, vectors=vectors, tokens=tokens)
        results |= dict(zip(positions, rankings, strict=True))
    return [results[index] for index in range(len(searches))]


def rank_alone(
    version: OpenVersion,
    student: SearchStudent,
    query: str,
    settings: SearchSettings,
    *,
    iem: bool = True,
    reranker: OpenReranker | None = None,
    expansion: Expansion | None = None,
) -> Ranking:
    """Rank one query with the help of a reranker or a writer; ``student`` encodes it.

    Outside ``OpenVersion.ranking``, because its searcher is not shared: others search while the reranker reads.
    """
    searcher = version.new_searcher(settings, student, iem=iem, rerank=reranker, expansion=expansion)
    (ranking,) = searcher.rank([Query("1", query)])
    return ranking


def identity_of(manifest: tuple[int, int], version: int, storage: Storage) -> tuple[int, ...]:
    """Identifies an index, its version, and the shards that could not be opened.

    The manifest is written once per index, and with its chunking; that of a sharded one, with every change.
    """
    return (*manifest, version, *(shard.number for shard in storage.missing))


def manifest_state(folder: Path) -> tuple[int, int]:
    """Identifies the manifest of an index, without reading it."""
    try:
        manifest = (folder / MANIFEST_NAME).stat()
    except FileNotFoundError:
        return 0, 0  # opening it raises the error
    return manifest.st_ino, manifest.st_mtime_ns


_NUM_EXAMPLES = 3
_NUM_READ = 60  # passages
_WORDS = range(2, 25)  # of an example
_TYPICAL_WORDS = 6
_MAX_CHARS = 150
_MARKER = re.compile(r"^(?:[-*+•#]+|\d[\d.]*[.)])\s+")
"""What a heading or an item of a list may begin with."""


def example_queries(view: IndexView) -> list[str]:
    """At most three different queries, from passages spread evenly over an index; the same for the same contents."""
    rows = view.live_rows()
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(_NUM_READ, len(rows))).astype(np.int64))
    return _queries_of(view.passages(rows[chosen]))


def _queries_of(passages: Sequence[Passage]) -> list[str]:
    """One query from each third of the passages: a heading that no other has if there is one, else a sentence."""
    headings = [_MARKER.sub("", passage.title.rsplit(HEADING_SEPARATOR, 1)[-1]) for passage in passages]
    sentences_of = [_first_sentence(passage.text) for passage in passages]
    counts = Counter(text.casefold() for text in headings)
    queries: list[str] = []
    for third in np.array_split(np.arange(len(passages)), _NUM_EXAMPLES):
        unique = [headings[row] for row in third if counts[headings[row].casefold()] == 1]
        for texts in (unique, [sentences_of[row] for row in third]):
            usable = [text for text in texts if _is_query(text) and text not in queries]
            if usable:
                queries.append(min(usable, key=_unusual))
                break
    return queries


def _first_sentence(text: str) -> str:
    """Without the marker of a list; nothing if a line ends before the sentence does."""
    start, end = next(iter(sentences(text)), (0, 0))
    is_whole = end == len(text.rstrip()) or text[start:end].endswith((".", "!", "?", "。", "！", "？"))
    return _MARKER.sub("", text[start:end]) if is_whole else ""


def _is_query(text: str) -> bool:
    """Whether a text reads like something that one would ask: some words, and hardly any signs."""
    letters = sum(sign.isalpha() or sign.isspace() for sign in text)
    return len(text) <= _MAX_CHARS and len(words(text)) in _WORDS and letters > 0.85 * len(text)


def _unusual(text: str) -> int:
    """How far the length of a query is from the usual one."""
    return abs(len(words(text)) - _TYPICAL_WORDS)
