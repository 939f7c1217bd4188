"""The key of a teacher's labels is the same whether the model is loaded or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2llm.core.errors import D2LLMError, InputError
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.identity import TeacherIdentity, identify_local_teacher
from d2llm.recipe import LoraConfig, TeacherConfig
from tiny_models import randomise, tiny_teacher_config, write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    teacher = CausalTeacher.load(tiny_teacher_config(base, max_tokens=96), device="cpu", dtype="float32")
    teacher.prepare_training(LoraConfig(rank=2))
    randomise(teacher, seed=1)
    folder = base.with_name("tuned")
    folder.mkdir()
    teacher.save(folder, {})
    return folder


def identity_of_loaded(config: TeacherConfig) -> TeacherIdentity:
    teacher = CausalTeacher.load(config, device="cpu", dtype="float32")
    prompts = {task: teacher.prompt_fingerprint(task) for task in ("symmetric", "asymmetric")}
    return TeacherIdentity(teacher.fingerprint, prompts)


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 64}, {"prompt": "paper"}])
def test_identity_of_a_pretrained_teacher(base: Path, settings: dict[str, object]) -> None:
    config = tiny_teacher_config(base, **settings)
    assert identify_local_teacher(config) == identity_of_loaded(config)


def test_a_tuned_teachers_identity_keeps_its_tuning_settings(base: Path, tuned: Path) -> None:
    identity = identify_local_teacher(TeacherConfig(model=str(tuned), prompt="paper", max_tokens=333))
    assert identity == identity_of_loaded(TeacherConfig(model=str(tuned)))
    untuned = identify_local_teacher(tiny_teacher_config(base, max_tokens=96))
    assert identity.prompts == untuned.prompts
    assert identity.fingerprint != untuned.fingerprint


def test_identity_depends_on_weights_prompt_length_and_task(base: Path, tmp_path: Path) -> None:
    identity = identify_local_teacher(tiny_teacher_config(base))
    other_weights = identify_local_teacher(tiny_teacher_config(write_tiny_model(tmp_path / "other", seed=1)))
    assert other_weights.fingerprint != identity.fingerprint
    assert other_weights.prompts == identity.prompts
    for change in ({"prompt": "paper"}, {"max_tokens": 64}):
        changed = identify_local_teacher(tiny_teacher_config(base, **change))
        assert changed.fingerprint == identity.fingerprint
        assert all(changed.prompts[task] != identity.prompts[task] for task in identity.prompts)
    assert len(set(identity.prompts.values())) == 2


def test_unknown_models_and_prompts_are_reported(base: Path, tmp_path: Path) -> None:
    with pytest.raises(D2LLMError, match="nowhere"):
        identify_local_teacher(tiny_teacher_config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no prompt set 'riddle'"):
        identify_local_teacher(tiny_teacher_config(base, prompt="riddle"))
