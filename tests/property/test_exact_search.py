"""Certified top k against brute force, with real interactions, ties, filters, deleted rows and extreme floats."""

from __future__ import annotations

import copy
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_loops import compiled
from d2llm.core.errors import InputError, ModelError
from d2llm.core.types import TASKS
from d2llm.models.interaction import Interaction
from d2llm.models.protocols import PlainStudent
from d2llm.models.row_features import RowFeatures
from d2llm.models.score_features import FeatureWeights, WordsFactor
from d2llm.models.scorer import HeadWeights, QueryScorer
from d2llm.ops.selection import from_the_highest, top_rows
from d2llm.recipe import InteractionConfig
from d2llm.retrieval import exact_search
from d2llm.retrieval.exact_search import certified_top_k
from d2llm.retrieval.segments import CachedBounds
from examples import examples
from fake_models import FakeStudent
from feature_rows import FeatureRows
from tiny_models import randomise

DIM = 8


class TinyStudent(PlainStudent):
    """A real interaction without a backbone."""

    fingerprint = "tiny"

    def __init__(self, head="dot", *, seed=0, gates=True, weight=1.0, features="rich", dtype=torch.float32):
        torch.manual_seed(seed)
        config = InteractionConfig(head=head, features=features, hidden_dim=8, feature_dim=4, gates=gates)
        self.interaction = Interaction(config, DIM).eval()
        randomise(self.interaction, seed=seed, scale=0.5)
        self.has_dot = head == "dot"
        if self.has_dot:
            for task in TASKS:
                self.interaction.interaction_weight(task).fill_(weight)
        with torch.inference_mode():
            self._weights = {task: HeadWeights(self.interaction, task, dtype) for task in TASKS}
        self.num_scored = 0

    def prepare(self, query_vector, task):
        return QueryScorer(self.interaction, self._weights[task], torch.from_numpy(query_vector), task, 64)

    def score(self, query_vector, passage_vectors, task):
        return self.prepare(query_vector, task)(passage_vectors)

    def query_vectors(self, query_vectors, task):
        return self.interaction.query_vectors(torch.from_numpy(query_vectors), task).numpy()

    def passage_bound(self, vectors):
        with torch.inference_mode():
            return self.interaction.passage_bound(torch.from_numpy(vectors)).numpy()


class ArrayView:
    """In-memory vectors with the interface of an index view."""

    def __init__(self, vectors, *, live=None, ids=None):
        self._vectors, self.live, self.capacity = vectors, live, len(vectors)
        self._ids = ids or [f"{row * 7919 % 1009:04d}" for row in range(len(vectors))]

    def ids(self, rows):
        return [self._ids[row] for row in rows]

    def vectors(self, rows):
        return self._vectors[rows]

    def block(self, start, end):
        return self._vectors[start:end]

    def mask(self, allowed):
        if allowed is None or self.live is None:
            return self.live if allowed is None else allowed
        return self.live & allowed

    def live_rows(self, allowed):
        mask = self.mask(allowed)
        return np.arange(self.capacity) if mask is None else np.flatnonzero(mask)

    def scan(self, query, top_k, allowed=None):
        rows, scores = self.live_rows(allowed), self._vectors @ query
        best = rows[top_rows(scores[rows], top_k, lambda positions: self.ids(rows[positions]))]
        return exact_search.CertifiedRows(best, scores[best], None, None)


def random_case(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 201))
    vectors = rng.standard_normal((capacity, DIM)).astype(np.float32)
    if rng.random() < 0.5:  # copies, so that scores tie
        vectors = vectors[rng.integers(0, max(1, capacity // 5), capacity)]
    vectors *= np.float32(10.0 ** rng.choice([-20, -3, 0, 0, 0, 0, 2, 12]))
    live = None if rng.random() < 0.4 else rng.random(capacity) < rng.choice([0.2, 0.9])
    allowed = None if rng.random() < 0.5 else rng.random(capacity) < rng.choice([0.0, 0.3, 0.9])
    query = rng.standard_normal(DIM).astype(np.float32) * np.float32(rng.choice([1e-3, 1, 1, 30]))
    return ArrayView(vectors, live=live), query, allowed, int(rng.choice([1, 2, 5, 10, 50, 300])), rng


def brute_force(view, student, query, task, top_k, allowed, score_features=None):
    """Ranks all passages by scores in the arithmetic that the module documents."""
    score, rows = student.prepare(query, task), view.live_rows(allowed)
    if score.dot_query is None:
        values = score(view.block(0, view.capacity))
    else:
        vectors = view.block(0, view.capacity)
        bound = np.float32(score.bound) * student.passage_bound(vectors)
        values = vectors @ score.dot_query
        if score_features is not None:
            values = values + score_features(np.arange(view.capacity))
        values = values + bound * score.change(vectors)
    assert values.dtype == np.float32
    order = sorted(rows.tolist(), key=lambda row: (-values[row], view.ids([row])[0]))[:top_k]
    return order, values


PAPER, WEIGHTLESS = TinyStudent("paper", seed=5), TinyStudent(seed=6, weight=0.0)
STUDENTS = [
    TinyStudent(),
    TinyStudent(seed=1, weight=0.25),
    TinyStudent(seed=2, gates=False, features="product"),
    TinyStudent(seed=3, dtype=torch.bfloat16),
    TinyStudent(seed=4, weight=0.02),
    PAPER,
    WEIGHTLESS,
]


def on_sphere(vectors):
    """Vectors [n, dim] of norm sqrt(dim), as those of tokens are."""
    return (vectors * (vectors.shape[1] ** 0.5 / np.linalg.norm(vectors, axis=1, keepdims=True))).astype(np.float32)


def test_ranking_with_score_features_matches_brute_force(monkeypatch):
    monkeypatch.setattr(exact_search, "_FIRST_SCORED", 8)
    monkeypatch.setattr(exact_search, "_MAX_SCORED", 32)
    num_early = num_cut = 0
    students = [student for student in STUDENTS if student is not PAPER]
    for seed in range(300):
        student = students[seed % len(students)]
        view, query, allowed, top_k, rng = random_case(seed)
        words = [f"w{n}" for n in range(9)]
        texts = [
            ". ".join(" ".join(rng.choice(words, 3)) for _ in range(rng.integers(0, 4)))
            for _ in view.ids(range(view.capacity))
        ]
        names = ("bm25", "bm25_fraction", "window_bm25", "window_vectors", "maxsim")
        weights = {name: float(rng.choice([0.0, 0.5, 4.0])) for name in names}
        own = view.vectors(np.arange(view.capacity))
        windows = [rng.standard_normal((rng.integers(0, 4), DIM)).astype(np.float32) for _ in texts]
        tokens = [on_sphere(rng.standard_normal((rng.integers(0, 5), 12))) for _ in texts]
        of_query = on_sphere(rng.standard_normal((rng.integers(0, 30), 12)))
        task = TASKS[seed % 2]
        dot = student.prepare(query, task).dot_query
        factor = (
            WordsFactor(
                slopes=tuple(rng.standard_normal(4)),
                offset=0.0,
                lowest=-3,
                highest=3,
                nearest_slope=0.1 * (seed % 3 - 1),
            )
            if seed % 3
            else None
        )
        rows = FeatureRows(texts, windows, own, tokens or None)
        if rows.tokens is None:
            weights["maxsim"] = 0.0
        score_features = RowFeatures(
            rows,
            "w1 w2 w3 w10",
            FeatureWeights(terms=weights, words_factor=factor),
            dot,
            of_query,
            nearest=float(rng.standard_normal()),
        )
        with compiled(bool(seed % 2)):
            expected, values = brute_force(view, student, query, task, top_k, allowed, score_features)
            result = certified_top_k(view, student, query, task, top_k, allowed=allowed, score_features=score_features)
        num_cut += rows.num_cut > 0
        assert result.rows.tolist() == expected, seed
        np.testing.assert_array_equal(result.scores, values[expected])
        assert result.certificate.proved == len(expected)
        num_early += result.certificate.num_left > 0
    assert num_early > 50  # the bounds did skip rows,
    assert num_cut > 30  # and some without the products of all tokens


def test_ranking_matches_brute_force_in_1050_random_cases(monkeypatch):
    monkeypatch.setattr(exact_search, "_FIRST_SCORED", 8)  # so that small corpora are not scored in one piece
    monkeypatch.setattr(exact_search, "_MAX_SCORED", 32)
    by_scans = mock.Mock(wraps=exact_search._by_scans)
    monkeypatch.setattr(exact_search, "_by_scans", by_scans)
    monkeypatch.setattr(exact_search, "_SCAN_MULTIPLE", 2)
    full_pass = mock.Mock(wraps=exact_search._pass)
    monkeypatch.setattr(exact_search, "_pass", full_pass)
    num_tied = num_early = 0
    for seed in range(1050):
        monkeypatch.setattr(exact_search, "_SCANS", [(), (6, 30), (20,)][seed % 3])
        student = STUDENTS[seed % len(STUDENTS)]
        view, query, allowed, top_k, rng = random_case(seed)
        task = TASKS[seed % 2]
        expected, values = brute_force(view, student, query, task, top_k, allowed)
        cached = CachedBounds(student.passage_bound(view.block(0, view.capacity))) if rng.random() < 0.5 else None
        result = certified_top_k(view, student, query, task, top_k, allowed=allowed, cached=cached)
        assert result.rows.tolist() == expected, seed
        assert result.scores.tolist() == values[expected].tolist(), seed
        certificate, total = result.certificate, len(view.live_rows(allowed))
        assert certificate.proved == len(expected) == min(top_k, total)
        assert certificate.num_scored + certificate.num_left == total
        assert certificate.kth_score == (values[expected[-1]] if expected else -math.inf)
        left = sorted(set(view.live_rows(allowed).tolist()) - set(expected))
        if certificate.num_left and student not in (PAPER, WEIGHTLESS):
            num_early += 1
            assert certificate.highest_bound_left < certificate.kth_score
        assert student is not PAPER or certificate.num_left == 0
        if expected and left:
            num_tied += bool((values[left] == certificate.kth_score).any())
    assert num_tied > 100  # ties at the cut-off occurred,
    assert num_early > 100  # and searches that ended early,
    assert full_pass.call_count > 100  # some with a pass over all vectors
    assert by_scans.call_count - full_pass.call_count > 100  # and some with scans alone


@settings(max_examples=examples(30))
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 2, 3, 4]))
def test_no_score_is_above_its_bound(seed, number):
    """In float64, computed by the network itself: |score - dot| <= R_q r_p."""
    student, (view, query, _, _, _) = STUDENTS[number], random_case(seed)
    vectors = view.block(0, view.capacity)
    query = query / max(1, np.abs(query).max())
    module = copy.deepcopy(student.interaction).double()
    with torch.inference_mode():
        queries, passages = torch.from_numpy(query)[None].double(), torch.from_numpy(vectors).double()
        scores = module(queries, passages, "symmetric")
        bound = (module.query_bound(queries, "symmetric")[:, None] * module.passage_bound(passages)).numpy()
        change = (scores.logits - scores.dot).numpy()
        assert (np.abs(change) <= bound + 1e-14 * np.abs(scores.dot.numpy())).all()
        single = student.prepare(query, "symmetric")
    dots = vectors @ single.dot_query
    bound = np.float32(single.bound) * student.passage_bound(vectors)
    finals = dots + bound * single.change(vectors)
    assert (finals <= dots + bound).all()


@pytest.mark.parametrize("head", ["dot", "paper"])
def test_ranks_proved_within_a_budget_are_exact(head, monkeypatch):
    monkeypatch.setattr(exact_search, "_FIRST_SCORED", 4)
    monkeypatch.setattr(exact_search, "_MAX_SCORED", 8)
    monkeypatch.setattr(exact_search, "_MIN_SCORED", 1)
    student, num_partly, num_unproved = TinyStudent(head, weight=0.05), 0, 0
    for seed in range(300):
        view, query, allowed, _, rng = random_case(seed)
        top_k = int(rng.integers(1, 8))
        expected, _ = brute_force(view, student, query, "symmetric", top_k, allowed)
        monkeypatch.setattr(exact_search, "_SCANS", [(), (6, 30)][seed % 2])
        monkeypatch.setattr(exact_search, "_SCAN_MULTIPLE", 2)
        fitting = itertools.chain([5] * (seed % 6), itertools.repeat(0))
        monkeypatch.setattr(exact_search._Clock, "num_fitting", mock.Mock(side_effect=fitting))
        result = certified_top_k(view, student, query, "symmetric", top_k, allowed=allowed, budget_ms=1)
        proved = result.certificate.proved
        assert len(result.rows) == len(expected)
        assert result.rows[:proved].tolist() == expected[:proved]
        if result.certificate.num_left and head == "paper":
            assert proved == 0
        num_partly += 0 < proved < len(expected)
        num_unproved += proved == 0 < len(expected)
    assert num_unproved > 5
    assert num_partly > 5 or head == "paper"


def test_a_budget_is_kept():
    vectors = np.random.default_rng(0).standard_normal((60_000, DIM)).astype(np.float32)
    student, query = TinyStudent(), np.ones(DIM, np.float32)
    view = ArrayView(vectors, ids=[str(row) for row in range(60_000)])
    result = certified_top_k(view, student, query, "symmetric", 10, budget_ms=0.0)
    assert result.certificate.num_scored == 128
    assert len(result.rows) == 10
    assert certified_top_k(view, student, query, "symmetric", 10, budget_ms=1e9).certificate.proved == 10


def test_zero_interaction_weight_uses_only_the_scan(monkeypatch):
    student, (view, query, _, _, _) = TinyStudent(weight=0.0), random_case(7)
    monkeypatch.setattr(QueryScorer, "change", lambda *_: pytest.fail("the interaction was asked"))
    monkeypatch.setattr(view, "block", lambda *_: pytest.fail("the vectors were read again"))
    result = certified_top_k(view, student, query, "symmetric", 5)
    assert result.certificate.proved == 5
    assert result.certificate.highest_bound_left <= result.certificate.kth_score
    assert result.dots is result.scores


def test_reaches_are_computed_once_and_only_if_scans_fall_short(monkeypatch):
    monkeypatch.setattr(exact_search, "_SCAN_MULTIPLE", 2)
    generator = np.random.default_rng(3)
    view = ArrayView(generator.standard_normal((9_000, DIM)).astype(np.float32))
    query, kept = generator.standard_normal(DIM).astype(np.float32), CachedBounds()
    gated = TinyStudent(weight=0.01)
    certified_top_k(view, gated, query, "symmetric", 3, cached=kept)
    assert kept.values is None
    monkeypatch.setattr(exact_search, "_SCANS", ())
    first = certified_top_k(view, gated, query, "symmetric", 3, cached=kept)
    np.testing.assert_allclose(kept.values, gated.passage_bound(view.block(0, view.capacity)), rtol=1e-6)
    monkeypatch.setattr(gated, "passage_bound", lambda _: pytest.fail("computed again"))
    again = certified_top_k(view, gated, query, "symmetric", 3, cached=kept)
    assert (first.rows.tolist(), first.scores.tolist()) == (again.rows.tolist(), again.scores.tolist())


def test_without_gates_kept_reaches_take_no_memory(monkeypatch):
    monkeypatch.setattr(exact_search, "_SCANS", ())
    student, (view, query, _, _, _), kept = TinyStudent(gates=False), random_case(11), CachedBounds()
    expected, values = brute_force(view, student, query, "symmetric", 4, None)
    for _ in range(2):
        result = certified_top_k(view, student, query, "symmetric", 4, cached=kept)
        assert (result.rows.tolist(), result.scores.tolist()) == (expected, values[expected].tolist())
        assert (kept.values == 1).all()
        assert kept.values.base.nbytes == 4


def test_a_student_without_bounds_is_scanned_in_full():
    student = FakeStudent(dim=DIM)
    vectors = np.random.default_rng(0).standard_normal((50, DIM)).astype(np.float32)
    query = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    result = certified_top_k(ArrayView(vectors), student, query, "asymmetric", 3)
    scores = student.score(query, vectors, "asymmetric")
    assert result.rows.tolist() == np.argsort(-scores)[:3].tolist()
    assert result.certificate.num_scored == 50
    np.testing.assert_allclose(result.dots, 2 * vectors[result.rows] @ query, rtol=1e-5)


def test_invalid_arguments_are_rejected_and_empty_views_are_not():
    student, (view, query, _, _, _) = TinyStudent(), random_case(3)
    with pytest.raises(InputError, match="top_k is 0"):
        certified_top_k(view, student, query, "symmetric", 0)
    for budget in (-1.0, math.nan):
        with pytest.raises(InputError, match="the budget is"):
            certified_top_k(view, student, query, "symmetric", 1, budget_ms=budget)
    with pytest.raises(InputError, match="a mask of rows has shape"):
        certified_top_k(view, student, query, "symmetric", 1, allowed=np.ones(view.capacity + 1, bool))
    with pytest.raises(ModelError, match="are NaN"):
        certified_top_k(view, student, np.full(DIM, np.nan, np.float32), "symmetric", 1)
    empty = certified_top_k(ArrayView(np.zeros((0, DIM), np.float32)), student, query, "symmetric", 4)
    assert len(empty.rows) == empty.certificate.proved == 0
    assert empty.certificate.highest_bound_left == -math.inf


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, -3.0, math.inf, -math.inf]), max_size=70), st.integers(1, 9))
def test_from_the_highest_goes_by_decreasing_bound(bounds, first):
    values = np.array(bounds, np.float32)
    parts = list(from_the_highest(values, first))
    order = np.concatenate([np.zeros(0, np.int64), *parts])
    assert sorted(order.tolist()) == list(range(len(bounds)))
    assert values[order].tolist() == sorted(bounds, reverse=True)
    assert [len(part) for part in parts[:-1]] == [first * 2**n for n in range(len(parts) - 1)]
