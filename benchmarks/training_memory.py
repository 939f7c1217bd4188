"""Memory that training holds, and the time that it takes to hold less.

The default recipe's student (`minilm`) on one batch of long passages and on one of sentences, with all activations
kept, with those that fit on a machine with 8 GB free, and with none. Each case runs in a separate process on one
thread: peak resident memory, and tokens per second of processor time (so that other programs do not matter), without
the first batch. Then a teacher of 135 million parameters (`smollm2`) on eight pairs, with several part sizes.

    python benchmarks/training_memory.py
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from d2llm.core.files import write_json
from d2llm.data.plan import TrainingPair
from d2llm.evaluation.systems import peak_memory
from d2llm.models.student import Student
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.recipe import CausalTeacherConfig, LoraConfig, Recipe, TeacherTuningConfig, TrainingConfig
from d2llm.training import gradient_cache, tune_teacher

RESULT = Path(__file__).parent / "results" / "training-memory.json"
GIB, MIB = 1 << 30, 1 << 20
BATCHES = {"passages": (40, 250), "sentences": (200, 48)}
"""Number of texts, and tokens of the longest; the shortest has three quarters of them."""
WAYS: dict[str, dict[str, Any]] = {
    "parts of 2,048 tokens, all kept": {"part_tokens": 2048, "gradient_caching": "off"},
    "parts of 512, all kept": {"gradient_caching": "off"},
    "parts of 512, as 8 GB have room": {},
    "parts of 512, none kept": {"gradient_caching": "on"},
}
TEACHER_PARTS = (2560, 1024, 512)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(1)
        case, way = arguments.child
        print(json.dumps(measure_teacher(int(way)) if case == "teacher" else measure_student(case, way)))
        return
    cases = [(batch, way) for batch in BATCHES for way in WAYS] + [("teacher", str(part)) for part in TEACHER_PARTS]
    rows: list[dict[str, Any]] = []
    print(f"{'':10} {'':34} {'peak GiB':>8} {'tokens/s':>9}   (one core's processor time)")
    for case, way in cases:
        command = [sys.executable, __file__, "--child", case, way]
        measured = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        rows.append({"case": case, "way": way, **measured})
        label = f"{int(way):,} tokens at a time" if case == "teacher" else way
        print(f"{case:10} {label:34} {measured['peak_gib']:8.2f} {measured['tokens_per_second']:9,.0f}", flush=True)
    write_json(RESULT, {"rows": rows})


def measure_student(batch: str, way: str) -> dict[str, float]:
    """Steps of the default recipe's student on one batch."""
    count, longest = BATCHES[batch]
    rng = random.Random(0)
    ids = [[rng.randrange(1000, 5000) for _ in range(rng.randint(3 * longest // 4, longest))] for _ in range(count)]
    training = TrainingConfig.model_validate(WAYS[way])
    with peak_memory() as peak:
        student = Student.create(Recipe().student, device="cpu", dtype="float32")
        student.prepare_training()
        student.train()
        free = 8 * GIB - int((peak() or 0) * MIB)
        with patch.object(gradient_cache, "free_memory", return_value=free):
            room = gradient_cache.graph_room(training, student.backbone.device)

        def step(seed: int) -> None:
            part_tokens = training.part_tokens
            gradient_cache.backpropagate(student, ids, in_batch_loss, part_tokens=part_tokens, room=room, seed=seed)
            student.zero_grad(set_to_none=True)

        return timed(step, sum(map(len, ids))) | {"peak_gib": round((peak() or 0) / 1024, 2)}


def in_batch_loss(vectors: torch.Tensor, _token_vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A loss over all pairs of vectors."""
    return (vectors @ vectors.T).logsumexp(1).sum()


def measure_teacher(part_tokens: int) -> dict[str, float]:
    """Gradients for a batch of pairs that reach the teacher's token limit."""
    rng = random.Random(0)
    passage = " ".join(rng.choices(["the", "of", "and", "river", "house", "music", "study", "virus"], k=400))
    pairs = [TrainingPair(f"what is it {n}", passage, "asymmetric", float(n == 0)) for n in range(8)]
    with peak_memory() as peak:
        teacher = CausalTeacher.load(
            CausalTeacherConfig(model="smollm2", prompt="short"), device="cpu", dtype="float32"
        )
        teacher.prepare_training(LoraConfig(rank=16, alpha=32))
        teacher.train()
        inputs, _ = teacher.tokenize([(pair.query, pair.passage) for pair in pairs], "asymmetric")

        def step(seed: int) -> None:
            torch.manual_seed(seed)
            tune_teacher.accumulate(teacher, pairs, part_tokens, TeacherTuningConfig())
            teacher.zero_grad(set_to_none=True)

        return timed(step, sum(map(len, inputs))) | {"peak_gib": round((peak() or 0) / 1024, 2)}


def timed(step: Any, num_tokens: int) -> dict[str, float]:
    """Tokens per second of the second and third of three steps."""
    step(0)
    start = time.process_time()
    step(1)
    step(2)
    return {"tokens_per_second": round(2 * num_tokens / (time.process_time() - start), 1)}


if __name__ == "__main__":
    main()
