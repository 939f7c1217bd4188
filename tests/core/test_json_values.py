"""JSON that others wrote has one kind of error."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2llm.core.errors import D2LLMError, DataFormatError, ModelError
from d2llm.core.json_values import parse_json, read_model_json
from d2llm.data.plan import read_plan
from d2llm.evaluation.leaderboard import read_leaderboard
from d2llm.fitting.write_queries import DraftStore
from d2llm.methods.losses.soft_expansion import read_expansions
from d2llm.models.fitted_part import TermWeights
from d2llm.models.writers.answers import parse_answer

DEEP = "[" * 100_000


def test_a_value():
    assert parse_json(b'{"a": [1, "b"]}') == {"a": [1, "b"]}


@pytest.mark.parametrize("text", [DEEP, "9" * 5_000, "{", "", b"\xff"], ids=["deep", "long", "open", "empty", "bytes"])
def test_what_is_no_value(text: str | bytes):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize("content", [DEEP, "5", "[1]", "{"], ids=["deep", "number", "list", "open"])
def test_a_file_of_a_model_is_named(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: .*fetch or restore it"):
        read_model_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("manifest.json", lambda path: read_plan(path.parent)),
        ("a.json", lambda path: read_leaderboard([path])),
        ("drafts-w.jsonl", lambda path: DraftStore(path.parent, "w")),
        ("a.jsonl", read_expansions),
        (TermWeights.file_name, lambda path: TermWeights.read(path.parent, "student")),
    ],
    ids=["plan", "report", "drafts", "expansions", "fitted values"],
)
@pytest.mark.parametrize("content", [DEEP, "5", '{"verb": "evaluate", "result": {}}'], ids=["deep", "number", "other"])
def test_files_that_others_wrote_are_named(tmp_path: Path, name: str, read, content: str):
    (tmp_path / name).write_text(content + "\n")
    with pytest.raises(D2LLMError, match=name) as caught:
        read(tmp_path / name)
    assert isinstance(caught.value, DataFormatError)


def test_drafts_have_numbers_of_tokens(tmp_path: Path):
    line = '{"passage_hash": "a", "kind": "question", "queries": ["b"], "num_prompt_tokens": 3, '
    line += '"num_written_tokens": %s}\n'
    (tmp_path / "drafts-w.jsonl").write_text(line % 4)
    assert DraftStore(tmp_path, "w").num_tokens == (3, 4)
    (tmp_path / "drafts-w.jsonl").write_text(line % "null")
    with pytest.raises(DataFormatError, match=r":1: is not a written query \(Input should be a valid integer\)"):
        DraftStore(tmp_path, "w")


def test_an_answer_that_is_nested_is_no_list():
    answer = DEEP + "]" * 100_000
    assert parse_answer(answer, num_queries=3) == ((), 1)
