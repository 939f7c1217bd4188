"""Fit the calibration of existing students, which turns scores into probabilities, on their manifests' dev splits.

    python scripts/fit_probabilities.py FOLDER_OF_DATA_SETS STUDENT... [--tried-on NAME:TASK ...]

Each STUDENT is a folder that `d2llm distill` wrote; its ``probabilities.json`` is replaced. ``--tried-on`` measures the
calibration on dev splits that were not used for fitting.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import cast

import numpy as np

from d2llm import Student, open_data
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.pair_training import read_pair_training_set
from d2llm.models.probabilities import ProbabilityCalibration, TaskCalibration
from d2llm.ops.calibration import expected_calibration_error, reliability_bins
from d2llm.training.fit_probabilities import fit_probabilities, score_drawn


def main() -> None:
    """Fit, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--tried-on", action="append", default=[], metavar="NAME:TASK")
    parser.add_argument("--queries", type=int, default=150, help="dev queries of each data set")
    parser.add_argument("--features-only", action="store_true", help="keep what was fitted to scores of vectors alone")
    arguments = parser.parse_args()
    for folder in arguments.students:
        student = Student.load(folder, dtype="float32")
        recipe = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["recipe"]
        judged: list[tuple[Dataset, Task]] = [
            (read_dev(arguments.data / Path(item["path"]).name), cast(Task, item["task"])) for item in recipe["data"]
        ]
        calibration = fit_probabilities(student, judged, num_queries=arguments.queries)
        if arguments.features_only:
            calibration = calibration.model_copy(update={"tasks": student.calibration.tasks})
        calibration.write(folder, student.fingerprint)
        named: list[tuple[str, TaskCalibration]] = [*calibration.tasks.items()]
        named += [(f"{task}, with score features", fitted) for task, fitted in calibration.with_features.items()]
        for name, fitted in named:
            print(
                f"{folder.name} {name}: slope {fitted.slope:.4f}, offset {fitted.offset:.4f}, "
                f"{sum(fitted.num_queries.values())} queries, {fitted.num_pairs} pairs, expected calibration error "
                f"{fitted.error_before:.4f} before, {fitted.error_after:.4f} after",
                flush=True,
            )
        for name in arguments.tried_on:
            print(tried(student, calibration, arguments.data, name, arguments.queries), flush=True)


def tried(student: Student, calibration: ProbabilityCalibration, data: Path, name: str, num_queries: int) -> str:
    """Calibration errors and probabilities on the dev split of a data set, sampled in the same way."""
    folder, _, task = name.partition(":")
    task_name = cast(Task, task or "asymmetric")
    sample = score_drawn(student, read_dev(data / folder), task_name, num_queries=num_queries, seed=1)
    fitted = calibration.tasks[task_name]
    log_odds = fitted.slope * sample.scores + fitted.offset
    before, after = (
        expected_calibration_error(reliability_bins(values, sample.relevant)) for values in (sample.scores, log_odds)
    )
    probabilities = calibration.probabilities(sample.scores, task_name)
    relevant, others = probabilities[sample.relevant], probabilities[~sample.relevant]
    return (
        f"  {folder}, {task_name}, {sample.num_queries[folder]} queries: error {before:.4f} before, {after:.4f} after; "
        f"median {np.median(relevant):.3f} relevant, {np.median(others):.4f} others; "
        f"{(relevant > 0.5).mean():.2f} of the relevant above .5, {(others > 0.5).mean():.3f} of the others"
    )


def read_dev(path: Path) -> Dataset:
    """Read the dev split of a data set in any layout."""
    data = open_data(path, splits=["dev"])
    return data if isinstance(data, Dataset) else read_pair_training_set(data).dataset


if __name__ == "__main__":
    main()
