"""Loading the systems of an evaluation from names and folders, and reporting those that are missing."""

from __future__ import annotations

import json
import shutil

import pytest

from d2llm.core.errors import InputError, ModelError
from d2llm.data.trec import read_run, write_run
from d2llm.evaluation.contenders import load_contenders
from d2llm.models.student import Student
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.recipe import AutoPooling, InteractionConfig, LoraConfig
from tiny_evaluations import make_dataset, measure
from tiny_models import TEXTS, randomise, tiny_student_config, tiny_teacher_config, write_tiny_model

COSINE = {"pooling": AutoPooling(), "interaction": InteractionConfig(head="cosine")}
PAPER = {"interaction": InteractionConfig(head="paper", features="concat", hidden_dim=16, feature_dim=8)}


class ModelFolder:
    """Tiny models, and a run folder with a student, its companions and its teacher."""

    def __init__(self, folder):
        self.encoder = write_tiny_model(folder / "encoder", "bert")
        self.decoder = write_tiny_model(folder / "decoder", "llama")
        self.run = folder / "run"
        teacher = CausalTeacher.load(tiny_teacher_config(self.decoder), device="cpu", dtype="float32")
        teacher.prepare_training(LoraConfig(rank=2, alpha=2))
        randomise(teacher, scale=0.05)
        (self.run / "teacher").mkdir(parents=True)
        teacher.save(self.run / "teacher", {})
        self.teacher = identify_local_teacher(tiny_teacher_config(self.run / "teacher")).fingerprint
        for name, changes in (("student", {}), ("student-cosine", COSINE), ("student-paper", PAPER)):
            self.student(self.run / name, seed=len(name), **changes)

    def student(self, folder, *, seed=0, teacher=None, **changes):
        config = tiny_student_config(self.encoder).model_copy(update=changes)
        model = Student.create(config, device="cpu", dtype="float32", seed=seed)
        model.prepare_training()
        randomise(model, seed=seed, scale=0.05)
        model.save(folder, content={"teacher": teacher or self.teacher, "recipe": {"name": "tiny"}})
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return ModelFolder(tmp_path_factory.mktemp("world"))


def load(student, **options):
    return load_contenders(student, device="cpu", dtype="float32", **options)


def fingerprint(folder):
    return json.loads((folder / "manifest.json").read_text())["fingerprint"]


def test_companions_are_found_beside_the_student(world):
    contenders = load(world.run / "student")
    assert contenders.student.fingerprint == fingerprint(world.run / "student")
    assert contenders.tuned_cosine.fingerprint == fingerprint(world.run / "student-cosine")
    assert contenders.paper_head.fingerprint == fingerprint(world.run / "student-paper")
    assert contenders.teacher.fingerprint == world.teacher
    assert contenders.why_missing == {}
    assert contenders.missing_rows(50) == []
    names = [row.name for row in contenders.students(1000, 100)]
    assert names == ["cosine, untuned", "cosine, tuned", "D2LLM, paper head", "cosine, D2LLM vectors", "D2LLM"]
    assert [row.num_candidates for row in contenders.students(1000, 100)] == [100] * 4 + [1000]
    fresh = Student.create(tiny_student_config(world.encoder).model_copy(update=COSINE), device="cpu", dtype="float32")
    vectors = fresh.encode_passages(TEXTS).vectors
    assert contenders.untuned.encode_passages(TEXTS).vectors == pytest.approx(vectors, abs=1e-5)


def test_provenance_names_all_models(world):
    provenance = load(world.run / "student").provenance
    assert provenance["student"]["name"] == "student"
    assert provenance["student"]["recipe"] == {"name": "tiny"}
    assert provenance["student"]["teacher"] == provenance["teacher"] == world.teacher
    assert provenance["student"]["fingerprint"] == fingerprint(world.run / "student")
    assert provenance["tuned_cosine"] == fingerprint(world.run / "student-cosine")
    assert provenance["paper_head"] == fingerprint(world.run / "student-paper")
    assert "torch" in provenance["student"]["packages"]


def test_missing_companions_say_how_to_train_them(world, tmp_path):
    alone = world.student(tmp_path / "alone", teacher="somebody far away")
    contenders = load(alone)
    assert contenders.tuned_cosine is contenders.paper_head is contenders.teacher is None
    assert {row.kind: row.reason for row in contenders.missing_rows(50)} == {
        "cosine_tuned": "alone-cosine is not beside the student; train it: d2llm distill RECIPE --variant cosine",
        "paper_head": "alone-paper is not beside the student; train it: d2llm distill RECIPE --variant paper",
        "teacher": "the teacher that the student was trained with was not found; name one",
    }
    assert contenders.provenance["teacher"] is contenders.provenance["tuned_cosine"] is None


def test_the_teacher_can_be_left_out(world):
    contenders = load(world.run / "student", with_teacher=False)
    assert contenders.teacher is None
    (missing,) = contenders.missing_rows(50)
    assert (missing.name, missing.reason) == ("teacher (reranking 50 of BM25 and D2LLM)", "it was left out")


def test_a_neighbouring_teacher_must_match_the_fingerprint(world, tmp_path):
    shutil.copytree(world.run / "teacher", tmp_path / "teacher")
    assert load(world.student(tmp_path / "student")).teacher.fingerprint == world.teacher
    other = load(world.student(tmp_path / "other", teacher="0123"))
    assert other.teacher is None
    assert "was not found" in other.why_missing["teacher"]
    explicit = load(tmp_path / "other", teacher=tiny_teacher_config(world.decoder))
    assert explicit.teacher.fingerprint == identify_local_teacher(tiny_teacher_config(world.decoder)).fingerprint
    assert explicit.why_missing == {
        kind: reason for kind, reason in other.why_missing.items() if kind in ("cosine_tuned", "paper_head")
    }


def test_a_shipped_teacher_is_found_by_its_fingerprint(world, tmp_path, monkeypatch):
    shutil.copytree(world.run / "teacher", tmp_path / "smart")
    stranger = tmp_path / "another"
    shutil.copytree(world.run / "teacher", stranger)
    manifest = json.loads((stranger / "manifest.json").read_text())
    (stranger / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}))
    shipped = {"another": stranger, "smart": tmp_path / "smart"}
    for module in ("evaluation.contenders", "core.shipped"):
        monkeypatch.setattr(f"d2llm.{module}.shipped_models", lambda _: shipped)
    loaded = []
    teacher = CausalTeacher.load(tiny_teacher_config(world.decoder), device="cpu", dtype="float32")
    monkeypatch.setattr(
        "d2llm.evaluation.contenders.load_teacher", lambda config, **_: loaded.append(config.model) or teacher
    )
    load(world.student(tmp_path / "far" / "student"))
    assert loaded == ["smart"]


def test_a_deleted_encoder_is_a_missing_row(world, tmp_path):
    encoder = write_tiny_model(tmp_path / "gone", "bert", seed=4)
    config = tiny_student_config(encoder)
    Student.create(config, device="cpu", dtype="float32").save(tmp_path / "student", merge=True)
    shutil.rmtree(encoder)
    contenders = load(tmp_path / "student", with_teacher=False)
    assert contenders.untuned is None
    assert str(encoder) in contenders.why_missing["cosine_untuned"]
    assert "cosine, untuned" in [row.name for row in contenders.missing_rows(None)]


def test_companions_can_be_given_explicitly(world, tmp_path):
    companion = world.student(tmp_path / "mine", seed=9, **COSINE)
    contenders = load(
        world.run / "student", tuned_cosine=companion, paper_head=world.run / "student-paper", with_teacher=False
    )
    assert contenders.tuned_cosine.fingerprint == fingerprint(companion)


# --- other systems ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A bi-encoder and a cross-encoder for sentence-transformers."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    import torch
    import transformers
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from tiny_models import _BASE, tiny_tokenizer

    folder = tmp_path_factory.mktemp("others")
    backbone = Transformer(str(write_tiny_model(folder / "backbone", "bert")))
    library.SentenceTransformer(modules=[backbone, Pooling(32)], device="cpu").save(str(folder / "bi"))
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(transformers.BertConfig(**_BASE, num_labels=1)).save_pretrained(
        folder / "cross"
    )
    tiny_tokenizer(is_decoder=False).save_pretrained(folder / "cross")
    return folder


def test_external_models_are_named_after_their_folders(world, others):
    contenders = load(world.run / "student", with_teacher=False, models=[str(others / "bi"), str(others / "cross")])
    assert list(contenders.bi_encoders) == ["bi"]
    assert list(contenders.cross_encoders) == ["cross"]
    rows = contenders.students(1000, 100)
    assert (rows[-1].name, rows[-1].kind, rows[-1].num_candidates) == ("bi", "external", 100)
    assert [(name, kind) for name, kind, _ in contenders.teachers(50)] == [("cross", "external")]


def test_another_student_is_measured_with_its_whole_score_and_what_it_has_seen_is_said(world, tmp_path):
    other = Student.load(world.run / "student-cosine", device="cpu", dtype="float32")
    other.save(
        tmp_path / "other",
        content={"recipe": {"data": [{"path": path, "task": "asymmetric"} for path in ("somewhere/zoo", "farm")]}},
    )
    contenders = load(world.run / "student", with_teacher=False, models=[str(tmp_path / "other"), "d2llm-minilm"])
    assert list(contenders.bi_encoders) == ["other", "d2llm-minilm"]
    assert contenders.bi_encoders["other"].fingerprint == other.fingerprint
    assert [row.num_candidates for row in contenders.students(1000, 100)][-2:] == [1000, 1000]
    assert set(contenders.loads) >= {other.fingerprint}
    assert not contenders.trained_on["D2LLM"]
    for dataset, seen in (("zoo", "other was"), ("farm", "other was"), ("banking77", "d2llm-minilm was"), ("new", "")):
        notes = " ".join(contenders.notes_on(dataset, "symmetric"))
        assert (f"{seen} trained on other queries of {dataset}" in notes) == bool(seen)
    report = measure(make_dataset(), contenders, score_parts=False, baseline="bm25")
    assert {"other", "d2llm-minilm"} <= {row.name for row in report.rows}
    assert "other was trained on other queries of zoo, which makes it easier" in report.notes


def test_conflicting_or_unsupported_models_are_rejected(world, others, tmp_path):
    student = world.run / "student"
    shutil.copytree(others / "cross", tmp_path / "bi")
    with pytest.raises(InputError, match="two models are called 'bi', which their rows would share; rename one folder"):
        load(student, with_teacher=False, models=[str(others / "bi"), str(tmp_path / "bi")])
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        load(student, with_teacher=False, models=[str(world.decoder)])


def test_runs_are_named_after_their_tag(world, tmp_path):
    write_run(tmp_path / "a.run", "theirs", {"q": (("p", 1.0),)})
    write_run(tmp_path / "b.run", "D2LLM", {"q": (("p", 1.0),)})
    student = world.run / "student"
    contenders = load(student, with_teacher=False, runs=[tmp_path / "a.run", tmp_path / "b.run"])
    assert [run.name for run in contenders.runs] == ["theirs", "D2LLM (run)"]  # "D2LLM" is the student's own row
    assert contenders.runs[0] == read_run(tmp_path / "a.run")


def test_notes_mention_closed_gates(world, tmp_path):
    folder = world.student(tmp_path / "far" / "student")
    manifest = json.loads((folder / "manifest.json").read_text())
    changes = {
        "closed_gates": ["squad"],
        "fraction_kept": 0.5,
        "recipe": {"training": {"max_interpolation": 0.5}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    contenders = load(folder, with_teacher=False)
    assert [note.split(":")[0] for note in contenders.notes] == [
        "the teacher's gate was closed for squad",
        "50% of the change of weights in training was kept",
    ]
    assert contenders.provenance["student"]["closed_gates"] == ["squad"]
