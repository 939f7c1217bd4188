"""Stored measurements of systems: keyed by everything they depend on, and unchanged when read back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from d2llm.evaluation.systems import MeasuredStore, System, milliseconds

SYSTEM = System(
    "a name ✓",
    "d2llm",
    {"q1": (("p1", 0.1 + 0.2), ("p2", -1e-7)), "q2": ()},
    {"total": (0.25, 1 / 3), "score": (0.125,)},
    {"passages_per_second": 12.5, "bytes_per_passage": 32},
    fingerprint="abc",
    notes=("one", "two"),
)


class CountingFactory:
    """Returns a value and counts its calls."""

    def __init__(self, value):
        self.value = value
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.value


def test_a_stored_system_is_read_back_unchanged(tmp_path):
    measure, unused = CountingFactory(SYSTEM), CountingFactory(None)
    first = MeasuredStore(tmp_path)
    assert first.system(["key", 1], measure) == SYSTEM
    second = MeasuredStore(tmp_path)
    assert second.system(["key", 1], unused) == SYSTEM
    assert (measure.calls, unused.calls, first.num_found, second.num_found) == (1, 0, 0, 1)
    restored = second.system(["key", 1], unused)
    assert restored.cost == SYSTEM.cost
    assert restored.ids("q1") == ["p1", "p2"]
    assert restored.ids("nobody") == []


def test_another_key_is_measured_anew(tmp_path):
    store = MeasuredStore(tmp_path)
    for key in (["a"], ["b"], ["a", None], [["a"]]):
        factory = CountingFactory([1])
        assert store.values(key, factory) == [1]
        assert factory.calls == 1
    assert store.num_found == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_another_version_is_measured_anew(tmp_path, monkeypatch):
    MeasuredStore(tmp_path).values("key", CountingFactory(1))
    monkeypatch.setattr("d2llm.evaluation.systems._VERSION", 1_000)
    factory = CountingFactory(2)
    assert MeasuredStore(tmp_path).values("key", factory) == 2
    assert factory.calls == 1


def test_a_failed_measurement_stores_nothing(tmp_path):
    def fail():
        raise KeyboardInterrupt

    store = MeasuredStore(tmp_path / "measured")
    with pytest.raises(KeyboardInterrupt):
        store.values("key", fail)
    assert not (tmp_path / "measured").exists()
    assert store.values("key", CountingFactory([3.5])) == [3.5]


def test_stored_files_are_plain_json(tmp_path):
    MeasuredStore(tmp_path).values(["name"], CountingFactory({"text": "ü", "scores": [0.1]}))
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text(encoding="utf-8")) == {"text": "ü", "scores": [0.1]}


def test_percentiles_of_times():
    seconds = np.linspace(0.001, 0.101, 101)
    times = milliseconds(seconds.tolist())
    assert (times.p50, times.p95, times.mean) == pytest.approx((51, 96, 51))
    assert milliseconds([]) is None
    single = milliseconds([0.5])
    assert (single.p50, single.p95, single.mean) == (500, 500, 500)
