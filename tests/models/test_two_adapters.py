"""Queries and passages with adapters of their own, against two plain models whose weights are changed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from d2llm import Index, Passage, Student
from d2llm.core.errors import InputError
from d2llm.core.types import WholeText
from d2llm.models.engines.engines import choose_engine
from d2llm.models.export.export import export
from d2llm.models.export.sentence_transformers import why_not_plain
from d2llm.models.student_files import ADAPTER_FILE, check_content
from d2llm.models.token_vectors import TokenProjection
from d2llm.recipe import Pretraining
from d2llm.recipe.losses import Objective
from d2llm.training.gradient_cache import backpropagate
from d2llm.training.pretrain import pretrain_backbone
from tiny_data import JUDGEMENTS, tiny_recipe
from tiny_distill import LEARNING, Workspace
from tiny_models import DIM, TEXTS, TWO_ADAPTERS, randomise, tiny_student_config, write_tiny_model

QUERIES, PASSAGES = TEXTS[:3], TEXTS[3:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert", initializer_range=0.1)


def trained(model: Path) -> Student:
    student = Student.create(tiny_student_config(model, tuning=TWO_ADAPTERS), device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    return student.eval()


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "two"
    trained(model).save(folder)
    return folder


def load(folder: Path, **options: bool) -> Student:
    return Student.load(folder, device="cpu", dtype="float32", **options)


def vectors(student: Student) -> tuple[np.ndarray, np.ndarray]:
    return student.encode_queries(QUERIES).vectors, student.encode_passages(PASSAGES).vectors


def test_each_kind_of_text_is_read_by_its_own_weights(model: Path, folder: Path) -> None:
    """By hand: the base model, with W + up down in its linear layers, read from the file."""
    student, tensors = load(folder), load_file(folder / ADAPTER_FILE)
    found = dict(zip(("query:", ""), vectors(student), strict=True))
    for prefix, texts in (("query:", QUERIES), ("", PASSAGES)):
        plain = AutoModel.from_pretrained(model).eval()
        layers = {name.rpartition(".")[0] for name in tensors if name.startswith("query:") == bool(prefix)}
        assert len(layers) == 12
        for layer in layers:
            change = tensors[f"{layer}.lora_up"] @ tensors[f"{layer}.lora_down"]
            plain.get_submodule(layer.removeprefix(prefix)).weight.data += change
        for text, vector in zip(texts, found[prefix], strict=True):
            ids = student.backbone.tokenizer([text], return_tensors="pt")["input_ids"]
            states = plain(input_ids=ids).last_hidden_state
            expected = student.pool(states, torch.ones_like(ids).bool())
            np.testing.assert_allclose(vector, expected[0].detach().numpy(), rtol=1e-4, atol=1e-4)
    as_passages = student.encode_passages(QUERIES).vectors
    assert np.abs(as_passages - found["query:"]).max() > 0.1


def test_saving_and_loading_is_the_identity(model: Path, folder: Path, tmp_path: Path) -> None:
    """Trained with PEFT, merged, saved again."""
    expected = vectors(trained(model))
    once = load(folder)
    once.save(tmp_path / "again")
    check_content(tmp_path / "again")
    for student in (once, load(tmp_path / "again")):
        assert student.fingerprint == trained(model).fingerprint
        for ours, theirs in zip(vectors(student), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_loaded_student_is_trained_on(folder: Path) -> None:
    student = load(folder)
    before = vectors(student)
    student.prepare_training()
    for ours, theirs in zip(vectors(student.eval()), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    randomise(student.backbone, scale=0.1)
    for ours, theirs in zip(vectors(student), before, strict=True):
        assert np.abs(ours - theirs).max() > 0.1


def test_a_batch_may_hold_both_kinds(folder: Path) -> None:
    """As in a server, which encodes what arrives at the same time."""
    student = load(folder)
    ids = [student.tokenize([text], kind).ids[0] for text in TEXTS for kind in ("query", "passage")]
    together = student.encode_tokens(ids)
    np.testing.assert_allclose(together[::2], student.encode_queries(TEXTS).vectors, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(together[1::2], student.encode_passages(TEXTS).vectors, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("room", [0, float("inf")])
def test_each_adapter_learns_from_its_own_texts(model: Path, room: float) -> None:
    """The gradient in parts that hold both kinds is that of each kind read alone."""
    student = trained(model).train()
    ids = [*student.tokenize(QUERIES, "query").ids, *student.tokenize(PASSAGES, "passage").ids]
    weight = torch.randn(len(ids), DIM, generator=torch.Generator().manual_seed(0))
    backpropagate(student, ids, lambda v, _: (v * weight).sum(), room=room, seed=0, part_tokens=64)
    found = {name: p.grad for name, p in student.backbone.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in found} == {"model", "query_model"}
    for part, rows in (("query_model", slice(0, 3)), ("model", slice(3, None))):
        student.zero_grad()
        (student(*student.backbone.pad(ids[rows])) * weight[rows]).sum().backward()
        own = {name: p.grad for name, p in student.backbone.named_parameters() if p.grad is not None}
        assert {name.split(".")[0] for name in own} == {part}
        for name, gradient in own.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_a_distilled_student_has_two_adapters(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    recipe = tiny_recipe(tiny_student_config(workspace.model, tuning=TWO_ADAPTERS), **LEARNING)
    report = workspace.run(tmp_path / "s", recipe=recipe.model_copy(update={"losses": Objective(JUDGEMENTS)}))
    assert report.best_step > 0
    tensors = load_file(tmp_path / "s" / ADAPTER_FILE)
    ups = [name for name in tensors if name.endswith("lora_up") and not name.startswith("query:")]
    assert ups
    for name in ups:
        assert 0 < tensors[name].abs().max() != tensors[f"query:{name}"].abs().max() > 0


def test_an_index_holds_passages_and_is_searched_by_queries(folder: Path, tmp_path: Path) -> None:
    student = load(folder)
    index = Index.create(tmp_path / "index", student, vector_format="float32")
    index.upsert([Passage(f"p{number}", text) for number, text in enumerate(PASSAGES)])
    [ranking] = index.search(["cows"], top_k=2)
    scores = student.score(
        student.encode_queries(["cows"]).vectors[0], student.encode_passages(PASSAGES).vectors, "asymmetric"
    )
    assert [result.passage.id for result in ranking.passages] == [f"p{number}" for number in np.argsort(-scores)[:2]]
    np.testing.assert_allclose(
        [result.score for result in ranking.passages], np.sort(scores)[::-1][:2], rtol=1e-3, atol=1e-3
    )


def test_chunks_are_read_as_passages(folder: Path) -> None:
    student = load(folder)
    chunk = student.encode_chunks([(WholeText(TEXTS[0]), [(0, len(TEXTS[0]))])]).vectors
    np.testing.assert_allclose(chunk, student.encode_passages(TEXTS[:1]).vectors, rtol=1e-4, atol=1e-4)


def test_tokens_of_queries_have_the_places_of_the_same_tokens_of_passages(folder: Path) -> None:
    student = load(folder)
    rarity = [float(number % 3) for number in range(400)]
    projection = student.token_projection = TokenProjection(DIM, 8, rarity, max_query_tokens=4)
    (query,), (passage,) = (student.tokenize(TEXTS[:1], kind).ids for kind in ("query", "passage"))
    assert query == [-1 - token for token in passage]
    assert projection.query_positions(query) == projection.query_positions(passage)
    encoded = student.encode_with_tokens(TEXTS[:1], "query")
    np.testing.assert_allclose(encoded.vectors, student.encode_queries(TEXTS[:1]).vectors, rtol=1e-4, atol=1e-4)
    assert encoded.tokens is not None
    assert encoded.tokens.counts.tolist() == [4]


def test_what_holds_one_set_of_weights_is_refused(model: Path, folder: Path, tmp_path: Path) -> None:
    student = load(folder)
    with pytest.raises(InputError, match="a copy with all weights merged has one set of weights"):
        student.save(tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(InputError, match="a graph of the backbone has one set of weights"):
        export(student, tmp_path / "graph", "onnx")
    with pytest.raises(InputError, match="engine 'openvino' runs one set of weights"):
        choose_engine("openvino", student.config)
    assert choose_engine("auto", student.config) == "torch"
    assert why_not_plain(student.config) == "it reads queries and passages with adapters of their own"
    fresh = Student.create(tiny_student_config(model, tuning=TWO_ADAPTERS), device="cpu", dtype="float32")
    with pytest.raises(InputError, match="but adapters is two; set it to one"):
        pretrain_backbone(fresh, TEXTS, tmp_path / "p", Pretraining.of("simcse"))
