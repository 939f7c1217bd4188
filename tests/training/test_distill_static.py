"""Static token embeddings: made as defined, read from model2vec's files, trained, exported, searched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2llm.core.errors import InputError, ModelError
from d2llm.models.backbone import Backbone
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, Frozen
from d2llm.training.distill_static import StaticReport, distill_static
from e2e.command_line import fail, succeed_with_report
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "bert", "bert")
    return Backbone.load(BackboneConfig(model=str(folder)), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def made(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StaticReport]:
    folder = tmp_path_factory.mktemp("static") / "model"
    return folder, distill_static(backbone, TEXTS, folder, smoothing=0.01)


def static_student(folder: Path, **backbone: object) -> Student:
    config = tiny_student_config(folder, **({"tuning": "full"} | backbone))
    return Student.create(config, device="cpu", dtype="float32")


def test_the_vectors_are_as_defined(backbone: Backbone, made: tuple[Path, StaticReport]) -> None:
    """Each token read alone, centred, half whitened along the principal axes, weighted by how frequent it is."""
    folder, report = made
    special = backbone.tokenizer.all_special_ids
    ordinary = [token for token in range(len(backbone.tokenizer)) if token not in special]
    read = np.stack(
        [
            backbone.model(input_ids=torch.tensor([[1, token, 2]])).last_hidden_state[0].mean(0).detach().numpy()
            for token in ordinary
        ]
    ).astype(np.float64)
    read -= read.mean(0)
    _, sizes, axes = np.linalg.svd(read, full_matrices=False)
    deviations = sizes / np.sqrt(len(read) - 1)
    expected = read @ axes.T / np.sqrt(deviations)
    ids = [token for text in TEXTS for token in backbone.tokenizer(text)["input_ids"]]
    counts = np.bincount(ids, minlength=len(backbone.tokenizer)) + 0.1
    expected *= (0.01 / (0.01 + counts / counts.sum()))[ordinary, None]
    stored = load_file(folder / "model.safetensors")["embeddings"].numpy()
    gram = stored[ordinary] @ stored[ordinary].T  # the sign of an axis is arbitrary
    np.testing.assert_allclose(gram, expected @ expected.T, atol=2e-3 * np.abs(gram).max())
    assert not stored[special].any()
    assert (report.num_vectors, report.dim) == stored.shape
    assert (report.num_passages, report.num_tokens) == (len(TEXTS), len(ids))
    assert report.variance == pytest.approx(1.0)


def test_fewer_dimensions_are_the_first_axes(backbone, made, tmp_path):
    report = distill_static(backbone, iter(TEXTS), tmp_path / "small", dim=4, smoothing=0.01)
    small, large = (load_file(each / "model.safetensors")["embeddings"] for each in (tmp_path / "small", made[0]))
    torch.testing.assert_close(small.abs(), large[:, :4].abs(), atol=1e-4, rtol=1e-3)
    assert report.dim == 4
    assert 0 < report.variance < 1


def test_all_of_a_long_passage_counts(backbone: Backbone, tmp_path: Path) -> None:
    long = "cows drink water and bread is baked " * 200
    report = distill_static(backbone, [long], tmp_path / "model")
    assert report.num_tokens == len(backbone.tokenizer(long)["input_ids"]) > 250


def test_a_text_is_the_mean_of_its_tokens(made: tuple[Path, StaticReport]) -> None:
    backbone = Backbone.load(BackboneConfig(model=str(made[0]), tuning=Frozen()), device="cpu", dtype="float32")
    rows = load_file(made[0] / "model.safetensors")["embeddings"]
    tokenized = backbone.tokenize(TEXTS[:4], "passage")
    states, mask = backbone(*backbone.pad(tokenized.ids))
    pooled = backbone.pool(states, mask)
    for ids, vector in zip(tokenized.ids, pooled, strict=True):
        torch.testing.assert_close(vector, rows[ids].mean(0), atol=1e-6, rtol=1e-5)


def test_a_student_learns_and_is_reloaded(made: tuple[Path, StaticReport], tmp_path: Path) -> None:
    student = static_student(made[0])
    student.prepare_training()
    trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
    assert any(name.endswith("embeddings") for name in trained)
    randomise(student, scale=0.1)
    student.eval()
    student.save(tmp_path / "student")
    again = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    np.testing.assert_array_equal(again.encode_passages(TEXTS).vectors, student.encode_passages(TEXTS).vectors)
    assert again.fingerprint == student.fingerprint


def test_onnx_gives_the_same_vectors(made: tuple[Path, StaticReport], tmp_path: Path) -> None:
    student = static_student(made[0], tuning="frozen")
    student.save(tmp_path / "student")
    exported = Student.load(tmp_path / "student", engine="onnx")
    np.testing.assert_allclose(
        exported.encode_passages(TEXTS).vectors, student.encode_passages(TEXTS).vectors, atol=1e-5
    )


def test_shared_and_weighted_vectors_of_model2vec(made: tuple[Path, StaticReport], tmp_path: Path) -> None:
    """A file in which tokens share vectors and have weights of their own, in half precision, with few settings."""
    rows = load_file(made[0] / "model.safetensors")["embeddings"]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embeddings": torch.randn(7, 16, generator=generator).half(),
        "mapping": torch.randint(0, 7, (len(rows),), generator=generator),
        "weights": torch.rand(len(rows), generator=generator),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))
    (tmp_path / "tokenizer.json").write_bytes((made[0] / "tokenizer.json").read_bytes())
    backbone = Backbone.load(BackboneConfig(model=str(tmp_path), tuning=Frozen()), device="cpu", dtype="float32")
    assert backbone.dim == 16
    states, _ = backbone(torch.tensor([[5, 9]]), torch.ones(1, 2, dtype=torch.bool))
    for token, state in zip((5, 9), states[0], strict=True):
        expected = tensors["embeddings"][tensors["mapping"][token]].float() * tensors["weights"][token]
        torch.testing.assert_close(state, expected)


@pytest.mark.parametrize("damage", ["other tensors", "cut"])
def test_files_that_hold_no_vectors(made: tuple[Path, StaticReport], tmp_path: Path, damage: str) -> None:
    for file in made[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: -9 if file.suffix == ".safetensors" else None])
    if damage == "other tensors":
        save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="cannot be read as token embeddings"):
        Backbone.load(BackboneConfig(model=str(tmp_path), tuning=Frozen()), device="cpu")


def test_adapters_are_refused(made: tuple[Path, StaticReport]) -> None:
    with pytest.raises(InputError, match="set tuning to full or frozen"):
        static_student(made[0], tuning="lora")


def test_bad_requests_write_nothing(backbone: Backbone, made: tuple[Path, StaticReport], tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(InputError, match="no passages"):
        distill_static(backbone, [], target)
    for dim in (0, 1_000):
        with pytest.raises(InputError, match="at most that"):
            distill_static(backbone, TEXTS, target, dim=dim)
    with pytest.raises(InputError, match="positive number"):
        distill_static(backbone, TEXTS, target, smoothing=0.0)
    with pytest.raises(InputError, match="exists"):
        distill_static(backbone, TEXTS, made[0])
    assert not list(tmp_path.iterdir())


def test_sentence_transformers_reads_the_folder(made: tuple[Path, StaticReport]) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    theirs = library.SentenceTransformer(str(made[0]), device="cpu").encode(TEXTS)
    backbone = Backbone.load(BackboneConfig(model=str(made[0]), tuning=Frozen()), device="cpu", dtype="float32")
    ours = backbone.pool(*backbone(*backbone.pad(backbone.tokenize(TEXTS, "passage").ids))).detach().numpy()
    np.testing.assert_allclose(theirs, ours / np.linalg.norm(ours, axis=1, keepdims=True), atol=1e-5)


def test_the_verb(backbone: Backbone, tmp_path: Path) -> None:
    corpus, model = tmp_path / "corpus.jsonl", backbone.location
    corpus.write_text("".join(json.dumps({"_id": str(n), "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    options = ("--model", model, "--dim", "8")
    _, report = succeed_with_report("distill-static", corpus, "--out", tmp_path / "made", *options, folder=tmp_path)
    assert report["result"]["dim"] == 8
    assert report["result"]["num_passages"] == len(TEXTS)
    fail("distill-static", corpus, "--out", tmp_path / "made", *options, containing=["exists; name a new folder"])
