"""Write the tables and lists of settings in the documentation from the classes that declare them.

    python scripts/settings_tables.py

A table or list stands between ``<!-- settings: NAME -->`` and ``<!-- end -->`` and is replaced; the rest of a page
stays. A test compares the pages with the classes.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from d2llm.core.names import NAMES_ELSEWHERE
from d2llm.core.settings import shown_as
from d2llm.data.settings import ReadingSettings
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.fitting.settings import FitSettings
from d2llm.recipe import Recipe
from d2llm.reports.methods import Setting, describe_methods, settings_of
from d2llm.retrieval.settings import (
    AnnSettings,
    ChunkingSettings,
    ClassifySettings,
    ContextSettings,
    ConversationSettings,
    ExcerptSettings,
    ExpansionSettings,
    SearchSettings,
    SimilaritySettings,
)
from d2llm.server.schemas import SearchRequest, sent_fields
from d2llm.server.settings import LoadedSettings, ServeSettings
from d2llm.sizing.plan import SizePlan
from d2llm.store.index_spec import IndexSpec
from d2llm.training.settings import AblationSettings

ROOT = Path(__file__).parent.parent
NAMES = ("names.md", "how-to/serve.md", "how-to/operate.md", "settings.md", "recipe-settings.md")
PAGES = tuple(ROOT / "docs" / name for name in NAMES)
WIDTH = 120
BLOCK = re.compile(r"(<!-- settings: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def search_table() -> str:
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
    return table(rows)


def request_table() -> str:
    """The fields of ``/v1/search``."""
    fields = sent_fields(SearchRequest).items()
    return table(
        [["field of `/v1/search`", "what"], *([f"`{name}`", field.description or ""] for name, field in fields)]
    )


def serve_table() -> str:
    """The settings of a server."""
    fields = ServeSettings.model_fields
    lines = LoadedSettings(ServeSettings(), dict.fromkeys(fields, "")).lines()
    rows = [[f"`{name}`", f"`{value}`", fields[name].description or ""] for name, value, _ in lines]
    return table([["setting", "default", "what"], *rows])


def recipe_lists() -> str:
    """The settings of each section of a recipe."""
    sections: dict[str, dict[str, Setting]] = {"": {}}
    for name, setting in settings_of(Recipe):
        section, _, key = name.rpartition(".")
        if setting.type == "table" or setting.type == "list of table" or section == "losses":
            sections.setdefault(name, {})
        else:
            sections[section][key] = setting
    titles = {"": "At the top", "data": "`[[data]]`"}
    return "\n".join(
        f"### {titles.get(section, f'`[{section}]`')}\n\n{described(settings.items())}"
        for section, settings in sections.items()
        if settings
    )


def kind_lists() -> str:
    """The settings of each kind that ships."""
    return "\n".join(
        f"### {section}: `{kind}`\n\n{filled(facts.what)}\n"
        + (f"\n{described(facts.settings.items())}" * bool(facts.settings))
        for section, kinds in describe_methods().items()
        for kind, facts in kinds.items()
        if facts.module.startswith("d2llm.")
    )


def class_list(*classes: type[BaseModel]) -> str:
    """The settings of classes."""
    return described(pair for cls in classes for pair in settings_of(cls))


def described(settings: Iterable[tuple[str, Setting]]) -> str:
    """A line for each setting: its name, what it may be, its default and what it is for."""
    lines = ""
    for name, setting in settings:
        facts = [
            setting.type.replace("<", "&lt;"),
            "" if setting.default in ("none", "", "()") else f"default {setting.default}",
        ]
        lines += (
            filled(f"- `{name}` ({'; '.join(filter(None, facts))}){': ' * bool(setting.help)}{setting.help}") + "\n"
        )
    return lines


def filled(text: str) -> str:
    """A paragraph or an item of a list, in lines of a readable length."""
    indent = "  " if text.startswith("- ") else ""
    text = re.sub(r"(?<=\S) ([-+*#]|\d+\.) ", "\0\\1 ", text)  # at the beginning of a line it would begin a list
    lines = textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def table(rows: list[list[str]]) -> str:
    """A table with its head."""
    head, *rest = rows
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rest)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "search": search_table,
    "request": request_table,
    "serve": serve_table,
    "recipe": recipe_lists,
    "kinds": kind_lists,
    "index": partial(class_list, IndexSpec),
    "reading": partial(class_list, ReadingSettings),
    "chunking": partial(class_list, ChunkingSettings),
    "around-a-search": partial(class_list, ExpansionSettings, ConversationSettings, ExcerptSettings, ContextSettings),
    "ann": partial(class_list, AnnSettings),
    "similar": partial(class_list, SimilaritySettings, ClassifySettings),
    "fit": partial(class_list, FitSettings),
    "evaluate": partial(class_list, EvaluationSettings),
    "ablate": partial(class_list, AblationSettings),
    "size": partial(class_list, SizePlan),
}


def written(page: str) -> str:
    """A page with its tables and lists as the classes make them."""
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found["name"]]() + found[3], page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
