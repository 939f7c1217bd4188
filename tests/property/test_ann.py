"""Approximate search after any changes, under any filter: never a disallowed row and never too few."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2llm.core.types import Query
from d2llm.retrieval import build_ann as module
from d2llm.retrieval.build_ann import build_ann
from d2llm.retrieval.local_segment import AnnSource
from d2llm.store import ann
from d2llm.store.view import PassageView
from examples import examples
from tiny_ann import PlainStudent, clustered, new_ann_store, put_vectors

NUM, DIM_HERE = 600, 16


@pytest.fixture(autouse=True, scope="module")
def _few_rows():
    """With so few rows, the exact scan would always be as fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ann, "MAX_EFFORT", 0.5)
        yield


@pytest.fixture(scope="module", params=["bfloat16", "int3"])
def views(request, tmp_path_factory):
    """Versions of an index with an approximate index: as built, then with later passages, then with deletions too."""
    folder = tmp_path_factory.mktemp("ann")
    store = new_ann_store(folder / "i", clustered(NUM, dim=DIM_HERE), request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_PASSAGES", 100)
        patch.setattr(module, "MAX_EFFORT", 0.5)
        build_ann(store, PlainStudent(dim=DIM_HERE), recall=0.8, depth=20)
    versions = [PassageView(store)]
    # Every vector twice, so that scores tie.
    put_vectors(store, NUM - 20, np.repeat(clustered(40, seed=2, dim=DIM_HERE), 2, axis=0), "other")
    versions.append(PassageView(store))
    store.delete([f"p{n:06d}" for n in range(0, NUM + 60, 4)])
    versions.append(PassageView(store))
    assert all(view.ann is not None for view in versions)
    return versions


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    version=st.integers(0, 2),
    top_k=st.integers(1, 700) | st.integers(1, 30),
    fraction=st.sampled_from([None, 0.0, 0.01, 0.2, 0.6, 0.95]),
    seed=st.integers(0, 1_000),
)
def test_rows_are_allowed_complete_and_ordered(views, version, top_k, fraction, seed):
    view = views[version]
    query = clustered(1, seed=seed + 10, dim=DIM_HERE)[0]
    allowed = None if fraction is None else np.random.default_rng(seed).random(view.capacity) < fraction
    eligible = np.ones(view.capacity, np.bool_) if view.live is None else view.live.copy()
    if allowed is not None:
        eligible &= allowed
    rows, scores = AnnSource(view, allowed).propose(Query("q", "text"), query, top_k)
    assert len(rows) == len(set(rows.tolist())) == min(top_k, eligible.sum())
    assert eligible[rows].all()
    exact = view.scan(query, view.capacity, allowed)
    score_of = dict(zip(exact.rows.tolist(), exact.scores.tolist(), strict=True))
    assert scores.tolist() == [score_of[row] for row in rows.tolist()]
    order = exact.rows.tolist()
    assert rows.tolist() == sorted(rows.tolist(), key=order.index)
    # Passages added after the build are scanned exactly, so none of them is missed.
    best_of_tail = [row for row in order[:top_k] if row >= view.ann.record.covered]
    assert set(best_of_tail) <= set(rows.tolist())
