"""A student that was trained for one task is used for that task, everywhere, unless told otherwise."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2llm.core.types import Passage, Task
from d2llm.data.beir import read_beir
from d2llm.evaluation.contenders import Contenders
from d2llm.evaluation.evaluate import evaluate
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.models.protocols import task_for
from d2llm.models.student import Student
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.sizing.index_bytes import StudentFacts
from d2llm.sizing.plan import SizePlan
from e2e.command_line import fail, succeed, succeed_with_report, write_data
from fake_models import FakeStudent
from tiny_models import TEXTS, write_trained_student

MISMATCH = "trained for symmetric search and is used for asymmetric search"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose manifest says that it was trained for symmetric search alone."""
    root = tmp_path_factory.mktemp("symmetric")
    trained = Student.load(write_trained_student(root), device="cpu", dtype="float32")
    trained.save(root / "student", content={"tasks": ["symmetric"]})
    return root / "student"


@pytest.fixture(scope="module")
def student(folder: Path) -> Student:
    return Student.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("data") / "mini"
    write_data(workspace)
    return workspace


def passages() -> list[Passage]:
    return [Passage(str(number), text) for number, text in enumerate(TEXTS)]


def scores(student: Student, query: str, task: Task) -> list[float]:
    vector = student.encode_queries([query]).vectors[0]
    return student.score(vector, student.encode_passages(TEXTS).vectors, task).tolist()


class Trained(FakeStudent):
    def __init__(self, *tasks: Task) -> None:
        super().__init__()
        self._tasks = tasks

    @property
    def trained_tasks(self):
        return self._tasks


@pytest.mark.parametrize(
    ("trained", "told", "used", "warns"),
    [
        ((), None, "asymmetric", False),
        ((), "symmetric", "symmetric", False),
        (("symmetric",), None, "symmetric", False),
        (("asymmetric",), None, "asymmetric", False),
        (("symmetric", "asymmetric"), None, "asymmetric", False),
        (("symmetric", "asymmetric"), "symmetric", "symmetric", False),
        (("symmetric",), "symmetric", "symmetric", False),
        (("symmetric",), "asymmetric", "asymmetric", True),
        (("asymmetric",), "symmetric", "symmetric", True),
    ],
)
def test_the_task_is_the_one_told_or_the_one_trained_for(
    trained: tuple[Task, ...], told: Task | None, used: Task, warns: bool, caplog
):
    assert task_for(Trained(*trained), told) == used
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warns
    assert task_for(FakeStudent(), None) == "asymmetric"  # knows of no tasks


def test_a_students_manifest_says_its_tasks(student: Student, folder: Path, tmp_path: Path) -> None:
    assert student.trained_tasks == ("symmetric",)
    student.save(tmp_path / "copy")
    assert Student.load(tmp_path / "copy", device="cpu").trained_tasks == ("symmetric",)
    assert 'task="symmetric"' in (tmp_path / "copy" / "README.md").read_text(encoding="utf-8")
    assert Student.load("d2llm-minilm", device="cpu").trained_tasks == ("symmetric", "asymmetric")
    vectors = student.encode_queries(TEXTS[:2]).vectors
    assert np.array_equal(student.query_vectors(vectors), student.query_vectors(vectors, "symmetric"))
    assert not np.allclose(student.query_vectors(vectors), student.query_vectors(vectors, "asymmetric"))


def test_an_index_is_for_the_task_of_its_student(student, folder, tmp_path, caplog):
    index = Index.create(tmp_path / "created", folder, device="cpu", dtype="float32")
    index.upsert(passages())
    assert index.view.task == "symmetric"
    ranking = index.search(TEXTS[0], top_k=len(TEXTS))
    expected = scores(student, TEXTS[0], "symmetric")
    found = {result.passage.id: result.score for result in ranking.passages}
    assert [found[str(number)] for number in range(len(TEXTS))] == pytest.approx(expected, abs=1e-2)
    encode(passages(), student, tmp_path / "encoded")
    assert Index.open(tmp_path / "encoded", student).view.task == "symmetric"
    assert not caplog.records
    index.search("snow", task="symmetric")
    assert not caplog.records
    index.search("snow", task="asymmetric")
    assert MISMATCH in caplog.text
    caplog.clear()
    Index.create(tmp_path / "told", student, task="asymmetric")
    assert MISMATCH in caplog.text
    caplog.clear()
    encode(passages(), student, tmp_path / "told-too", task="asymmetric")
    assert len(caplog.records) == 1


def test_an_evaluation_measures_the_task_of_its_student(student, data, caplog):
    dataset = read_beir(data)

    def measured(task: Task | None) -> Any:
        settings = EvaluationSettings(task=task, latency_queries=1, baseline="bm25", score_parts=False)
        return evaluate(dataset, Contenders(student=student), settings)

    own, told, other = measured(None), measured("symmetric"), measured("asymmetric")
    assert (own.task, told.task, other.task) == ("symmetric", "symmetric", "asymmetric")
    assert own.settings["task"] == "symmetric"
    assert own.details.rankings == told.details.rankings
    assert own.details.rankings != other.details.rankings
    assert [MISMATCH in record.getMessage() for record in caplog.records] == [True]


def test_every_verb_takes_the_task_of_the_student(folder: Path, data: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    made = succeed("index", index, "upsert", data / "corpus.jsonl", "--student", folder)
    assert json.loads((index / "manifest.json").read_text())["task"] == "symmetric"
    assert "warning" not in made.stderr
    assert MISMATCH in succeed("search", index, "the cat", "--task", "asymmetric").stderr
    assert "warning" not in succeed("search", index, "the cat", "--task", "symmetric").stderr
    told = succeed(
        "index", tmp_path / "told", "upsert", data / "corpus.jsonl", "--student", folder, "--task", "asymmetric"
    )
    assert MISMATCH in told.stderr
    _, report = succeed_with_report("evaluate", data, "--student", folder, "--no-teacher", folder=tmp_path)
    assert report["result"]["task"] == "symmetric"
    result, report = succeed_with_report(
        "evaluate", data, "--student", folder, "--no-teacher", "--task", "asymmetric", folder=tmp_path
    )
    assert report["result"]["task"] == "asymmetric"
    assert MISMATCH in result.stderr
    _, report = succeed_with_report(
        "probe", folder, "--persons", "5", "--distractors", "0", "--scenes", "20", folder=tmp_path
    )
    assert report["result"]["task"] == "symmetric"
    fitted = ["fit-scores", folder, data, "--no-words"]
    _, report = succeed_with_report(*fitted, "--out", tmp_path / "fitted", folder=tmp_path)
    assert report["result"]["task"] == "symmetric"
    fail("index", index, "upsert", data / "corpus.jsonl", "--task", "asymmetric", containing=["exists already"])


def test_a_planned_index_is_for_the_task_of_its_student(student: Student) -> None:
    facts = {
        task: StudentFacts.of_student(student, SizePlan(passages=100, task=task))
        for task in (None, "symmetric", "asymmetric")
    }
    assert facts[None] == facts["symmetric"]


def test_a_server_scores_for_the_task_of_its_student(student: Student, folder: Path) -> None:
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    import httpx2

    from d2llm.server.app import make_app
    from d2llm.server.settings import ServeSettings
    from live_server import serve, wait_until_ready

    with serve(make_app(ServeSettings(student=str(folder), device="cpu", dtype="float32"))) as address:
        wait_until_ready(address)
        body = {"query": TEXTS[0], "texts": TEXTS, "raw_scores": True}
        answer = httpx2.post(f"{address}/rerank", json=body).json()
    got = {each["index"]: each["score"] for each in answer}
    assert [got[index] for index in range(len(TEXTS))] == pytest.approx(
        scores(student, TEXTS[0], "symmetric"), abs=1e-3
    )


def test_adapters_take_the_task_of_the_student(student: Student, folder: Path) -> None:
    vector = student.query_vectors(student.encode_queries([TEXTS[0]]).vectors, "symmetric")[0]
    pytest.importorskip("langchain_core", reason="needs LangChain: pip install 'd2llm[langchain]'")
    from langchain_core.documents import Document

    from d2llm.integrations.langchain import D2LLMEmbeddings, D2LLMReranker

    assert D2LLMEmbeddings(student).embed_query(TEXTS[0]) == pytest.approx(vector, abs=1e-5)
    documents = [Document(page_content=text) for text in TEXTS]
    reranked = D2LLMReranker(student=student).compress_documents(documents, TEXTS[0])
    expected = sorted(scores(student, TEXTS[0], "symmetric"), reverse=True)
    assert [each.metadata["relevance_score"] for each in reranked] == pytest.approx(expected, abs=1e-4)
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    from d2llm.integrations.sentence_transformers import StudentCrossEncoder, as_sentence_transformer

    assert as_sentence_transformer(student).encode_query(TEXTS[0]) == pytest.approx(vector, abs=1e-5)
    predicted = StudentCrossEncoder(student).predict([(TEXTS[0], text) for text in TEXTS])
    assert sorted(np.asarray(predicted).tolist(), reverse=True) == pytest.approx(expected, abs=1e-4)
    pytest.importorskip("llama_index.core", reason="needs LlamaIndex: pip install 'd2llm[llama-index]'")
    from d2llm.integrations.llama_index import D2LLMEmbedding

    assert D2LLMEmbedding(student=student).get_query_embedding(TEXTS[0]) == pytest.approx(vector, abs=1e-5)
    pytest.importorskip("haystack", reason="needs Haystack: pip install 'd2llm[haystack]'")
    from d2llm.integrations.haystack import D2LLMTextEmbedder

    embedded = D2LLMTextEmbedder(str(folder), device="cpu", dtype="float32").run(TEXTS[0])["embedding"]
    assert embedded == pytest.approx(vector, abs=1e-5)
