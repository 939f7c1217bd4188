"""Every engine: a text's vector is the same alone, in a batch, in another order, and beside long texts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.types import EngineName
from d2llm.models.device import cpu_has_fast_bfloat16
from d2llm.models.engines import engines
from d2llm.models.student import Student
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

EXACT = 2e-5
"""Largest difference of a number, in vectors of norm near 6: the order of sums in float32."""
ROUNDED = 2e-3
"""The same where activations are rounded to 8 bits: another order of sums may round one of them to its neighbour."""
SHORT = 0.1
"""The same in bfloat16, which has three digits."""
KINDS: dict[str, tuple[EngineName, str, float]] = {
    "torch": ("torch", "float32", EXACT),
    "torch-bfloat16": ("torch", "bfloat16", SHORT),
    "onnx": ("onnx", "float32", EXACT),
    "onnx-int8": ("onnx-int8", "float32", ROUNDED),
    "openvino": ("openvino", "float32", EXACT),
    "openvino-int8": ("openvino-int8", "float32", ROUNDED),
    "openvino-bfloat16": ("openvino", "bfloat16", SHORT),
}
WORDS = sorted({word for text in TEXTS for word in text.split()})
texts = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)


@cache
def student(kind: str, architecture: str) -> Student:
    """A student whose activations differ in size by token, as those of real models do."""
    engine, dtype, _ = KINDS[kind]
    if engine != "torch":
        pytest.importorskip("onnx")
        pytest.importorskip("openvino" if engine.startswith("openvino") else "onnxruntime")
    if kind == "openvino-bfloat16" and not cpu_has_fast_bfloat16():
        pytest.skip("this CPU has no products of bfloat16")
    root = Path(mkdtemp())
    created = Student.create(
        tiny_student_config(write_tiny_model(root / "model", architecture)), device="cpu", dtype="float32"
    )
    created.prepare_training()
    randomise(created, scale=0.1)
    with torch.no_grad():
        embeddings = created.backbone.model.get_input_embeddings().weight
        embeddings *= torch.logspace(-1, 1, len(embeddings))[:, None]
    created.save(root / "student", merge=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engines, "user_cache_path", lambda _: root / "cache")
        return Student.load(root / "student", device="cpu", dtype=dtype, engine=engine)


@pytest.mark.parametrize("architecture", ["bert", "llama", "modernbert"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(text=texts, others=st.lists(texts, min_size=1, max_size=6), position=st.integers(0, 6))
def test_a_vector_depends_on_its_own_text(kind, architecture, text, others, position):
    """Not on what is in its batch: the batch is one call of the engine."""
    model, tolerance = student(kind, architecture), KINDS[kind][2]
    (alone,) = model.tokenize([text], "passage").ids
    rows = model.tokenize(others, "passage").ids
    position = min(position, len(rows))
    expected = model.encode_tokens([alone])[0]
    for around in (rows, rows[::-1]):
        batch = [*around[:position], alone, *around[position:]]
        np.testing.assert_allclose(model.encode_tokens(batch)[position], expected, rtol=0, atol=tolerance)
    both = model.encode_passages([text, *others, text]).vectors
    np.testing.assert_allclose(both[[0, -1]], [expected, expected], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_different_texts_differ_by_far_more(kind):
    vectors = student(kind, "bert").encode_passages(TEXTS).vectors
    distances = abs(vectors[:, None] - vectors).max(-1)[~np.eye(len(TEXTS), dtype=bool)]
    assert distances.min() > 2 * KINDS[kind][2]
