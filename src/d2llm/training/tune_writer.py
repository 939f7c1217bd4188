"""Tunes a local writer with adapters to write the queries that people wrote: next-token loss on the query's tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.files import new_folder, write_bytes
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.inputs import objects_of
from d2llm.core.table import Column, Table
from d2llm.data.beir import Dataset
from d2llm.data.run_folder import require_unfinished, working_folder
from d2llm.models.device import inference, size_of_states, tokens_to_train
from d2llm.models.sources import hub_name
from d2llm.models.writers.local import WRITER_KIND, LocalWriter
from d2llm.models.writers.writer import Assignment, keywords_of, kind_of_query
from d2llm.ops.batching import token_budget_batches
from d2llm.recipe import LocalWriterConfig, WriterConfig, WriterTuningConfig
from d2llm.training.checkpoints import BestState, trainable
from d2llm.training.trainer import Trainable, Trainer, save_tuned

_SORTED_EXAMPLES = 2048  # number of examples that are sorted by length together
_CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True)
class WriterExample:
    """A query that a person wrote, and the assignment that it carries out: its passage and its kind."""

    assignment: Assignment
    query: str


@dataclass(frozen=True, slots=True)
class WriterData:
    """The examples of some data sets: those to train on, and those of dev queries.

    ``num_shared`` training queries were left out because they share a positive with a dev or test query.
    """

    training: tuple[WriterExample, ...]
    dev: tuple[WriterExample, ...]
    num_shared: int


@dataclass(frozen=True, slots=True)
class WriterTuningReport:
    """The result of a tuning run.

    Attributes:
        folder: the tuned writer.
        fingerprint: of its weights.
        num_examples: examples that it was trained on, each once in every epoch.
        steps: number of steps.
        num_truncated: examples whose passage was cut.
        num_too_long: examples left out because their query has more tokens than the writer may write.
        num_shared: training queries left out because they share a positive with a dev or test query.
        loss: mean training loss over the last tenth of the steps, in nats per token.
        num_dev: number of held-out examples.
        dev_loss_before: loss of the dev examples before training, in nats per token; None without dev examples.
        dev_loss: the same after training.
        seconds: since the start, or since the last resumption.
    """

    folder: str
    fingerprint: str
    num_examples: int
    steps: int
    num_truncated: int
    num_too_long: int
    num_shared: int
    loss: float
    num_dev: int
    dev_loss_before: float | None
    dev_loss: float | None
    seconds: float


def writer_data(datasets: Sequence[Dataset], tuning: WriterTuningConfig, *, seed: int = 0) -> WriterData:
    """One example for each query of the train and dev splits, with one of its positives, drawn at random.

    A fraction of the training questions become keyword queries. A data set that was read without a dev split has no dev
    examples.

    Raises:
        DataFormatError: a data set was read without its train split.
        InputError: there is nothing to train on, or two data sets have the same name.
    """
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise InputError(f"two data sets have the same name: {', '.join(sorted(names))}; rename the folder of one")
    training: list[WriterExample] = []
    dev: list[WriterExample] = []
    num_shared = 0
    for dataset in datasets:
        held_out = [split for split in ("dev", "test") if split in dataset.qrels]
        positives = dataset.unshared_positives("train", held_out if tuning.exclude_shared_passages else [])
        num_shared += len(dataset.unshared_positives("train")) - len(positives)
        examples = _examples(dataset, positives, seed)[: tuning.max_queries]
        training += [_as_keywords(example, tuning.keywords_fraction, seed) for example in examples]
        if "dev" in held_out:
            dev += _examples(dataset, dataset.positives("dev"), seed)[: tuning.dev_queries]
    if not training:
        raise InputError(
            f"there is no query to tune the writer on: the data sets {', '.join(names) or '(none)'} have no training "
            f"queries with a relevant passage, and {num_shared} were left out because they share one with a dev or "
            "test query (exclude_shared_passages = false keeps those)"
        )
    random.Random(seed).shuffle(training)
    return WriterData(tuple(training), tuple(dev), num_shared)


def tune_writer(
    datasets: Sequence[Dataset] | Dataset,
    folder: str | Path,
    *,
    writer: WriterConfig | None = None,
    tuning: WriterTuningConfig | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
) -> WriterTuningReport:
    """Tune a writer and write it to ``folder``; an interrupted run continues from its last checkpoint.

    ``WriterConfig(model=str(folder))`` is the tuned writer.

    Args:
        datasets: retrieval sets with a train split and, for the loss on held-out queries, a dev split.
        folder: where to write the tuned writer; ``<folder>.run`` beside it has the checkpoint and the log.
        writer: the model to tune, the length limit of its passages, and (``max_new_tokens``) of its queries.
        tuning: the schedule and the choice of queries.
        seed: seed of the examples, their order, and the adapter's initial weights.
        device: where to compute; by default the best device available.
        dtype: number format; by default the fastest on that device.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last complete step is kept.
        InputError: there is nothing to train on, ``folder`` already holds something, the checkpoint is from another
            run, or the writer is not of kind ``local``.
        TrainingDivergedError: the loss is not finite; the last good checkpoint is kept.
    """
    datasets = objects_of(datasets, "datasets", Dataset)
    writer, tuning, folder = writer or WriterConfig(), tuning or WriterTuningConfig(), Path(folder)
    require_unfinished(folder, WRITER_KIND)
    if not isinstance(writer, LocalWriterConfig):
        raise InputError(
            f"writer '{writer.model}' is of kind {writer.kind} and has no weights to tune here; name a local model"
        )
    started = time.monotonic()
    data = writer_data(datasets, tuning, seed=seed)
    model = LocalWriter.load(writer, device=device, dtype=dtype)
    run = _Tuning(model, data, tuning, seed)
    trainer = Trainer(
        run,
        working_folder(folder),
        _settings(model, data, tuning, seed),
        seed=seed,
        warmup_steps=tuning.warmup_of(run.total_steps),
        eval_every=run.total_steps if run.dev else None,
        eval_start=bool(run.dev),
        checkpoint_minutes=tuning.checkpoint_minutes,
    )
    trainer.train()
    report = WriterTuningReport(
        folder=str(folder),
        fingerprint="",
        num_examples=len(run.examples),
        steps=trainer.step,
        num_truncated=run.num_truncated,
        num_too_long=run.num_too_long,
        num_shared=data.num_shared,
        loss=trainer.mean_losses[1],
        num_dev=len(run.dev),
        dev_loss_before=run.dev_losses.get("before"),
        dev_loss=run.dev_losses.get("after"),
        seconds=time.monotonic() - started,
    )
    content = {"tuning": tuning.model_dump(), "seed": seed, "data": [dataset.name for dataset in datasets]}

    def save(content: dict[str, Any]) -> str:
        with new_folder(folder, kind=WRITER_KIND) as temporary:
            fingerprint = model.save(temporary, content)
            write_bytes(temporary / _CARD_FILE, _card(model, content, run.examples).encode())
            return fingerprint

    return save_tuned(report, save, content, [trainer])


class _Tuning(Trainable):
    """A writer and its examples; dev is measured before and after the training."""

    title = "tuning the writer"

    def __init__(self, model: LocalWriter, data: WriterData, tuning: WriterTuningConfig, seed: int) -> None:
        self.model = model
        self.part_tokens = tuning.part_tokens or tokens_to_train(model.device, size_of_states(model.whole))
        self.examples, lengths, self.num_truncated = _measured(model, data.training)
        self.dev, _, _ = _measured(model, data.dev)
        self.num_too_long = len(data.training) + len(data.dev) - len(self.examples) - len(self.dev)
        if not self.examples:
            raise InputError(
                f"all {len(data.training)} queries have more than {model.config.max_new_tokens} tokens; raise "
                "max_new_tokens"
            )
        self.batches = list(_batches(lengths, tuning, seed))
        self.total_steps = len(self.batches)
        self.dev_losses: dict[str, float] = {}
        model.prepare_training(tuning.lora, seed=seed)
        self.parameters = trainable(model.model)
        self.groups = [([*self.parameters.values()], tuning.learning_rate, 0.0)]

    def step(self, step: int) -> dict[str, Any]:
        self.model.train()
        examples = [self.examples[index] for index in self.batches[step]]
        return {"loss": accumulate(self.model, examples, self.part_tokens), "examples": len(examples)}

    def evaluate(self) -> float:
        return mean_loss(self.model, self.dev, self.part_tokens)

    def record(self, results: float, step: int, best: BestState) -> dict[str, Any]:
        del best  # the last state is kept
        self.dev_losses["after" if step else "before"] = results
        return {"dev_loss": results}

    def state(self) -> dict[str, Any]:
        return self.dev_losses

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.dev_losses = dict(state)


def accumulate(model: LocalWriter, examples: Sequence[WriterExample], part_tokens: int) -> float:
    """Add the gradient of the mean loss per token of a batch, in parts of ``part_tokens``; returns that loss."""
    prompts, targets = _encode(model, examples)
    num_tokens = sum(map(len, targets))
    total = 0.0
    for part in _micro_batches(prompts, targets, part_tokens):
        losses = model.query_losses([prompts[index] for index in part], [targets[index] for index in part])
        loss = losses.sum() / num_tokens
        loss.backward()
        total += float(loss.detach())
    return total


def mean_loss(model: LocalWriter, examples: Sequence[WriterExample], part_tokens: int) -> float:
    """The loss of examples, in nats per token. Switches the adapters' dropout off."""
    model.train(False)
    prompts, targets = _encode(model, examples)
    total = 0.0
    with inference(model.whole):
        for part in _micro_batches(prompts, targets, part_tokens):
            losses = model.query_losses([prompts[index] for index in part], [targets[index] for index in part])
            total += float(losses.sum())
    return total / sum(map(len, targets))


def _examples(dataset: Dataset, positives: dict[str, tuple[str, ...]], seed: int) -> list[WriterExample]:
    """One example for each query that has a positive with text, in an order fixed by ``seed``."""
    examples: list[WriterExample] = []
    for query_id in sorted(positives):
        rng = random.Random(f"{seed}:{dataset.name}:{query_id}")
        usable = [dataset.passages[passage_id] for passage_id in positives[query_id]]
        usable = [passage for passage in usable if passage.text.strip()]
        query = dataset.queries[query_id].text
        if usable and query.strip():
            passage = rng.choice(usable)
            examples.append(WriterExample(Assignment(passage.text, kind_of_query(query), title=passage.title), query))
    random.Random(f"{seed}:{dataset.name}").shuffle(examples)
    return examples


def _as_keywords(example: WriterExample, fraction: float, seed: int) -> WriterExample:
    """A fraction of the questions as keyword queries; other examples unchanged."""
    assignment = example.assignment
    if assignment.kind != "question" or random.Random(f"{seed}:{example.query}").random() >= fraction:
        return example
    keywords = keywords_of(example.query)
    return example if keywords is None else WriterExample(replace(assignment, kind="keywords"), keywords)


def _measured(
    model: LocalWriter, examples: Sequence[WriterExample]
) -> tuple[tuple[WriterExample, ...], list[int], int]:
    """The examples whose query is not too long, their numbers of tokens, and how many have a passage that is cut."""
    kept: list[WriterExample] = []
    lengths: list[int] = []
    num_truncated = 0
    for start in range(0, len(examples), _SORTED_EXAMPLES):
        group = examples[start : start + _SORTED_EXAMPLES]
        prompts, cut = model.encode_tuned([example.assignment for example in group])
        targets = model.encode_targets([example.query for example in group])
        for example, prompt, target, was_cut in zip(group, prompts, targets, cut, strict=True):
            if len(target) <= model.config.max_new_tokens:
                kept.append(example)
                lengths.append(len(prompt) + len(target))
                num_truncated += was_cut
    return tuple(kept), lengths, num_truncated


def _batches(lengths: Sequence[int], tuning: WriterTuningConfig, seed: int) -> Iterator[list[int]]:
    """The batches of all epochs as indices of examples: similar lengths in each, at most ``batch_tokens``; shuffled."""
    for epoch in range(tuning.epochs):
        rng = random.Random(f"{seed}:{epoch}")
        order = rng.sample(range(len(lengths)), len(lengths))
        batches: list[list[int]] = []
        for start in range(0, len(order), _SORTED_EXAMPLES):
            group = order[start : start + _SORTED_EXAMPLES]
            sizes = [lengths[index] for index in group]
            sorted_batches = token_budget_batches(sizes, max_tokens=tuning.batch_tokens, max_items=len(group))
            batches += [[group[index] for index in batch] for batch in sorted_batches]
        rng.shuffle(batches)
        yield from batches


def _encode(model: LocalWriter, examples: Sequence[WriterExample]) -> tuple[list[list[int]], list[list[int]]]:
    prompts, _ = model.encode_tuned([example.assignment for example in examples])
    return prompts, model.encode_targets([example.query for example in examples])


def _micro_batches(prompts: Sequence[list[int]], targets: Sequence[list[int]], part_tokens: int) -> list[list[int]]:
    lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
    return token_budget_batches(lengths, max_tokens=part_tokens, max_items=len(lengths))


def _settings(model: LocalWriter, data: WriterData, tuning: WriterTuningConfig, seed: int) -> dict[str, Any]:
    """Everything that affects a run; a checkpoint with other settings is from another run."""
    examples = [
        [item.assignment.title, item.assignment.passage, item.assignment.kind, item.query]
        for item in (*data.training, *data.dev)
    ]
    return {
        "writer": model.config.model_dump(mode="json", include={"max_passage_tokens", "max_new_tokens"}),
        "tuning": tuning.model_dump(mode="json", exclude={"checkpoint_minutes"}),
        "model": model.weights_fingerprint,
        "examples": fingerprint_json(examples),
        "seed": seed,
    }


def _card(model: LocalWriter, content: dict[str, Any], examples: Sequence[WriterExample]) -> str:
    """The text of the writer's README.md."""
    report = content["report"]
    # Only the last part of a folder's path: where it lies on somebody's machine is private.
    base = Path(model.config.model).name if Path(model.config.model).exists() else hub_name(model.config.model)
    counts = Table("kind of query", Column("examples"))
    for kind in sorted({example.assignment.kind for example in examples}):
        counts.add_row(kind, sum(example.assignment.kind == kind for example in examples))
    held_out = "It was not measured on held-out queries."
    if report["dev_loss"] is not None:
        held_out = (
            f"On {report['num_dev']} dev queries, the loss per token is {report['dev_loss']:.3f} nats; before tuning "
            f"it was {report['dev_loss_before']:.3f}."
        )
    return (
        "# A d2llm writer\n\nA language model that was tuned to write search queries for passages: questions, "
        f"keywords and statements, as in its training data.\n\n- Base model: {base}, with a low-rank adapter\n"
        f"- Reads at most {model.config.max_passage_tokens} tokens of a passage; longer ones are cut, and counted\n"
        f"- Trained on {report['num_examples']:,} queries of {', '.join(content['data'])}, in {report['steps']:,} "
        f"steps\n\n{counts.to_markdown()}\n\n{held_out} The licences of these data sets apply to its use.\n\n"
        "```python\nfrom d2llm.models.writers.writer import Assignment, load_writer\n"
        "from d2llm.recipe import WriterConfig\n\n"
        'writer = load_writer(WriterConfig(model="..."))  # this folder\n'
        'print(writer.write([Assignment("Cows drink water.", "question", num_queries=3)])[0].queries)\n```\n'
    )
