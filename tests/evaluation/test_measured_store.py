"""What an evaluation keeps of each system: found by all that it depends on, and the same when read again."""

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
    passages_per_second=12.5,
    bytes_per_passage=32,
    fingerprint="abc",
    num_truncated=2,
    notes=("one", "two"),
)


class Maker:
    """Gives a value and counts how often it was asked."""

    def __init__(self, value):
        self.value = value
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.value


def test_a_system_comes_back_as_it_was(tmp_path):
    made, again = Maker(SYSTEM), Maker(None)
    first = MeasuredStore(tmp_path)
    assert first.system(["key", 1], made) == SYSTEM
    second = MeasuredStore(tmp_path)
    assert second.system(["key", 1], again) == SYSTEM
    assert (made.calls, again.calls, first.num_found, second.num_found) == (1, 0, 0, 1)
    restored = second.system(["key", 1], again)
    assert restored.cost == SYSTEM.cost
    assert restored.ids("q1") == ["p1", "p2"]
    assert restored.ids("nobody") == []


def test_another_key_is_measured_anew(tmp_path):
    store = MeasuredStore(tmp_path)
    for key in (["a"], ["b"], ["a", None], [["a"]]):
        made = Maker([1])
        assert store.values(key, made) == [1]
        assert made.calls == 1
    assert store.num_found == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_another_version_is_measured_anew(tmp_path, monkeypatch):
    MeasuredStore(tmp_path).values("key", Maker(1))
    monkeypatch.setattr("d2llm.evaluation.systems._VERSION", 1_000)
    made = Maker(2)
    assert MeasuredStore(tmp_path).values("key", made) == 2
    assert made.calls == 1


def test_what_fails_leaves_nothing(tmp_path):
    def fail():
        raise KeyboardInterrupt

    store = MeasuredStore(tmp_path / "measured")
    with pytest.raises(KeyboardInterrupt):
        store.values("key", fail)
    assert not (tmp_path / "measured").exists()
    assert store.values("key", Maker([3.5])) == [3.5]


def test_files_are_plain_json(tmp_path):
    MeasuredStore(tmp_path).values(["name"], Maker({"text": "ü", "scores": [0.1]}))
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text(encoding="utf-8")) == {"text": "ü", "scores": [0.1]}


def test_percentiles_of_times():
    seconds = np.linspace(0.001, 0.101, 101)
    found = milliseconds(seconds.tolist())
    assert (found.p50, found.p95, found.mean) == pytest.approx((51, 96, 51))
    assert milliseconds([]) is None
    one = milliseconds([0.5])
    assert (one.p50, one.p95, one.mean) == (500, 500, 500)
