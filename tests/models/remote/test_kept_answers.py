"""Answers of an endpoint that a killed process leaves to the next one; ``d2llm label`` is killed in ``tests/e2e``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from d2llm.core.errors import InputError
from d2llm.models.remote.kept_answers import KeptAnswers

REQUEST, ANSWER = {"model": "m", "prompt": "p"}, {"text": "x", "is_complete": True}


def killed(folder: Path, to: Path, purpose: str = "labels") -> None:
    """What a process leaves in ``to`` that is killed after the same answer came twice."""
    answers = KeptAnswers(folder, purpose)
    with answers.used():
        assert answers.take(REQUEST) is None
        answers.add(REQUEST, ANSWER)
        answers.add(REQUEST, ANSWER | {"text": "y"})
        assert answers.take(REQUEST) is None  # its own
        shutil.copytree(folder, to, dirs_exist_ok=True)
        answers.clear()
    assert not folder.exists()


def test_each_answer_is_given_once_and_only_for_its_purpose(tmp_path: Path):
    killed(tmp_path / "a", tmp_path / "b")
    others, answers = (KeptAnswers(tmp_path / "b", purpose) for purpose in ("other labels", "labels"))
    with others.used():
        assert others.take(REQUEST) is None
        others.clear()  # keeps what it did not use
        with answers.used():
            assert answers.take(REQUEST) == ANSWER
            assert answers.take({**REQUEST, "prompt": "q"}) is None
            assert answers.take(REQUEST) == ANSWER | {"text": "y"}
            assert answers.take(REQUEST) is None
            answers.is_broken_off = True
        with answers.used():
            assert answers.take(REQUEST) == ANSWER
            answers.clear()
            answers.add(REQUEST, ANSWER)
        others.add(REQUEST, ANSWER)  # the file is still there for it
        with answers.used():
            assert answers.take(REQUEST) == ANSWER | {"text": "y"}
    assert not (tmp_path / "b").exists()


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "answers.db").write_text("[1]\n" * 2_000)
    answers = KeptAnswers(tmp_path, "labels")
    with pytest.raises(InputError, match=r"answers.db: .* delete the file if it is damaged"), answers.used():
        answers.take(REQUEST)
