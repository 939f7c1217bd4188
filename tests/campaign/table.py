"""Writes the table of what the campaign reached into docs/reliability.md, from the JSON files of its rows.

PYTHONPATH=tests python -m campaign.table
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from campaign.frame import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_PLACE = re.compile(r"(<!-- campaign -->\n).*?(<!-- end -->)", re.DOTALL)


def page_with_table(page: str) -> str:
    """The page with its table as the files say."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    rows = ["| row | script | cases reached | faults seen | minutes |", "|---|---|--:|--:|--:|"]
    for name, result in sorted(results.items(), key=lambda item: (item[1]["id"], item[0])):
        reached = f"{result['reached']:,} of {result['full']:,}"
        minutes = f"{result['seconds'] / 60:.0f}"
        rows.append(f"| {result['id']} | `campaign/{name}.py` | {reached} | {len(result['faults'])} | {minutes} |")
    return _PLACE.sub(lambda match: match[1] + "\n".join(rows) + "\n" + match[2], page)


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
