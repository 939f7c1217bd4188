"""The vLLM teacher on a stand-in engine that runs a tiny model: the log-odds of the local teacher, exactly one request
per pair, and errors."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fake_vllm
from d2llm.core.errors import AnswerTokenError, InputError, MissingExtraError, ModelError
from d2llm.data.labels import LabelStore
from d2llm.models.teachers import vllm as module
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.pair_teacher import PairTeacher, identify_teacher, load_teacher
from d2llm.models.teachers.vllm import VllmTeacher
from d2llm.recipe import LoraConfig, TeacherConfig
from d2llm.training.label import label
from tiny_data import topics
from tiny_models import TEXTS, randomise, tiny_teacher_config, tiny_tokenizer, write_tiny_model

PAIRS = [(query, passage) for passage in TEXTS[:4] for query in TEXTS[:3]]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[fake_vllm.LLM]:
    return fake_vllm.install(monkeypatch)


def config(model: Path, **settings: Any) -> TeacherConfig:
    return tiny_teacher_config(model, kind="vllm", **settings)


def local(model: Path, **settings: Any) -> CausalTeacher:
    return CausalTeacher.load(tiny_teacher_config(model, **settings), device="cpu", dtype="float32")


@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_log_odds_are_those_of_the_local_teacher(tmp_path, engine, architecture: str, task: Any):
    folder = write_tiny_model(tmp_path / "model", architecture)
    teacher = load_teacher(config(folder))
    assert isinstance(teacher, VllmTeacher)
    assert isinstance(teacher, PairTeacher)
    finished: list[int] = []
    scores = teacher.score_pairs(PAIRS, task, with_features=True, advance=finished.append)
    expected = local(folder).score_pairs(PAIRS, task)
    np.testing.assert_allclose(scores.log_odds, expected.log_odds, rtol=1e-4, atol=1e-4)
    assert scores.log_odds.std() > 0.1
    assert scores.features is None
    assert (scores.num_tokens, scores.num_truncated) == (expected.num_tokens, expected.num_truncated)
    assert sum(finished) == len(PAIRS)
    assert engine.engines[-1].max_model_len == 129


def test_each_pair_is_one_request_and_those_of_a_query_follow_each_other(llama, engine, monkeypatch):
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 5)
    teacher = load_teacher(config(llama))
    teacher.score_pairs(PAIRS, "asymmetric")
    rows, _ = local(llama).tokenize([PAIRS[index] for first in range(3) for index in range(first, 12, 3)], "asymmetric")
    assert engine.engines[-1].requests == rows


def test_texts_are_cut_as_for_the_local_teacher(llama: Path, engine: type[fake_vllm.LLM]) -> None:
    pairs = [("the cat " * 5, "a dog runs " * 40), ("rain", "snow")]
    teacher = load_teacher(config(llama, max_tokens=64))
    scores, expected = (
        teacher.score_pairs(pairs, "asymmetric"),
        local(llama, max_tokens=64).score_pairs(pairs, "asymmetric"),
    )
    assert scores.num_truncated == expected.num_truncated == 1
    np.testing.assert_allclose(scores.log_odds, expected.log_odds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 11])
def test_a_tuned_teacher_is_its_base_with_the_adapter(tmp_path, llama, engine, rank: int):
    teacher = local(llama)
    before = teacher.score_pairs(PAIRS, "asymmetric").log_odds
    teacher.prepare_training(LoraConfig(rank=rank, alpha=3.0))
    randomise(teacher.model, scale=0.2)
    teacher.eval()
    expected = teacher.score_pairs(PAIRS, "asymmetric").log_odds
    assert np.abs(expected - before).max() > 0.5
    (tmp_path / "tuned").mkdir()
    teacher.save(tmp_path / "tuned", {})
    tuned = load_teacher(TeacherConfig(model=str(tmp_path / "tuned"), kind="vllm"))
    assert tuned.fingerprint == teacher.fingerprint
    assert engine.engines[-1].max_lora_rank == (8 if rank == 2 else 16)
    np.testing.assert_allclose(tuned.score_pairs(PAIRS, "asymmetric").log_odds, expected, rtol=1e-3, atol=1e-3)


def test_a_wholly_tuned_teacher_needs_no_adapter(tmp_path: Path, llama: Path, engine: type[fake_vllm.LLM]) -> None:
    teacher = local(llama)
    teacher.prepare_training(LoraConfig(), tuning="full")
    randomise(teacher.model, scale=0.05)
    (tmp_path / "tuned").mkdir()
    teacher.save(tmp_path / "tuned", {})
    tuned = load_teacher(TeacherConfig(model=str(tmp_path / "tuned"), kind="vllm"))
    assert not engine.engines[-1].enable_lora
    expected = teacher.eval().score_pairs(PAIRS, "asymmetric").log_odds
    np.testing.assert_allclose(tuned.score_pairs(PAIRS, "asymmetric").log_odds, expected, rtol=1e-3, atol=1e-3)


def test_labels_are_those_of_the_same_causal_teacher(tmp_path: Path, llama: Path, engine: type[fake_vllm.LLM]) -> None:
    """Begun by one and continued by the other, no pair is scored twice."""
    source = topics(num_train=12)
    first = label([source], tmp_path / "store", teacher=config(llama))
    assert first.pairs == len(engine.engines[-1].requests) > 0
    again = label([source], tmp_path / "store", teacher=tiny_teacher_config(llama), device="cpu", dtype="float32")
    assert (again.pairs, again.finished_pairs) == (0, first.pairs)
    key = {"teacher": first.teacher, "prompt": identify_teacher(config(llama)).prompts[source.task]}
    store = LabelStore.open_for_reading(tmp_path / "store", dataset=source.dataset.name, **key)
    query = source.plan.entries[0]
    texts = [(source.query_text(query.query_id), source.passage_text(name)) for name in query.passage_ids]
    expected = local(llama).score_pairs(texts, source.task).log_odds
    stored = store.log_odds(query.query_id)
    np.testing.assert_allclose([stored[name] for name in query.passage_ids], expected, rtol=1e-4, atol=1e-4)


def test_weights_that_vllm_quantises_are_another_teacher(llama: Path) -> None:
    plain = identify_teacher(config(llama))
    quantised = identify_teacher(config(llama, quantization="fp8"))
    assert plain == identify_teacher(tiny_teacher_config(llama))
    assert quantised.fingerprint != plain.fingerprint
    assert quantised.prompts == plain.prompts


def test_settings_reach_the_engine(llama: Path, engine: type[fake_vllm.LLM]) -> None:
    settings = {"gpu_memory_utilization": 0.5, "enforce_eager": True, "quantization": "fp8"}
    load_teacher(config(llama, dtype="float16", **settings))
    load_teacher(config(llama, dtype="float16"), dtype="bfloat16")
    first, second = engine.engines
    assert {name: getattr(first, name) for name in settings} == settings
    assert (first.dtype, second.dtype, second.quantization) == ("float16", "bfloat16", None)
    assert first.enable_prefix_caching


def test_the_engine_ends_with_the_teacher(llama: Path, engine: type[fake_vllm.LLM]) -> None:
    teacher = load_teacher(config(llama))
    assert not engine.engines[-1].is_shut_down
    del teacher
    gc.collect()
    assert engine.engines[-1].is_shut_down


# --- errors


def test_without_vllm_one_line_names_the_pip_command(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"a teacher of kind vllm needs .*pip install .*d2llm\[vllm\]"):
        load_teacher(config(llama))


@pytest.mark.parametrize("lost", ["one", "all", "not finite"])
def test_a_missing_log_probability_is_an_error(llama, engine, monkeypatch, lost: str):
    original = fake_vllm.LLM._one

    def incomplete(self: fake_vllm.LLM, *arguments: Any) -> fake_vllm.RequestOutput:
        output = original(self, *arguments)
        positions = output.outputs[0].logprobs
        assert positions is not None
        if lost == "not finite":
            next(iter(positions[0].values())).logprob = -np.inf
        else:
            output.outputs[0].logprobs = [dict(list(positions[0].items())[:1])] if lost == "one" else None
        return output

    monkeypatch.setattr(fake_vllm.LLM, "_one", incomplete)
    teacher = load_teacher(config(llama))
    with pytest.raises(AnswerTokenError, match="did not return the log-probabilities of both ' yes' and ' no'"):
        teacher.score_pairs(PAIRS, "asymmetric")


def test_an_engine_that_reads_other_tokens_is_refused(llama, engine, monkeypatch):
    original = fake_vllm.LLM._one
    monkeypatch.setattr(fake_vllm.LLM, "_one", lambda self, ids, params: original(self, ids[:-1], params))
    with pytest.raises(ModelError, match=r"vLLM read \d+ tokens of query .* instead of the \d+ that it was sent"):
        load_teacher(config(llama)).score_pairs(PAIRS, "asymmetric")


def test_an_old_version_is_named(llama: Path, engine: type[fake_vllm.LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def old(*, max_tokens: int, temperature: float, logprobs: int) -> None: ...

    monkeypatch.setattr(sys.modules["vllm"], "SamplingParams", old)
    with pytest.raises(ModelError, match=r"this version of vLLM \(0.22.0\) cannot return .*pip install --upgrade"):
        load_teacher(config(llama))


def test_an_engine_that_cannot_start_is_named(llama: Path, engine: type[fake_vllm.LLM]) -> None:
    with pytest.raises(ModelError, match=r"vLLM cannot load .*: Engine core initialization failed"):
        load_teacher(config(llama, tensor_parallel_size=2))
    with pytest.raises(ModelError, match=r"vLLM cannot load .*: User-specified max_model_len \(1001\)"):
        load_teacher(config(llama, max_tokens=1000))


def test_a_certain_gpu_is_refused(llama: Path, engine: type[fake_vllm.LLM]) -> None:
    with pytest.raises(InputError, match="cannot be put on cuda:1; set CUDA_VISIBLE_DEVICES=1 instead"):
        load_teacher(config(llama), device="cuda:1")
    assert isinstance(load_teacher(config(llama), device="cuda"), VllmTeacher)


def test_other_kinds_of_models_are_refused(tmp_path: Path, engine: type[fake_vllm.LLM]) -> None:
    settings = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.random.fork_rng():
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**settings, intermediate_size=48))
    model.save_pretrained(tmp_path)
    tiny_tokenizer(is_decoder=False).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a classifier model, but vLLM scores with causal language models only"):
        load_teacher(TeacherConfig(model=str(tmp_path), kind="vllm"))
