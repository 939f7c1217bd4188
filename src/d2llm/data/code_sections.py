"""The sections of source code: functions and methods by themselves, and the text between them.

Python is parsed by its own parser, other languages by tree-sitter. The names of the syntax trees' nodes hardly differ
between languages and nowhere contradict each other, so that one table serves for all.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from d2llm.core.types import Section

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

_GRAMMARS: dict[str, tuple[str, str]] = {  # suffix -> module of the grammar and its function
    **dict.fromkeys([".js", ".jsx", ".mjs", ".cjs"], ("tree_sitter_javascript", "language")),
    **dict.fromkeys([".ts", ".mts", ".cts"], ("tree_sitter_typescript", "language_typescript")),
    ".tsx": ("tree_sitter_typescript", "language_tsx"),
    ".java": ("tree_sitter_java", "language"),
    ".c": ("tree_sitter_c", "language"),
    **dict.fromkeys([".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx"], ("tree_sitter_cpp", "language")),
    ".cs": ("tree_sitter_c_sharp", "language"),
    ".go": ("tree_sitter_go", "language"),
    ".rs": ("tree_sitter_rust", "language"),
    ".rb": ("tree_sitter_ruby", "language"),
    ".php": ("tree_sitter_php", "language_php"),
    **dict.fromkeys([".kt", ".kts"], ("tree_sitter_kotlin", "language")),
    ".swift": ("tree_sitter_swift", "language"),
    ".scala": ("tree_sitter_scala", "language"),
    ".lua": ("tree_sitter_lua", "language"),
    **dict.fromkeys([".sh", ".bash"], ("tree_sitter_bash", "language")),
}
PARSED = frozenset(_GRAMMARS)
"""The suffixes of the languages that tree-sitter parses."""


def _node_types(names: str) -> frozenset[str]:
    return frozenset(names.split())


_FUNCTIONS = _node_types(
    "function_definition function_declaration function_item generator_function_declaration method_declaration "
    "method_definition method singleton_method constructor_declaration destructor_declaration operator_declaration "
    "conversion_operator_declaration compact_constructor_declaration secondary_constructor init_declaration "
    "deinit_declaration"
)
_WITHOUT_BODY = frozenset({"method", "singleton_method"})  # Ruby's, whose empty methods have none
_CLASSES = _node_types(
    "class class_declaration abstract_class_declaration class_definition class_specifier struct_specifier "
    "union_specifier struct_declaration interface_declaration annotation_type_declaration enum_declaration "
    "record_declaration trait_declaration trait_item impl_item mod_item module namespace_declaration "
    "namespace_definition internal_module object_declaration companion_object object_definition trait_definition "
    "enum_definition protocol_declaration"
)
_ASSIGNMENTS = _node_types(  # what names the function, object or call that is assigned
    "variable_declarator assignment_expression assignment_statement pair field_definition public_field_definition"
)
_ASSIGNED_FUNCTIONS = _node_types("arrow_function function_expression generator_function function_definition")
_AROUND = _node_types(  # what begins before the definition that it contains
    "export_statement template_declaration ambient_declaration lexical_declaration variable_declaration "
    "expression_statement"
)
_BODIES = _node_types(
    "ERROR annotation_type_body argument_list arguments arrow_function block body_statement call "
    "call_expression class_body compound_statement declaration_list enum_body enum_body_declarations enum_class_body "
    "enum_declaration_list expression_list field_declaration_list function_expression if_statement interface_body "
    "linkage_specification object package_clause parenthesized_expression preproc_elif preproc_else preproc_if "
    "preproc_ifdef protocol_body return_statement singleton_class statement_block table_constructor template_body"
)
_LEADING = _node_types(  # what belongs to the definition after it
    "comment line_comment block_comment multiline_comment attribute_item decorator annotation"
)
_FEW_WORDS = 3  # fewer words between two definitions join one of them: "public:", "}", "end"


@dataclass(frozen=True, slots=True)
class _Definition:
    """A function or class: its rows ``first`` to ``end - 1``, its name ("" if it has none), what a class contains."""

    first: int
    end: int
    name: str
    members: tuple[_Definition, ...] = ()


def python_sections(text: str) -> Iterator[Section]:
    """The functions and classes of a Python module, methods by themselves, and the text between them.

    A module that cannot be parsed is one section.
    """
    try:
        definitions = _python_definitions(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # MemoryError: nested too deep for its parser
        definitions = ()
    return _sections(text.split("\n"), definitions)


def code_sections(text: str, suffix: str) -> Iterator[Section]:
    """The functions and methods of a file and the text between them; a section's headings are the classes around it.

    Comments right before a function belong to it. A class without methods is a section. What tree-sitter cannot parse
    is text like any other; no line is lost.

    Args:
        text: its lines end in line feeds.
        suffix: one of ``PARSED`` for which ``missing_grammar`` is None.
    """
    tree = _parser(suffix).parse(text.encode(errors="replace"))
    try:
        definitions = _definitions(tree.root_node)
    except RecursionError:
        definitions = ()
    return _sections(text.split("\n"), definitions)


@cache
def missing_grammar(suffix: str) -> str | None:
    """The module that is not installed, without which files with this suffix cannot be parsed; None if all are."""
    return next((name for name in ("tree_sitter", _GRAMMARS[suffix][0]) if find_spec(name) is None), None)


def _parser(suffix: str) -> Parser:
    from tree_sitter import Language, Parser

    module, function = _GRAMMARS[suffix]
    pointer: object = getattr(import_module(module), function)()
    return Parser(Language(pointer))


def _sections(rows: Sequence[str], definitions: Sequence[_Definition]) -> Iterator[Section]:
    """Cut a text at its definitions."""
    spans: list[tuple[int, int, tuple[str, ...]]] = []  # first row, end, headings
    at = 0

    def is_short(end: int) -> bool:
        return sum(len(re.findall(r"\w+", row)) for row in rows[at:end]) < _FEW_WORDS

    def add(end: int, headings: tuple[str, ...]) -> None:
        nonlocal at
        if end > at:
            spans.append((at, end, headings))
            at = end

    def close(end: int, headings: tuple[str, ...]) -> None:
        nonlocal at
        if spans and end > at and is_short(end):
            spans[-1] = (spans[-1][0], end, spans[-1][2])
            at = end
        add(end, headings)

    def cut(members: Sequence[_Definition], headings: tuple[str, ...]) -> None:
        for part in members:
            if not is_short(part.first):
                add(part.first, headings)
            inside = (*headings, part.name) if part.name else headings
            cut(part.members, inside)
            (close if part.members else add)(part.end, inside)

    cut(definitions, ())
    close(len(rows), ())
    for first, end, headings in spans:
        yield Section("\n".join(rows[first:end]).strip("\n"), headings)


def _python_definitions(body: Sequence[ast.stmt]) -> tuple[_Definition, ...]:
    definitions: list[_Definition] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            members = _python_definitions(node.body) if isinstance(node, ast.ClassDef) else ()
            definitions.append(_Definition(first, node.end_lineno or node.lineno, node.name, members))
    return tuple(definitions)


def _definitions(parent: Node, around: int | None = None) -> tuple[_Definition, ...]:
    """The definitions below a node that are not inside a function; the first begins at the row ``around``."""
    definitions: list[_Definition] = []
    leading: int | None = None  # the row at which the comments before the next node begin
    end = parent.start_point.row + (parent.parent is not None)  # the row after the previous node
    for node in parent.named_children:
        first = node.start_point.row
        if node.type in _LEADING:
            if leading is None or first > end:
                leading = first if first >= end else None
            end = _end(node)
            continue
        begin = leading if leading is not None and first <= end else first
        if around is not None:
            begin = min(begin, around)
        definitions += _definitions_of(node, begin)
        leading, end = None, _end(node)
    return tuple(definitions)


def _definitions_of(node: Node, first: int) -> Sequence[_Definition]:
    """A function or class, or those inside a node that is neither."""
    if node.type in _FUNCTIONS:
        return [_Definition(first, _end(node), _name(node))] if _has_body(node) else []
    if node.type in _CLASSES and any(child.type in _BODIES for child in node.children):
        return [_Definition(first, _end(node), _name(node), _definitions(node))]
    if node.type in _ASSIGNMENTS:
        return _assigned(node, first)
    if node.type in _AROUND:
        return _definitions(node, first)
    return _definitions(node) if node.type in _BODIES else []


def _assigned(node: Node, first: int) -> Sequence[_Definition]:
    """A function or an object with functions that gets its name by an assignment."""
    value = node.named_children[-1] if node.named_children else node
    if value.type == "expression_list" and value.named_children:  # Lua's
        value = value.named_children[0]
    arguments = value.child_by_field_name("arguments")
    values = [value, *(arguments.named_children if arguments else ())]
    if any(assigned.type in _ASSIGNED_FUNCTIONS for assigned in values):
        return [_Definition(first, _end(node), _name(node))]
    members = _definitions(value) if value.type in _BODIES else ()
    return [_Definition(first, _end(node), _name(node), members)] if members else []


def _has_body(node: Node) -> bool:
    """Whether a function is more than a signature."""
    has_part = node.child_by_field_name("body") or any(child.type == "function_body" for child in node.children)
    return node.type in _WITHOUT_BODY or bool(has_part)


def _name(node: Node) -> str:
    """The name of a definition, a Go method's with that of its type; "" if it has none."""
    name = node
    while (inner := name.child_by_field_name("declarator")) and name.type != "operator_cast":  # C and C++
        name = inner
    if name is node:
        fields = ("name", "property", "key", "left", "type")
        named = next((part for field in fields if (part := node.child_by_field_name(field))), None)
        identifiers = (part for part in node.named_children if part.type.endswith(("identifier", "variable_list")))
        name = named or next(identifiers, None)
    text = _text(name).split("(")[0].strip("'\"") if name else ""
    receiver = node.child_by_field_name("receiver")
    owner = re.search(r"(\w+)\s*(\[.*\])?\s*\)$", _text(receiver)) if receiver else None
    return " ".join((f"{owner[1]}.{text}" if owner else text).split())


def _text(node: Node) -> str:
    return (node.text or b"").decode(errors="replace")


def _end(node: Node) -> int:
    """The row after a node."""
    return node.end_point.row + (node.end_point.column > 0)
