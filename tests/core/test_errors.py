from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest

from d2llm.core import errors

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.D2LLMError)]


def test_every_error_is_in_the_documented_tree():
    assert len(ALL) == 19
    for cls in ALL:
        assert cls.__name__ in errors.__doc__.split()
        assert cls.__doc__


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        (errors.DataFormatError, errors.InputError),
        (errors.DamagedFileError, errors.DataFormatError),
        (errors.DuplicateIdError, errors.DataFormatError),
        (errors.FilterError, errors.InputError),
        (errors.RecipeError, errors.InputError),
        (errors.ModelNotFoundError, errors.ModelError),
        (errors.AnswerTokenError, errors.ModelError),
        (errors.IndexMismatchError, errors.MismatchError),
        (errors.LabelMismatchError, errors.MismatchError),
        (errors.StorageError, errors.D2LLMError),
        (errors.IndexLockedError, errors.StorageError),
        (errors.TrainingDivergedError, errors.D2LLMError),
        (errors.MissingExtraError, ImportError),
    ],
)
def test_the_class_hierarchy(child: type, parent: type):
    assert issubclass(child, parent)


def test_a_format_error_names_file_and_line():
    error = errors.DataFormatError("data/corpus.jsonl", "not JSON", line=7)
    assert str(error) == "data/corpus.jsonl:7: not JSON"
    assert error.path == Path("data/corpus.jsonl")
    assert error.line == 7
    assert str(errors.DataFormatError("qrels", "is empty")) == "qrels: is empty"


@pytest.mark.parametrize("cls", [errors.DataFormatError, errors.DamagedFileError, errors.DuplicateIdError])
def test_a_format_error_survives_pickling(cls: type[errors.DataFormatError]):
    error = pickle.loads(pickle.dumps(cls("a/b.jsonl", "broken", line=3)))
    assert type(error) is cls
    assert str(error) == "a/b.jsonl:3: broken"
    assert (error.path, error.problem, error.line) == (Path("a/b.jsonl"), "broken", 3)


def test_a_plain_error_survives_pickling():
    error = pickle.loads(pickle.dumps(errors.IndexMismatchError("index a, student b")))
    assert type(error) is errors.IndexMismatchError
    assert str(error) == "index a, student b"


def test_an_error_that_quotes_a_damaged_file_is_not_as_long_as_the_file():
    message = str(errors.DataFormatError("a/b.jsonl", f"unknown field {'x' * 10_000_000}; use another", line=3))
    assert len(message) < 9_000
    assert message.startswith("a/b.jsonl:3: unknown field x")
    assert message.endswith("x; use another")
