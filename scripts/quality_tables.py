"""Write the tables of measured quality from the JSON files that `d2llm evaluate --json` made.

    python scripts/quality_tables.py

Reads benchmarks/results/quality/*.json; writes, between their markers, the tables of docs/quality.md and the short ones
in README.md and in the card of the shipped student. No figure in them is typed by hand: each comes from a file, and the
command that made the file stands beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
KINDS = {
    "bm25": "BM25",
    "hybrid": "BM25 + D2LLM",
    "cosine_untuned": "cosine, untuned",
    "cosine_tuned": "cosine, tuned",
    "paper_head": "paper head",
    "anchor": "D2LLM's cosine",
    "d2llm": "D2LLM",
}
SHORT = {"accuracy (3 classes)": "accuracy of 3"}
Report = dict[str, Any]


def main() -> None:
    """Write every table."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    retrieval = [file for file in files if file["result"]["kind"] == "retrieval"]
    pairs = [file for file in files if file["result"]["kind"] == "pairs"]
    overview = "\n".join(
        [
            "Retrieval, nDCG@10 on test splits:",
            "",
            *overview_table(retrieval),
            "",
            "Pairs, on test splits:",
            "",
            *overview_table(pairs),
            "",
            *legend(files[0]["result"]),
        ]
    )
    for target in (ROOT / "README.md", ROOT / "src" / "d2llm" / "students" / "d2llm-minilm" / "README.md"):
        put(target, overview)
    parts = [
        "## All sets",
        overview,
        "### Against the teacher, on the queries or pairs that it judged",
        "\n".join(teacher_table(files)),
        "## Retrieval, set by set",
        *map(section, retrieval),
        "## Pairs, set by set",
        *map(section, pairs),
    ]
    put(ROOT / "docs" / "quality.md", "\n\n".join(parts))


def put(target: Path, text: str) -> None:
    """Write a text between the markers of a file."""
    before, rest = target.read_text(encoding="utf-8").split(BEGIN)
    target.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def overview_table(files: list[dict[str, Any]]) -> list[str]:
    """One line a data set, one column a system, in the set's main measure."""
    lines = [
        f"| set | {' | '.join(KINDS.values())} | D2LLM - tuned | p |",
        "|---|" + "---|" * (len(KINDS) + 2),
    ]
    for file in files:
        report = file["result"]
        rows = {row["kind"]: row for row in report["rows"] if "untuned" not in row["name"] or row["kind"] != "hybrid"}
        measure = report["main_measure"]
        values = {kind: rows[kind]["measures"][measure]["value"] for kind in KINDS if kind in rows}
        best = max(round(value, 3) for value in values.values())
        cells = [figure(values[kind], best) if kind in values else "-" for kind in KINDS]
        name = report["dataset"] + trained(report)
        if measure != "nDCG@10":
            name += f", {SHORT.get(measure, measure)}"
        found = comparison(report, "D2LLM", "cosine, tuned", measure)
        difference = ["-", "-"] if found is None else [f"{found['difference']['value']:+.3f}", p_text(found)]
        lines.append("| " + " | ".join([name, *cells, *difference]) + " |")
    return lines


def teacher_table(files: list[dict[str, Any]]) -> list[str]:
    """The teacher beside the others on exactly what it judged, with the agreement."""
    lines = [
        "| set | measure | judged | teacher | tuned | D2LLM | label loyalty | Pearson | Kendall | top-10 overlap |",
        "|---" * 10 + "|",
    ]
    for file in files:
        report = file["result"]
        rows = {row["kind"]: row for row in report["sample_rows"] or report["rows"]}
        if "teacher" not in rows:
            continue
        measure = report["main_measure"]
        values = [
            f"{rows[kind]['measures'][measure]['value']:.3f}" if kind in rows else "-"
            for kind in ("teacher", "cosine_tuned", "d2llm")
        ]
        follower = next(row for row in report["agreement"] if row["name"] == report["subject"])
        agreement = follower["agreement"]
        numbers = [agreement["label_loyalty"], agreement["pearson_within"], agreement["kendall_within"]]
        cells = [ratio(number) for number in (*numbers, follower["top_10_overlap"])]
        count = f"{rows['teacher']['num_items']:,}"
        lines.append("| " + " | ".join([report["dataset"], measure, count, *values, *cells]) + " |")
    return lines


def section(file: dict[str, Any]) -> str:
    """One data set: facts, measures with intervals, cost, notes, command."""
    report = file["result"]
    unit = "queries" if report["kind"] == "retrieval" else "pairs"
    facts = f"{report['num_items']:,} {unit}, {report['num_passages']:,} passages, {report['task']}"
    lines = [f"### {report['dataset']}{trained(report)}", "", f"{report['split']} split: {facts}.", ""]
    lines += measures_table(report)
    lines += [f"\nNot measured: {missing['name']} ({missing['reason']})." for missing in report["missing"]]
    found = comparison(report, report["subject"], report["baseline"], report["main_measure"])
    if found is not None:
        gap = found["difference"]
        lines += [
            "",
            (
                f"{found['row']} minus {found['baseline']}: {gap['value']:+.4f} {found['measure']} "
                f"[{gap['low']:+.4f}, {gap['high']:+.4f}], adjusted {p_text(found)} ({found['test']})."
            ),
        ]
    lines += [f"\n- {note}" for note in report["notes"] if "earlier run" not in note]
    return "\n".join([*lines, "", f"`{command(file['arguments'])}`"])


def measures_table(report: Report) -> list[str]:
    """Every row with every measure; marks as in the report."""
    names = list(report["rows"][0]["measures"])
    most = max(row["num_items"] for row in report["rows"])
    full = [row for row in report["rows"] if row["num_items"] == most]
    best = {name: max(round(row["measures"][name]["value"], 3) for row in full) for name in names}
    lines = [f"| system | {' | '.join(names)} | ms, p50 | n |", "|---|" + "---|" * (len(names) + 2)]
    for row in report["rows"]:
        cells: list[str] = []
        for name in names:
            value = row["measures"][name]["value"]
            text = figure(value, best[name]) if row in full else f"{value:.3f}"
            found = comparison(report, row["name"], report["baseline"], name)
            mark = ""
            if found is not None and found["adjusted_p"] < 0.05:
                mark = "\\*" if found["difference"]["value"] > 0 else "†"
            cells.append(text + mark)
        total = row["cost"]["total"]
        time = "-" if total is None else f"{total['p50']:.1f}"
        lines.append("| " + " | ".join([row["name"], *cells, time, f"{row['num_items']:,}"]) + " |")
    return lines


def legend(report: Report) -> list[str]:
    """What stands for what in the overview."""
    student = report["provenance"]["student"]
    return [
        (
            "Bold: best of the line. *(trained)*: the student, the tuned cosine and the paper head were trained on the "
            "train split of this set, and on no other. The last columns: D2LLM minus the cosine tuned on the same data "
            f"and steps, p Holm-adjusted over the rows. Student {student['name']} ({student['fingerprint']})."
        )
    ]


def trained(report: Report) -> str:
    """A mark for the sets that the student was trained on."""
    names = {Path(data["path"]).name for data in report["provenance"]["student"]["recipe"]["data"]}
    return " *(trained)*" if report["dataset"] in names else ""


def comparison(report: Report, row: str, baseline: str, measure: str) -> dict[str, Any] | None:
    """The comparison of one row with the baseline in one measure, where it was made."""
    for found in report["comparisons"]:
        if (found["row"], found["baseline"], found["measure"]) == (row, baseline, measure):
            return found
    return None


def figure(value: float, best: float) -> str:
    """Three digits, bold for the best."""
    return f"**{value:.3f}**" if round(value, 3) == best else f"{value:.3f}"


def p_text(found: dict[str, Any]) -> str:
    """The adjusted p-value, short."""
    value = found["adjusted_p"]
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".")


def ratio(value: float | None) -> str:
    """Two digits, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def command(arguments: dict[str, Any]) -> str:
    """The command line that made a result; only options that differ from their defaults are named."""
    words = ["d2llm evaluate", str(arguments["data"])]
    defaults = {"split": "test", "task": "asymmetric", "teacher_depth": 50, "teacher_queries": 100}
    for name, default in defaults.items():
        if arguments.get(name) != default:
            words += [f"--{name.replace('_', '-')}", str(arguments[name])]
    return " ".join(words)


if __name__ == "__main__":
    main()
