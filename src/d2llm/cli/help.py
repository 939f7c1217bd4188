"""The help of all verbs: texts as they are written, options in groups, and words for the kinds of values.

A verb with few options has one group. In others, an option is in the group that the verb's own table says, or else in
that of the common table.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import typer

from d2llm.core.settings import shown_as
from d2llm.data.settings import ReadingSettings
from d2llm.store.index_spec import IndexSpec

_FEW = 7  # options that need no groups
_WIDTH = 50  # of a list of values that is shown beside an option; a longer one is in its help

_OTHER_NAMES = {
    "task",
    "metadata",
    "num_shards",
}  # of IndexSpec; the options are task (of several verbs), field, shards

_COMMON = {
    "Files of documents": (
        *(name for name, field in ReadingSettings.model_fields.items() if not shown_as(field).python_only),
        *("no_metadata", "lenient_metadata"),
    ),
    "Passages": ("chunk_tokens", "chunk_overlap", "late", "late_window", "whole"),
    "A new index": (*(name for name in IndexSpec.model_fields if name not in _OTHER_NAMES), "field", "shards", "prune"),
    "Language model that writes": ("writer", "endpoint", "api_key_env"),
    "Where it runs": ("device", "dtype", "engine", "runner", "workers", "gpus_per_worker"),
    "Output": ("json_path", "jsonl", "markdown", "html", "save_runs"),
}
_NEW_INDEX = {"A new index": ("task",)}
_OWN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "search": {
        "Candidates and scores": ("num_candidates", "sources", "hybrid", "exact", "budget_ms", "instruction", "task"),
        "What is shown": (
            *("group", "neighbours", "excerpts", "mmr", "near_duplicates", "select_from", "explain"),
            *("max_tokens", "order", "tokenizer"),
        ),
        "Rerankers": ("reranker", "reranker_set"),
        "Language model that writes": ("expand", "expansions"),
    },
    "fit": {
        "Queries": ("prices", "max_cost", "max_tokens", "max_queries", "examples", "judged", "teacher"),
    },
    "evaluate": {
        "Rows of the report": (
            *("tuned_cosine", "paper_head", "models", "runs", "baseline", "stored_as", "exact", "ann_recall"),
            *("reranker", "filter", "instruction", "num_candidates"),
        ),
        "The teacher": ("teacher", "no_teacher", "teacher_depth", "teacher_queries", "prompt"),
        "Cached work": ("labels", "indexes", "work"),
    },
    "serve": {
        "Models": ("student", "teacher", "prompt", "reranker", "writer"),
        "Address and access": ("host", "port", "keys_file", "writable"),
        "Settings": ("config", "assignments", "show_config"),
    },
    "size": {
        "The index": (
            "passages",
            "tokens",
            "student",
            "task",
            "vector_format",
            "vector_copies",
            "window_vectors",
            "token_vectors",
        ),
        "Searches and machines": ("qps", "recall", "num_candidates", "shards", "machine_memory", "machine_cores"),
        "Labels": ("teacher", "queries", "candidates"),
        "Prices": ("core_hour_price", "memory_price", "disk_price"),
    },
    "fit-scores": {
        "What is fitted": (
            *("words", "words_factor", "window_vectors", "token_vectors", "quality", "term_weights"),
            "document_expansion",
        ),
    },
    "encode": _NEW_INDEX,
    "add": _NEW_INDEX,
    "upsert": _NEW_INDEX,
    "sync": _NEW_INDEX,
}
_WORDS = {"int": "N", "float": "NUMBER", "str": "TEXT", "path": "PATH", "Path": "PATH", "file": "FILE"}


def tidy_help(command: Any, name: str = "") -> None:
    """Make the help of a verb and its subcommands readable, and their texts appear verbatim.

    Without this, Rich treats words in square brackets as markup, and typer keeps the line breaks of the source and says
    ``<bool>`` or ``<list[Path]>`` where these are no words of a user.
    """
    from rich.markup import escape

    context = typer.Context(command, help_option_names=["-h", "--help"])
    options = [param for param in command.params if param.param_type_name == "option"]
    for part in (command, *command.params):
        for field in ("help", "short_help", "epilog"):
            if isinstance(text := getattr(part, field, None), str):
                setattr(part, field, escape(_joined_lines(text)))
    for option in (*options, command.get_help_option(context)):
        _name_value(option, context)
    for argument in command.params:
        if argument.param_type_name == "argument":
            argument.metavar = argument.metavar and argument.metavar.removesuffix("...")
            argument.display_type_rich = _nothing
    if len(options) > _FEW:
        groups = groups_of(name)
        for option in options:
            option.rich_help_panel = option.rich_help_panel or groups.get(option.name)
    for verb, subcommand in getattr(command, "commands", {}).items():
        tidy_help(subcommand, verb)


def groups_of(verb: str) -> dict[str, str]:
    """The heading that each option of a verb is under, by the option's name; others are under "Options"."""
    specific = {option: heading for heading, names in _OWN.get(verb, {}).items() for option in names}
    common = {option: heading for heading, names in _COMMON.items() for option in names}
    return common | specific


def _name_value(option: Any, context: typer.Context) -> None:
    """Name the kind of an option's value, if its declaration does not: a flag has none, a choice its values."""
    if option.is_flag:
        option.metavar = ""
    elif option.metavar is None:
        kind = option.display_type(ctx=context).strip("<>")
        kind = kind.removeprefix("list[").removesuffix("]").removesuffix(" range")
        option.metavar = _WORDS.get(kind, kind)
        if len(kind) > _WIDTH:
            option.metavar = "NAME"
            option.help = f"{option.help} One of: {kind.replace('|', ', ')}."
    low, high = option.min, option.max
    option.min = option.max = None  # typer would show x>=1; it checks the value by the declaration
    if high is not None:
        option.help = f"{option.help} From {low or 0:,} to {high:,}."
    elif low is not None and low > 1:
        option.help = f"{option.help} At least {low:,}."


def _nothing(ctx: typer.Context) -> None:
    """An argument's name says what it is."""


def _joined_lines(text: str) -> str:
    """Put each paragraph on one line, except those with indented lines, which are lists or examples."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(p if "\n " in p else p.replace("\n", " ") for p in paragraphs)
