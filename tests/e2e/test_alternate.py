"""Student and teacher in turns: each learns the other's scores, and no judgement reaches the training."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2llm.core.errors import InputError, RecipeError
from d2llm.data.labels import LabelStore, QueryLabels, label_keys
from d2llm.data.plan import TrainingPair, TrainingSource, labelled_pairs
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import load_teacher
from d2llm.recipe import LoraConfig, Pretraining, Recipe, TeacherTuningConfig
from d2llm.recipe.losses import Objective
from d2llm.training import alternate as verb
from d2llm.training.alternate import alternate, recipe_of_round
from d2llm.training.tune_teacher import tune_teacher, with_labels, with_student_scores
from tiny_data import JUDGEMENTS, tiny_recipe, topics
from tiny_models import tiny_student_config, tiny_teacher_config, write_tiny_model, write_trained_student

CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("models")
    tuning = {"lora": LoraConfig(rank=4, alpha=8.0, dropout=0.0), "learning_rate": 5e-3, "batch_pairs": 8, "epochs": 6}
    return tiny_recipe(
        tiny_student_config(write_tiny_model(folder / "student", "modernbert", initializer_range=0.1)),
        losses=Objective(JUDGEMENTS | {"list_imitation": 1.0}),
    ).model_copy(
        update={
            "teacher": tiny_teacher_config(write_tiny_model(folder / "teacher", "llama")),
            "teacher_tuning": TeacherTuningConfig.model_validate(tuning),
        }
    )


@pytest.fixture(scope="module")
def sources() -> list[TrainingSource]:
    return [topics()]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_student(tmp_path_factory.mktemp("trained"))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def test_targets_are_the_mean_scores_of_students_around_their_mean(recipe: Recipe, student: Path) -> None:
    students = [Student.load(student, **CPU), Student.create(recipe.student, **CPU)]
    pairs = labelled_pairs([topics(), topics(num_train=8, task="symmetric")], num_negatives=2, max_queries=None, seed=0)
    scored = with_student_scores(pairs, students)
    assert [replace(pair, target=0.0) for pair in scored] == [replace(pair, target=0.0) for pair in pairs]
    for task in ("asymmetric", "symmetric"):
        chosen = [pair for pair in scored if pair.task == task]
        scores = np.array([[_score(one, pair) for pair in chosen] for one in students])
        expected = 1 / (1 + np.exp((scores.mean(axis=1, keepdims=True) - scores).mean(axis=0)))
        np.testing.assert_allclose([pair.target for pair in chosen], expected, atol=1e-4)
        assert expected.std() > 0.05


def _score(student: Student, pair: TrainingPair) -> float:
    query, passage = student.encode_queries([pair.query]).vectors[0], student.encode_passages([pair.passage]).vectors
    return float(student.score(query, passage, pair.task)[0])


def test_a_teacher_learns_the_scores_of_a_student(recipe, sources, student, tmp_path):
    tuning = recipe.teacher_tuning.model_copy(update={"students": (str(student),)})
    tune_teacher(sources, tmp_path / "teacher", teacher=recipe.teacher, tuning=tuning, **CPU)
    pairs = labelled_pairs(sources, num_negatives=4, max_queries=None, seed=0)
    targets = [pair.target for pair in with_student_scores(pairs, [Student.load(student, **CPU)])]
    texts = [(pair.query, pair.passage) for pair in pairs]
    tuned = recipe.teacher.model_copy(update={"model": str(tmp_path / "teacher")})
    before, after = (
        np.corrcoef(load_teacher(each, **CPU).score_pairs(texts, "asymmetric").log_odds, targets)[0, 1]
        for each in (recipe.teacher, tuned)
    )
    assert after > max(0.5, before + 0.2)
    assert manifest(tmp_path / "teacher")["settings"]["learns_from"] == Student.load(student).fingerprint


def test_a_teacher_learns_the_labels_of_another(recipe: Recipe, sources: list[TrainingSource], tmp_path: Path) -> None:
    """Targets are P(yes) of the labelled pairs; a query without labels keeps its judgements."""
    [source] = sources
    first, *others = source.plan.entries
    store = LabelStore(tmp_path / "labels", teacher="t", prompt="p", dataset=source.dataset.name)
    for entry in others:  # the opposite of the judgements
        log_odds = np.where([name in entry.positives for name in entry.passage_ids], -3.0, 2.0).astype(np.float32)
        store.write([QueryLabels(entry.query_id, entry.passage_ids, log_odds)])
    pairs = labelled_pairs(sources, num_negatives=4, max_queries=None, seed=0)
    labelled, made_by = with_labels(pairs, sources, tmp_path / "labels")
    unlabelled = source.query_text(first.query_id)
    for before, after in zip(pairs, labelled, strict=True):
        expected = before.target if before.query == unlabelled else 1 / (1 + np.exp(3 if before.target else -2))
        assert after == replace(before, target=after.target)
        assert after.target == pytest.approx(expected)
    tuning = recipe.teacher_tuning.model_copy(update={"labels": str(tmp_path / "labels")})
    tune_teacher(sources, tmp_path / "teacher", teacher=recipe.teacher, tuning=tuning, **CPU)
    assert manifest(tmp_path / "teacher")["settings"]["learns_from"] == made_by
    tuned = load_teacher(recipe.teacher.model_copy(update={"model": str(tmp_path / "teacher")}), **CPU)
    scores = tuned.score_pairs([(pair.query, pair.passage) for pair in labelled], "asymmetric").log_odds
    assert np.corrcoef(scores, [pair.target for pair in labelled])[0, 1] > 0.5


def test_labels_of_two_teachers_or_of_other_pairs_are_refused(sources: list[TrainingSource], tmp_path: Path) -> None:
    [source] = sources
    pairs = labelled_pairs(sources, num_negatives=1, max_queries=None, seed=0)
    label = [QueryLabels("unknown", ("passage",), np.zeros(1, np.float32))]
    LabelStore(tmp_path, teacher="t", prompt="p", dataset=source.dataset.name).write(label)
    with pytest.raises(InputError, match="no label of any pair"):
        with_labels(pairs, sources, tmp_path)
    LabelStore(tmp_path, teacher="other", prompt="p", dataset=source.dataset.name).write(label)
    with pytest.raises(InputError, match="several teachers"):
        with_labels(pairs, sources, tmp_path)
    with pytest.raises(InputError, match="students or from labels"):
        TeacherTuningConfig(students=("s",), labels="l")


def test_rounds_follow_one_another_and_learn_from_no_judgements(recipe, sources, tmp_path, monkeypatch, caplog):
    rounds = alternate(sources, tmp_path / "run", recipes=[recipe], rounds=2, **CPU)
    first, second = (tmp_path / "run" / f"round-{number}" for number in (1, 2))
    assert [each.student for each in rounds] == [str(first / "student"), str(second / "student")]
    untrained = Student.create(recipe.student, **CPU).fingerprint
    assert manifest(tmp_path / "run" / "start")["fingerprint"] == untrained
    assert manifest(first / "teacher")["settings"]["learns_from"] == untrained
    assert manifest(second / "teacher")["settings"]["learns_from"] == manifest(first / "student")["fingerprint"]
    assert manifest(second / "student")["settings"]["started_from"] == manifest(first / "student")["fingerprint"]
    for each in rounds:
        assert each.dev["tiny"]["kept"] >= each.dev["tiny"]["start"]
        logged = (Path(each.student).with_name("student.run") / "log.jsonl").read_text(encoding="utf-8")
        assert "list_imitation" in logged
        assert "cross_entropy" not in logged
    monkeypatch.setattr(verb, "tune_teacher", None)  # finished parts are not made again
    monkeypatch.setattr(verb, "distill", None)
    assert alternate(sources, tmp_path / "run", recipes=[recipe], rounds=2, **CPU) == rounds
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        alternate(sources, tmp_path / "run", recipes=[recipe.model_copy(update={"seed": 5})], rounds=1, **CPU)
    assert "seed (was 0, is 5)" in caplog.text


def test_two_models_learn_the_mean_of_what_both_say(recipe, sources, tmp_path):
    """Mutual distillation, whose teachers go on from round to round."""
    backbone = write_tiny_model(tmp_path / "backbone", "modernbert", seed=7, initializer_range=0.1)
    teacher = tiny_teacher_config(write_tiny_model(tmp_path / "teacher", "llama", seed=7))
    changes = {"name": "other", "student": tiny_student_config(backbone), "teacher": teacher}
    recipes = [recipe.model_copy(update={"name": "one"}), recipe.model_copy(update=changes)]
    rounds = alternate(sources, tmp_path / "run", recipes=recipes, rounds=2, continue_teachers=True, **CPU)
    folders = [[tmp_path / "run" / f"round-{number}" / one.name for one in recipes] for number in (1, 2)]
    assert [each.student for each in rounds] == [str(one / "student") for both in folders for one in both]
    before = [Student.create(one.student, **CPU).fingerprint for one in recipes]
    for teachers, both in zip(([None, None], folders[0]), folders, strict=True):
        for earlier, one in zip(teachers, both, strict=True):
            settings = manifest(one / "teacher")["settings"]
            assert settings["learns_from"] == " ".join(before)
            if earlier is not None:
                assert settings["model"] == manifest(earlier / "teacher")["fingerprint"]
        before = [manifest(one / "student")["fingerprint"] for one in both]
    labels = tmp_path / "run" / "round-2" / "labels"
    [key] = label_keys(labels)
    entry = sources[0].plan.entries[0]
    texts = [(sources[0].query_text(entry.query_id), sources[0].passage_text(name)) for name in entry.passage_ids]
    tuned = [load_teacher(recipe.teacher.tuned(str(one / "teacher")), **CPU) for one in folders[1]]
    one, other = (teacher.score_pairs(texts, "asymmetric").log_odds for teacher in tuned)
    assert np.abs(one - other).max() > 0.01
    known = LabelStore.of(labels, key).log_odds(entry.query_id)
    np.testing.assert_allclose([known[name] for name in entry.passage_ids], (one + other) / 2, atol=1e-4)
    with pytest.raises(InputError, match="two recipes are called 'one'"):
        alternate(sources, tmp_path / "run", recipes=[recipes[0], recipes[0]], rounds=1, **CPU)


def test_a_recipe_that_cannot_alternate_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rounds is 0, but must be at least 1"):
        alternate([], tmp_path, recipes=[recipe], rounds=0)
    judgements = recipe.model_copy(update={"losses": Objective(JUDGEMENTS)})
    with pytest.raises(InputError, match="no loss of the recipe imitates a teacher"):
        recipe_of_round(judgements, 1, ["start"], "start")
    untuned = recipe.model_copy(update={"teacher_tuning": TeacherTuningConfig(epochs=0)})
    with pytest.raises(RecipeError, match="set epochs above 0"):
        recipe_of_round(untuned, 1, ["start"], "start")
    ranked = recipe.model_copy(update={"teacher_tuning": TeacherTuningConfig(dev_measure="mrr")})
    with pytest.raises(RecipeError, match="dev_measure mrr needs the data sets' judgements"):
        recipe_of_round(ranked, 1, ["start"], "start")
    two_heads = recipe.model_copy(update={"training": recipe.training.model_copy(update={"dual_head": True})})
    nested = recipe.model_copy(update={"losses": recipe.losses.with_losses({"nested_cross_entropy": {"dims": (4,)}})})
    with pytest.raises(InputError, match="nested_cross_entropy is trained on judgements"):
        recipe_of_round(nested, 1, ["start"], "start")
    first = recipe.training.model_copy(update={"pretraining": (Pretraining.of("simcse"),)})
    with pytest.raises(InputError, match="pretraining prepares the backbone of a new student"):
        recipe_of_round(recipe.model_copy(update={"training": first}), 1, ["start"], "start")
    with pytest.raises(InputError, match="dual_head has a head for judgements"):
        recipe_of_round(two_heads, 1, ["start"], "start")
