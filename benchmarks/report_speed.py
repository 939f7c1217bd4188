"""Time of a complete report of `d2llm evaluate`: every row, 50,000 passages, 1,000 queries, the teacher on 100.

    python benchmarks/report_speed.py           a tenth of everything
    python benchmarks/report_speed.py --full    the goal: under 20 minutes on two cores

The corpus is assembled from data sets in BEIR layout (--data), by default short ones beside the
checkout; if they are missing, the script says so and measures nothing. Everything is computed in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from d2llm import EvaluationSettings, evaluate
from d2llm.core.files import write_json
from d2llm.data.beir import read_beir
from d2llm.evaluation.contenders import load_contenders

DATA = [Path("../shared/data") / name for name in ("quora", "squad-sent", "trecqa")]
RESULT = Path(__file__).parent / "results" / "report-speed.json"
GOAL_SECONDS = 1200.0


@dataclass(frozen=True)
class Size:
    passages: int
    queries: int
    teacher_queries: int


FULL, TENTH = Size(50_000, 1_000, 100), Size(5_000, 100, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the size of the goal")
    parser.add_argument("--data", type=Path, nargs="+", default=DATA, help="folders in BEIR layout")
    arguments = parser.parse_args()
    missing = [str(path) for path in arguments.data if not path.is_dir()]
    if missing:
        print(f"skipped: no data at {', '.join(missing)}; pass folders in BEIR layout with --data")
        return
    size = FULL if arguments.full else TENTH
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(corpus, arguments.data, size)
        begin = time.perf_counter()
        dataset = read_beir(corpus)
        contenders = load_contenders("d2llm-minilm")
        settings = EvaluationSettings(teacher_depth=50, teacher_queries=size.teacher_queries)
        report = evaluate(dataset, contenders, settings, work_folder=Path(folder) / "work")
        seconds = time.perf_counter() - begin
    num_words = sum(len(passage.full_text.split()) for passage in dataset.passages.values())
    figures: dict[str, object] = {
        "passages": report.num_passages,
        "words_per_passage": round(num_words / report.num_passages, 1),
        "queries": report.num_items,
        "teacher_pairs": 50 * size.teacher_queries,
        "rows": [row.name for row in report.rows],
        "missing": [row.name for row in report.missing],
        "passages_per_second": {
            row.name: round(row.cost.passages_per_second) for row in report.rows if row.cost.passages_per_second
        },
        "seconds": round(seconds, 1),
        "goal_seconds": GOAL_SECONDS if arguments.full else None,
        "ratio_to_goal": round(seconds / GOAL_SECONDS, 3) if arguments.full else None,
    }
    for name, value in figures.items():
        print(f"{name:22} {value}")
    if arguments.full:
        write_json(RESULT, figures)


def write_corpus(folder: Path, sources: list[Path], size: Size) -> None:
    """Write one BEIR folder of the given size: judged passages first, then random others."""
    rng = random.Random(0)
    datasets = [read_beir(path, splits=["test"]) for path in sources]
    judged = [
        (number, query_id, passage_ids)
        for number, dataset in enumerate(datasets)
        for query_id, passage_ids in dataset.positives("test").items()
        if passage_ids
    ]
    chosen = rng.sample(judged, size.queries)
    needed = {(number, passage_id) for number, _, passage_ids in chosen for passage_id in passage_ids}
    others = [(n, p) for n, dataset in enumerate(datasets) for p in dataset.passages if (n, p) not in needed]
    kept = sorted(needed) + rng.sample(others, size.passages - len(needed))
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number, passage_id in kept:
            passage = datasets[number].passages[passage_id]
            line = {"_id": f"{number}-{passage_id}", "title": passage.title, "text": passage.text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        for number, query_id, _ in chosen:
            line = {"_id": f"{number}-{query_id}", "text": datasets[number].queries[query_id].text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with (folder / "qrels" / "test.tsv").open("w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for number, query_id, passage_ids in chosen:
            file.writelines(f"{number}-{query_id}\t{number}-{passage_id}\t1\n" for passage_id in passage_ids)


if __name__ == "__main__":
    main()
