"""``d2llm probe`` with a tiny student: the tables, the files, and a corpus that is too small."""

from __future__ import annotations

import random

import pytest

from d2llm.evaluation import probe
from e2e.command_line import fail, succeed_with_report, write_lines
from e2e.small_corpus import SENTENCES
from tiny_models import write_trained_student

SMALL = ("--persons", 5, "--distractors", 3, "--scenes", 20, "--dtype", "float32")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_trained_student(tmp_path_factory.mktemp("student"))


def test_a_student_is_probed_on_a_corpus_and_on_generated_sets(student, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_PENALTIES", (1e-2,))  # saves time
    words = sorted({word for sentence in SENTENCES for word in sentence.lower().split() if word.isalpha()})
    rng = random.Random(0)
    texts = [f"The {' '.join(rng.choices(words, k=rng.randint(6, 12)))}." for _ in range(260)]
    write_lines(tmp_path / "corpus.jsonl", [{"_id": f"p{n}", "text": text} for n, text in enumerate(texts)])
    files = ("--html", tmp_path / "p.html", "--markdown", tmp_path / "p.md")
    result, written = succeed_with_report("probe", student, tmp_path, *SMALL, *files, folder=tmp_path)
    assert {"length", "word order"} <= {row["task"] for row in written["result"]["probing"]}
    assert all(0 <= row["vectors"] <= 1 for row in written["result"]["probing"])
    limit = [row for row in written["result"]["ranking"] if row["set_name"] == "LIMIT"]
    assert [row["system"] for row in limit] == ["BM25", "student, inner product", "student"]
    assert limit[0]["num_queries"] == 10
    assert limit[0]["measures"]["R-precision"] == 1.0
    for text in (result.stdout, (tmp_path / "p.html").read_text(), (tmp_path / "p.md").read_text()):
        assert "LIMIT" in text
        assert "word order" in text


def test_without_a_corpus_only_generated_sets_are_ranked(student, tmp_path):
    _, written = succeed_with_report("probe", student, *SMALL, folder=tmp_path)
    assert written["result"]["probing"] == []
    write_lines(tmp_path / "corpus.jsonl", [{"_id": "p", "text": "Only one sentence stands here."}])
    fail("probe", student, tmp_path, *SMALL, containing=["the corpus has 1 different sentences", "larger corpus"])
