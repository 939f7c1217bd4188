"""Where models work, and how workers load them; no Ray is needed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from copy_runner import CopyRunner
from d2llm.core.errors import InputError, MismatchError
from d2llm.core.progress import ignore
from d2llm.core.types import Passage
from d2llm.evaluation import evaluate as evaluate_verb
from d2llm.evaluation.contenders import load_contenders
from d2llm.evaluation.pool_scores import TeacherOnWorkers, place_teacher
from d2llm.models.teachers.ensemble import EnsembleMember, write_ensemble
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.ops.ensemble import Ensemble
from d2llm.recipe import RemoteConfig, TeacherConfig
from d2llm.retrieval import encode as encode_verb
from d2llm.retrieval.cosine import CosineStudent
from d2llm.retrieval.reading import TextShard, encode_shard, encode_texts, encoder_loads
from d2llm.runners.placement import HERE, Placement, load_work
from d2llm.runners.runner import LocalRunner
from d2llm.training import label as label_verb
from fake_models import FakeStudent
from tiny_data import topics
from tiny_models import tiny_teacher_config, write_tiny_model
from tiny_server import write_tiny_student

REMOTE = TeacherConfig(model="judge", kind="remote", remote=RemoteConfig(url="http://127.0.0.1:1/v1"))


class StudentWithTokens(FakeStudent):
    """A student with a projection of tokens, which is no part of its fingerprint."""

    token_dim = 8

    def __init__(self, projection: str):
        super().__init__(fingerprint="same")
        self.token_fingerprint = projection

    def encode_with_tokens(self, texts, kind, *, advance=None):
        raise NotImplementedError


def test_a_model_without_a_load_is_refused():
    problem = "nothing says how they load the FakeStudent fake"
    with pytest.raises(InputError, match=problem):
        Placement(CopyRunner()).workers(FakeStudent(fingerprint="fake"), encode_shard)


def test_another_model_at_the_same_place_is_refused():
    load = partial(FakeStudent, fingerprint="other")
    with pytest.raises(MismatchError, match=r"the FakeStudent on .* is other, but fake is meant; put the same model"):
        load_work(load, "fake", encode_shard)


def test_label_refuses_another_teacher_on_a_worker(tmp_path, monkeypatch):
    config = tiny_teacher_config(write_tiny_model(tmp_path))
    own = identify_local_teacher(config).fingerprint
    meant = replace(identify_local_teacher(config), fingerprint="0123456789abcdef")
    monkeypatch.setattr(label_verb, "identify_teacher", lambda _: meant)
    with pytest.raises(MismatchError, match=rf"the \w+ on .* is {own}, but 0123456789abcdef is meant"):
        label_verb.label([topics(num_train=4)], tmp_path / "labels", teacher=config, device="cpu")


def test_encode_refuses_another_student_or_projection_on_a_worker(tmp_path):
    """With the same weights, another projection of tokens is another student, if the index has token embeddings."""
    manifest = {"student": "same", "token_projection": "p1", "document_expansion": None}
    storage = SimpleNamespace(manifest=manifest, part_formats={"token": "int8"})
    with (
        encode_verb._readers(CopyRunner(), storage, partial(StudentWithTokens, "p2"), device="cpu") as workers,
        pytest.raises(MismatchError, match=r"is same with projection p2, but same with projection p1 is meant"),
    ):
        list(workers.map([[Passage("a", "cat")]], ignore))
    storage.manifest["token_projection"] = None  # token embeddings do not matter
    storage.part_formats = {}
    passages = [Passage("a", "cat"), Passage("b", "dog")]
    with encode_verb._readers(CopyRunner(), storage, partial(StudentWithTokens, "p2"), device="cpu") as workers:
        (read,) = workers.map([passages], ignore)
    assert read.vectors.tolist() == StudentWithTokens("p2").encode_passages(["cat", "dog"]).vectors.tolist()
    storage.manifest["student"] = "another"
    with (
        encode_verb._readers(CopyRunner(), storage, partial(StudentWithTokens, "p2"), device="cpu") as workers,
        pytest.raises(MismatchError, match=r"is same, but another is meant"),
    ):
        list(workers.map([passages], ignore))


def test_encode_refuses_a_worker_that_adds_other_words(tmp_path):
    manifest = {"student": "fake-student", "token_projection": None, "document_expansion": "e1"}
    storage = SimpleNamespace(manifest=manifest, part_formats={})
    with (
        encode_verb._readers(CopyRunner(), storage, FakeStudent, device="cpu") as workers,
        pytest.raises(MismatchError, match=r"is fake-student, but fake-student with document expansion e1 is meant"),
    ):
        list(workers.map([[Passage("a", "cat")]], ignore))


def test_each_model_reserves_the_gpus_that_it_needs():
    small, large = FakeStudent(fingerprint="small"), FakeStudent(fingerprint="large")
    loads = {model.fingerprint: partial(FakeStudent, fingerprint=model.fingerprint) for model in (small, large)}
    runner = CopyRunner()
    placement = Placement(runner, None, loads, {"large": 4})
    for model in (small, large, small):
        with placement.workers(model, encode_shard):
            pass
    assert runner.gpus == [1, 4, 1]


def test_an_evaluation_reserves_the_gpus_of_its_teacher(tmp_path, monkeypatch):
    config = tiny_teacher_config(write_tiny_model(tmp_path / "judge"))
    monkeypatch.setattr(TeacherConfig, "num_gpus", 4)
    contenders = load_contenders(write_tiny_student(tmp_path), teacher=config, device="cpu", dtype="float32")
    assert contenders.teacher is not None
    assert contenders.gpus == {contenders.teacher.fingerprint: 4}

    def reserve(*_, placement, **__):
        for model in (contenders.teacher, contenders.student):
            with placement.workers(model, encode_shard):
                pass
        raise KeyboardInterrupt

    runner = CopyRunner()
    monkeypatch.setattr(evaluate_verb, "evaluate_retrieval", reserve)
    with pytest.raises(KeyboardInterrupt):
        evaluate_verb.evaluate(topics(num_train=4).dataset, contenders, runner=runner, device="cpu")
    assert runner.gpus == [4, 1]


@pytest.mark.parametrize("cosine", [False, True])
def test_texts_are_encoded_in_the_same_blocks_everywhere(cosine):
    encoder = FakeStudent()
    loads = encoder_loads(encoder, FakeStudent)
    model = CosineStudent(encoder) if cosine else encoder
    texts = [f"{number} cats and {number % 3} dogs" for number in range(10)]
    runner, results = CopyRunner(), []
    for placement in (HERE, Placement(runner, "cpu", loads)):
        finished: list[int] = []
        with placement.workers(model, encode_shard) as workers:
            encoded = encode_texts(workers, texts, "query", block=4, advance=finished.append)
        assert sum(finished) == 10
        results.append(encoded.vectors.tolist())
    assert results[0] == results[1]
    assert (runner.num_loads, runner.num_shards, runner.devices) == (1, 3, {"cpu"})


def test_no_texts_have_no_vectors():
    with HERE.workers(FakeStudent(), encode_shard) as workers:
        assert encode_texts(workers, [], "passage").vectors.shape[0] == 0


def test_vectors_of_tokens_of_an_encoder_without_any():
    with pytest.raises(InputError, match="a CosineStudent has no token embeddings"):
        encode_shard(CosineStudent(FakeStudent()), TextShard(["cat"], "query", with_tokens=True), ignore)


def test_a_remote_teacher_works_here():
    teacher, placement = place_teacher(REMOTE, partial(str, "loaded here"), CopyRunner(), device=None)
    assert teacher == "loaded here"
    assert placement is HERE


def test_an_ensemble_with_a_remote_member_works_here(tmp_path):
    ensemble = Ensemble((0.0,), (1.0,), (1.0,), 1.0, 0.0)
    write_ensemble(tmp_path / "ensemble", [EnsembleMember(REMOTE, "remote")], {"asymmetric": ensemble}, {})
    config = TeacherConfig(model=str(tmp_path / "ensemble"), kind="ensemble")
    assert place_teacher(config, partial(str, "here"), CopyRunner(), device=None) == ("here", HERE)


def test_a_teacher_of_workers_is_not_loaded_here(tmp_path):
    config = tiny_teacher_config(write_tiny_model(tmp_path))
    runner = CopyRunner()
    teacher, placement = place_teacher(config, partial(str, "never"), runner, device="cpu")
    assert isinstance(teacher, TeacherOnWorkers)
    assert teacher.fingerprint == identify_local_teacher(config).fingerprint
    assert placement.runner is runner
    assert not placement.is_here(teacher)
    with pytest.raises(InputError, match="is not loaded in this process"):
        teacher.score_pairs([("a", "b")], "asymmetric")


def test_this_process_needs_no_load():
    student = FakeStudent()
    assert HERE.is_here(student)
    assert HERE.load(student) is None
    with Placement(LocalRunner()).connected() as placement:
        assert placement.is_here(student)
