"""Speed of the teacher's scores compared with the plain procedure, on the same pairs in one run.

The plain procedure pads every pair to 250 tokens, eight at a time, and computes logits of the whole vocabulary at every
position. `CausalTeacher.score_pairs` avoids unnecessary padding, computes two logits per pair, reads a query once for
all its candidates, and holds the weights in bfloat16 if that is fast on this machine. SmolLM2-135M; questions with
their passages as in a plan (the positive and those that BM25 finds). Both prompts are measured: two thirds of `paper`
stand behind the passage and cannot be shared, hardly anything of `short` does.

Times are CPU seconds of this process over all threads, so that a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2llm.data.beir import read_beir
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.pair_teacher import TextPair
from d2llm.recipe import CausalTeacherConfig
from d2llm.store.bm25 import WordIndex, rank_passages

PLAIN_TOKENS, PLAIN_PAIRS = 250, 8
NUM_CANDIDATES = 11
TASK = "asymmetric"
RESULT = Path(__file__).parent / "results" / "teacher.json"
DATA = Path(__file__).parents[2] / "shared" / "data" / "squad-sent"
FALLBACK = Path(__file__).parent.parent / "ARCHITECTURE.md"


def seconds(work: Callable[[], object]) -> float:
    """Processor time of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def real_pairs(num_queries: int, data: Path = DATA) -> tuple[str, list[TextPair]]:
    """Questions, each with the passages that BM25 finds for it; lines of this project if the data is missing."""
    if not data.is_dir():
        lines = [line for line in FALLBACK.read_text(encoding="utf-8").splitlines() if len(line) > 60]
        return FALLBACK.name, [(query[:60], text) for query in lines[:num_queries] for text in lines[:NUM_CANDIDATES]]
    dataset = read_beir(data)
    passages = list(dataset.passages.values())
    queries = list(dataset.qrels["train"])[:: max(1, len(dataset.qrels["train"]) // num_queries)][:num_queries]
    texts = [dataset.queries[query].text for query in queries]
    index = WordIndex.from_texts(passage.full_text for passage in passages)
    ranked = rank_passages(index, [passage.id for passage in passages], texts, NUM_CANDIDATES)
    pairs: list[TextPair] = []
    for query, text, candidates in zip(queries, texts, ranked, strict=True):
        ids = list(dict.fromkeys([*dataset.qrels["train"][query], *(c.passage_id for c in candidates)]))
        pairs += [(text, dataset.passages[passage_id].full_text) for passage_id in ids[:NUM_CANDIDATES]]
    return data.name, pairs


def plain(teacher: CausalTeacher, pairs: list[TextPair]) -> np.ndarray:
    """The plain procedure's log-odds."""
    inputs, _ = teacher.tokenize(pairs, TASK)
    padding: Any = teacher.tokenizer.pad_token_id or 0
    yes, no = teacher._answer_ids[TASK]
    model = teacher._whole[0]
    log_odds: list[np.ndarray] = []
    for start in range(0, len(inputs), PLAIN_PAIRS):
        rows = [ids[-PLAIN_TOKENS:] for ids in inputs[start : start + PLAIN_PAIRS]]
        ids = torch.tensor([row + [padding] * (PLAIN_TOKENS - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (PLAIN_TOKENS - len(row)) for row in rows])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        last = logits[torch.arange(len(rows)), mask.sum(1) - 1].float()
        log_odds.append((last[:, yes] - last[:, no]).numpy())
    return np.concatenate(log_odds)


def measure(prompt: str, dtype: str, pairs: list[TextPair], num_plain: int) -> dict[str, float]:
    """Pairs per second of both procedures, and the largest difference between their log-odds."""
    teacher = CausalTeacher.load(CausalTeacherConfig(prompt=prompt), device="cpu", dtype=dtype)
    plain_log_odds: list[np.ndarray] = []
    teacher.score_pairs(pairs[:PLAIN_PAIRS], TASK)  # warm-up: tests the cache, loads the weights
    plain_seconds = seconds(lambda: plain_log_odds.append(plain(teacher, pairs[:num_plain])))
    teacher_log_odds: list[np.ndarray] = []
    teacher_seconds = seconds(lambda: teacher_log_odds.append(teacher.score_pairs(pairs, TASK).log_odds))
    return {
        "tokens_per_pair": float(np.mean([len(ids) for ids in teacher.tokenize(pairs, TASK)[0]])),
        "plain_pairs_per_second": num_plain / plain_seconds,
        "judge_pairs_per_second": len(pairs) / teacher_seconds,
        "largest_difference": float(np.abs(teacher_log_odds[0][:num_plain] - plain_log_odds[0]).max()),
    }


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--plain-pairs", type=int, default=16, help="number of pairs for timing the plain procedure")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", nargs="+", default=["short", "paper"])
    options = parser.parse_args()
    source, pairs = real_pairs(options.queries)
    facts = {"data": source, "pairs": len(pairs), "queries": options.queries, "threads": torch.get_num_threads()}
    rows: dict[str, dict[str, float]] = {}
    for prompt in options.prompts:
        for dtype in options.dtypes:
            row = rows[f"{prompt}, {dtype}"] = measure(prompt, dtype, pairs, min(len(pairs), options.plain_pairs))
            row["ratio"] = row["judge_pairs_per_second"] / row["plain_pairs_per_second"]
            exact = rows[f"{prompt}, {options.dtypes[0]}"]
            row["ratio_to_plain_in_" + options.dtypes[0]] = (
                row["judge_pairs_per_second"] / exact["plain_pairs_per_second"]
            )
            print(f"{prompt:6} {dtype:9}" + "".join(f"  {name} {value:.4g}" for name, value in row.items()), flush=True)
            RESULT.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
