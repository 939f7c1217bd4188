"""The key of a teacher's labels is the same whether the model is loaded or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2llm.core.errors import D2LLMError, InputError
from d2llm.core.recipe import LoraConfig, TeacherConfig
from d2llm.models.teachers.causal import FORMAT_VERSION, KIND, Teacher
from d2llm.models.teachers.identity import TEACHER_FORMAT_VERSION, TEACHER_KIND, TeacherIdentity, identify_local_teacher
from tiny_models import randomise, tiny_teacher_config, write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    teacher = Teacher.load(tiny_teacher_config(base, max_tokens=96), device="cpu", dtype="float32")
    teacher.prepare_training(LoraConfig(rank=2))
    randomise(teacher, seed=1)
    folder = base.with_name("tuned")
    folder.mkdir()
    teacher.save(folder, {})
    return folder


def loaded(config: TeacherConfig) -> TeacherIdentity:
    teacher = Teacher.load(config, device="cpu", dtype="float32")
    prompts = {task: teacher.prompt_fingerprint(task) for task in ("symmetric", "asymmetric")}
    return TeacherIdentity(teacher.fingerprint, prompts)


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 64}, {"prompt": "paper"}])
def test_identity_of_a_pretrained_teacher(base: Path, settings: dict[str, object]) -> None:
    config = tiny_teacher_config(base, **settings)
    assert identify_local_teacher(config) == loaded(config)


def test_identity_of_a_tuned_teacher_is_what_it_was_tuned_with(base: Path, tuned: Path) -> None:
    found = identify_local_teacher(TeacherConfig(model=str(tuned), prompt="paper", max_tokens=333))
    assert found == loaded(TeacherConfig(model=str(tuned)))
    as_tuned = identify_local_teacher(tiny_teacher_config(base, max_tokens=96))
    assert found.prompts == as_tuned.prompts
    assert found.fingerprint != as_tuned.fingerprint


def test_weights_prompt_length_and_task_tell_identities_apart(base: Path, tmp_path: Path) -> None:
    own = identify_local_teacher(tiny_teacher_config(base))
    other_weights = identify_local_teacher(tiny_teacher_config(write_tiny_model(tmp_path / "other", seed=1)))
    assert other_weights.fingerprint != own.fingerprint
    assert other_weights.prompts == own.prompts
    for change in ({"prompt": "paper"}, {"max_tokens": 64}):
        changed = identify_local_teacher(tiny_teacher_config(base, **change))
        assert changed.fingerprint == own.fingerprint
        assert all(changed.prompts[task] != own.prompts[task] for task in own.prompts)
    assert len(set(own.prompts.values())) == 2


def test_what_it_reads_is_what_a_teacher_writes() -> None:
    assert (TEACHER_KIND, TEACHER_FORMAT_VERSION) == (KIND, FORMAT_VERSION)


def test_errors(base: Path, tmp_path: Path) -> None:
    with pytest.raises(D2LLMError, match="nowhere"):
        identify_local_teacher(tiny_teacher_config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no prompt set 'riddle'"):
        identify_local_teacher(tiny_teacher_config(base, prompt="riddle"))
