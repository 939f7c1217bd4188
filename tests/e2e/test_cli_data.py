"""``d2llm data check`` as a user runs it."""

from __future__ import annotations

import json

import pytest

from e2e.command_line import d2llm, fail, succeed, write_data, write_lines
from tiny_models import write_tiny_model

SHARED = "a dog runs fast across the green field"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_model(folder / "bert", "bert")
    return folder / "bert"


def write_pairs(folder, *, leak):
    folder.mkdir()
    for split in ("train", "test"):
        query = SHARED if leak else f"{split} {SHARED}"
        records = [
            {"query": query, "document": f"ships sail in {split}", "label": 1},
            {"query": f"bread of {split}", "document": "rain falls", "label": 0},
        ]
        write_lines(folder / f"{split}.jsonl", records)
    return folder


def test_a_retrieval_data_set_passes(tmp_path, tokenizer):
    data = write_data(tmp_path / "everyday")
    result = succeed("data", "check", data, "--tokenizer", tokenizer, "--json", tmp_path / "r.json")
    assert "everyday (retrieval): 20 queries, 60 passages" in result.stdout
    for heading in ("Tokens of all 20 queries", "Tokens of all 60 passages", "Languages detected in a sample"):
        assert heading in result.stdout
    assert "Leaks between splits" not in result.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["verb"] == "check"
    assert report["result"]["leaks"] == []
    assert [(s["name"], s["num_queries"], s["values"]) for s in report["result"]["splits"]] == [
        ("train", 12, {"1": 12}),
        ("dev", 4, {"1": 4}),
        ("test", 4, {"1": 4}),
    ]


def test_leaks_fail_after_the_tables_and_report_are_written(tmp_path, tokenizer):
    data = write_pairs(tmp_path / "pairs", leak=True)
    arguments = ("data", "check", data, "--tokenizer", tokenizer, "--json", tmp_path / "r.json")
    message = fail(*arguments, containing=[str(data), "1 leaks", "same query: test-1 = train-1", "--allow-leaks"])
    assert "1 of test in train" in message
    output = d2llm(*arguments).stdout
    assert output.index("Leaks between splits") < output.index("Languages detected in a sample")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["result"]["leaks"][0]["examples"] == [["test-1", "train-1"]]
    allowed = succeed(*arguments, "--allow-leaks")
    assert "Leaks between splits" in allowed.stdout
    assert allowed.stderr == ""


def test_judgements_of_unknown_passages_are_a_warning(tmp_path, tokenizer):
    data = write_data(tmp_path / "everyday")
    with (data / "qrels" / "test.tsv").open("a") as file:
        file.write("q16\tnowhere\t1\n")
    result = succeed("data", "check", data, "--tokenizer", tokenizer)
    warning = f"warning: {data}: test: 1 judgement of unknown passages not counted, first 1: nowhere"
    assert result.stderr.splitlines() == [warning]
    assert succeed("--quiet", "data", "check", data, "--tokenizer", tokenizer).stderr == ""
