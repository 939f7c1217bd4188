"""Write the tables of settings in the documentation from the classes that declare them.

    python scripts/settings_tables.py

A table stands between ``<!-- settings: NAME -->`` and ``<!-- end -->`` and is replaced; the rest of a page stays. A
test compares the pages with the classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from d2llm.core.names import NAMES_ELSEWHERE
from d2llm.core.settings import shown_as
from d2llm.retrieval.settings import SearchSettings
from d2llm.server.schemas import SearchRequest, sent_fields
from d2llm.server.settings import LoadedSettings, ServeSettings

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "names.md", ROOT / "docs" / "how-to" / "serve.md", ROOT / "docs" / "how-to" / "operate.md")
BLOCK = re.compile(r"(<!-- settings: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def search_table() -> list[list[str]]:
    """Search settings in Python, on the command line and over HTTP."""
    rows = [["Python", "HTTP", "command line", "default", "what", "names elsewhere"]]
    sent = sent_fields(SearchRequest)
    for name, field in SearchSettings.model_fields.items():
        shown = shown_as(field)
        option = "-" if shown.python_only else f"`--{shown.option or name}`".replace("_", "-")
        default = shown.default or ("none" if field.default is None else f"`{json.dumps(field.default)}`")
        others = ", ".join(f"`{other}`" for other, own in NAMES_ELSEWHERE.items() if own == name)
        rows.append(
            [f"`{name}`", f"`{name}`" if name in sent else "-", option, default, field.description or "", others]
        )
    return rows


def request_table() -> list[list[str]]:
    """The fields of ``/v1/search``."""
    fields = sent_fields(SearchRequest).items()
    return [["field of `/v1/search`", "what"]] + [[f"`{name}`", field.description or ""] for name, field in fields]


def serve_table() -> list[list[str]]:
    """The settings of a server."""
    fields = ServeSettings.model_fields
    lines = LoadedSettings(ServeSettings(), dict.fromkeys(fields, "")).lines()
    rows = [[f"`{name}`", f"`{value}`", fields[name].description or ""] for name, value, _ in lines]
    return [["setting", "default", "what"], *rows]


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "search": search_table,
    "request": request_table,
    "serve": serve_table,
}


def written(page: str) -> str:
    """A page with its tables as the classes make them."""

    def table(found: re.Match[str]) -> str:
        head, *rows = TABLES[found["name"]]()
        lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
        return found[1] + "".join(f"| {' | '.join(line)} |\n" for line in lines) + found[3]

    return BLOCK.sub(table, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
