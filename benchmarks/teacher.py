"""How fast the teacher judges, beside the plain procedure, on the same pairs in one run.

The plain procedure pads every pair to 250 tokens, eight at a time, and makes logits of the whole vocabulary at every
place. `Teacher.judge` pads nothing it need not, makes two logits a pair, reads a query once for all its candidates, and
holds the weights in bfloat16 where this machine is fast with it. SmolLM2-135M; questions with their passages as a plan
has them (the positive and those that BM25 finds). Both prompts: of `paper` two thirds stand behind the passage and
cannot be shared, of `short` hardly anything.

Times are those of this process alone (CPU seconds over threads), so that a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from d2llm.core.recipe import TeacherConfig
from d2llm.data.beir import read_beir
from d2llm.models.teachers.causal import Teacher
from d2llm.models.teachers.judge import TextPair
from d2llm.store.bm25 import WordIndex, rank_passages

PLAIN_TOKENS, PLAIN_PAIRS = 250, 8
NUM_CANDIDATES = 11
TASK = "asymmetric"
RESULT = Path(__file__).parent / "results" / "teacher.json"
DATA = Path(__file__).parents[2] / "shared" / "data" / "squad-sent"
FALLBACK = Path(__file__).parent.parent / "ARCHITECTURE.md"


def seconds(work: Callable[[], object]) -> float:
    """Time that this process computes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def real_pairs(num_queries: int) -> tuple[str, list[TextPair]]:
    """Questions, each with the passages that BM25 finds for it; lines of this project where that is missing."""
    if not DATA.is_dir():
        lines = [line for line in FALLBACK.read_text(encoding="utf-8").splitlines() if len(line) > 60]
        return FALLBACK.name, [(query[:60], text) for query in lines[:num_queries] for text in lines[:NUM_CANDIDATES]]
    dataset = read_beir(DATA)
    passages = list(dataset.passages.values())
    queries = list(dataset.qrels["train"])[:: max(1, len(dataset.qrels["train"]) // num_queries)][:num_queries]
    texts = [dataset.queries[query].text for query in queries]
    index = WordIndex.from_texts(passage.full_text for passage in passages)
    found = rank_passages(index, [passage.id for passage in passages], texts, NUM_CANDIDATES)
    pairs: list[TextPair] = []
    for query, text, candidates in zip(queries, texts, found, strict=True):
        ids = list(dict.fromkeys([*dataset.qrels["train"][query], *(c.passage_id for c in candidates)]))
        pairs += [(text, dataset.passages[passage_id].full_text) for passage_id in ids[:NUM_CANDIDATES]]
    return DATA.name, pairs


def plain(teacher: Teacher, pairs: list[TextPair]) -> np.ndarray:
    """The plain procedure's log-odds."""
    inputs, _ = teacher.tokenize(pairs, TASK)
    padding = int(teacher.tokenizer.pad_token_id or 0)
    yes, no = teacher._answer_ids[TASK]
    model = teacher._whole[0]
    found: list[np.ndarray] = []
    for start in range(0, len(inputs), PLAIN_PAIRS):
        rows = [ids[-PLAIN_TOKENS:] for ids in inputs[start : start + PLAIN_PAIRS]]
        ids = torch.tensor([row + [padding] * (PLAIN_TOKENS - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (PLAIN_TOKENS - len(row)) for row in rows])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        last = logits[torch.arange(len(rows)), mask.sum(1) - 1].float()
        found.append((last[:, yes] - last[:, no]).numpy())
    return np.concatenate(found)


def measure(prompt: str, dtype: str, pairs: list[TextPair], num_plain: int) -> dict[str, float]:
    """Pairs a second of both procedures, and how far their log-odds are apart."""
    teacher = Teacher.load(TeacherConfig(prompt=prompt), device="cpu", dtype=dtype)
    of_plain: list[np.ndarray] = []
    teacher.judge(pairs[:PLAIN_PAIRS], TASK)  # the trial of the cache, the first touch of the weights
    plain_seconds = seconds(lambda: of_plain.append(plain(teacher, pairs[:num_plain])))
    of_judge: list[np.ndarray] = []
    judge_seconds = seconds(lambda: of_judge.append(teacher.judge(pairs, TASK).log_odds))
    return {
        "tokens_per_pair": float(np.mean([len(ids) for ids in teacher.tokenize(pairs, TASK)[0]])),
        "plain_pairs_per_second": num_plain / plain_seconds,
        "judge_pairs_per_second": len(pairs) / judge_seconds,
        "largest_difference": float(np.abs(of_judge[0][:num_plain] - of_plain[0]).max()),
    }


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--plain-pairs", type=int, default=16, help="pairs that the plain procedure is timed on")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", nargs="+", default=["short", "paper"])
    asked = parser.parse_args()
    source, pairs = real_pairs(asked.queries)
    facts = {"data": source, "pairs": len(pairs), "queries": asked.queries, "threads": torch.get_num_threads()}
    rows: dict[str, dict[str, float]] = {}
    for prompt in asked.prompts:
        for dtype in asked.dtypes:
            row = rows[f"{prompt}, {dtype}"] = measure(prompt, dtype, pairs, min(len(pairs), asked.plain_pairs))
            row["ratio"] = row["judge_pairs_per_second"] / row["plain_pairs_per_second"]
            exact = rows[f"{prompt}, {asked.dtypes[0]}"]
            row["ratio_to_plain_in_" + asked.dtypes[0]] = (
                row["judge_pairs_per_second"] / exact["plain_pairs_per_second"]
            )
            print(f"{prompt:6} {dtype:9}" + "".join(f"  {name} {value:.4g}" for name, value in row.items()), flush=True)
            RESULT.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
