"""A training step beside that of sentence-transformers' own trainer, and how much of the machine's limit it reaches.

Both real trainers, ``distill``'s and ``SentenceTransformerTrainer``, train the same weights on the same batches, in the
same order: a query with its positive and hard negatives, against all passages of the batch
(MultipleNegativesRankingLoss), with AdamW, the same rate, schedule and clipping. Trained are all weights, with the
model's own dropout, and adapters (LoRA), without; in float32, and in bfloat16 if the CPU multiplies it. A step is all
that a trainer does from one step to the next: collating, tokenizing, both passes, the optimiser, the log.

Rounds of few steps alternate. First, without dropout, the losses of the first step are compared: it is the same work.
The limit is measured in every round: the fastest products of the model's shapes (``scaling.roofline``). Counted are
operations for the texts themselves, so padding counts as waste.

    python benchmarks/training_step.py --threads 1
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import datasets
import torch
from scaling.data_sets import DATA, require
from scaling.roofline import Encoder, measure_limits
from torch import nn

from d2llm.core.files import write_json
from d2llm.core.manifest import package_versions
from d2llm.core.progress import showing_progress
from d2llm.data.beir import read_beir
from d2llm.data.collation import Draw, LabelledSource, epoch_batches
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, TrainingPlan, TrainingSource
from d2llm.models.device import cpu_has_fast_bfloat16
from d2llm.models.sources import locate_model
from d2llm.models.student import Student
from d2llm.recipe import Recipe
from d2llm.training.dev_sets import make_dev_set
from d2llm.training.processes import ALONE
from d2llm.training.training_loop import DistillRun

RESULT = Path(__file__).parent / "results" / "training-step.json"
RANK, RATE, DECAY, CLIP, SCALE = 16, 2e-5, 0.01, 1.0, 20.0
OURS, THEIRS = "d2llm", "sentence-transformers"
MAX_LOSS_DIFFERENCE = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Way:
    """What is trained, and in which number format."""

    tuning: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.tuning}, {self.dtype}"


@dataclass
class Trained:
    """What one run of a trainer took, and what its backbone read."""

    losses: list[float] = field(default_factory=list[float])
    wall: list[float] = field(default_factory=list[float])
    processor: list[float] = field(default_factory=list[float])
    shapes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def stamp(self) -> None:
        """Note that a step has begun or ended."""
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    def steps(self, clock: str) -> list[float]:
        """Seconds of each step but the first."""
        stamps = cast("list[float]", getattr(self, clock))
        return [after - before for before, after in pairwise(stamps[1:])]

    def watch(self, model: nn.Module) -> None:
        """Note the shape of what a model reads in training."""

        def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                rows, tokens = arguments[0].shape
                self.shapes.append((rows, tokens))

        cast(Any, model).get_input_embeddings().register_forward_pre_hook(note)


def make_source(folder: Path, num_queries: int, num_hard: int) -> LabelledSource:
    """Train queries with their positives and neighbouring passages as hard negatives; no text occurs twice."""
    dataset = read_beir(folder)
    ids = list(dataset.passages)
    position = {passage_id: index for index, passage_id in enumerate(ids)}
    positives = [(query_id, found) for query_id, found in dataset.positives("train").items() if len(found) == 1]
    random.Random(0).shuffle(positives)
    used: set[str] = set()
    entries: list[PlanEntry] = []
    for query_id, found in positives:
        row = position[found[0]]
        nearby = [ids[n] for n in range(max(0, row - 9), min(len(ids), row + 10)) if n != row]
        texts = {name: dataset.passages[name].full_text for name in (*found, *nearby)}
        hard = [name for name in nearby if texts[name] not in used and texts[name] != texts[found[0]]][:num_hard]
        chosen = {texts[name] for name in (*found, *hard)}
        if texts[found[0]] in used or len(chosen) <= num_hard:
            continue
        used |= chosen
        entries.append(PlanEntry(query_id, found, tuple(hard), ()))
        if len(entries) == num_queries:
            break
    source = TrainingSource(dataset, TrainingPlan(tuple(entries), {}), "asymmetric")
    labels = LabelStore(Path("unused"), teacher="none", prompt="none", dataset=dataset.name)
    return LabelledSource.join(source, labels, keep_unlabelled=True)


def make_recipe(way: Way, options: argparse.Namespace) -> Recipe:
    tuning = {"kind": "full"} if way.tuning == "full" else {"kind": "lora", "rank": RANK, "alpha": RANK, "dropout": 0.0}
    limits = {"max_query_tokens": options.max_tokens, "max_passage_tokens": options.max_tokens}
    return Recipe.model_validate(
        {
            "student": {
                "backbone": {"model": "minilm", "tuning": tuning, **limits},
                "pooling": "auto",
                "interaction": {"head": "cosine"},
            },
            "losses": {"in_batch_cross_entropy": 1.0},
            "training": {
                "epochs": 1,
                "batch_queries": options.queries,
                "num_hard": options.hard,
                "learning_rate": RATE,
                "head_learning_rate": RATE,
                "weight_decay": DECAY,
                "max_gradient_norm": CLIP,
                "warmup_steps": 0,
                "eval_every": 1_000_000,
                "checkpoint_every": 1_000_000,
                "checkpoint_minutes": 1_000_000,
                "residual": {"epochs": 0},
                "trackers": [],
            },
        }
    )


class StampedRun(DistillRun):
    """``distill``'s training loop, which notes when each step begins."""

    trained: Trained

    def step(self, step: int) -> dict[str, Any]:
        self.trained.stamp()
        return super().step(step)


def train_ours(way: Way, source: LabelledSource, options: argparse.Namespace, *, dropout: bool) -> Trained:
    """Train with ``distill``'s loop."""
    recipe, trained = make_recipe(way, options), Trained()
    student = Student.create(recipe.student, device="cpu", dtype=way.dtype)
    student.prepare_training()
    if not dropout:
        without_dropout(student)
    trained.watch(student.backbone.model)
    with tempfile.TemporaryDirectory() as folder, showing_progress(False):
        dev = make_dev_set(source.source, num_queries=1, num_passages=1, seed=0)
        run = StampedRun(student, recipe, [source], [dev], {}, Path(folder), ALONE, no_teacher)
        run.trained = trained
        trained.shapes.clear()
        run.trainer.train()
    trained.losses = run.trainer.losses
    return trained


def no_teacher(*_: object) -> None:
    """There is none."""


def train_theirs(
    way: Way, source: LabelledSource, draws: Sequence[Draw], options: argparse.Namespace, *, dropout: bool
) -> Trained:
    """Train with sentence-transformers' trainer."""
    from peft import LoraConfig, inject_adapter_in_model
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    trained = Trained()
    model = SentenceTransformer(locate_model("minilm"), device="cpu")
    model.max_seq_length = options.max_tokens
    backbone = cast(Any, model[0]).auto_model
    if way.tuning != "full":
        layers = [n for n, part in backbone.named_modules() if isinstance(part, nn.Linear) and "pooler" not in n]
        # What add_adapter does, which refuses every peft that there is in this transformers.
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=layers), backbone)
    if not dropout:
        without_dropout(model)
    trained.watch(backbone)

    class Stamps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not trained.wall:
                trained.stamp()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            trained.stamp()

    class InOrder(DefaultBatchSampler):
        """The batches as they were drawn."""

        def __iter__(self) -> Iterator[list[int]]:
            for start in range(0, len(draws), options.queries):
                yield list(range(start, min(start + options.queries, len(draws))))

    texts = source.source
    columns = {"anchor": [texts.query_text(draw.entry.query_id) for draw in draws]}
    columns |= {
        f"passage_{column}": [texts.passage_text(draw.passage_ids[column]) for draw in draws]
        for column in range(1 + options.hard)
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=way.dtype == "bfloat16",
            num_train_epochs=1,
            per_device_train_batch_size=options.queries,
            batch_sampler=InOrder,
            learning_rate=RATE,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict(columns),
            loss=MultipleNegativesRankingLoss(model, scale=SCALE),
            callbacks=[Stamps()],
        )
        trainer.train()
    trained.losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return trained


def without_dropout(model: nn.Module) -> None:
    """Let a model in training compute what it computes otherwise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def measure(source: LabelledSource, ways: Sequence[Way], options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all ways."""
    recipe = make_recipe(ways[0], options)
    student = Student.create(recipe.student, device="cpu", dtype="float32")
    draws = drawn(source, recipe)
    texts = source.source
    queries = student.backbone.tokenize([texts.query_text(draw.entry.query_id) for draw in draws], "query").lengths
    passages = student.backbone.tokenize(
        [texts.passage_text(name) for draw in draws for name in draw.passage_ids], "passage"
    ).lengths
    lengths = [*queries, *passages]
    runs: dict[Way, dict[str, list[Trained]]] = {way: {OURS: [], THEIRS: []} for way in ways}
    first: dict[Way, dict[str, float]] = {}
    formats = [*dict.fromkeys(way.dtype for way in ways)]
    shape = Encoder.shape_of(student.backbone.model)
    limits: list[dict[str, float]] = []
    for way in ways:
        with redirect_stdout(io.StringIO()):  # what trainers print
            theirs = train_theirs(way, source, draws[: options.queries], options, dropout=False)
            few = drawn_entries(source, draws[: options.queries])
            ours = train_ours(way, few, options, dropout=False)
        first[way] = {OURS: ours.losses[0], THEIRS: theirs.losses[0]}
        difference = abs(ours.losses[0] - theirs.losses[0])
        print(f"{way}: first loss {ours.losses[0]:.5f} and {theirs.losses[0]:.5f}", flush=True)
        if difference > MAX_LOSS_DIFFERENCE[way.dtype]:
            raise SystemExit(f"{way}: this is not the same work")
    for number in range(options.rounds):
        limits.append(measure_limits(shape, formats))
        for way in ways:
            dropout = way.tuning == "full"
            with redirect_stdout(io.StringIO()):  # what trainers print
                for name in (OURS, THEIRS) if number % 2 else (THEIRS, OURS):
                    trained = (
                        train_ours(way, source, options, dropout=dropout)
                        if name == OURS
                        else train_theirs(way, source, draws, options, dropout=dropout)
                    )
                    runs[way][name].append(trained)
            seconds = {name: median(runs[way][name][-1].steps(options.clock)) for name in (OURS, THEIRS)}
            print(
                f"round {number + 1}, {way}: {seconds[OURS]:.3f} and {seconds[THEIRS]:.3f} s a step, "
                f"{seconds[THEIRS] / seconds[OURS]:.2f}",
                flush=True,
            )
    best = {name: max(measured[name] for measured in limits) for name in limits[0]}
    num_steps = options.steps
    rows: list[dict[str, Any]] = []
    for way, of_both in runs.items():
        encoder = Encoder.shape_of(student.backbone.model, RANK if way.tuning == "lora" else 0)
        operations = encoder.step((1, length) for length in lengths) / num_steps / 1e9
        row: dict[str, Any] = {"tuning": way.tuning, "dtype": way.dtype, "first_loss": first[way]}
        for name, all_runs in of_both.items():
            seconds = median(step for run in all_runs for step in run.steps(options.clock))
            read = all_runs[0].shapes
            padded = sum(rows * tokens for rows, tokens in read)
            of_texts, of_all = operations / seconds, encoder.step(read) / num_steps / 1e9 / seconds
            row[name] = {
                "seconds_per_step": seconds,
                "steps_measured": sum(len(run.steps(options.clock)) for run in all_runs),
                "seconds_per_step_wall": median(step for run in all_runs for step in run.steps("wall")),
                "tokens_per_second": sum(lengths) / num_steps / seconds,
                "padding": padded / sum(lengths),
                "gflop_per_second": of_texts,
                "gflop_per_second_padded": of_all,
                "fraction_of_limit": of_texts / best[way.dtype],
                "fraction_of_limit_padded": of_all / best[way.dtype],
            }
        row["gflop_per_step"] = operations
        medians = [
            median(t.steps(options.clock)) / median(o.steps(options.clock))
            for o, t in zip(of_both[OURS], of_both[THEIRS], strict=True)
        ]
        row["ratio"] = row[THEIRS]["seconds_per_step"] / row[OURS]["seconds_per_step"]
        row["ratio_by_round"] = medians
        rows.append(row)
    return {
        "texts": len(lengths),
        "tokens_per_text": sum(lengths) / len(lengths),
        "limits": best,
        "rows": rows,
    }


def drawn(source: LabelledSource, recipe: Recipe) -> list[Draw]:
    """The draws of the only epoch, as ``distill`` draws them."""
    training = recipe.training
    batches = epoch_batches(
        [source],
        epoch=0,
        batch_queries=training.batch_queries,
        num_hard=training.num_hard,
        num_easy=training.num_easy,
        seed=recipe.seed,
    )
    return [draw for _, draws in batches for draw in draws]


def drawn_entries(source: LabelledSource, draws: Sequence[Draw]) -> LabelledSource:
    """The source with the queries of these draws alone."""
    names = {draw.entry.query_id for draw in draws}
    return replace(source, entries=tuple(entry for entry in source.entries if entry.query_id in names))


def show(result: dict[str, Any]) -> None:
    """Print a table."""
    limits = ", ".join(f"{name} {value:,.0f}" for name, value in result["limits"].items())
    print(f"\nlimits (GFLOP/s of the model's products): {limits}")
    print("| trained | s a step, d2llm | sentence-transformers | ratio | tokens/s | padding | of the limit |")
    print("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        ours, theirs = row[OURS], row[THEIRS]
        print(
            f"| {row['tuning']}, {row['dtype']} | {ours['seconds_per_step']:.3f} | {theirs['seconds_per_step']:.3f} | "
            f"{row['ratio']:.2f} | {ours['tokens_per_second']:,.0f}, {theirs['tokens_per_second']:,.0f} | "
            f"{ours['padding']:.2f}, {theirs['padding']:.2f} | "
            f"{ours['fraction_of_limit']:.0%}, {theirs['fraction_of_limit']:.0%} |"
        )


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "squad-sent", help="in BEIR layout, with train and dev")
    parser.add_argument("--queries", type=int, default=32, help="queries in a batch")
    parser.add_argument("--hard", type=int, default=2, help="hard negatives of a query")
    parser.add_argument("--max-tokens", type=int, default=250)
    parser.add_argument("--steps", type=int, default=6, help="steps of a round; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tuning", nargs="*", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    require(options.data)
    torch.set_num_threads(options.threads)
    # Of one thread, processor time: other programs on the machine do not count.
    options.clock = "processor" if options.threads == 1 else "wall"
    formats = ["float32", *(["bfloat16"] if cpu_has_fast_bfloat16() else [])]
    ways = [Way(tuning, dtype) for tuning in options.tuning for dtype in formats]
    result = measure(make_source(options.data, options.queries * options.steps, options.hard), ways, options)
    show(result)
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    results[f"{options.data.name}, {options.threads} thread(s)"] = {
        "clock": options.clock,
        "queries_of_a_batch": options.queries,
        "hard_negatives": options.hard,
        "bfloat16_products": cpu_has_fast_bfloat16(),
        "packages": package_versions(),
        **result,
    }
    write_json(options.out, results)


if __name__ == "__main__":
    main()
