"""Markdown as HTML, as CommonMark says, with what generators of sites and notes add to it.

These are tables, footnotes, definition lists, formulas, admonitions (``!!! note``, ``:::tip``, ``> [!NOTE]``), MyST's
roles and directives, wiki links (``[[Page|text]]``), templates' tags (``{{< ref >}}``, ``{% note %}``) and lists of
attributes (``{#id}``). Of each, only what a reader of the site would see is kept.
"""

from __future__ import annotations

import re
from functools import cache
from html import escape
from typing import Any

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
