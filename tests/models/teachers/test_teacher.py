"""``Teacher``, the public face of all kinds of teachers."""

from __future__ import annotations

from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from d2llm.core.errors import InputError, ModelNotFoundError
from d2llm.models.teachers.pair_teacher import gives_grades, load_teacher, ranks_lists
from d2llm.models.teachers.teacher import Teacher
from d2llm.recipe import TeacherConfig
from d2llm.recipe.recipe import named_teacher
from d2llm.retrieval.index import Index
from fake_models import FakeStudent
from rerankers import teacher_reading
from tiny_models import TEXTS, tiny_teacher_config, write_tiny_model

PAIRS = [(TEXTS[0], text) for text in TEXTS[1:6]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "llama")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return Teacher.load(folder, device="cpu", dtype="float32")


def test_it_scores_as_the_teacher_of_its_kind(folder: Path, teacher: Teacher):
    model = load_teacher(named_teacher(str(folder)), device="cpu", dtype="float32")
    for task in ("asymmetric", "symmetric"):
        np.testing.assert_array_equal(teacher.score(PAIRS, task), model.score_pairs(PAIRS, task).log_odds)
        assert teacher.prompt_fingerprint(task) == model.prompt_fingerprint(task)
    np.testing.assert_array_equal(teacher.score(PAIRS), teacher.score(PAIRS, "asymmetric"))
    assert teacher.score(PAIRS).shape == (5,)
    assert teacher.fingerprint == model.fingerprint
    assert not ranks_lists(teacher)
    assert not gives_grades(teacher)


def test_a_section_or_a_kind_names_it_too(folder: Path, teacher: Teacher):
    config = TeacherConfig(model=str(folder))
    assert Teacher.load(config, device="cpu", dtype="float32").fingerprint == teacher.fingerprint
    named = Teacher.load(f"causal:{folder}", device="cpu", dtype="float32")
    assert named.config.kind == "causal"
    assert Teacher.load(tiny_teacher_config(folder, max_tokens=64), device="cpu").config.max_tokens == 64
    with pytest.raises(ModelNotFoundError):
        Teacher.load("no-such-model-here")


def test_it_is_a_teacher_wherever_one_is_taken(teacher: Teacher, tmp_path: Path):
    index = Index.create(tmp_path / "index", FakeStudent())
    index.upsert([{"id": str(number), "text": text} for number, text in enumerate(TEXTS)])
    ranking = index.search(TEXTS[0], top_k=3, rerank=teacher_reading(teacher, 3))
    read = [result for result in ranking if result.log_odds is not None]
    assert read
    for result in read:
        expected = teacher.score([(TEXTS[0], result.passage.text)])[0]
        assert result.log_odds == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("wrong", ["ab", [("a", "b"), "cd"], [("a",)], [("a", 7)], ("a", "b"), 7])
def test_what_are_no_pairs_is_refused(teacher: Teacher, wrong: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(InputError, match="pairs"):
        teacher.score(wrong)  # pyright: ignore[reportArgumentType]


def test_a_closed_one_says_so(folder: Path):
    with Teacher.load(folder, device="cpu", dtype="float32") as teacher:
        assert len(teacher.score(PAIRS)) == 5
    assert repr(teacher) == f"Teacher({folder}, kind auto, closed)"
    for use in (lambda: teacher.score(PAIRS), lambda: teacher.fingerprint, lambda: teacher.__enter__()):
        with pytest.raises(InputError, match=r"was closed; load it again with Teacher\.load"):
            use()
    teacher.close()
