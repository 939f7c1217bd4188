"""What a fit is worth: learnt from a corpus alone, measured on the real test queries of its data set.

For each set, `d2llm fit` starts from the untuned backbone (or `--start`) and sees the corpus only: no queries and no
judgements of the set. Everything is then measured on the test split of the set, in one run of `evaluate`: BM25, the
untuned cosine, the sum of both with weights that were fitted on real dev queries (a row that a user without queries
cannot have), the start with weights fitted on the written dev queries, and the student of the fit. The upper limit is a
student trained on the set's real training queries in the same way (`--limit`). `--recorded` takes the queries that a
large language model once wrote (`recorded_writer.py`) instead of having a local one write them.

    python benchmarks/fit_quality.py DATA_FOLDER covidqa wikiqa --hours 0.5 [--limit] [--start STUDENT]
        [--writer MODEL | --recorded]
"""

from __future__ import annotations

import argparse
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from recorded_writer import read_recorded, recorded_writer

from d2llm.core.files import write_json
from d2llm.core.shipped import DEFAULT_STUDENT, DEFAULT_WRITER
from d2llm.data.beir import read_beir
from d2llm.evaluation.contenders import Contenders
from d2llm.evaluation.evaluate import evaluate
from d2llm.evaluation.report import EvaluationReport
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.fitting.compare import BASE_NAME
from d2llm.fitting.fit import Fit
from d2llm.fitting.settings import FitSettings
from d2llm.fitting.training_data import DataReport
from d2llm.models.student import Student
from d2llm.recipe import RemoteWriterConfig, WriterConfig, WriterEndpointConfig, untuned_config
from d2llm.training.run import Run

RESULTS = Path(__file__).parent / "results" / "fit"
SETS = ("medquad", "stackfaq", "covidqa", "squad", "wikiqa", "nfcorpus")
SHARED_PASSAGES = {"nfcorpus"}
"""Sets of which all training queries share passages with dev or test."""
LIMIT_NAME = "trained on real queries"
TRAINED_NAME = "trained on written queries, but not kept"
MAX_REAL_QUERIES = 2_000
"""The upper limit is trained on no more real queries than this, which a fit of an hour could have had written."""
RECORDED_NAME = "recorded"
_RECORDED_FRACTION = 0.95  # of the recorded queries; the writing stops there, because rules drop a few


def untuned(folder: Path, backbone: str) -> Path:
    """A student with the backbone's own cosine, from which a fit can start."""
    if not folder.exists():
        config = Student.load(DEFAULT_STUDENT).config
        named = config.backbone.model_copy(update={"model": backbone})
        Student.create(config.model_copy(update={"backbone": named})).save(folder)
    return folder


def measure(data: Path, work: Path, *, hours: float, writer: str, start: str, with_limit: bool) -> dict[str, Any]:
    """Fit to the corpus of a set, starting from a student, and measure on its test split."""
    with ExitStack() as stack:
        if writer == RECORDED_NAME:
            remote = WriterEndpointConfig(url=stack.enter_context(recorded_writer(data)))
            config = RemoteWriterConfig(model=RECORDED_NAME, remote=remote)
            num_recorded = sum(len(queries) for queries in read_recorded(data.name).values())
            settings = FitSettings(
                hours=hours, student=start, writer=config, max_queries=round(_RECORDED_FRACTION * num_recorded)
            )
        else:
            settings = FitSettings(hours=hours, student=start, writer=WriterConfig(model=writer))
        fitting = Fit([data], work / "fit", settings)
        fitting.served.read()
        before = work / "index-before"  # the fit replaces it, and the student to start from is measured with it
        if not before.exists():
            shutil.copytree(fitting.folder.index, before)
        fitting.finish()  # brings only the index up to date if an earlier call finished the fit
    report = json.loads(fitting.folder.report.read_text(encoding="utf-8"))
    main = Student.load(fitting.folder.student)
    students = {BASE_NAME: Student.load(next(fitting.folder.work.glob("base-*")))}
    if report["kept"] == "start" and report["verdict"] is not None:
        students[TRAINED_NAME] = Student.load(next(fitting.folder.work.glob("run-*/student")))
    if with_limit:
        students[LIMIT_NAME] = Student.load(_trained_on_real_queries(fitting, data, work))
    contenders = Contenders(student=main, untuned=Student.create(untuned_config(main.config)), bi_encoders=students)
    real = evaluate(
        read_beir(data, splits=["dev", "test"] if (data / "qrels" / "dev.tsv").is_file() else ["test"]),
        contenders,
        EvaluationSettings(baseline="fitted_sum", latency_queries=10),
        work_folder=work / "measured",
        indexes=[before, fitting.folder.index, *fitting.folder.work.glob("index-*")],
    )
    return {
        "set": data.name,
        "hours": hours,
        "start": Path(start).name,
        "writer": writer,
        "stages": report["seconds"],
        "kept": report["kept"],
        "num_kept_queries": report["num_kept"],
        "rejected": report["rejected"],
        "writing": report["writing"],
        "verdict_on_written_queries": report["verdict"],
        "rows": rows(real),
    }


def _trained_on_real_queries(fitting: Fit, data: Path, work: Path) -> Path:
    """The recipe of the fit, with the set's own queries in place of the written ones."""
    real = read_beir(data, splits=["train", "dev"])
    counts = {split: len(real.qrels[split]) for split in ("train", "dev")}
    recipe = fitting.recipe({"written": DataReport(counts)}, fitting.plan())
    changes = {"max_queries": MAX_REAL_QUERIES, "exclude_shared_passages": data.name not in SHARED_PASSAGES}
    own = recipe.data[0].model_copy(update={"path": str(data)} | changes)
    run = Run(recipe.model_copy(update={"data": (own,)}), work / "real-run")
    run.finish()
    return run.folder.student


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
    parser.add_argument("--writer", default=DEFAULT_WRITER)
    parser.add_argument("--recorded", dest="writer", action="store_const", const=RECORDED_NAME)
    parser.add_argument("--backbone", default="minilm", help="of the untuned student to start from")
    parser.add_argument("--start", help="start from this student instead, which must not have been trained on the sets")
    parser.add_argument("--limit", action="store_true", help="also train on the real queries of each set")
    parser.add_argument("--work", type=Path, default=Path("runs/fit-quality"))
    options = parser.parse_args()
    start = options.start or str(untuned(options.work / "untuned", options.backbone))
    ending = "" if options.start is None else f"-from-{Path(start).name}"
    for name in options.sets:
        result = measure(
            options.data / name,
            options.work / Path(options.writer).name / f"{name}{ending}",
            hours=options.hours,
            writer=options.writer,
            start=start,
            with_limit=options.limit,
        )
        write_json(RESULTS / Path(options.writer).name / f"{name}{ending}.json", result)
        for row in result["rows"]:
            print(f"{name:12} {row['name']:40} {row['nDCG@10']:.3f}")


if __name__ == "__main__":
    main()
