"""The simulation of many shards, on cases that can be worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("faiss")

from tail_latency import SCORE_FEATURES, recorded_times, shard_latencies, simulate


def random():
    return np.random.default_rng(0)


def test_a_single_replica_is_a_queue():
    arrivals, times = np.array([0.0, 1.0, 100.0]), np.array([10.0])
    latencies, work = shard_latencies(arrivals, times, 1, random(), shortest=False, hedge_after=None)
    assert latencies.tolist() == [10, 19, 10]
    assert work == 1


def test_the_shorter_queue_of_two_replicas_is_chosen():
    arrivals = np.arange(0.0, 1_000.0, 6.0)
    chosen, _ = shard_latencies(arrivals, np.array([10.0]), 2, random(), shortest=True, hedge_after=None)
    drawn, _ = shard_latencies(arrivals, np.array([10.0]), 2, random(), shortest=False, hedge_after=None)
    assert chosen.mean() < drawn.mean()


def test_a_hedge_bounds_a_slow_answer():
    arrivals = np.arange(200) * 1_000.0
    times = np.array([10.0] * 9 + [500.0])
    alone, _ = shard_latencies(arrivals, times, 3, random(), shortest=False, hedge_after=None)
    hedged, work = shard_latencies(arrivals, times, 3, random(), shortest=False, hedge_after=20.0)
    assert set(alone.tolist()) == {10, 500}
    assert set(hedged.tolist()) <= {10, 30, 500}  # 20 ms of waiting and 10 of work
    assert (hedged == 500).sum() < (alone == 500).sum() / 3
    assert 1 < work < 1.4  # only slow requests are repeated


def test_a_hedge_that_would_start_too_late_is_cancelled():
    """The other replica is free only after the first has answered."""
    arrivals, times = np.array([0.0, 0.0]), np.array([100.0])
    _, work = shard_latencies(arrivals, times, 2, random(), shortest=True, hedge_after=50.0)
    assert work == 1


def test_waiting_at_a_load_is_that_of_queueing_theory():
    """Mean time in a queue with one core and equal work (M/D/1): work (2 - load) / (2 (1 - load))."""
    draw, load = np.random.default_rng(1), 0.5
    arrivals = np.cumsum(draw.exponential(10 / load, 100_000))
    latencies, _ = shard_latencies(arrivals, np.array([10.0]), 1, random(), shortest=False, hedge_after=None)
    assert latencies.mean() == pytest.approx(10 * (2 - load) / (2 * (1 - load)), rel=0.03)


def test_recorded_times_have_the_recorded_percentiles():
    recorded = json.loads(SCORE_FEATURES.read_text())["ms"]["small: words of windows"]
    times = recorded_times()
    assert np.percentile(times, 50) == pytest.approx(recorded["p50"], rel=0.01)
    assert np.percentile(times, 95) == pytest.approx(recorded["p95"], rel=0.01)


def test_more_shards_are_slower_and_hedging_helps():
    times = np.exp(np.random.default_rng(0).normal(3, 0.5, 500))
    few = simulate(times, shards=2, replicas=3, load=0.2, queries=1_000)
    many = simulate(times, shards=40, replicas=3, load=0.2, queries=1_000)
    assert set(few) == {"one", "shortest", "hedged", "both"}
    for name, row in many.items():
        assert row["p50"] > few[name]["p50"]
        assert row["p99"] >= row["p50"]
    assert many["both"]["p99"] < many["one"]["p99"]
    assert many["one"]["work"] == pytest.approx(1)
    assert 1.0001 < many["hedged"]["work"] < 1.3
