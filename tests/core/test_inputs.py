"""An argument of the wrong type is an error of d2llm that names it, whichever function gets it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

import d2llm
from d2llm import D2LLMError, Index, Passage
from d2llm.core.inputs import pairs_of
from d2llm.retrieval.settings import ContextSettings
from d2llm.retrieval.similar import similar_pairs
from fake_models import FakeStudent
from tiny_models import write_trained_student

CALLS = {
    "Index.open": (lambda: Index.open(5), "folder is 5 (int), but must be a path"),
    "Index.create": (lambda: Index.create(5, FakeStudent()), "folder is 5 (int), but must be a path"),
    "a student": (lambda: Index.create("i", 5), "student is 5 (int), but must be a student, its folder, or a name"),
    "its student": (lambda: (Index.create("i", FakeStudent()), Index.open("i", 5).student), "student is 5 (int), but"),
    "a snapshot": (lambda: Index.create("i", FakeStudent()).snapshot(5), "5 cannot name a snapshot"),
    "a rewriter": (
        lambda: Index.create("i", FakeStudent()).search("a", history="b", rewriter=5),
        "rewriter is 5 (int), but must be a Rewriter",
    ),
    "an expansion": (
        lambda: Index.create("i", FakeStudent()).search("a", expansion=5),
        "expansion is 5 (int), but must be an Expansion",
    ),
    "metadata": (
        lambda: Index.create("i", FakeStudent()).upsert(Passage("a", "b", metadata=5)),
        "the metadata of passage 'a' is 5 (int), but must be a dictionary",
    ),
    "a position": (
        lambda: Index.create("i", FakeStudent()).upsert({"id": "a", "text": "b", "position": -1}),
        "'position' must be a whole number of at least 0, found -1",
    ),
    "a distance": (
        lambda: Index.create("i", FakeStudent()).around([], "x"),
        "distance is 'x' (str), but must be a whole number",
    ),
    "max_tokens": (lambda: ContextSettings(max_tokens="9"), "max_tokens is '9' (str), but must be a whole number"),
    "compact": (lambda: Index.create("i", FakeStudent()).compact(5), "keep is 5 (int), but must be a timedelta"),
    "chunking": (lambda: Index.create("i", FakeStudent()).upsert_documents([], 5), "chunking is 5 (int), but must be"),
    "sync_documents": (lambda: d2llm.sync_documents("i", "docs"), "index is 'i' (str), but must be an Index"),
    "similar_pairs": (lambda: similar_pairs("i"), "index is 'i' (str), but must be an Index"),
    "evaluate": (lambda: d2llm.evaluate(5, 5), "dataset is 5 (int), but must be a Dataset or PairDataset"),
    "a kind of teacher": (lambda: d2llm.Teacher.load("cosin:x"), "no kind of teacher 'cosin'; did you mean 'cosine'?"),
    "an impossible path": (lambda: Index.create("/proc/new/index", FakeStudent()), "/proc/new: this folder cannot be"),
    "an impossible name": (lambda: Index.create("a\0b", FakeStudent()), "but must be a path"),
    "load_recipe": (lambda: d2llm.load_recipe(5), "path_or_name is 5 (int), but must be a path"),
    "open_data": (lambda: d2llm.open_data(5), "path_or_name is 5 (int), but must be a path"),
    "fit": (lambda: d2llm.fit(["docs"], 5), "output is 5 (int), but must be a path"),
    "settings": (lambda: setattr(d2llm.SearchSettings(), "top_k", 3), "make another by replace(top_k=...)"),
    "a recipe": (lambda: setattr(d2llm.Recipe(), "name", "a"), "make another by model_copy(update={'name': ...})"),
}
CALLS_OF_MODELS = """
import sys
import d2llm
from d2llm import Student
student = Student.load(sys.argv[1], device="cpu", dtype="float32")
for call in (
    lambda: Student.load(5),
    lambda: student.save(5),
    lambda: d2llm.export(student, 5, "numpy"),
    lambda: d2llm.Teacher.load(5),
    lambda: student.rank("a", ["b"], index="i"),
    lambda: student.rank("a", ["b"], task="both"),
    lambda: d2llm.export(student, "folder", "onix"),
    lambda: d2llm.export("student", "folder", "onnx"),
):
    try:
        call()
    except d2llm.D2LLMError as error:
        print(str(error).partition(" (")[0])
"""


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_what_is_no_such_thing(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    with pytest.raises(D2LLMError, match=re.escape(message)):
        call()


@pytest.mark.slow
def test_what_is_no_such_thing_for_a_model(tmp_path):
    """In a program of its own: the types of arguments of models are checked in tests."""
    command = [sys.executable, "-c", CALLS_OF_MODELS, str(write_trained_student(tmp_path))]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [
        "folder_or_name is 5",
        "folder is 5",
        "folder is 5",
        "model is 5",
        "index is 'i'",
        "task is 'both'",
        "to is 'onix'",
        "student is 'student'",
    ]


def test_a_dataclass_is_a_passage_and_a_query(tmp_path):
    @dataclass
    class Message:
        id: str
        text: str
        year: int = 2024

    index = Index.create(tmp_path / "index", FakeStudent())
    index.upsert([Message("a", "a text"), Message("b", "another", 2025)])
    index.upsert(Message("c", "a third"))
    assert index.get(["b", "c"]) == [
        Passage("b", "another", metadata={"year": 2025}),
        Passage("c", "a third", metadata={"year": 2024}),
    ]
    assert index.search(Message("q", "text")).query.id == "q"


def test_pairs_may_be_rows_of_an_array():
    assert pairs_of(np.array([["a", "b"], ["c", "d"]]), "pairs") == (("a", "b"), ("c", "d"))
