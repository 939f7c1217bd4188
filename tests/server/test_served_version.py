"""Searches of one version at the same time: which wait for each other, and that it does not change a ranking."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm import Index, Passage, Student
from d2llm.core.errors import FilterError, ModelError
from d2llm.core.types import Ranking
from d2llm.models.teachers.pair_teacher import TeacherScores
from d2llm.models.writers.writer import Assignment, WrittenQueries
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.server.model_service import ModelService
from d2llm.server.served_version import OpenVersion, PendingSearch, rank_alone, rank_together
from fake_models import FakeTeacher
from rerankers import teacher_reading
from tiny_server import write_tiny_index
from waiting import PATIENCE

QUERIES = ("the cat by the sea", "bread and salt", "a train in the snow", "winter at noon")
EXACT = SearchSettings(task="asymmetric", exact=True)
PLAIN = SearchSettings(task="asymmetric")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_index(tmp_path_factory.mktemp("version"), 200)


@pytest.fixture(scope="module")
def models(folder: Path) -> ModelService:
    return ModelService(Student.load(folder.parent / "student-0", dtype="float32"), "tiny")


@pytest.fixture
def version(folder: Path, models: ModelService) -> OpenVersion:
    """A version of which no search but the first has read anything."""
    return OpenVersion(folder, models)


def pending(version: OpenVersion, query: str, settings: SearchSettings = PLAIN) -> PendingSearch:
    return PendingSearch(version, query, version.models.student.encode_queries([query]).vectors[0], settings, True)


class Gate:
    """Work that begins, and goes on once it may."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.begun.set()
        assert self.open.wait(PATIENCE)


class WaitingTeacher(FakeTeacher):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def score_pairs(self, pairs: Any, task: Any, **options: Any) -> TeacherScores:
        self._gate.wait()
        return super().score_pairs(pairs, task, **options)


class WaitingWriter:
    """Fails in the end, so that the plain query is searched."""

    fingerprint = "waiting"

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def write(self, assignments: Sequence[Assignment], *, advance: object = None) -> list[WrittenQueries]:
        del assignments, advance
        self._gate.wait()
        raise ModelError("it wrote nothing")


def with_teacher(version: OpenVersion, gate: Gate) -> Ranking:
    return rank_alone(version, version.student, QUERIES[0], PLAIN, reranker=teacher_reading(WaitingTeacher(gate)))


def with_writer(version: OpenVersion, gate: Gate) -> Ranking:
    return rank_alone(version, version.student, QUERIES[0], PLAIN, expansion=Expansion(WaitingWriter(gate), "multi"))


@pytest.mark.parametrize("slow_search", [with_teacher, with_writer])
def test_others_search_while_a_teacher_or_writer_works(version, slow_search: Callable[[OpenVersion, Gate], Ranking]):
    gate = Gate()
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(slow_search, version, gate)
        try:
            assert gate.begun.wait(PATIENCE)
            (other,) = threads.submit(rank_together, [pending(version, QUERIES[1])]).result(timeout=PATIENCE)
            assert isinstance(other, Ranking)
            assert not slow.done()
        finally:
            gate.open.set()
        assert slow.result(PATIENCE).passages


def test_a_shared_searcher_serves_one_thread_at_a_time(version: OpenVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = 0, 0
    rank = Searcher.rank

    def counted(self: Searcher, *args: Any, **options: Any) -> list[Ranking]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)  # long enough for the others to come
        try:
            return rank(self, *args, **options)
        finally:
            inside -= 1

    monkeypatch.setattr(Searcher, "rank", counted)
    with ThreadPoolExecutor(len(QUERIES)) as threads:
        list(threads.map(rank_together, [[pending(version, query, EXACT)] for query in QUERIES]))
    assert most == 1


def test_rankings_at_the_same_time_are_those_one_by_one(folder: Path, models: ModelService) -> None:
    def searches(version: OpenVersion) -> Iterator[Callable[[], Ranking | Exception]]:
        for query in QUERIES:
            for settings in (PLAIN, EXACT, SearchSettings(hybrid=0.5, filter="year > 2004")):
                search = pending(version, query, settings)
                yield lambda search=search: rank_together([search])[0]
            yield partial(rank_alone, version, version.student, query, PLAIN, reranker=teacher_reading(FakeTeacher()))
            expansion = Expansion(WaitingWriter(open_gate), "multi")
            yield partial(rank_alone, version, version.student, query, PLAIN, expansion=expansion)

    open_gate = Gate()
    open_gate.open.set()
    one_by_one = [search() for search in searches(OpenVersion(folder, models))]
    for _ in range(3):  # each with a version that nobody has searched
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(lambda search: search(), searches(OpenVersion(folder, models))))
        for alone, other in zip(one_by_one, together, strict=True):
            assert isinstance(alone, Ranking)
            assert isinstance(other, Ranking)
            assert [hit.passage.id for hit in other.passages] == [hit.passage.id for hit in alone.passages]
            np.testing.assert_allclose(
                [hit.score for hit in other.passages], [hit.score for hit in alone.passages], rtol=1e-5
            )


def test_a_batch_of_different_searches_of_two_versions_ranks_each_as_alone(folder: Path, models: ModelService) -> None:
    older = OpenVersion(folder, models)
    Index.open(folder, models.student).upsert([Passage("new", "a cat by the sea at noon", metadata={"year": 2003})])
    newer = OpenVersion(folder, models, older)
    settings = [PLAIN, EXACT, *(PLAIN.replace(filter=condition) for condition in ("year = 2003", "language = 'de'"))]
    searches = [pending(version, query, one) for one in settings for version in (older, newer) for query in QUERIES]
    bad = pending(newer, QUERIES[0], PLAIN.replace(filter="no_such_field = 1"))
    together = rank_together([*searches[:9], bad, *searches[9:]])
    assert isinstance(together.pop(9), FilterError)
    for search, ranking in zip(searches, together, strict=True):
        (alone,) = rank_together([search])
        assert isinstance(ranking, Ranking)
        assert isinstance(alone, Ranking)
        assert ranking.query.text == search.query
        assert ranking.passages == alone.passages
        assert ranking.index_version == search.version.view.version
    found = {result.passage.id for ranking in together if isinstance(ranking, Ranking) for result in ranking.passages}
    assert "new" in found
