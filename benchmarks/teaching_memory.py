"""How the memory of mining and labelling grows with the corpus: 100,000 and 400,000 short passages.

Each case runs in a separate process.

    python benchmarks/teaching_memory.py            the goal: both sizes, texts in memory and in a file
    python benchmarks/teaching_memory.py --small    a tenth of it

For each passage, mining needs its vector (in a memory-mapped file, whose pages count as resident memory while
they are in use) and little else; the memory for labelling does not depend on the corpus. Encoder and teacher are fakes
with vectors of the width of `minilm`, because memory is measured, not time.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np

from d2llm.core.files import write_json
from d2llm.core.types import TASKS, Passage, Query, Task
from d2llm.data.beir import Dataset, PassageStore
from d2llm.data.plan import PlanEntry, TrainingPlan, TrainingSource
from d2llm.evaluation.systems import peak_memory
from d2llm.models.protocols import PlainStudent
from d2llm.models.teachers.identity import TeacherIdentity
from d2llm.models.teachers.pair_teacher import TeacherScores, TextPair
from d2llm.models.tokens import EncodedTexts
from d2llm.recipe import MiningConfig, StudentConfig, TeacherConfig
from d2llm.store.bm25 import WordIndex
from d2llm.training.label import label
from d2llm.training.mining.mine import mine

RESULT = Path(__file__).parent / "results" / "teaching-memory.json"
SIZES, SMALL_SIZES = (100_000, 400_000), (10_000, 40_000)
DIM = 384
NUM_QUERIES = 200
NUM_WORDS = 20
VOCABULARY = 30_000
CASES = (
    ("file", "label"),
    ("file", "mine"),
    ("memory", "label"),
    ("memory", "mine"),
    ("memory", "texts"),
    ("file", "texts"),
    ("file", "bm25"),
)
"""Where the texts are stored, and up to which step the process runs. Labelling needs no vectors: its plan is random."""
MIB = 2**20


class FakeEncoder(PlainStudent):
    """Random vectors of the width of `minilm`."""

    fingerprint = "fake"
    config = StudentConfig()
    vector_dim = DIM

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        del advance
        return EncodedTexts(self._rng.standard_normal((len(texts), DIM), dtype=np.float32), (), 0)

    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> EncodedTexts:
        del instruction
        return self.encode_passages(texts, advance=advance)


class FakeTeacher:
    """Arbitrary log-odds and features."""

    fingerprint = "fake"

    def prompt_fingerprint(self, task: Task) -> str:
        return task

    def score_pairs(self, pairs: Sequence[TextPair], task: Task, **_: Any) -> TeacherScores:
        del task
        odds = np.array([len(passage) - len(query) for query, passage in pairs], np.float32)
        return TeacherScores(odds, np.resize(odds, (len(pairs), DIM)) + 1, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the size")
    parser.add_argument("--child", nargs=3, metavar=("SIZE", "TEXTS", "PART"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        size, texts, part = arguments.child
        print(json.dumps(measure(int(size), texts, part)))
        return
    sizes = SMALL_SIZES if arguments.small else SIZES
    vectors = (sizes[1] - sizes[0]) * DIM * 4 / MIB
    print(f"{'texts in':9} {'up to':10} {sizes[0]:>9,} {sizes[1]:>9,}   growth  bytes/passage   (peak resident MiB)")
    print(f"the vectors alone {vectors:33.0f} {DIM * 4:14}")
    rows: list[dict[str, Any]] = []
    for texts, part in CASES:
        row = row_of(texts, part, sizes, [run_child(size, texts, part) for size in sizes])
        small, large = row["peak_mib"]
        print(
            f"{texts:9} {part:10} {small:9.0f} {large:9.0f} {large - small:8.0f} {row['bytes_per_passage']:14.0f}",
            flush=True,
        )
        rows.append(row)
    if not arguments.small:
        write_json(RESULT, {"sizes": sizes, "vectors_mib": round(vectors, 1), "rows": rows})


def row_of(texts: str, part: str, sizes: tuple[int, int], measured: list[dict[str, float]]) -> dict[str, Any]:
    small, large = measured
    growth = (large["peak_mib"] - small["peak_mib"]) * MIB / (sizes[1] - sizes[0])
    return {
        "texts_in": texts,
        "up_to": part,
        "peak_mib": [small["peak_mib"], large["peak_mib"]],
        "bytes_per_passage": round(growth, 1),
        "seconds": [small["seconds"], large["seconds"]],
    }


def run_child(size: int, texts: str, part: str) -> Any:
    command = [sys.executable, __file__, "--child", str(size), texts, part]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(size: int, texts: str, part: str) -> dict[str, float]:
    """Peak memory of a process that runs up to ``part``."""
    begin = time.perf_counter()
    with peak_memory() as peak:
        passages: Any = PassageStore(make_passages(size)) if texts == "file" else {p.id: p for p in make_passages(size)}
        dataset = make_dataset(passages)
        if part == "bm25":
            passage_ids = sorted(dataset.passages)
            WordIndex.from_texts(dataset.passages[passage_id].full_text for passage_id in passage_ids)
        elif part == "mine":
            mine(dataset, "train", MiningConfig(), encoder=FakeEncoder(), seed=0)
        elif part == "label":
            label_plan(dataset, size)
        return {"peak_mib": round(peak() or 0, 1), "seconds": round(time.perf_counter() - begin, 1)}


def label_plan(dataset: Dataset, size: int) -> None:
    """Label the positive and ten random passages of each query."""
    rng = random.Random(1)
    entries: list[PlanEntry] = []
    for query_id, positives in dataset.qrels["train"].items():
        others = (f"p{number:07}" for number in rng.sample(range(size), 11))
        drawn = tuple(passage_id for passage_id in others if passage_id not in positives)[:10]
        entries.append(PlanEntry(query_id, tuple(positives), drawn[:8], drawn[8:]))
    source = TrainingSource(dataset, TrainingPlan(tuple(entries), {}), "asymmetric")
    identity = TeacherIdentity(FakeTeacher.fingerprint, {task: task for task in TASKS})
    with (
        TemporaryDirectory() as folder,
        patch("d2llm.training.label.load_teacher", lambda *_, **__: FakeTeacher()),
        patch("d2llm.training.label.identify_teacher", lambda _: identity),
    ):
        label([source], Path(folder) / "labels", teacher=TeacherConfig())


def make_passages(size: int) -> Iterator[Passage]:
    """Short texts with Zipf-distributed word frequencies."""
    rng = random.Random(0)
    weights = np.cumsum(1 / np.arange(1, VOCABULARY + 1)).tolist()
    words = [f"w{number:x}" for number in range(VOCABULARY)]
    for number in range(size):
        yield Passage(f"p{number:07}", " ".join(rng.choices(words, cum_weights=weights, k=NUM_WORDS)))


def make_dataset(passages: Any) -> Dataset:
    queries: dict[str, Query] = {}
    train: dict[str, dict[str, int]] = {}
    for number in range(NUM_QUERIES):
        passage_id = f"p{37 * number:07}"
        queries[f"q{number}"] = Query(f"q{number}", " ".join(passages[passage_id].text.split()[:6]))
        train[f"q{number}"] = {passage_id: 1}
    return Dataset("synthetic", Path("synthetic"), passages, queries, {"train": train, "dev": {}, "test": {}})


if __name__ == "__main__":
    main()
