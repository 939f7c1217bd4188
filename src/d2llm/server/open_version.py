"""An index at one version, as requests read it: searchers that they share, queries ranked together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.types import Query, Ranking
from d2llm.retrieval.cascade import Rereader
from d2llm.retrieval.cosine import AnchorStudent
from d2llm.retrieval.index import Index
from d2llm.retrieval.protocols import SearchStudent
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.server.model_service import ModelService
from d2llm.store.index_store import IndexStore

_KEPT_SEARCHERS = 64  # of a version: each keeps what a filter allows


@dataclass(frozen=True, slots=True)
class Asked:
    """A query on its way: encoded, with how to search for it, and whether the IEM takes part."""

    version: OpenVersion
    query: str
    vector: NDArray[np.float32]
    settings: SearchSettings
    iem: bool


class OpenVersion:
    """An index at one version, as long as a request reads it, with the searchers that its requests share."""

    def __init__(self, folder: Path, models: ModelService) -> None:
        """Open the latest version, and make it ready for quick answers.

        Raises:
            DataFormatError: there is no index, or it is damaged.
            IndexMismatchError: another student made it.
        """
        file = _manifest_state(folder)  # before it is read: what takes its place meanwhile is seen as another
        self.index = Index.open(folder, cast("SearchStudent", models.student))
        self.view = self.index.view
        self.models = models
        self.identity = (*file, self.view.version)  # of what was read: a writer may be further by now
        self._anchor: SearchStudent = AnchorStudent(cast("SearchStudent", models.student))
        self._searchers: OrderedDict[tuple[SearchSettings, bool], Searcher] = OrderedDict()
        self.view.check_student(models.fingerprint)
        if len(self.view):  # the first search of a version takes longer
            self.searcher(SearchSettings(top_k=1), iem=True).rank(
                ["warm"], vectors=np.zeros((1, models.dim), np.float32)
            )

    def searcher(self, settings: SearchSettings, *, iem: bool) -> Searcher:
        """What answers searches with these settings; called in one thread at a time."""
        key = (settings, iem)
        if key not in self._searchers:
            self._searchers[key] = self.new_searcher(settings, iem=iem)
            if len(self._searchers) > _KEPT_SEARCHERS:
                self._searchers.popitem(last=False)
        self._searchers.move_to_end(key)
        return self._searchers[key]

    def new_searcher(self, settings: SearchSettings, *, iem: bool, rereader: Rereader | None = None) -> Searcher:
        """One that is not kept."""
        student = cast("SearchStudent", self.models.student) if iem else self._anchor
        return Searcher(self.view, student, settings, cascade=rereader)


def rank_together(asked: Sequence[Asked]) -> list[Ranking | Exception]:
    """Rank queries; those with the same settings, of the same version, together."""
    together: dict[tuple[OpenVersion, SearchSettings, bool], list[int]] = {}
    for place, one in enumerate(asked):
        together.setdefault((one.version, one.settings, one.iem), []).append(place)
    found: dict[int, Ranking | Exception] = {}
    for (version, settings, iem), places in together.items():
        try:
            searcher = version.searcher(settings, iem=iem)
        except D2LLMError as error:
            found |= dict.fromkeys(places, error)
            continue
        queries = [Query(str(place), asked[place].query) for place in places]
        rankings = searcher.rank(queries, vectors=np.stack([asked[place].vector for place in places]))
        found |= dict(zip(places, rankings, strict=True))
    return [found[place] for place in range(len(asked))]


def rank_again(asked: Asked, rereader: Rereader) -> Ranking:
    """Rank one query with a teacher's help."""
    searcher = asked.version.new_searcher(asked.settings, iem=True, rereader=rereader)
    (ranking,) = searcher.rank([Query("1", asked.query)], vectors=asked.vector[None])
    return ranking


def identity_in(folder: Path) -> tuple[int, int, int]:
    """Tells whether a folder still holds the same index, at the same version: a manifest is written once."""
    return (*_manifest_state(folder), IndexStore.open(folder).version)


def _manifest_state(folder: Path) -> tuple[int, int]:
    try:
        manifest = (folder / MANIFEST_NAME).stat()
    except FileNotFoundError:
        return 0, 0  # whoever opens it says what is wrong
    return manifest.st_ino, manifest.st_mtime_ns
