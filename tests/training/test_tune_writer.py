"""Tuning a writer on a tiny random model: its data, that it learns, resumes exactly, and writes a usable folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2llm.core.errors import InputError
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.models.writers.local import LocalWriter, read_tuned_writer
from d2llm.models.writers.writer import Assignment, load_writer
from d2llm.recipe import LoraConfig, WriterConfig, WriterTuningConfig
from d2llm.training import tune_writer as module
from d2llm.training.tune_writer import WriterTuningReport, accumulate, mean_loss, tune_writer, writer_data
from tiny_models import TEXTS, write_tiny_model

EVERY_STEP = 1e-9  # minutes between checkpoints


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=1)


def questions(name: str = "tiny", *, num_train: int = 24, num_dev: int = 4) -> Dataset:
    """A passage for each query, which asks for the first three words of the passage."""
    words = [text.split() for text in TEXTS]
    count = num_train + num_dev
    texts = {f"p{n}": " ".join(words[n % 8][n % 3 :] + words[(n + 1) % 8]) for n in range(count)}
    queries = {f"q{n}": f"what is {' '.join(texts[f'p{n}'].split()[:3])}?" for n in range(count)}
    qrels = {
        "train": {f"q{n}": {f"p{n}": 1} for n in range(num_train)},
        "dev": {f"q{n}": {f"p{n}": 1} for n in range(num_train, count)},
    }
    passages = {key: Passage(key, text, title="A title") for key, text in texts.items()}
    return Dataset(name, Path(name), passages, {key: Query(key, text) for key, text in queries.items()}, qrels)


def tune(
    llama: Path, folder: Path, *datasets: Dataset, seed: int = 0, max_new_tokens: int = 32, **settings: Any
) -> WriterTuningReport:
    values = {"lora": LoraConfig(rank=4, alpha=8.0, dropout=0.1), "learning_rate": 1e-2, "batch_tokens": 256}
    return tune_writer(
        datasets or [questions()],
        folder,
        writer=WriterConfig(model=str(llama), max_passage_tokens=40, max_new_tokens=max_new_tokens),
        tuning=WriterTuningConfig.model_validate(values | {"checkpoint_minutes": EVERY_STEP} | settings),
        seed=seed,
        device="cpu",
        dtype="float32",
    )


class Interrupted(Exception):
    pass


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Raises ``Interrupted`` in the middle of a step; returns a list of batch sizes."""
    original = module.accumulate
    sizes: list[int] = []

    def replaced(model: Any, examples: Any, part_tokens: int) -> float:
        sizes.append(len(examples))
        if len(sizes) - 1 == step:
            raise Interrupted
        return original(model, examples, part_tokens)

    monkeypatch.setattr(module, "accumulate", replaced)
    return sizes


def log(folder: Path) -> list[dict[str, Any]]:
    lines = folder.with_name(folder.name + ".run").joinpath("log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


# --- data


def test_an_example_is_a_query_with_one_of_its_positives():
    passages = {
        key: Passage(key, text, title=key.upper()) for key, text in [("a", "A."), ("b", "B."), ("c", "C."), ("d", " ")]
    }
    texts = {"q1": "what is a?", "q2": "b c", "q3": "Only dev asks this.", "q4": "no text", "q5": "shared", "q6": " "}
    train = {"q1": {"a": 1}, "q2": {"b": 1, "c": 2, "a": 0}, "q4": {"d": 1}, "q6": {"a": 1}, "q7": {"a": 1}}
    qrels = {"train": train | {"q5": {"b": 1, "e": 1}}, "dev": {"q3": {"e": 1}}}
    passages["e"] = Passage("e", "E.")
    dataset = Dataset("d", Path("d"), passages, {key: Query(key, text) for key, text in texts.items()}, qrels)
    data = writer_data([dataset], WriterTuningConfig())
    pairs = {item.query: item.assignment for item in data.training}
    assert set(pairs) == {"what is a?", "b c"}
    assert pairs["what is a?"] == Assignment("A.", "question", title="A")
    assert pairs["b c"].passage in ("B.", "C.")
    assert pairs["b c"].kind == "keywords"
    assert [(item.query, item.assignment.kind) for item in data.dev] == [("Only dev asks this.", "statement")]
    assert data.num_shared == 1  # q5 shares passage e with a dev query
    everything = writer_data([dataset], WriterTuningConfig(exclude_shared_passages=False, dev_queries=0))
    assert (len(everything.training), len(everything.dev), everything.num_shared) == (3, 0, 0)


def test_samples_follow_from_the_seed():
    datasets = [questions(), questions("other", num_train=10)]
    tuning = WriterTuningConfig(max_queries=8, dev_queries=2)
    data = writer_data(datasets, tuning)
    assert (len(data.training), len(data.dev)) == (16, 4)
    assert writer_data(datasets, tuning) == data
    assert writer_data(datasets, tuning, seed=1).training != data.training


def test_unusable_data_is_rejected():
    dataset = questions()
    with pytest.raises(InputError, match="two data sets have the same name: tiny, tiny"):
        writer_data([dataset, dataset], WriterTuningConfig())
    with pytest.raises(InputError, match=r"the data sets \(none\) have no training queries"):
        writer_data([], WriterTuningConfig())


# --- training


def test_a_tuned_writer_has_learnt_and_is_loaded_from_its_folder(tmp_path: Path, llama: Path):
    report = tune(llama, tmp_path / "writer", epochs=8)
    steps = [line for line in log(tmp_path / "writer") if "loss" in line]
    losses = [line["loss"] for line in steps]
    assert sum(line["examples"] for line in steps) == 8 * report.num_examples == 8 * 24
    assert (len(losses), report.num_dev) == (report.steps, 4)
    assert report.loss < 0.7 * losses[0]
    assert report.dev_loss_before is not None
    assert report.dev_loss is not None
    assert report.dev_loss < 0.8 * report.dev_loss_before

    config = WriterConfig(model=str(tmp_path / "writer"))
    tuned = load_writer(config, device="cpu", dtype="float32")
    assert isinstance(tuned, LocalWriter)
    saved = read_tuned_writer(config.model)
    assert saved is not None
    assert (saved.fingerprint, saved.max_passage_tokens) == (report.fingerprint, 40)
    dev = writer_data([questions()], WriterTuningConfig()).dev
    assert mean_loss(tuned, dev, 512) == pytest.approx(report.dev_loss, rel=1e-4)
    manifest = json.loads((tmp_path / "writer" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["kind"], manifest["data"]) == ("writer", ["tiny"])
    assert manifest["report"]["dev_loss"] == report.dev_loss
    card = (tmp_path / "writer" / "README.md").read_text(encoding="utf-8")
    assert f"{report.dev_loss:.3f} nats; before tuning it was {report.dev_loss_before:.3f}" in card
    kinds = Counter(example.assignment.kind for example in writer_data([questions()], WriterTuningConfig()).training)
    assert kinds.keys() == {"question", "keywords"}
    assert all(f"| {kind} | {number} |" in card for kind, number in kinds.items())
    assert str(tmp_path) not in card
    assert not (tmp_path / "writer.run" / "checkpoint.safetensors").exists()


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    whole = tune(llama, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, 4)
        with pytest.raises(Interrupted):
            tune(llama, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    with monkeypatch.context() as patch:
        sizes = fail_at(patch, -1)
        resumed = tune(llama, tmp_path / "resumed")
    assert len(sizes) == whole.steps - 4  # no step is repeated
    assert (resumed.fingerprint, resumed.loss, resumed.dev_loss) == (whole.fingerprint, whole.loss, whole.dev_loss)
    assert resumed.dev_loss_before == whole.dev_loss_before
    assert log(tmp_path / "resumed") == log(tmp_path / "whole")
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "resumed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 2)
        with pytest.raises(Interrupted):
            tune(llama, tmp_path / "writer")
    with pytest.raises(InputError, match=r"other settings: .*seed \(was 0, is 1\)"):
        tune(llama, tmp_path / "writer", seed=1)
    with pytest.raises(InputError, match=r"belongs to a run with other settings: tuning\.learning_rate"):
        tune(llama, tmp_path / "writer", learning_rate=1e-3)
    with pytest.raises(InputError, match="belongs to a run with other settings: examples"):
        tune(llama, tmp_path / "writer", questions(num_dev=3))


def test_folders_and_writers_that_cannot_be_used_are_refused(tmp_path: Path, llama: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("...")
    with pytest.raises(InputError, match="holds files that d2llm did not make"):
        tune(llama, tmp_path / "mine")
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="already holds a finished writer"):
        tune(llama, tmp_path / "mine")
    with pytest.raises(InputError, match="is of kind remote and has no weights to tune"):
        tune_writer(
            [questions()],
            tmp_path / "writer",
            writer=WriterConfig(kind="remote", remote={"url": "http://127.0.0.1:1/v1"}),
        )


def test_queries_that_are_too_long_are_counted(tmp_path: Path, llama: Path):
    dataset = questions(num_train=6, num_dev=0)
    dataset.queries["q1"] = Query("q1", " ".join(TEXTS))
    report = tune(llama, tmp_path / "writer", dataset)
    assert (report.num_examples, report.num_too_long, report.num_dev) == (5, 1, 0)
    assert report.dev_loss is report.dev_loss_before is None
    assert "not measured on held-out queries" in (tmp_path / "writer" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="all 6 queries have more than 4 tokens"):
        tune(llama, tmp_path / "none", questions(num_train=6, num_dev=0), max_new_tokens=4)


def test_parts_of_a_batch_have_the_gradient_of_the_whole(llama: Path):
    config = WriterConfig(model=str(llama), max_passage_tokens=40)
    model = LocalWriter.load(config, device="cpu", dtype="float32")
    examples = writer_data([questions()], WriterTuningConfig()).training[:6]
    expected = mean_loss(model, examples, 10_000)
    model.prepare_training(LoraConfig(rank=2, dropout=0.0))
    gradients: list[list[torch.Tensor]] = []
    for part_tokens in (10_000, 60):
        model.whole.zero_grad()
        assert accumulate(model, examples, part_tokens) == pytest.approx(expected, rel=1e-5)
        gradients.append([p.grad.clone() for p in model.model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 5
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)
