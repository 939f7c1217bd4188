"""A setting is declared once: what users see of it in other places is made from its field."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import ValidationError
from pydantic.fields import FieldInfo

import d2llm
from d2llm import EvaluationSettings, Index, SearchSettings
from d2llm.cli.main import app
from d2llm.core.errors import InputError
from d2llm.core.settings import Settings, bound, is_list, shown_as
from d2llm.retrieval.settings import ExpansionSettings
from d2llm.server.schemas import ContextRequest, SearchRequest
from d2llm.server.settings import ServeSettings
from d2llm.sizing.plan import SizePlan
from d2llm.store.index_spec import IndexSpec

SHOWN = {
    name: field
    for kind in (SearchSettings, ExpansionSettings)
    for name, field in kind.model_fields.items()
    if not shown_as(field).python_only
}


@cache
def tables(repository: Path) -> Any:
    spec = importlib.util.spec_from_file_location("settings_tables", repository / "scripts" / "settings_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options_of(*verb: str) -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    for word in verb:
        command = command.commands[word]
    return {option: parameter for parameter in command.params for option in parameter.opts}


OPTIONS = [
    (verb, name, field)
    for verb, kind in [
        ("search", SearchSettings),
        ("search", ExpansionSettings),
        ("evaluate", EvaluationSettings),
        ("size", SizePlan),
        *((verb, IndexSpec) for verb in ("encode", "index add", "index upsert", "index sync")),
    ]
    for name, field in kind.model_fields.items()
    if not shown_as(field).python_only
]


@pytest.mark.parametrize(("verb", "name", "field"), OPTIONS, ids=[f"{verb} {name}" for verb, name, _ in OPTIONS])
def test_a_setting_is_an_option_with_its_help_default_and_bounds(verb: str, name: str, field: FieldInfo):
    shown = shown_as(field)
    option = options_of(*verb.split())["--" + (shown.option or name).replace("_", "-")]
    assert option.help.replace("\\[", "[").startswith(field.description)
    assert option.default == (None if is_list(field) or shown.default else field.default)
    assert option.show_default == (shown.default or True)
    assert (option.type_descriptor.annotation is bool) == option.is_flag
    checks = option.type_descriptor.parameter_info
    assert (checks.min, checks.max) == (bound(field, "ge"), bound(field, "le"))


@pytest.mark.parametrize("name", SHOWN)
def test_a_search_setting_is_a_field_of_requests_with_its_help_default_and_bounds(name: str):
    kind = SearchSettings if name in SearchSettings.model_fields else ExpansionSettings
    ours, theirs = (each.model_json_schema()["properties"][name] for each in (kind, SearchRequest))
    if name in ("neighbours", "expansions"):  # the server has a limit
        limited = theirs if name == "neighbours" else theirs["anyOf"][0]
        assert limited.pop("maximum") == 10
    assert theirs == ours


def test_settings_for_python_only_are_in_no_request_and_no_option():
    hidden = SearchSettings.model_fields.keys() - SHOWN.keys()
    assert hidden == {"evidence", "max_num_candidates", "document_passages"}
    assert not hidden & {parameter.name for parameter in options_of("search").values()}
    for request, unknown in ((SearchRequest, hidden), (ContextRequest, {*hidden, "explain", "group"})):
        assert not unknown & request.model_json_schema()["properties"].keys()
        for name in unknown:
            with pytest.raises(ValueError, match="there is no such field"):
                request.model_validate({"query": "x", name: None})


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (Index.search, SearchSettings),
        (Index.context, SearchSettings),
        (Index.create, IndexSpec),
        (d2llm.encode, IndexSpec),
        (SizePlan, SizePlan),
    ],
)
def test_a_setting_is_an_argument_in_python(function: Any, kind: type[Settings]):
    parameters = inspect.signature(function).parameters
    assert not any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for name, field in kind.model_fields.items():
        default = inspect.Parameter.empty if field.is_required() else field.default
        assert (parameters[name].default, parameters[name].annotation) == (default, field.annotation)
        assert f"{name}: {field.description}" in (kind.__doc__ or "")


def test_a_long_list_of_wrong_values_is_not_read_to_its_end():
    with pytest.raises(ValidationError) as caught:
        SearchRequest.model_validate({"query": "x", "sources": ["bm26"] * 100_000})
    assert caught.value.error_count() <= 2


def test_something_else_than_settings_is_named():
    with pytest.raises(InputError, match=r"'symmetric' \(str\), but must be IndexSpec, or given one by one"):
        IndexSpec.of("symmetric")  # pyright: ignore[reportArgumentType]


def test_the_tables_of_the_documentation_are_those_of_the_classes(repository: Path):
    made = tables(repository)
    named = [found["name"] for path in made.PAGES for found in made.BLOCK.finditer(path.read_text(encoding="utf-8"))]
    assert sorted(named) == sorted(made.TABLES)
    for path in made.PAGES:
        page = path.read_text(encoding="utf-8")
        assert made.written(page) == page, f"{path.name} differs; run: python scripts/settings_tables.py"


def test_no_help_text_of_a_setting_is_written_twice(repository: Path):
    kinds = (SearchSettings, ExpansionSettings, EvaluationSettings, IndexSpec, SizePlan, ServeSettings)
    helps = {field.description for kind in kinds for field in kind.model_fields.values() if field.description}
    assert len(helps) > 80
    written: list[str] = []
    for path in (repository / "src" / "d2llm").rglob("*"):
        if path.suffix == ".py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            written += [
                each.value for each in ast.walk(tree) if isinstance(each, ast.Constant) and isinstance(each.value, str)
            ]
        elif path.suffix in (".js", ".html"):
            page = path.read_text(encoding="utf-8")
            written += [text for text in helps if len(text) > 20 and text.rstrip(".") in page]
    counts = Counter(written)
    assert {text: counts[text] for text in helps if counts[text] > 1} == {}
    made = {text for text in helps if not counts[text]}  # with names of the code in them
    assert len(made) < len(helps) / 4
