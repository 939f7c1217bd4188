"""A setting is declared once: what users see of it in other places is made from its field."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import ValidationError
from pydantic.fields import FieldInfo

import d2llm
from d2llm import EvaluationSettings, FitSettings, Index, SearchSettings
from d2llm.cli.main import app
from d2llm.core.errors import InputError
from d2llm.core.settings import LENIENT_HELP, Settings, bound, is_list, shown_as
from d2llm.data.settings import ReadingSettings
from d2llm.retrieval.reranker import TeacherReranker
from d2llm.retrieval.settings import (
    AnnSettings,
    ChunkingSettings,
    ClassifySettings,
    ContextSettings,
    ConversationSettings,
    ExcerptSettings,
    ExpansionSettings,
    SimilaritySettings,
)
from d2llm.server import corpus_routes, schemas
from d2llm.server.schemas import ContextRequest, SearchRequest
from d2llm.server.settings import ServeSettings
from d2llm.sizing.plan import SizePlan
from d2llm.store.index_spec import IndexSpec
from d2llm.training.settings import AblationSettings
from repository_scripts import load_script

SHOWN = {
    name: field
    for kind in (SearchSettings, ExpansionSettings)
    for name, field in kind.model_fields.items()
    if not shown_as(field).python_only
}


@cache
def tables() -> Any:
    return load_script("settings_tables")


@cache
def options_of(*verb: str) -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    for word in verb:
        command = command.commands[word]
    return {option: parameter for parameter in command.params for option in parameter.opts}


VERBS: list[tuple[str, type[Settings]]] = [
    *(
        ("search", kind)
        for kind in (SearchSettings, ExpansionSettings, ConversationSettings, ExcerptSettings, ContextSettings)
    ),
    ("fit", FitSettings),
    ("evaluate", EvaluationSettings),
    ("ablate", AblationSettings),
    ("size", SizePlan),
    ("duplicates", SimilaritySettings),
    ("cluster", SimilaritySettings),
    ("classify", ClassifySettings),
    ("index ann", AnnSettings),
    *(
        (verb, kind)
        for verb in ("encode", "index add", "index upsert", "index sync")
        for kind in (IndexSpec, ChunkingSettings, ReadingSettings)
    ),
    *((verb, ReadingSettings) for verb in ("distill-static", "prune-vocabulary", "prune-neurons")),
]
KINDS = {kind for _, kind in VERBS} | {ServeSettings}
OPTIONS = [
    (verb, name, field)
    for verb, kind in VERBS
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
    if shown.parse is None:
        assert (checks.min, checks.max) == (bound(field, "ge"), bound(field, "le"))
    assert (option.secondary_opts == []) == (field.default is not True)  # what is on can be turned off


@pytest.mark.parametrize("name", ["student", "writer", "examples", "judged", "teacher"])
def test_an_option_with_a_form_of_its_own_begins_with_the_help_of_its_setting(name: str):
    field, option = FitSettings.model_fields[name], options_of("fit")[f"--{name}"]
    assert option.help.startswith(field.description)
    assert option.show_default in (shown_as(field).default, True) or name == "writer"


def test_no_option_of_a_verb_repeats_a_setting_of_it_under_another_help():
    """An option that has the name of a setting has its help, whether it was made from it or not."""
    different = {
        f"{verb} {option.name}"
        for verb, kind in VERBS
        for option in options_of(*verb.split()).values()
        if (field := kind.model_fields.get(option.name)) is not None
        and not option.help.replace("\\[", "[").startswith(field.description)
    }
    assert different == {"evaluate dtype"}  # of the models, whereas the setting is for Python only: of stored vectors


def test_a_field_of_requests_that_others_have_is_declared_once():
    """A field of two bodies, or of a body and an option, is that of a class of settings, or has no help."""
    options = {each.name for verb, _ in VERBS for each in options_of(*verb.split()).values()}
    bodies = [each for each in vars(schemas).values() if isinstance(each, type) and issubclass(each, schemas.Body)]
    own = [(body, name) for body in bodies for name in body.__annotations__ if name in body.model_fields]
    counts = Counter(name for _, name in own)
    other = {"teacher", "query", "passages", "metadata"}  # other things than the options of these names
    for body, name in own:
        field = body.model_fields[name]
        if name in other or not (name in options or counts[name] > 1):
            continue
        declared = [kind.model_fields[name] for kind in KINDS if name in kind.model_fields]
        if declared:
            assert field.description in {each.description for each in declared}, f"{body.__name__}.{name}"
            assert bound(field, "ge") in {bound(each, "ge") for each in declared}, f"{body.__name__}.{name}"
        else:
            assert field.description in (None, LENIENT_HELP), f"{body.__name__}.{name}"


@pytest.mark.parametrize(("name", "setting"), [("teacher_passages", "num_passages"), ("teacher_ms", "max_ms")])
def test_limits_of_a_teacher_in_requests_are_settings_of_rerankers(name: str, setting: str):
    field, own = SearchRequest.model_fields[name], TeacherReranker.model_fields[setting]
    assert own.description
    assert (field.description or "").startswith(own.description.rstrip("."))
    assert field.default == own.default
    declared = [each for each in ast.walk(ast.parse(inspect.getsource(schemas))) if isinstance(each, ast.AnnAssign)]
    (value,) = [each.value for each in declared if isinstance(each.target, ast.Name) and each.target.id == name]
    assert isinstance(value, ast.Call)
    assert ast.unparse(value.func) == "narrowed"


def test_parameters_of_requests_are_the_fields_of_bodies():
    parameters = {
        each.alias: each.field_info
        for route in corpus_routes.router.routes
        for each in getattr(getattr(route, "dependant", None), "query_params", ())
    }
    for name in ("chunk_tokens", "chunk_overlap", "lenient_metadata"):
        field = schemas.DocumentsRequest.model_fields[name]
        assert parameters[name].description == field.description
        assert bound(parameters[name], "ge") == bound(field, "ge")


def test_the_names_of_the_controls_of_the_page_are_those_of_the_settings():
    """The page gets them with the help texts, so its HTML has none of them."""
    names = {field.title for field in SearchRequest.model_fields.values() if field.title}
    assert names == {"Ranked by", "Exact", "Hybrid", "Candidates", "Results", "Filter"}
    page = (Path(d2llm.__file__).parent / "server" / "page" / "index.html").read_text(encoding="utf-8")
    words = {each.strip() for each in re.findall(r">([^<>]+)<", page)}
    assert not words & names
    assert len(re.findall(r"data-of=", page)) == 1 + len(names)  # the filter has two


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
    assert hidden == {"score_features", "max_num_candidates", "document_passages"}
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
        (Index.context, ContextSettings),
        (Index.build_ann, AnnSettings),
        (Index.create, IndexSpec),
        (d2llm.encode, IndexSpec),
        (d2llm.fit, FitSettings),
        (d2llm.Run.ablate, AblationSettings),
        (d2llm.find_documents, ReadingSettings),
        (d2llm.sync_documents, ReadingSettings),
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
    made = tables()
    named = [found["name"] for path in made.PAGES for found in made.BLOCK.finditer(path.read_text(encoding="utf-8"))]
    assert sorted(named) == sorted(made.BLOCKS)
    for path in made.PAGES:
        page = path.read_text(encoding="utf-8")
        assert made.written(page) == page, f"{path.name} differs; run: python scripts/settings_tables.py"


def test_every_setting_and_environment_variable_is_on_the_pages(repository: Path):
    pages = "\n".join(path.read_text(encoding="utf-8") for path in tables().PAGES)
    fields = {name for kind in KINDS for name in kind.model_fields}
    assert {name for name in fields if f"`{name}`" not in pages} == set()
    source = "\n".join(path.read_text(encoding="utf-8") for path in (repository / "src").rglob("*.py"))
    variables = {
        *re.findall(r"environ(?:\.\w+\(|\[)\s*\"([A-Z_]+)\"", source),
        *re.findall(r"\"(D2LLM_[A-Z_]+)", source),
    }
    assert len(variables) > 12
    assert {name for name in variables if f"`{name}" not in pages} == set()


def test_no_help_text_of_a_setting_is_written_twice(repository: Path):
    helps = {field.description for kind in KINDS for field in kind.model_fields.values() if field.description}
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
