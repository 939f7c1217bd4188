"""Fallbacks to slower code paths are counted, and each reason is logged once."""

from __future__ import annotations

import logging

import numpy as np

from d2llm.core import fallbacks
from d2llm.core.fallbacks import count_fallback, fallback_counts, fell_back
from d2llm.store import scan


def test_fallbacks_are_counted_and_each_reason_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(fallbacks, "_counts", type(fallbacks._counts)())
    monkeypatch.setattr(fallbacks, "_logged", set())
    with caplog.at_level(logging.INFO, "d2llm"):
        for reason in ("it rained", "it rained", "it snowed"):
            fell_back("the bus", reason)
        count_fallback("the train")
        fell_back("the bus", "nobody minds", level=logging.DEBUG)
    assert [record.getMessage() for record in caplog.records] == ["the bus: it rained", "the bus: it snowed"]
    assert fallback_counts() == {"the bus": 4, "the train": 1}


def test_a_scan_without_faiss_is_counted(monkeypatch):
    def fail_to_import():
        raise ImportError("no faiss")

    monkeypatch.setattr(scan, "load_faiss", fail_to_import)
    before = fallback_counts().get("scan by FAISS", 0)
    assert scan._import_faiss() is None
    assert fallback_counts()["scan by FAISS"] == before + 1


def test_fallbacks_are_in_the_metrics():
    import pytest

    pytest.importorskip("prometheus_client", reason="needs the extra 'serve'")
    from d2llm.server.telemetry import Telemetry

    count_fallback("a test's way")
    number = fallback_counts()["a test's way"]
    assert (
        f'd2llm_fallbacks_total{{fast_path="a test\'s way"}} {np.float64(number)}'
        in Telemetry().exposition()[0].decode()
    )
