"""Training speed of a student compared with the plain procedure.

One run, the same model, the same batches of the same plan: queries, each with one positive and four hard negatives,
LoRA on all linear layers, one optimizer step per batch. Measured are queries and tokens (of the texts themselves, each
counted once) per second:
- plain: every text padded to 250 tokens, the passages of each pair encoded separately, float32, attention as chosen by
  `transformers`; four queries at a time, because many more do not fit into memory;
- ours, step by step: each text once, padded to its neighbours only; the fast number format; the attention that trains
  fastest; and gradient caching, which bounds memory at the cost of a second forward pass.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2llm.data.beir import Dataset
from d2llm.data.collation import DistillationBatch, LabelledSource, collate, epoch_batches
from d2llm.data.labels import LabelStore
from d2llm.data.open_data import open_data
from d2llm.data.plan import read_plan
from d2llm.data.training import TrainingSource
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, Lora, StudentConfig, TrainingConfig
from d2llm.recipe.losses import Objective
from d2llm.training.checkpoints import trainable
from d2llm.training.gradient_cache import backpropagate, graph_room
from d2llm.training.losses import LossInput
from d2llm.training.objective import batch_losses, batch_tokens, score_vectors, weighted_sum

PADDED = 250
AT_A_TIME, HARD = 4, 4
OWN_JUDGEMENTS = Objective.model_validate({"in_batch_cross_entropy": 1.0, "dot_cross_entropy": 1.0}).root
RESULT = Path(__file__).parent / "results" / "training.json"


@dataclass(frozen=True)
class Work:
    """One optimizer step: a batch, and the same queries in smaller batches for the plain procedure."""

    batch: DistillationBatch
    small: list[DistillationBatch]


def make_work(data: Path, plan: Path, count: int, num_queries: int) -> list[Work]:
    """The first batches of an epoch."""
    dataset = open_data(data)
    assert isinstance(dataset, Dataset)
    source = TrainingSource(dataset, read_plan(plan), "asymmetric")
    labels = LabelStore(Path("unused"), teacher="none", prompt="none", dataset=dataset.name)
    labelled = LabelledSource.join(source, labels, keep_unlabelled=True)
    drawn = epoch_batches([labelled], epoch=0, batch_queries=num_queries, num_hard=HARD, num_easy=0, seed=0)
    return [
        Work(
            collate(labelled, draws),
            [collate(labelled, draws[at : at + AT_A_TIME]) for at in range(0, len(draws), AT_A_TIME)],
        )
        for _, draws in drawn[:count]
    ]


def make_student(dtype: str | None, attention: str | None) -> Student:
    """MiniLM with adapters, ready to train; None selects what ``distill`` uses."""
    lora = Lora(rank=16, alpha=32, dropout=0.0)
    student = Student.create(StudentConfig(backbone=BackboneConfig(model="minilm", tuning=lora)), dtype=dtype)
    student.prepare_training()
    if attention is not None:
        student.backbone.model.set_attn_implementation(attention)
    return student.train()


def plain_step(student: Student, work: Work) -> None:
    """Forward and backward pass of the plain procedure: each query once, then the passages of each of its pairs."""
    for batch in work.small:
        ids, num_queries = batch_tokens(student, batch), len(batch.query_ids)
        columns = np.nonzero(batch.positive | batch.hard)[1]  # by query
        rows = ids[:num_queries] + [ids[num_queries + column] for column in columns]
        padded, mask = (
            torch.zeros(len(rows), PADDED, dtype=torch.long),
            torch.zeros(len(rows), PADDED, dtype=torch.bool),
        )
        for row, tokens in enumerate(rows):
            padded[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        vectors = student(padded, mask)
        first = [num_queries + int(np.flatnonzero(columns == c)[0]) for c in range(len(batch.passage_ids))]
        (loss_of(student, batch)(vectors[[*range(num_queries), *first]], ()) / len(work.small)).backward()


def our_step(training: TrainingConfig) -> Callable[[Student, Work], None]:
    """Forward and backward pass as in ``distill``."""

    def step(student: Student, work: Work) -> None:
        ids = batch_tokens(student, work.batch)
        room = graph_room(training, student.backbone.device)
        backpropagate(student, ids, loss_of(student, work.batch), room=room, seed=0)

    return step


def loss_of(student: Student, batch: DistillationBatch) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """The loss of a batch as a function of its vectors."""

    def loss(vectors: Tensor, _token_vectors: Sequence[Tensor]) -> Tensor:
        inputs = LossInput(batch, score_vectors(student, vectors, batch), student)
        return weighted_sum(batch_losses(OWN_JUDGEMENTS, inputs), OWN_JUDGEMENTS)

    return loss


def run_step(
    student: Student, optimizer: torch.optim.Optimizer, step: Callable[[Student, Work], None], work: Work
) -> None:
    step(student, work)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/squad-sent"))
    parser.add_argument("--plan", type=Path, default=Path("runs/d2llm/plans/squad-sent"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--queries", type=int, default=32, help="queries in a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--processor-time", action="store_true", help="processor time: one thread, busy machine")
    options = parser.parse_args()
    if not (options.plan / "plan.jsonl").is_file() or not options.data.is_dir():
        print(f"{options.plan}: no plan there; pass one that `d2llm mine` wrote: --plan FOLDER --data FOLDER")
        return
    torch.set_num_threads(options.threads)
    first, *all_work = make_work(options.data, options.plan, options.batches + 1, options.queries)
    clock = time.process_time if options.processor_time else time.perf_counter
    ours, caching = our_step(TrainingConfig()), our_step(TrainingConfig(gradient_caching="on"))
    ways = {
        "plain procedure, float32": (make_student("float32", "sdpa"), plain_step),
        "each text once, little padding": (make_student("float32", "sdpa"), ours),
        "+ fast number format": (make_student(None, "sdpa"), ours),
        "+ fast attention = ours": (make_student(None, None), ours),
        "ours with gradient caching": (make_student(None, None), caching),
    }
    optimizers = {n: torch.optim.AdamW(trainable(student).values(), lr=1e-5) for n, (student, _) in ways.items()}
    times = dict.fromkeys(ways, 0.0)
    for name, (student, step) in ways.items():  # a small batch first, which is not counted
        run_step(student, optimizers[name], step, Work(first.small[0], first.small[:1]))
    for work in all_work:  # interleaved, so that other work on the machine affects all equally
        for name, (student, step) in ways.items():
            start = clock()
            run_step(student, optimizers[name], step, work)
            times[name] += clock() - start
    counted = [work.batch for work in all_work]
    student = ways["+ fast attention = ours"][0]
    queries = sum(len(batch.query_ids) for batch in counted)
    tokens = sum(len(ids) for batch in counted for ids in batch_tokens(student, batch))
    base = times["plain procedure, float32"]
    rows = {
        name: {"queries_per_second": queries / t, "tokens_per_second": tokens / t, "ratio_to_plain": base / t}
        for name, t in times.items()
    }
    print(f"{options.threads} thread(s), {student.backbone.compute_dtype}, {queries} queries, {tokens} tokens")
    for name, row in rows.items():
        print(
            f"{name:32} {row['queries_per_second']:7.2f} queries/s {row['tokens_per_second']:9,.0f} tokens/s "
            f"{row['ratio_to_plain']:6.2f} x"
        )
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    results[f"{options.threads} thread(s)"] = {
        "clock": "processor" if options.processor_time else "wall",
        "number_format": str(student.backbone.compute_dtype).removeprefix("torch."),
        "queries_of_a_batch": options.queries,
        "queries": queries,
        "tokens": tokens,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
