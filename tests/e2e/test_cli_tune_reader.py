"""``d2llm tune-reader`` and ``d2llm search --reranker listwise:FOLDER`` as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from e2e.command_line import fail, succeed, succeed_with_report, write_data, write_lines
from tiny_models import write_tiny_model, write_trained_student

CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    write_trained_student(folder)
    write_tiny_model(folder / "llama", seed=5)
    write_data(folder / "everyday")
    arguments = ("tune-reader", folder / "tiny-student", folder / "everyday", "--out", folder / "reader")
    options = ("--model", folder / "llama", "--layers", "1", "--depth", "12", "--lists", "16", "8", "--seed", "1", *CPU)
    result, report = succeed_with_report(*arguments, *options, folder=folder)
    (folder / "said").write_text(result.stderr)
    (folder / "tuned.json").write_text(json.dumps(report))
    succeed("encode", folder / "everyday", "--student", folder / "tiny-student", "--out", folder / "index", *CPU)
    return folder


def test_tuning_reports_what_it_learnt_and_brings(workspace: Path) -> None:
    report = json.loads((workspace / "tuned.json").read_text())
    result = report["result"]
    assert report["arguments"]["lists"] == [16, 8]
    assert (result["steps"], result["dev"]["everyday"]["num_queries"]) == (3, 4)
    said = " ".join((workspace / "said").read_text().split())
    assert f"tune-reader: 3 steps on {result['num_lists']['everyday']} lists of everyday (loss " in said
    assert f"decoded order {result['dev']['everyday']['decoded']:.3f}, random order" in said
    manifest = json.loads((workspace / "reader" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["fingerprint"]) == ("reader", result["fingerprint"])


def test_a_search_with_a_reader(workspace: Path, tmp_path: Path) -> None:
    search = ("search", workspace / "index", "the cat sleeps", "--top-k", "30", *CPU)
    _, plain = succeed_with_report(*search, folder=tmp_path)
    options = ("--reranker", f"listwise:{workspace / 'reader'}", "--reranker-set", "num_passages=12")
    result, read = succeed_with_report(*search, *options, folder=tmp_path)
    before, after = (
        [one["passage"]["id"] for one in each["result"]["rankings"][0]["passages"]] for each in (plain, read)
    )
    assert before[12:] == after[12:]
    assert set(before) == set(after)
    assert before != after
    assert "listwise: 12 passages were read, in " in result.stderr
    assert "teacher" not in result.stderr
    (ranking,) = read["result"]["rankings"]
    assert len(ranking["reranking"]["read"]) == 12


def test_wrong_options(workspace: Path, tmp_path: Path) -> None:
    search = ("search", workspace / "index", "the cat sleeps", *CPU)
    reader = ("--reranker", f"listwise:{workspace / 'reader'}")
    fail(*search, *reader, "--reranker-set", "prompt=short", containing=["prompt", "of kind cascade or teacher"])
    fail(*search, "--reranker", "listwise", containing=["reranker.model"])
    fail(*search, *reader, "--exact", containing=["leave out exact and hybrid"])
    fail(
        *search,
        "--reranker",
        f"listwise:{workspace / 'tiny-student'}",
        containing=["describes a 'student', but a 'reader' is needed"],
    )
    fail(*search, "--reranker", f"listwise:{workspace / 'nowhere'}", containing=["not a d2llm reader folder"])
    shutil.copytree(workspace / "reader", tmp_path / "reader")
    manifest = json.loads((tmp_path / "reader" / "manifest.json").read_text())
    (tmp_path / "reader" / "manifest.json").write_text(json.dumps(manifest | {"student": "0123"}))
    fail(
        *search,
        "--reranker",
        f"listwise:{tmp_path / 'reader'}",
        containing=["vectors of the student 0123", "tune a reader"],
    )
    tune = ("tune-reader", workspace / "tiny-student", workspace / "everyday", "--model", workspace / "llama", *CPU)
    fail(*tune, "--out", workspace / "reader", "--layers", "1", containing=["already holds a finished reader"])
    fail(*tune, "--out", tmp_path / "new", "--lists", "0", "8", containing=["--lists begins with"])
    fail(*tune, "--out", tmp_path / "new", "--layers", "8", containing=["layers is 8", "has 2"])
    pairs = tmp_path / "pairs.jsonl"
    write_lines(pairs, [{"text1": "a", "text2": "b", "label": 1}])
    out = ("--out", tmp_path / "new")
    fail("tune-reader", workspace / "tiny-student", pairs, *out, containing=["these are labelled pairs"])
