"""The lean encoder against transformers: the same tokens and vectors for the models it supports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.models.engines.lean import open_lean
from d2llm.models.student import Student
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

ODD_TEXTS = [
    "",
    "  spaces\tand\nlines ",
    "Ünïcode naïve café 北京大学 在哪里",
    "[SEP] <s> [MASK]",
    "word " * 400,
    *TEXTS,
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A student on a tiny BERT, saved as an adapter (with and without a tokenizer) and with merged weights."""
    folder = tmp_path_factory.mktemp("lean")
    write_tiny_model(folder / "bert", "bert")
    student = Student.create(tiny_student_config(folder / "bert"), device="cpu", dtype="float32")
    student.prepare_training(seed=1)
    randomise(student, scale=0.2)
    student.save(folder / "adapter")
    student.save(folder / "merged", merge=True)
    shutil.copytree(folder / "adapter", folder / "no tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


def load_both(folder, **options):
    return (Student.load(folder, device="cpu", lean=lean, **options) for lean in (True, False))


def assert_same(lean, whole):
    assert lean.backbone.is_lean
    assert not whole.backbone.is_lean
    assert lean.fingerprint == whole.fingerprint
    for kind in ("query", "passage"):
        assert lean.tokenize(ODD_TEXTS, kind) == whole.tokenize(ODD_TEXTS, kind)
    assert lean.tokenize(ODD_TEXTS, "query").num_truncated > 0
    for text in ODD_TEXTS:
        assert lean.backbone.token_ends(text) == whole.backbone.token_ends(text)
    assert len(lean.backbone.token_ends(ODD_TEXTS[4])) > 200  # not truncated
    actual, expected = (student.encode_queries(ODD_TEXTS).vectors for student in (lean, whole))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["adapter", "merged", "no tokenizer"])
def test_a_student_encodes_as_with_transformers(saved, form):
    assert_same(*load_both(saved / form, dtype="float32"))


def test_the_shipped_student_encodes_as_with_transformers():
    assert_same(*load_both("d2llm-minilm", dtype="float32"))


def test_words_of_queries_have_the_same_states(saved):
    queries = [text for text in ODD_TEXTS if text.strip()]
    lean, whole = (student.term_states(queries) for student in load_both(saved / "adapter", dtype="float32"))
    assert sum(map(len, whole)) > 20
    for actual, expected in zip(lean, whole, strict=True):
        assert actual.keys() == expected.keys()
        for term, state in expected.items():
            np.testing.assert_allclose(actual[term], state, rtol=0, atol=2e-6 * np.abs(state).max())


def test_bfloat16_vectors_are_close(saved):
    lean, whole = load_both(saved / "adapter", dtype="bfloat16")
    actual, expected = (student.encode_queries(ODD_TEXTS).vectors for student in (lean, whole))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_a_decoder_falls_back_to_transformers(tmp_path):
    write_tiny_model(tmp_path / "llama", "llama")
    Student.create(tiny_student_config(tmp_path / "llama"), device="cpu").save(tmp_path / "student")
    assert not Student.load(tmp_path / "student", lean=True).backbone.is_lean


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("model_type", "roberta"),
        ("num_hidden_layers", 1),
    ],
)
def test_other_kinds_of_bert_are_left_to_transformers(saved, tmp_path, key, value):
    for path in (saved / "bert").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert open_lean(str(tmp_path), saved / "adapter", dtype=torch.float32) is not None
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    assert open_lean(str(tmp_path), saved / "adapter", dtype=torch.float32) is None


def test_training_and_saving_are_refused(saved, tmp_path):
    student = Student.load(saved / "adapter", lean=True)
    with pytest.raises(InputError, match="lean=False to train"):
        student.prepare_training()
    with pytest.raises(InputError, match="lean=False to save"):
        student.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_transformers_is_not_imported(saved):
    code = f"""
import sys
from d2llm.models.student import Student
Student.load({str(saved / "adapter")!r}, lean=True).encode_queries(["a question"])
print(*sorted({{"transformers", "torch._dynamo", "huggingface_hub", "peft"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
