"""Answers of an endpoint that a killed process leaves to the next one; ``d2llm label`` is killed in ``tests/e2e``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from d2llm.core.errors import InputError
from d2llm.models.remote.kept_answers import KeptAnswers

REQUEST, ANSWER = {"model": "m", "prompt": "p"}, {"text": "x", "is_complete": True}


def killed(folder: Path, to: Path, purpose: str = "labels") -> Path:
    """What a process leaves in ``to`` that is killed after the same answer came twice; the path of its file."""
    answers = KeptAnswers(folder, purpose)
    with answers.used():
        assert answers.take(REQUEST) is None
        answers.add(REQUEST, ANSWER)
        answers.add(REQUEST, ANSWER | {"text": "y"})
        shutil.copytree(folder, to, dirs_exist_ok=True)  # its lock is that of nobody
        answers.clear()
    assert not folder.exists()
    (path,) = to.glob("*.jsonl")
    return path


def test_each_answer_is_given_once_and_only_for_its_purpose(tmp_path: Path):
    path = killed(tmp_path / "a", tmp_path / "b")
    path.write_text(path.read_text() + '{"request": "unfini')
    others = KeptAnswers(tmp_path / "b", "other labels")
    with others.used():
        assert others.take(REQUEST) is None
        others.clear()  # keeps what it did not use
        answers = KeptAnswers(tmp_path / "b", "labels")
        with answers.used():
            assert answers.take(REQUEST) is None  # the file of a process that is alive
    with answers.used():
        assert answers.take(REQUEST) == ANSWER
        assert answers.take({**REQUEST, "prompt": "q"}) is None
        assert answers.take(REQUEST) == ANSWER | {"text": "y"}
        assert answers.take(REQUEST) is None
        answers.clear()
    assert not (tmp_path / "b").exists()


def test_a_damaged_line_is_named(tmp_path: Path):
    path = killed(tmp_path / "a", tmp_path / "b")
    path.write_text("[1]\n" + path.read_text())
    answers = KeptAnswers(tmp_path / "b", "labels")
    with answers.used(), pytest.raises(InputError, match=r"jsonl:1: is not an answer .* delete the line"):
        answers.take(REQUEST)
    path.write_text(path.read_text().partition("\n")[2])
    with KeptAnswers(tmp_path / "b", "labels").used():
        pass
    with answers.used():
        assert answers.take(REQUEST) == ANSWER
