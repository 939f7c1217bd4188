"""``d2llm fit`` with a teacher that grades or ranks lists behind an endpoint, and with recorded grades."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d2llm.data.beir import read_beir
from d2llm.data.labels import LabelStore
from d2llm.data.plan import read_plan
from d2llm.fitting import time_plan
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import identify_teacher, recorded_teacher
from d2llm.recipe import TeacherConfig
from d2llm.recipe.recipe import named_teacher
from e2e.command_line import fail, succeed_with_report, write_lines
from list_endpoint import grade, judged_lists, list_teacher, shared_words
from local_endpoint import LocalEndpoint, local_endpoint
from tiny_fit import ask_about_passage, write_documents
from tiny_models import tiny_student_config, write_tiny_model


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    model = write_tiny_model(folder / "model", "bert")
    Student.create(tiny_student_config(model), device="cpu", dtype="float32").save(folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def writer() -> Iterator[LocalEndpoint]:
    with local_endpoint(ask_about_passage) as endpoint:
        yield endpoint


@pytest.fixture(scope="module", autouse=True)
def short_trainings() -> Iterator[None]:
    """One epoch: what is taught matters here, not how well it is learnt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_plan, "usual_epochs", lambda *_, **__: 1)
        yield


def run_fit(folder: Path, student: Path, writer: LocalEndpoint, *teacher: object) -> dict[str, Any]:
    """The report of a fit to a few documents."""
    arguments = ("fit", write_documents(folder / "docs", 32), "--student", student, "--dtype", "float32")
    endpoint = ("--endpoint", writer.url, "--writer", "served", "--minutes", 60)
    return succeed_with_report(*arguments, *endpoint, *teacher, folder=folder)[1]["result"]


def taught_labels(folder: Path, teacher: TeacherConfig) -> dict[str, dict[str, float]]:
    """The log-odds that the fit's student learnt from, by the texts of query and passage."""
    identity = identify_teacher(teacher)
    (run,) = (folder / "docs.search" / "work").glob("run-*-taught")
    assert json.loads((run / "student" / "manifest.json").read_text())["teacher"] == identity.fingerprint
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts["asymmetric"], "dataset": "written"}
    labels = LabelStore.open_for_reading(run / "labels", **key)
    written = read_beir(folder / "docs.search" / "work" / "data" / "written")
    entries = read_plan(run / "plans" / "written").entries
    assert {entry.query_id for entry in entries} == {*labels.query_ids}
    assert all(not labels.missing(entry.query_id, entry.passage_ids) for entry in entries)
    return {
        written.queries[query_id].text: {
            written.passages[name].full_text: value for name, value in labels.log_odds(query_id).items()
        }
        for query_id in labels.query_ids
    }


@pytest.fixture(scope="module")
def graded(tmp_path_factory, student, writer) -> tuple[Path, dict[str, Any], list[tuple[str, list[str]]]]:
    """The folder and the report of a fit with a graded teacher, and the lists that it was shown."""
    folder = tmp_path_factory.mktemp("graded")
    with list_teacher(folder, "graded") as (file, endpoint):
        report = run_fit(folder, student, writer, "--teacher", file)
        return folder, report, [judged_lists(request) for request in endpoint.requests]


def test_a_graded_teacher_reviews_the_queries_and_teaches_the_student(graded):
    folder, report, _ = graded
    assert report["rejected"]["not answered"] > 0  # a query with few words of its passage
    assert report["num_kept"] > 0
    assert report["notes"] == []
    for query, passages in taught_labels(folder, named_teacher(str(folder / "graded.toml"))).items():
        for passage, log_odds in passages.items():
            assert log_odds == pytest.approx((grade(query, passage) - 70) / 12, abs=1e-5)


def test_recorded_grades_make_the_same_fit(graded, student, writer, tmp_path):
    folder, report, shown = graded
    teacher = named_teacher("graded:counts-words")
    lists = tmp_path / "lists.jsonl"
    lines = [{"query": q, "passages": ps, "grades": [grade(q, p) for p in ps]} for q, ps in shown]
    write_lines(lists, lines)
    options = ("--teacher", "graded:counts-words", "--recorded", lists)
    repeated = run_fit(tmp_path, student, writer, *options)
    assert {name: repeated[name] for name in ("num_kept", "rejected", "data", "notes")} == {
        name: report[name] for name in ("num_kept", "rejected", "data", "notes")
    }
    live = named_teacher(str(folder / "graded.toml"))
    assert taught_labels(tmp_path, recorded_teacher(teacher, lists)) == taught_labels(folder, live)


def test_a_listwise_teacher_compares_and_rejects_nothing(tmp_path: Path, student: Path, writer: LocalEndpoint) -> None:
    with list_teacher(tmp_path, "listwise") as (file, endpoint):
        report = run_fit(tmp_path, student, writer, "--teacher", file)
        assert all(len(judged_lists(request)[1]) > 1 for request in endpoint.requests[1:] if "zorb" in request.prompt)
    assert "not answered" not in report["rejected"]
    for query, passages in taught_labels(tmp_path, named_teacher(str(file))).items():
        best_first = sorted(passages, key=lambda passage: -passages[passage])
        shared = [shared_words(query, passage) for passage in best_first]
        assert shared == sorted(shared, reverse=True)


def test_a_teacher_that_cannot_be_used_is_an_error_before_anything_is_written(tmp_path: Path, student: Path) -> None:
    documents = write_documents(tmp_path / "docs", 3)
    with local_endpoint(ask_about_passage) as writer:
        writing = ("--endpoint", writer.url, "--writer", "served")
        command = ("fit", documents, "--student", student, *writing)
        with list_teacher(tmp_path, "graded") as (file, _):
            pass
        fail(*command, "--teacher", file, containing=["cannot be reached", "teacher.remote.url"])
        fail(*command, "--teacher", "graded:large", containing=["no address", "[teacher.remote]"])
        lists = tmp_path / "lists.jsonl"
        write_lines(lists, [{"query_id": "q", "passages": ["p"], "grades": [1]}])
        fail(*command, "--recorded", lists, containing=["lists.jsonl", "--data"])
        fail(*command, "--recorded", lists, "--teacher", "cosine:large", containing=["graded"])
        fail(*command, "--data", tmp_path, containing=["--recorded"])
        write_lines(lists, [{"query": "q", "passages": ["p"], "grades": [101]}])
        fail(*command, "--recorded", lists, containing=["lists.jsonl:1", "0 to 100"])
        assert writer.requests == []
    assert not (tmp_path / "docs.search").exists()
