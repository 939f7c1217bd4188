"""reStructuredText as HTML, with the roles and directives of Sphinx, as far as a text alone can show them.

docutils parses the text. It reads no other file, and what it does not know is kept: the contents of an unknown
directive are text, and so is what cannot be parsed.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from html import escape
from threading import Lock
from typing import Any


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_ROLE_TARGET = re.compile(r"(.*?)\s*<[^<>]+>", flags=re.DOTALL)
_SHORTENED = re.compile(r"~[\w.]*?(\w+)(\(\))?")
_VERBATIM_ROLES = frozenset("code command file guilabel kbd literal math menuselection samp".split())  # noqa: SIM905
_NUMBERED = frozenset({"pep", "rfc"})
_OWN_ROLES = _NUMBERED | {"raw"}
_CODE = _words(
    "code code-block doctest ipython math mermaid parsed-code productionlist prompt sourcecode testcode "
    "testoutput testsetup graphviz digraph graph uml"
)
_CODE_WITH_ARGUMENT = frozenset({"digraph", "graph", "math", "productionlist"})
NO_TEXT = _words(
    "bibliography contents currentmodule default-domain highlight highlightlang include index literalinclude meta "
    "module program py:currentmodule py:module sectionauthor moduleauthor codeauthor tabularcolumns testcleanup "
    "toctree"
)
"""Directives of which a reader sees nothing, or only what is elsewhere."""
_OBJECTS = _words(
    "attribute class classmethod cmdoption confval constant data decorator decoratormethod describe directive "
    "enum enumerator envvar event exception function label macro member method object opcode option pdbcommand "
    "property role staticmethod struct type union var"
)
"""Directives that define something, in any domain ("py:function")."""
_LABELS = {
    "deprecated": "Deprecated since version {}",
    "deprecated-removed": "Deprecated since version {}",
    "versionadded": "Added in version {}",
    "versionchanged": "Changed in version {}",
    "versionremoved": "Removed in version {}",
}
_FIELDS_FOR_SPHINX = frozenset({"nocomments", "nosearch", "orphan", "tocdepth"})
_OWN_DIRECTIVES = _CODE | NO_TEXT | frozenset({"class", "figure", "image", "raw"})
_SETTINGS: dict[str, Any] = {
    "_disable_config": True,
    "docinfo_xform": False,
    "doctitle_xform": False,
    "embed_stylesheet": False,
    "file_insertion_enabled": False,
    "halt_level": 5,
    "initial_header_level": 1,
    "input_encoding": "unicode",
    "line_length_limit": 1 << 40,
    "math_output": "LaTeX",
    "output_encoding": "unicode",
    "report_level": 5,
    "sectsubtitle_xform": False,
    "stylesheet_path": "",
    "syntax_highlight": "none",
    "warning_stream": "",
}
_LOCK = Lock()


def role_text(name: str, text: str) -> str:
    """What a reader sees of a role: ``text <target>`` is "text", and of ``~package.module.name`` the name."""
    if name in _VERBATIM_ROLES:
        return text
    if (target := _ROLE_TARGET.fullmatch(text)) and target[1]:
        return target[1]
    if shortened := _SHORTENED.fullmatch(text):
        return shortened[1] + (shortened[2] or "")
    numbered = re.fullmatch(r"(\d+)(#.*)?", text)
    return f"{name.upper()} {numbered[1]}" if numbered and name in _NUMBERED else text.removeprefix("!")


def rst_as_html(text: str) -> str:
    """A reStructuredText, whose lines end in line feeds, as HTML; one that docutils fails on is one block of it."""
    from docutils import core, nodes

    try:
        with _sphinx():
            tree: Any = core.publish_doctree(text, settings_overrides=_SETTINGS)
        for message in list(tree.findall(nodes.system_message)):
            at = message.parent.index(message)
            message.parent[at : at + 1] = list(message.findall(nodes.literal_block))  # what could not be parsed
        for field in list(tree.findall(nodes.field)):
            if field[0].astext() in _FIELDS_FOR_SPHINX:
                field.parent.remove(field)
        html: Any = core.publish_from_doctree(tree, writer="html5", settings_overrides=_SETTINGS)
    except Exception:  # noqa: BLE001 - such as RecursionError: a fault of the parser must not lose the text
        return f"<pre>\n{escape(text, quote=False)}</pre>"
    return str(html)


@contextmanager
def _sphinx() -> Generator[None]:
    """While this is open, docutils finds our directives and roles besides its own; it is one thread's at a time."""
    from docutils.parsers.rst import directives, roles

    find_directive, find_role = directives.directive, roles.role

    def directive(name: str, language: Any, document: Any) -> Any:
        if name.lower() in _OWN_DIRECTIVES:
            return _directive_class(), []
        found, messages = find_directive(name, language, document)
        return (found, messages) if found is not None else (_directive_class(), [])

    def role(name: str, language: Any, line: int, reporter: Any) -> Any:
        if name in _OWN_ROLES:
            return _role, []
        found, messages = find_role(name, language, line, reporter)
        return (found, messages) if found is not None else (_role, [])

    with _LOCK:
        directives.directive, roles.role = directive, role
        try:
            yield
        finally:
            directives.directive, roles.role = find_directive, find_role


def _role(name: str, rawtext: str, text: str, *_others: Any) -> Any:
    from docutils import nodes, utils

    return [nodes.inline(rawtext, role_text(name, utils.unescape(text)))], []


class _AnyOptions(dict[str, Any]):
    """Options of a directive that are all known, and texts."""

    def __bool__(self) -> bool:
        return True

    def __missing__(self, name: str) -> Any:
        return _option


def _option(argument: str | None) -> str:
    return argument or ""


@cache
def _directive_class() -> Any:  # noqa: C901 - one class
    from docutils import nodes
    from docutils.parsers.rst import Directive
    from docutils.statemachine import StringList

    class AnyDirective(Directive):
        """What a reader sees of a directive: its title or signature, and its contents."""

        optional_arguments = 1
        final_argument_whitespace = True
        has_content = True
        option_spec = _AnyOptions()

        def run(self) -> list[Any]:
            name, argument = self.name.lower(), self.arguments[0] if self.arguments else ""
            if argument and self.block_text.partition("\n")[0].rstrip().endswith("::"):  # it begins below the name
                self.content = StringList([*argument.split("\n"), "", *self.content], "text")
                argument = ""
            if name in NO_TEXT or (name == "raw" and "html" not in argument):
                return []
            if name == "raw":
                return [nodes.raw("", "\n".join(self.content), format="html")]
            if name in _CODE:
                code = "\n".join([*([argument] if name in _CODE_WITH_ARGUMENT else []), *self.content])
                return [nodes.literal_block(code, code)] if code.strip() else []
            is_class_of_text = name == "class" and not re.search(r"[A-Z(.]", argument)
            if name.rpartition(":")[2] in _OBJECTS and not is_class_of_text:
                return self._definition(argument)
            if name in ("image", "figure"):
                argument = str(self.options.get("alt", ""))
            elif name in ("seealso", "todo"):
                return self._labelled("See also" if name == "seealso" else "Todo", argument)
            elif name in _LABELS:
                version, _, rest = " ".join(argument.split()).partition(" ")
                argument = _LABELS[name].format(version).strip() + (f": {rest}" if rest else "")
            return self._labelled("" if is_class_of_text else argument)

        def _labelled(self, *labels: str) -> list[Any]:
            around = nodes.container()
            for label in filter(None, labels):
                texts, messages = self.state.inline_text(label, self.lineno)
                around += [nodes.paragraph("", "", *texts), *messages]
            self.state.nested_parse(self.content, self.content_offset, around)
            return [around]

        def _definition(self, signatures: str) -> list[Any]:
            item = nodes.definition_list_item()
            for line in re.sub(r"\\\n\s*", " ", signatures).split("\n"):
                if signature := line.strip().replace("\\", ""):
                    before, bracket, after = signature.partition("(")
                    start, _, name = before.rstrip().rpartition(" ") if bracket else ("", "", before)
                    term = nodes.term("", f"{start} " if start else "")
                    term += [nodes.inline("", name, classes=["sig-name"]), nodes.Text(bracket + after)]
                    item += term
            body = nodes.definition()
            self.state.nested_parse(self.content, self.content_offset, body)
            item += body
            return [nodes.definition_list("", item)]

    return AnyDirective
