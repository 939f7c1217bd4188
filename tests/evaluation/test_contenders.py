"""From names and folders to the systems of an evaluation: what is found where, and what is said of what is not."""

from __future__ import annotations

import json
import shutil

import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError, InputError, ModelError, ModelNotFoundError
from d2llm.core.recipe import InteractionConfig, LoraConfig, PoolingConfig
from d2llm.data.trec import read_run, write_run
from d2llm.evaluation.loading import load_contenders
from d2llm.models.student import Student
from d2llm.models.teachers.causal import Teacher
from d2llm.models.teachers.identity import identify_local_teacher
from tiny_models import TEXTS, randomise, tiny_student_config, tiny_teacher_config, write_tiny_model

COSINE = {"pooling": PoolingConfig(method="backbone"), "interaction": InteractionConfig(head="cosine")}
PAPER = {"interaction": InteractionConfig(head="paper", features="concat", hidden_dim=16, feature_dim=8)}


class World:
    """Tiny models; a run with student, companions and teacher."""

    def __init__(self, folder):
        self.encoder = write_tiny_model(folder / "encoder", "bert")
        self.decoder = write_tiny_model(folder / "decoder", "llama")
        self.run = folder / "run"
        teacher = Teacher.load(tiny_teacher_config(self.decoder), device="cpu", dtype="float32")
        teacher.prepare_training(LoraConfig(rank=2, alpha=2))
        randomise(teacher, scale=0.05)
        (self.run / "teacher").mkdir(parents=True)
        teacher.save(self.run / "teacher", {})
        self.teacher = identify_local_teacher(tiny_teacher_config(self.run / "teacher")).fingerprint
        for name, changes in (("student", {}), ("student-cosine", COSINE), ("student-paper", PAPER)):
            self.student(self.run / name, seed=len(name), **changes)

    def student(self, folder, *, seed=0, teacher=None, **changes):
        config = tiny_student_config(self.encoder).model_copy(update=changes)
        made = Student.create(config, device="cpu", dtype="float32", seed=seed)
        made.prepare_training()
        randomise(made, seed=seed, scale=0.05)
        made.save(folder, content={"teacher": teacher or self.teacher, "recipe": {"name": "tiny"}})
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def load(student, **options):
    return load_contenders(student, device="cpu", dtype="float32", **options)


def fingerprint(folder):
    return json.loads((folder / "manifest.json").read_text())["fingerprint"]


def test_everything_is_found_beside_the_student(world):
    found = load(world.run / "student")
    assert found.student.fingerprint == fingerprint(world.run / "student")
    assert found.tuned_cosine.fingerprint == fingerprint(world.run / "student-cosine")
    assert found.paper_head.fingerprint == fingerprint(world.run / "student-paper")
    assert found.teacher.fingerprint == world.teacher
    assert found.why_missing == {}
    assert found.missing_rows(50) == []
    names = [row.name for row in found.students(1000, 100)]
    assert names == ["cosine, untuned", "cosine, tuned", "D2LLM, paper head", "cosine, D2LLM vectors", "D2LLM"]
    assert [row.num_candidates for row in found.students(1000, 100)] == [100] * 4 + [1000]
    fresh = Student.create(tiny_student_config(world.encoder).model_copy(update=COSINE), device="cpu", dtype="float32")
    vectors = fresh.encode_passages(TEXTS).vectors
    assert found.untuned.encode_passages(TEXTS).vectors == pytest.approx(vectors, abs=1e-5)


def test_provenance_names_all_that_made_it(world):
    found = load(world.run / "student").provenance
    assert found["student"]["name"] == "student"
    assert found["student"]["recipe"] == {"name": "tiny"}
    assert found["student"]["teacher"] == found["teacher"] == world.teacher
    assert found["student"]["fingerprint"] == fingerprint(world.run / "student")
    assert found["tuned_cosine"] == fingerprint(world.run / "student-cosine")
    assert found["paper_head"] == fingerprint(world.run / "student-paper")
    assert "torch" in found["student"]["packages"]


def test_what_is_not_there_is_missing_with_what_would_bring_it(world, tmp_path):
    alone = world.student(tmp_path / "alone", teacher="somebody far away")
    found = load(alone)
    assert found.tuned_cosine is found.paper_head is found.teacher is None
    assert {row.kind: row.reason for row in found.missing_rows(50)} == {
        "cosine_tuned": "alone-cosine is not beside the student; train it: d2llm distill RECIPE --variant cosine",
        "paper_head": "alone-paper is not beside the student; train it: d2llm distill RECIPE --variant paper",
        "teacher": "the teacher that the student was trained with was not found; name one",
    }
    assert found.provenance["teacher"] is found.provenance["tuned_cosine"] is None


def test_the_teacher_can_be_left_out(world):
    found = load(world.run / "student", with_teacher=False)
    assert found.teacher is None
    (missing,) = found.missing_rows(50)
    assert (missing.name, missing.reason) == ("teacher (reranking 50 of BM25 and D2LLM)", "it was left out")


def test_a_teacher_beside_the_student_that_did_not_teach_it_is_not_its_own(world, tmp_path):
    shutil.copytree(world.run / "teacher", tmp_path / "teacher")
    assert load(world.student(tmp_path / "student")).teacher.fingerprint == world.teacher
    other = load(world.student(tmp_path / "other", teacher="0123"))
    assert other.teacher is None
    assert "was not found" in other.why_missing["teacher"]
    named = load(tmp_path / "other", teacher=tiny_teacher_config(world.decoder))
    assert named.teacher.fingerprint == identify_local_teacher(tiny_teacher_config(world.decoder)).fingerprint
    assert named.why_missing == {
        kind: reason for kind, reason in other.why_missing.items() if kind in ("cosine_tuned", "paper_head")
    }


def test_a_shipped_teacher_is_found_by_its_fingerprint(world, tmp_path, monkeypatch):
    shutil.copytree(world.run / "teacher", tmp_path / "smart")
    stranger = tmp_path / "another"
    shutil.copytree(world.run / "teacher", stranger)
    manifest = json.loads((stranger / "manifest.json").read_text())
    (stranger / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}))
    shipped = {"another": stranger, "smart": tmp_path / "smart"}
    for module in ("evaluation.loading", "models.teachers.identity"):
        monkeypatch.setattr(f"d2llm.{module}.shipped_models", lambda _: shipped)
    asked = []
    judge = Teacher.load(tiny_teacher_config(world.decoder), device="cpu", dtype="float32")
    monkeypatch.setattr("d2llm.evaluation.loading.load_judge", lambda config, **_: asked.append(config.model) or judge)
    load(world.student(tmp_path / "far" / "student"))
    assert asked == ["smart"]


def test_an_encoder_that_is_gone_is_a_missing_row(world, tmp_path):
    gone = write_tiny_model(tmp_path / "gone", "bert", seed=4)
    config = tiny_student_config(gone)
    Student.create(config, device="cpu", dtype="float32").save(tmp_path / "student", merge=True)
    shutil.rmtree(gone)
    found = load(tmp_path / "student", with_teacher=False)
    assert found.untuned is None
    assert str(gone) in found.why_missing["cosine_untuned"]
    assert "cosine, untuned" in [row.name for row in found.missing_rows(None)]


def test_companions_can_be_named(world, tmp_path):
    mine = world.student(tmp_path / "mine", seed=9, **COSINE)
    found = load(world.run / "student", tuned_cosine=mine, paper_head=world.run / "student-paper", with_teacher=False)
    assert found.tuned_cosine.fingerprint == fingerprint(mine)
    for option in ("tuned_cosine", "paper_head"):
        with pytest.raises(ModelNotFoundError, match="no student at 'nowhere'"):
            load(world.run / "student", with_teacher=False, **{option: "nowhere"})


def test_a_student_that_is_not_there():
    with pytest.raises(ModelNotFoundError, match="no student at 'nobody'"):
        load("nobody")


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


def test_external_models_are_rows_by_their_folders_name(world, others):
    found = load(world.run / "student", with_teacher=False, models=[str(others / "bi"), str(others / "cross")])
    assert list(found.bi_encoders) == ["bi"]
    assert list(found.cross_encoders) == ["cross"]
    rows = found.students(1000, 100)
    assert (rows[-1].name, rows[-1].kind, rows[-1].num_candidates) == ("bi", "external", 100)
    assert [(name, kind) for name, kind, _ in found.judges(50)] == [("cross", "external")]


def test_external_models_that_cannot_be_told_apart_or_used(world, others, tmp_path):
    student = world.run / "student"
    shutil.copytree(others / "cross", tmp_path / "bi")
    with pytest.raises(InputError, match="two models are called 'bi', which their rows would share; rename one folder"):
        load(student, with_teacher=False, models=[str(others / "bi"), str(tmp_path / "bi")])
    shutil.copytree(others / "bi", tmp_path / "BM25")
    with pytest.raises(InputError, match="share: BM25; rename one"):
        load(student, with_teacher=False, models=[str(tmp_path / "BM25")])
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        load(student, with_teacher=False, models=[str(world.decoder)])


def test_runs_are_rows_by_their_tag(world, tmp_path):
    write_run(tmp_path / "a.run", "theirs", {"q": (("p", 1.0),)})
    write_run(tmp_path / "b.run", "D2LLM", {"q": (("p", 1.0),)})
    student = world.run / "student"
    found = load(student, with_teacher=False, runs=[tmp_path / "a.run", tmp_path / "b.run"])
    assert [run.name for run in found.runs] == ["theirs", "D2LLM (run)"]  # our own row of today has that name
    assert found.runs[0] == read_run(tmp_path / "a.run")
    with pytest.raises(InputError, match="two systems have the same name, which their rows would share: theirs"):
        load(student, with_teacher=False, runs=[tmp_path / "a.run", tmp_path / "a.run"])


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("q Q0 p 2 0.5 x", DuplicateIdError, r"x\.run:2: passage 'p' is ranked twice for query 'q'"),
        ("q Q0 o 2 nan x", DataFormatError, r"x\.run:2: the score is nan, which cannot be ranked"),
        ("q Q0 o 2 much x", DataFormatError, r"x\.run:2: the score must be a number"),
    ],
)
def test_runs_that_cannot_be_read(world, tmp_path, line, error, message):
    (tmp_path / "x.run").write_text(f"q Q0 p 1 1.0 x\n{line}\n")
    with pytest.raises(error, match=message):
        load(world.run / "student", with_teacher=False, runs=[tmp_path / "x.run"])


def test_the_report_will_say_which_gates_closed(world, tmp_path):
    folder = world.student(tmp_path / "far" / "student")
    manifest = json.loads((folder / "manifest.json").read_text())
    asked = {"closed_gates": ["squad"], "share_kept": 0.5, "residual_weights": {"symmetric": 0.0, "asymmetric": 1.0}}
    (folder / "manifest.json").write_text(json.dumps(manifest | asked))
    found = load(folder, with_teacher=False)
    assert [note.split(":")[0] for note in found.notes] == [
        "the teacher's gate was closed for squad",
        "50% of the change of weights in training was kept",
        "the interaction is switched off for symmetric search",
    ]
    assert found.provenance["student"]["closed_gates"] == ["squad"]
