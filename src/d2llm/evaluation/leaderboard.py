"""Many reports of ``d2llm evaluate`` in one: systems of several students on several data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.json_values import parse_json
from d2llm.evaluation.report import REPORT_VERSION, SIGNIFICANCE_LEVEL
from d2llm.ops.significance import holm

_SAME = 1e-6  # two reports of a data set may differ by so much, by the rounding of other machines
_Report = dict[str, Any]
"""``EvaluationReport.to_json``, read from a file."""


@dataclass(frozen=True, slots=True)
class MeasuredSet:
    """A data set (``name`` contains the split if there are several), its main measure, and its queries or pairs."""

    name: str
    measure: str
    num_items: int


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over those sets of a measure on which a system was measured."""

    value: float
    num_sets: int


@dataclass(frozen=True, slots=True)
class LeaderboardRow:
    """One system.

    ``values`` are by set, in its main measure; ``means`` are by measure. Of ``num_compared`` sets, the system is
    significantly above the baseline on ``above``, and below it on ``below``: p < 0.05, Holm-corrected over these sets.
    """

    name: str
    values: dict[str, float]
    means: dict[str, Mean]
    num_compared: int
    above: tuple[str, ...]
    below: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Systems on data sets: first those that were measured on most sets, and of these the best first.

    ``baseline`` is the one of most reports; None if no report has any.
    """

    sets: tuple[MeasuredSet, ...]
    rows: tuple[LeaderboardRow, ...]
    baseline: str | None
    notes: tuple[str, ...]

    @property
    def set_counts(self) -> dict[str, int]:
        """The number of sets of each main measure, the largest first."""
        return _set_counts(self.sets)


def read_leaderboard(paths: Sequence[Path]) -> Leaderboard:
    """The leaderboard of the reports in some JSON files; of a folder, all files ``*.json`` in it are read.

    A system without one of the students in it (BM25, an untuned cosine) has one row for all reports; one that is
    another model in each student's reports has a row for each student.

    Raises:
        InputError: there is no such file, or no report at all.
        DataFormatError: a file is not the report of an evaluation. In a folder, such files are noted and left out.
    """
    reports: list[_Report] = []
    others: list[str] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; give reports that `d2llm evaluate --json` wrote")
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                reports.append(_read(file))
            except DataFormatError:
                if not path.is_dir():
                    raise
                others.append(file.name)
    if not reports:
        raise InputError("none of these files is a report; write some with `d2llm evaluate DATA --json FILE`")
    notes = [f"not reports of an evaluation, left out: {', '.join(others)}"] if others else []
    return leaderboard(reports, notes)


def leaderboard(reports: Sequence[_Report], notes: Iterable[str] = ()) -> Leaderboard:
    """The leaderboard of reports, each as ``EvaluationReport.to_json`` gives it."""
    all_notes = list(notes)
    names = _set_names(reports)
    sets: dict[str, MeasuredSet] = {}
    for name, report in zip(names, reports, strict=True):
        sets.setdefault(name, MeasuredSet(name, report["main_measure"], report["num_items"]))
    labels = _Labels(reports)
    baselines = Counter(report["baseline"] for report in reports if report["baseline"] is not None)
    baseline = baselines.most_common(1)[0][0] if baselines else None
    values: dict[str, dict[str, float]] = {}
    p_values: dict[str, dict[str, tuple[float, float]]] = {}
    for name, report in zip(names, reports, strict=True):
        for row in report["rows"]:
            if row["kind"] == "shortcut":  # the student without a part of its score: see the report of the set
                continue
            label = labels.of(report, row)
            if row["num_items"] != report["num_items"]:
                all_notes.append(f"{label}: only {row['num_items']:,} of {report['num_items']:,} on {name}, left out")
                continue
            value = row["measures"][report["main_measure"]]["value"]
            earlier = values.setdefault(label, {}).setdefault(name, value)
            if abs(earlier - value) > _SAME:
                all_notes.append(f"{label}: {earlier:.4f} and {value:.4f} on {name} in two reports; the first counts")
            compared = _comparison(report, row["name"], baseline)
            if compared is not None:
                p_values.setdefault(label, {}).setdefault(name, compared)
    measured: dict[str, list[str]] = {measure: [] for measure in _set_counts(sets.values())}
    for one in sets.values():
        measured[one.measure].append(one.name)
    rows = [_row(label, of_sets, p_values.get(label, {}), measured) for label, of_sets in values.items()]
    nothing = Mean(0.0, 0)
    rows.sort(key=lambda row: [(-mean.num_sets, -mean.value) for mean in (row.means.get(m, nothing) for m in measured)])
    return Leaderboard(tuple(sets.values()), tuple(rows), baseline, tuple(dict.fromkeys(all_notes)))


def _read(file: Path) -> _Report:
    """The report in a file."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(file, f"not JSON ({error}); give files that `d2llm evaluate --json` wrote") from error
    if not isinstance(content, dict) or cast("_Report", content).get("verb") != "evaluate":
        raise DataFormatError(file, "not the report of an evaluation; give files that `d2llm evaluate --json` wrote")
    report = cast("_Report", content).get("result")
    version = cast("_Report", report).get("report_version") if isinstance(report, dict) else None
    if version != REPORT_VERSION:
        raise DataFormatError(
            file,
            f"a report of version {version!r:.20}, but this d2llm reads version {REPORT_VERSION}; evaluate "
            "again with one version of d2llm",
        )
    return cast("_Report", report)


def _set_names(reports: Sequence[_Report]) -> list[str]:
    """The name of each report's data set, with its split unless all reports have the same."""
    with_split = len({report["split"] for report in reports}) > 1
    return [f"{report['dataset']} / {report['split']}" if with_split else report["dataset"] for report in reports]


class _Labels:
    """Names of systems; those that are different models in different reports are told apart by the student."""

    def __init__(self, reports: Sequence[_Report]) -> None:
        fingerprints: dict[str, set[str | None]] = {}
        for report in reports:
            for row in report["rows"]:
                fingerprints.setdefault(row["name"], set()).add(_fingerprint(report, row))
        self._several = {name for name, different in fingerprints.items() if len(different) > 1}
        students = {(student["name"], student["fingerprint"]) for student in map(_student, reports)}
        self._repeated = {name for name, count in Counter(name for name, _ in students).items() if count > 1}

    def of(self, report: _Report, row: dict[str, Any]) -> str:
        """The name of the system in a row of a report."""
        if row["name"] not in self._several:
            return row["name"]
        student = _student(report)
        name = student["name"]
        return (
            f"{row['name']} ({name} {student['fingerprint']})" if name in self._repeated else f"{row['name']} ({name})"
        )


def _fingerprint(report: _Report, row: dict[str, Any]) -> str | None:
    """The fingerprint of the model of a system; a fusion with BM25 has the student's."""
    return _student(report)["fingerprint"] if row["kind"] == "hybrid" else row["fingerprint"]


def _student(report: _Report) -> dict[str, Any]:
    return report["provenance"]["student"]


def _comparison(report: _Report, row: str, baseline: str | None) -> tuple[float, float] | None:
    """The difference of a row from the baseline in the main measure, and its p-value before any correction."""
    for one in cast("list[dict[str, Any]]", report["comparisons"]):
        if (one["row"], one["baseline"], one["measure"]) == (row, baseline, report["main_measure"]):
            return one["difference"]["value"], one["p_value"]
    return None


def _set_counts(sets: Iterable[MeasuredSet]) -> dict[str, int]:
    """The number of sets of each main measure, the largest first."""
    return dict(Counter(one.measure for one in sets).most_common())


def _row(
    name: str,
    values: dict[str, float],
    compared: dict[str, tuple[float, float]],
    sets_of_measure: Mapping[str, Sequence[str]],
) -> LeaderboardRow:
    adjusted = holm([p_value for _, p_value in compared.values()])
    sure = [one for one, p_value in zip(compared, adjusted, strict=True) if p_value < SIGNIFICANCE_LEVEL]
    of_measure = {
        measure: [values[one] for one in names if one in values] for measure, names in sets_of_measure.items()
    }
    return LeaderboardRow(
        name,
        values,
        {
            measure: Mean(fmean(differences), len(differences))
            for measure, differences in of_measure.items()
            if differences
        },
        len(compared),
        tuple(one for one in sure if compared[one][0] > 0),
        tuple(one for one in sure if compared[one][0] < 0),
    )
