"""Markdown as HTML, as CommonMark says, with what generators of sites and notes add to it; its front matter.

These are tables, footnotes, definition lists, formulas, admonitions (``!!! note``, ``:::tip``, ``> [!NOTE]``), MyST's
roles and directives, wiki links (``[[Page|text]]``), templates' tags (``{{< ref >}}``, ``{% note %}``) and lists of
attributes (``{#id}``). Of each, only what a reader of the site would see is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time, timezone
from functools import cache
from html import escape
from typing import Any, cast

from d2llm.core.errors import InputError
from d2llm.core.toml import parse_toml
from d2llm.core.types import MetadataValue
from d2llm.data.rst import NO_TEXT, role_text, rst_as_html


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_HTML_NAMES = _words(
    "a abbr acronym address applet area article aside audio b base basefont bdi bdo bgsound big blink blockquote "
    "body br button canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div "
    "dl dt em embed fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header "
    "hgroup hr html i iframe image img input ins kbd label legend li link listing main map mark marquee math menu "
    "meta meter nav nobr noembed noframes noscript object ol optgroup option output p param picture plaintext pre "
    "progress q rb rp rt rtc ruby s samp script search section select slot small source span strike strong style "
    "sub summary sup svg table tbody td template textarea tfoot th thead time title tr track tt u ul var video "
    "wbr xmp"
)
_TAG = re.compile(r"</?([A-Za-z][\w:.-]*)[^<>]*>")
_ROLE = re.compile(r"\{([A-Za-z][\w.:+-]*)\}(`+)(?!`)(.{1,2000}?)(?<!`)\2(?!`)", flags=re.DOTALL)
_TEMPLATE_TAG = re.compile(r"\{\{[<%].{0,2000}?[%>]\}\}|\{%.{0,2000}?%\}", flags=re.DOTALL)
_SHOWN_ATTRIBUTE = re.compile(r"\b(?:title|caption|alt|summary)\s*=\s*\"([^\"]*)\"")
_WIKI_LINK = re.compile(r"!?\[\[([^\[\]\n|]{1,500})(?:\\?\|([^\[\]\n]{1,500}))?\]\](?![(\[])")
_ATTRIBUTES = re.compile(r"[ \t]*\{:?[ \t]*[#.][^{}\n]*\}[ \t]*$")
_CALLOUT = re.compile(r"\[!(\w+)\][+-]?[ \t]*")
_DIRECTIVE = re.compile(r"\{([\w.:+-]+)\}[ \t]*(.*)")
_OPTION_LINES = re.compile(r"(?::[\w-]+:[^\n]*(?:\n|\Z))+|---\n(?:[^\n]*\n)*?---(?:\n|\Z)")
_CODE = frozenset({"code", "code-block", "code-cell", "ipython", "math", "mermaid", "parsed-literal", "sourcecode"})
_PICTURES = frozenset({"figure", "figure-md", "image"})
_LABELLED = _words("attention caution danger error hint important info note seealso success tip todo warning")
_DEEPEST = 20  # what is nested more deeply is a plain paragraph


def markdown_as_html(text: str) -> str:
    """A Markdown text without front matter, whose lines end in line feeds, as the HTML of a page."""
    closed = {name.lower() for name in re.findall(r"</([A-Za-z][\w:.-]*)", text)}
    return _parser().render(text, {"closed": closed, "depth": 0})


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt
    from markdown_it.parser_block import ParserBlock
    from mdit_py_plugins.admon import admon_plugin
    from mdit_py_plugins.colon_fence import colon_fence_plugin
    from mdit_py_plugins.deflist import deflist_plugin
    from mdit_py_plugins.dollarmath import dollarmath_plugin
    from mdit_py_plugins.footnote import footnote_plugin

    class Blocks(ParserBlock):
        def tokenize(self, state: Any, startLine: int, endLine: int) -> None:  # noqa: N803 - its names
            if state.level < 2 * _DEEPEST:
                super().tokenize(state, startLine, endLine)
                return
            state.push("paragraph_open", "p", 1)  # it would leave the text out
            token = state.push("inline", "", 0)
            token.content = state.getLines(startLine, endLine, state.blkIndent, keepLastLF=False).strip()
            token.map, token.children = [startLine, endLine], []
            state.push("paragraph_close", "p", -1)
            state.line = endLine

    parser: Any = MarkdownIt("commonmark", {"maxNesting": 10 * _DEEPEST}).enable(["table", "strikethrough"])
    blocks = Blocks()
    blocks.ruler = parser.block.ruler
    parser.block = blocks
    for plugin in (admon_plugin, colon_fence_plugin, deflist_plugin, footnote_plugin):
        parser.use(plugin)
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True)
    parser.inline.ruler.before("backticks", "site_marks", _site_marks)
    parser.core.ruler.after("block", "site_blocks", _site_blocks)
    parser.add_render_rule("fence", _fence)
    parser.add_render_rule("colon_fence", _fence)
    parser.add_render_rule("html_inline", _html)
    parser.add_render_rule("html_block", _html)
    return parser


def _site_marks(state: Any, silent: bool) -> bool:
    """An inline rule: roles, tags of templates, and wiki links."""
    mark = state.src[state.pos]
    if mark == "{":
        if role := _ROLE.match(state.src, state.pos):
            return _accept(state, role.end(), role_text(role[1], role[3].strip()), silent)
        if tag := _TEMPLATE_TAG.match(state.src, state.pos):
            return _accept(state, tag.end(), " ".join(_SHOWN_ATTRIBUTE.findall(tag[0])), silent)
    elif mark in "![" and (link := _WIKI_LINK.match(state.src, state.pos)):
        return _accept(state, link.end(), link[2] or link[1], silent)
    return False


def _accept(state: Any, end: int, text: str, silent: bool) -> bool:
    if not silent:
        token = state.push("text", "", 0)
        token.content = text
    state.pos = end
    return True


def _site_blocks(state: Any) -> None:
    """A core rule: lists of attributes behind blocks are left out, and callouts get their labels."""
    in_quote = 0
    for token in state.tokens:
        in_quote += token.nesting if token.type.startswith("blockquote") else 0
        if token.type == "inline":
            token.content = re.sub(_ATTRIBUTES, "", token.content)
            if in_quote and (callout := _CALLOUT.match(token.content)):
                rest = token.content[callout.end() :]
                label = "" if rest.partition("\n")[0].strip() else callout[1].capitalize()
                token.content = f"{label}  {rest}" if label else rest


def _fence(_renderer: Any, tokens: Any, index: int, _options: Any, env: Any) -> str:
    """Code between fences, or a directive with its title and contents."""
    token = tokens[index]
    info, content = token.info.strip(), token.content
    directive = _DIRECTIVE.fullmatch(info)
    if token.type == "colon_fence":
        name, _, rest = info.replace("[", " ").replace("]", " ").partition(" ")
        name, argument = directive.groups() if directive else (name.strip("{}."), "" if rest.startswith("{") else rest)
    elif directive:
        name, argument = directive.groups()
    else:
        return _preformatted(content)
    options_match = _OPTION_LINES.match(content) if directive else None
    body = content[options_match.end() :] if options_match else content
    if name in NO_TEXT or name == "tableofcontents":
        return ""
    if name in _PICTURES:
        alternative = re.search(r"^:alt:(.*)$", options_match[0], flags=re.MULTILINE) if options_match else None
        argument = alternative[1] if alternative else ""
    elif name in _CODE or name.startswith("code"):
        return _preformatted(body)
    elif name == "eval-rst":
        return rst_as_html(body)
    label = argument.strip() or (name.capitalize() if name.lower() in _LABELLED else "")
    if env["depth"] >= _DEEPEST:
        return _preformatted(f"{label}\n{body}")
    env = {"closed": env["closed"], "depth": env["depth"] + 1}
    return f"<p>{_parser().renderInline(label, env)}</p>\n{_parser().render(body, env)}"


def _preformatted(content: str) -> str:
    return f"<pre>\n{escape(content, quote=False)}</pre>\n"


def _html(_renderer: Any, tokens: Any, index: int, _options: Any, env: Any) -> str:
    """HTML in the text; what is no element but only looks like one ("List<String>") is text."""

    def checked(tag: re.Match[str]) -> str:
        name = tag[1].lower()
        is_element = name in _HTML_NAMES or name in env["closed"] or "-" in name or tag[0].endswith("/>")
        return tag[0] if is_element else escape(tag[0])

    return re.sub(_TAG, checked, tokens[index].content)


_YAML = re.compile(r"---[ \t]*\n(?=[^\s])(.*?\n)??(?:---|\.\.\.)[ \t]*(?:\n|\Z)", flags=re.DOTALL)
_TOML = re.compile(r"\+\+\+[ \t]*\n(.*?\n)??\+\+\+[ \t]*(?:\n|\Z)", flags=re.DOTALL)
_UNQUOTED = re.compile(r"^([\w-]+:[ \t]+)([^\s'\"\[{|>&*!#].*:.*?)[ \t]*$", flags=re.MULTILINE)
_LONGEST = 1 << 16  # characters
_MAX_FIELDS = 100
_MAX_VALUES = 1_000  # aliases of YAML can stand for any number of values
_DEEPEST_FIELD = 8


@dataclass(frozen=True, slots=True)
class FrontMatter:
    """The title of a text ("" if it has none), its other fields as metadata, and where the text begins."""

    title: str = ""
    fields: Mapping[str, MetadataValue] = field(default_factory=dict[str, MetadataValue])
    end: int = 0


class _NotFieldsError(ValueError):
    """What looks like front matter is none, or more than metadata can be."""


def read_front_matter(text: str) -> FrontMatter:
    """Read the front matter of a text whose lines end in line feeds.

    A list becomes a text with commas ("tags: [a, b]" is "a, b"), and what is nested gets a name with underscores
    ("author: {name: Ann}" is ``author_name``). Characters that names of metadata cannot have become underscores, too.
    What is malformed, or has more than 100 fields, is no front matter but part of the text.
    """
    try:
        if match := _YAML.match(text):
            title, fields = _yaml_fields(match[1] or "")
            end = match.end()
        elif match := _TOML.match(text):
            title, fields = "", parse_toml(match[1] or "", where="front matter")
            end = match.end()
        elif text.startswith("{"):
            fields, end = json.JSONDecoder().raw_decode(text)
            title = ""
            if not isinstance(fields, dict) or text[end : end + 1] != "\n" or not text[end:].strip():
                return FrontMatter()
        else:
            return FrontMatter()
        return _front_matter(title, fields, end)
    except (InputError, ValueError, RecursionError):
        return FrontMatter()


def _front_matter(title: str, fields: dict[str, Any], end: int) -> FrontMatter:
    leaves: dict[str, _Leaf] = {}
    budget = [_MAX_VALUES]
    for name, value in fields.items():
        if name.lower() == "title" and not isinstance(value, dict | list):
            title = title or _text(value)
        else:
            _collect(name, value, leaves, budget, depth=0)
    if len(leaves) > _MAX_FIELDS:
        raise _NotFieldsError
    return FrontMatter(" ".join(title.split()), {name: leaf.value for name, leaf in leaves.items()}, end)


@dataclass(slots=True)
class _Leaf:
    """The values of a field; those of a list are one text."""

    values: list[Any] = field(default_factory=list[Any])
    is_list: bool = False

    @property
    def value(self) -> MetadataValue:
        return ", ".join(map(_text, self.values)) if self.is_list or len(self.values) > 1 else _scalar(self.values[0])


def _collect(
    name: str, value: Any, leaves: dict[str, _Leaf], budget: list[int], *, depth: int, listed: bool = False
) -> None:
    budget[0] -= 1
    if budget[0] < 0 or depth > _DEEPEST_FIELD:
        raise _NotFieldsError
    if isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            _collect(f"{name}_{_text(key)}", item, leaves, budget, depth=depth + 1, listed=listed)
    elif isinstance(value, list | tuple | set):
        for item in cast("list[Any]", value):
            _collect(name, item, leaves, budget, depth=depth + 1, listed=True)
    elif value is not None:
        leaf = leaves.setdefault(re.sub(r"\W+", "_", name.strip()), _Leaf())
        leaf.values.append(value)
        leaf.is_list = leaf.is_list or listed


def _scalar(value: Any) -> MetadataValue:
    if isinstance(value, datetime):
        return value if value.utcoffset() is not None else value.replace(tzinfo=timezone.utc)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=timezone.utc)
    is_kept = isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**63)
    return value if is_kept else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value).strip("\n")


def _yaml_fields(text: str) -> tuple[str, dict[str, Any]]:
    """The title as it is written, and all fields; ``ValueError`` if the text is no mapping of names to values."""
    import yaml

    if len(text) > _LONGEST:
        raise _NotFieldsError
    try:
        node, fields = _yaml_node(text)
    except yaml.YAMLError:  # often because of a colon in a title
        quoted = re.sub(_UNQUOTED, lambda line: line[1] + json.dumps(line[2], ensure_ascii=False), text)
        try:
            node, fields = _yaml_node(quoted)
        except yaml.YAMLError as error:
            raise _NotFieldsError from error
    if node is None:
        return "", {}
    if not isinstance(fields, dict) or not all(_is_name(name) for name in cast("dict[Any, Any]", fields)):
        raise _NotFieldsError
    title = next(
        (value.value for key, value in node.value if key.value == "title" and isinstance(value.value, str)), ""
    )
    return title, cast("dict[str, Any]", fields)


def _yaml_node(text: str) -> tuple[Any, Any]:
    """The node of a text in YAML, and its value; None and None if it has only comments."""
    loader = _yaml_loader()(text)
    try:
        node: Any = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _is_name(name: object) -> bool:
    """Whether a text before a colon is the name of a field, and not a sentence between two rules."""
    return isinstance(name, str) and re.fullmatch(r"[^\s](.{0,38}[^\s])?", name) is not None and name.count(" ") < 3


def _yaml_loader() -> Any:
    """YAML's safe loader with the types of version 1.2: "no" is a text, and so is "12:30"."""
    import yaml

    class Loader(yaml.SafeLoader):  # not the one in C, whose stack deep nesting overflows
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - not those of version 1.1

    def timestamp(loader: Any, node: Any) -> object:
        try:
            return loader.construct_yaml_timestamp(node)
        except (ValueError, OverflowError):  # 2024-13-45
            return loader.construct_scalar(node)

    types = {
        "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
        "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
        "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
        "float": (r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?", "-+.0123456789"),
        "timestamp": (r"\d{4}-\d\d-\d\d([Tt ]+\d\d?:\d\d:\d\d(\.\d*)?[ \t]*(Z|[-+]\d\d?(:\d\d)?)?)?", "0123456789"),
        "merge": ("<<", "<"),
    }
    for name, (pattern, first) in types.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:timestamp", timestamp)
    return Loader
