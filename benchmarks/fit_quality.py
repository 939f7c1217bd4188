"""What a fit is worth: learnt from a corpus alone, measured on the real test queries of its data set.

For each set, `d2llm fit` starts from the untuned backbone and sees the corpus only: no queries and no judgements of the
set. Everything is then measured on the test split of the set, in one run of `evaluate`: BM25, the untuned cosine, the
sum of both with weights that were fitted on real dev queries (a row that a user without queries cannot have), the
untuned backbone with weights fitted on the written dev queries, and the student of the fit. The upper limit is a
student trained on the set's real training queries in the same way (`--limit`).

    python benchmarks/fit_quality.py DATA_FOLDER covidqa wikiqa --hours 0.5 [--limit] [--writer smollm2]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d2llm.core.files import write_json
from d2llm.core.recipe import WriterConfig, untuned_config
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.data.beir import read_beir
from d2llm.evaluation.evaluate import evaluate
from d2llm.evaluation.report import EvaluationReport
from d2llm.evaluation.setting import Contenders, EvaluationSettings
from d2llm.fitting.fit import BASE_NAME, Fit
from d2llm.fitting.settings import FitSettings
from d2llm.fitting.training_data import DataReport
from d2llm.models.student import Student
from d2llm.training.run import Run

RESULTS = Path(__file__).parent / "results" / "fit"
SETS = ("medquad", "stackfaq", "covidqa", "squad", "wikiqa", "nfcorpus")
LIMIT_NAME = "trained on real queries"


def untuned(folder: Path, backbone: str) -> Path:
    """A student with the backbone's own cosine, from which a fit can start."""
    if not folder.exists():
        config = Student.load(DEFAULT_STUDENT).config
        named = config.backbone.model_copy(update={"model": backbone})
        Student.create(config.model_copy(update={"backbone": named})).save(folder)
    return folder


def measure(data: Path, work: Path, *, hours: float, writer: str, backbone: str, with_limit: bool) -> dict[str, Any]:
    """Fit to the corpus of a set and measure on its test split."""
    started = time.monotonic()
    settings = FitSettings(
        hours=hours, student=str(untuned(work.parent / "untuned", backbone)), writer=WriterConfig(model=writer)
    )
    fitting = Fit([data / "corpus.jsonl"], work / "fit", settings)
    report = fitting.finish()
    if report is None:
        raise SystemExit(f"{work}: was finished by an earlier call; delete it to measure again")
    seconds = time.monotonic() - started
    students = {
        BASE_NAME: Student.load(next(fitting.folder.work.glob("base-*"))),
        "d2llm fit": Student.load(fitting.folder.student),
    }
    if with_limit:
        students[LIMIT_NAME] = Student.load(_trained_on_real_queries(fitting, data, work))
    main = students.pop("d2llm fit")
    contenders = Contenders(
        student=main,
        untuned=Student.create(untuned_config(main.config)),
        bi_encoders=students,
    )
    real = evaluate(
        read_beir(data, splits=["dev", "test"] if (data / "qrels" / "dev.tsv").is_file() else ["test"]),
        contenders,
        EvaluationSettings(baseline="fitted_sum", latency_queries=10),
        work_folder=work / "measured",
    )
    return {
        "set": data.name,
        "hours": hours,
        "writer": writer,
        "seconds": seconds,
        "kept": report.kept,
        "num_kept_queries": report.num_kept,
        "rejected": dict(report.rejected),
        "writing": asdict(report.writing),
        "verdict_on_written_queries": None if report.verdict is None else asdict(report.verdict),
        "rows": rows(real),
    }


def _trained_on_real_queries(fitting: Fit, data: Path, work: Path) -> Path:
    """The recipe of the fit, with the set's own queries in place of the written ones."""
    real = read_beir(data, splits=["train", "dev"])
    counts = {split: len(real.qrels[split]) for split in ("train", "dev")}
    recipe = fitting.recipe({"written": DataReport(counts)}, fitting.plan())
    own = recipe.data[0].model_copy(update={"path": str(data), "max_queries": None})
    run = Run(recipe.model_copy(update={"data": (own,)}), work / "real-run")
    run.finish()
    return run.parts.student


def rows(report: EvaluationReport) -> list[dict[str, Any]]:
    """The main measure of each row, with its difference from the fitted sum."""
    result: list[dict[str, Any]] = []
    for row in report.rows:
        comparison = report.comparison(row.name, report.main_measure)
        difference = None
        if comparison is not None:
            difference = {"value": comparison.difference.value, "adjusted_p": comparison.adjusted_p}
        value = row.measures[report.main_measure].value
        result.append({"name": row.name, report.main_measure: value, "against_fitted_sum": difference})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that contains the data sets")
    parser.add_argument("sets", nargs="*", default=SETS)
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--writer", default="smollm2")
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--limit", action="store_true", help="also train on the real queries of each set")
    parser.add_argument("--work", type=Path, default=Path("runs/fit-quality"))
    options = parser.parse_args()
    for name in options.sets:
        result = measure(
            options.data / name,
            options.work / name,
            hours=options.hours,
            writer=options.writer,
            backbone=options.backbone,
            with_limit=options.limit,
        )
        write_json(RESULTS / f"{name}.json", result)
        for row in result["rows"]:
            print(f"{name:12} {row['name']:40} {row['nDCG@10']:.3f}")


if __name__ == "__main__":
    main()
