"""Write the results tables of README and model cards from the JSON files that `d2llm evaluate --json` made.

    python scripts/readme_results.py benchmarks/results/evaluate-*.json

No figure in that table is typed by hand: each comes from a file, and the command that made the file stands beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MEASURES = ("nDCG@10", "MRR@10", "Recall@100")


def main(paths: list[str]) -> None:
    """Put the tables of the given result files between the markers of README and model cards."""
    if not paths:
        sys.exit(__doc__)
    blocks = [block(json.loads(Path(path).read_text(encoding="utf-8"))) for path in sorted(paths)]
    for target in (ROOT / "README.md", *sorted(ROOT.glob("src/d2llm/students/*/README.md"))):
        before, rest = target.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        target.write_text(before + BEGIN + "\n\n" + "\n".join(blocks) + "\n" + END + after, encoding="utf-8")


def block(file: dict[str, Any]) -> str:
    """One data set: heading, table, significance, command."""
    result, arguments = file["result"], file["arguments"]
    lines = [
        (
            f"**{result['dataset']}**, {result['split']} split ({result['task']}): {result['num_queries']:,} queries, "
            f"{result['num_passages']:,} passages"
        ),
        "",
        *table(result["rows"]),
    ]
    if result["sample_rows"]:
        sample = result["sample_rows"]
        lines += ["", f"The same systems on the {sample[0]['num_queries']} queries that the teacher was asked:", ""]
        lines += table(sample)
    lines += [f"Not measured: {missing['name']} ({missing['reason']})." for missing in result["missing"]]
    test = result["significance"]
    if test:
        lines += [
            "",
            (
                f"{test['first']} minus {test['second']}: {test['difference']:+.4f} {test['measure']}, "
                f"p = {test['p_value']:.4f} (paired randomisation, {test['num_permutations']:,} permutations)."
            ),
        ]
    return "\n".join([*lines, "", f"`{command(arguments)}`", ""])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown rows, the best of each measure bold."""
    best = {name: max(row["measures"][name] for row in rows) for name in MEASURES}
    lines = [
        f"| system | {' | '.join(MEASURES)} | ms a query | bytes a passage | queries |",
        "|---|" + "---|" * (len(MEASURES) + 3),
    ]
    for row in rows:
        values = [figure(row["measures"][name], row["measures"][name] == best[name]) for name in MEASURES]
        size = "-" if row["bytes_per_passage"] is None else f"{row['bytes_per_passage']:,.0f}"
        cells = [row["name"], *values, f"{row['milliseconds_per_query']:.1f}", size, f"{row['num_queries']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def figure(value: float, is_best: bool) -> str:
    """Three digits, bold for the best."""
    return f"**{value:.3f}**" if is_best else f"{value:.3f}"


def command(arguments: dict[str, Any]) -> str:
    """The command line that made a result; options left at their default are not named."""
    words = ["d2llm evaluate", str(arguments["data"])]
    for name in ("student", "split", "task", "teacher", "teacher_depth", "teacher_queries"):
        if arguments.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(arguments[name])]
    return " ".join(words)


if __name__ == "__main__":
    main(sys.argv[1:])
