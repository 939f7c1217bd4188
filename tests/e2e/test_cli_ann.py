"""``d2llm index INDEX ann`` and ``d2llm search --source ann``, with a fake student."""

import json

import numpy as np
import pytest

from d2llm.core.types import Passage
from d2llm.retrieval import build_ann as module
from d2llm.retrieval.index import Index
from d2llm.store.shards import Storage
from e2e.command_line import d2llm, fail
from fake_models import FakeStudent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An index of 900 passages that a fake student encoded."""
    student = FakeStudent(dim=32)
    random = np.random.default_rng(0)
    index = Index.create(tmp_path / "i", student)
    words = [f"w{n}" for n in range(40)]
    index.upsert([Passage(f"{n}", f"{' '.join(random.choice(words, 4))} {n}") for n in range(900)])
    monkeypatch.setattr(Index, "open", lambda folder, *_, **__: Index(Storage.open(folder), student))
    return tmp_path / "i"


def test_ann_is_built_to_a_recall_and_searched(folder, monkeypatch):
    monkeypatch.setattr(module, "MIN_PASSAGES", 500)
    monkeypatch.setattr(module, "MAX_EFFORT", 0.25)
    monkeypatch.setattr("d2llm.store.ann.MAX_EFFORT", 0.25)
    queries = folder.parent / "queries.jsonl"
    queries.write_text("".join(json.dumps({"_id": f"q{n}", "text": f"w{n} w{n + 1}"}) + "\n" for n in range(39)))
    options = ("--recall", "0.8", "--depth", "20", "--queries", queries, "--json", folder.parent / "r.json")
    built = d2llm("index", folder, "ann", *options)
    assert built.exit_code == 0, built.output
    assert "ann: 900 passages, " in built.stderr
    report = json.loads((folder.parent / "r.json").read_text())["result"]
    assert (report["num_queries"], report["queries"], report["depth"]) == (39, "given", 20)
    assert report["recalls"][-1]["at_least"] >= 0.8
    measured = report["recalls"][-1]
    assert f"{measured['recall']:.4f} (at least {measured['at_least']:.4f}) of the first 20" in built.stderr
    assert f"{report['first_ten']:.4f} of the first ten" in built.stderr
    assert measured["recall"] <= report["first_ten"] <= 1
    result = d2llm("search", folder, "w3 w4", "--source", "ann", "--num-candidates", "20", "--explain", "--top-k", "2")
    assert result.exit_code == 0, result.output
    assert "ann" in result.stdout


def test_too_few_passages_are_rejected(folder):
    fail("index", folder, "ann", containing=["holds 900 passages; below 20,000 the exact scan is faster"])
