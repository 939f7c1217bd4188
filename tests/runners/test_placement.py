"""Where models work, and how workers load them; no Ray is needed."""

from __future__ import annotations

from functools import partial

import pytest

from copy_runner import CopyRunner
from d2llm.core.errors import InputError, MismatchError
from d2llm.core.progress import ignore
from d2llm.core.recipe import RemoteConfig, TeacherConfig
from d2llm.evaluation.judging import JudgeOnWorkers, place_judge
from d2llm.models.teachers.stacked import StackMember, write_stack
from d2llm.ops.stacking import Stack
from d2llm.retrieval.cosine import CosineStudent
from d2llm.retrieval.text_workers import TextShard, encode_shard, encode_texts, encoder_loads
from d2llm.runners.placement import HERE, Placement, load_work
from d2llm.runners.runner import LocalRunner
from fake_models import FakeStudent

REMOTE = TeacherConfig(model="judge", kind="remote", remote=RemoteConfig(url="http://127.0.0.1:1/v1"))


def test_a_model_without_a_load_is_refused():
    problem = "nothing says how they load the FakeStudent fake"
    with pytest.raises(InputError, match=problem):
        Placement(CopyRunner()).workers(FakeStudent(fingerprint="fake"), encode_shard)


def test_another_model_at_the_same_place_is_refused():
    load = partial(FakeStudent, fingerprint="other")
    with pytest.raises(MismatchError, match=r"the FakeStudent on .* is other, but fake is meant; put the same model"):
        load_work(load, "fake", encode_shard)


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
    with pytest.raises(InputError, match="a CosineStudent has no vectors of tokens"):
        encode_shard(CosineStudent(FakeStudent()), TextShard(["cat"], "query", with_tokens=True), ignore)


def test_a_remote_teacher_works_here():
    judge, placement = place_judge(REMOTE, partial(str, "loaded here"), CopyRunner(), device=None)
    assert judge == "loaded here"
    assert placement is HERE


def test_a_stack_with_a_remote_member_works_here(tmp_path):
    stack = Stack((0.0,), (1.0,), (1.0,), 1.0, 0.0)
    write_stack(tmp_path / "stack", [StackMember(REMOTE, "remote")], {"asymmetric": stack}, {})
    config = TeacherConfig(model=str(tmp_path / "stack"), kind="stack")
    assert place_judge(config, partial(str, "here"), CopyRunner(), device=None) == ("here", HERE)


def test_a_teacher_of_workers_is_not_loaded_here(tmp_path):
    from d2llm.models.teachers.identity import identify_local_teacher
    from tiny_models import tiny_teacher_config, write_tiny_model

    config = tiny_teacher_config(write_tiny_model(tmp_path))
    runner = CopyRunner()
    judge, placement = place_judge(config, partial(str, "never"), runner, device="cpu")
    assert isinstance(judge, JudgeOnWorkers)
    assert judge.fingerprint == identify_local_teacher(config).fingerprint
    assert placement.runner is runner
    assert not placement.is_here(judge)
    with pytest.raises(InputError, match="is not loaded in this process"):
        judge.judge([("a", "b")], "asymmetric")


def test_this_process_needs_no_load():
    student = FakeStudent()
    assert HERE.is_here(student)
    assert HERE.load(student) is None
    with Placement(LocalRunner()).connected() as placement:
        assert placement.is_here(student)
