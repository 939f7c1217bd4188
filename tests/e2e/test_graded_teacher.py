"""A model that grades lists in words, behind a real endpoint, wherever a teacher is used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from d2llm.core.errors import InputError, RecipeError
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, TrainingSource
from d2llm.evaluation import pool_scores
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import identify_teacher, load_teacher
from d2llm.recipe import GateConfig, LabellingConfig, TeacherConfig
from d2llm.recipe.recipe import named_teacher, parse_recipe
from d2llm.training.ensemble_teachers import ensemble_teachers
from d2llm.training.gate import gate
from d2llm.training.label import LabelReport, label
from fake_models import FakeStudent
from list_endpoint import judged_lists, list_teacher
from local_endpoint import LocalEndpoint, Reply, Request, chat, local_endpoint
from tiny_data import everyday, make_source, topics
from tiny_models import tiny_student_config, write_tiny_model

NUM_QUERIES = 12
PRICES = {"price_per_million_prompt_tokens": 1_000.0, "price_per_million_written_tokens": 5_000.0}


def grader(request: Request, number: int) -> Reply:
    """Grades by length; a passage that answers a query of ``everyday`` gets 62, which is little for an answer."""
    query = re.findall(r"^Query: (.*)$", request.prompt, re.M)[0]
    texts = re.findall(r"^\[\d+\] (.*)$", request.prompt, re.M)
    grades = [62 if text[0] == query[0] and text.endswith("2") else len(text) % 60 for text in texts]
    answer = "\n".join(f"[{position}] {grade}" for position, grade in enumerate(grades, start=1))
    return Reply(chat(answer, usage=(10 * len(texts), len(texts))))


def config(url: str, **lists: int) -> TeacherConfig:
    values = {"kind": "graded", "model": "grader", "remote": {"url": url, **PRICES}, "lists": lists}
    return TeacherConfig.model_validate(values)


@pytest.fixture(scope="module")
def source() -> TrainingSource:
    return topics(num_train=NUM_QUERIES)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_scores, "_PAIRS_AT_ONCE", 1)  # a query at a time


def labelled(source: TrainingSource, store: Path, endpoint: LocalEndpoint, **limits: float) -> LabelReport:
    settings = LabellingConfig.model_validate(limits)
    return label([source], store, teacher=config(endpoint.url), settings=settings)


def test_labels_have_grades_and_cost(source: TrainingSource, tmp_path: Path) -> None:
    with local_endpoint(grader) as endpoint:
        report = labelled(source, tmp_path, endpoint)
        identity = identify_teacher(config(endpoint.url))
        again = labelled(source, tmp_path, endpoint)
    num_pairs = sum(len(entry.passage_ids) for entry in source.plan.entries)
    assert (report.pairs, report.ended_by, report.unfinished_pairs) == (num_pairs, None, 0)
    assert (report.tokens, report.written_tokens) == (10 * num_pairs, num_pairs)
    assert report.cost == pytest.approx(num_pairs * (10 * 1_000 + 5_000) / 1e6)
    assert (again.pairs, again.cost) == (0, 0)
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts[source.task]}
    store = LabelStore(tmp_path, **key, dataset=source.dataset.name)
    for entry in source.plan.entries:
        grades = store.grades(entry.query_id)
        assert set(grades) == {*entry.passage_ids}
        assert store.log_odds(entry.query_id) == pytest.approx({name: (g - 70) / 12 for name, g in grades.items()})


def test_a_teacher_that_ranks_judges_the_whole_list_again_when_a_passage_is_new(tmp_path: Path) -> None:
    passages = {f"p{n}": "cats " * n for n in range(5)}
    first, longer = (
        make_source(passages, {"q": "cats"}, [PlanEntry("q", ("p4",), hard, ())])
        for hard in (("p1", "p2"), ("p1", "p3"))
    )
    with list_teacher(tmp_path, "listwise") as (file, endpoint):
        teacher = named_teacher(str(file))
        label([first], tmp_path / "labels", teacher=teacher)
        report = label([longer], tmp_path / "labels", teacher=teacher)
        repeated = label([longer], tmp_path / "labels", teacher=teacher)
        shown = [len(judged_lists(request)[1]) for request in endpoint.requests]
    assert (report.pairs, repeated.pairs) == (3, 0)
    assert shown == [1, 3, 1, 3]  # a trial before each


def test_the_gate_opens_for_it_and_an_ensemble_of_it_alone_calibrates_its_grades(tmp_path: Path) -> None:
    with local_endpoint(grader) as endpoint:
        teacher = config(endpoint.url)
        model = write_tiny_model(tmp_path / "bert", "bert")
        student = Student.create(tiny_student_config(model, tuning="frozen"), dtype="float32")
        report = gate(
            [(everyday(), "asymmetric")],
            tmp_path / "run",
            teacher=teacher,
            student=student,
            settings=GateConfig(queries=12, depth=8),
        )
        (row,) = report.sets
        assert row.teacher == 1
        ensemble = ensemble_teachers(
            [(everyday(), "asymmetric")],
            tmp_path / "ensemble",
            members=[teacher],
            student=FakeStudent(),
            num_queries=12,
            depth=8,
        )
        alone, _ = ensemble.tasks["asymmetric"].rows
        assert alone.before is not None
        assert alone.after.log_loss < alone.before.log_loss
        calibrated = load_teacher(TeacherConfig(model=str(tmp_path / "ensemble")))
        judged = calibrated.score_pairs([("a?", "a 2"), ("a?", "b 1")], "asymmetric")
    good, bad = judged.log_odds
    assert good > 0 > bad
    assert (judged.num_tokens, judged.num_written_tokens) == (20, 2)
    assert judged.cost == pytest.approx((20 * 1_000 + 2 * 5_000) / 1e6)


def test_a_recipe_says_what_does_not_go_with_it() -> None:
    teacher = {"kind": "graded", "model": "grader", "remote": {"url": "http://one/v1"}}
    with pytest.raises(RecipeError, match=r"imitates a teacher's features.*set losses\.feature_imitation = 0"):
        parse_recipe({"teacher": teacher, "losses": {"feature_imitation": 0.5}})
    recipe = parse_recipe({"teacher": teacher})
    assert parse_recipe(json.loads(recipe.model_dump_json())) == recipe  # as a manifest records it
    with pytest.raises(RecipeError, match=r"max_cost needs prices"):
        parse_recipe({"teacher": teacher, "labelling": {"max_cost": 1}})
    with pytest.raises(InputError, match="has no address"):
        load_teacher(TeacherConfig(kind="graded", model="grader"))
