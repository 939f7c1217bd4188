"""MkDocs' hooks for the documentation site (mkdocs.yml): pages of a code host become pages of a site.

- docs/README.md is the start; docs/index.md, which is about indexes, gets another address.
- Files outside docs/ that pages link to are part of the site, below ``repository/``, and links lead there.
- Notebooks are pages, with what their cells printed.
- A link that shows a file's name shows the title of its page.
- Lists are written as Python-Markdown reads them.
- Pages below ``api/`` are made from docstrings: those of the public names, by the groups in d2llm's own docstring, and
  those of the other names that pages mention.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import d2llm
from d2llm.core import errors

ROOT = Path(__file__).parent.parent
OUTSIDE = "repository"
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
FILE_LINK = re.compile(r"\[([\w./-]+\.md)\]\(([\w./-]+\.md)")
CODE = re.compile(r"^( *)(```+).*?^\1\2$|``[^\n]+?``|`[^`\n]+`", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"(?<![\w./\"-])d2llm(?:\.[A-Za-z_]\w*)+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page about indexes, and what pages link to outside docs/."""
    if (index := files.get_file_from_path("index.md")) is not None:
        files.remove(index)
    index = File("index.md", config.docs_dir, config.site_dir, False, dest_uri="indexes.html")
    index.inclusion = InclusionLevel.INCLUDED
    files.append(index)
    for name, content in api_pages(ROOT).items():
        files.append(File.generated(config, name, content=content))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        page = notebook_page(Path(config.docs_dir, file.src_uri).read_text(encoding="utf-8"))
        files.append(File.generated(config, str(Path(file.src_uri).with_suffix(".md")), content=page))
    waiting = [file.src_uri for file in files.documentation_pages()]
    waiting += [name for name in _nav_pages(config.nav) if name.startswith(f"{OUTSIDE}/")]
    while waiting:
        source = waiting.pop()
        if files.get_file_from_path(source) is None:
            files.append(_outside(source, config))
        if source.endswith(".md") and _path_of(source).is_file():
            text = _path_of(source).read_text(encoding="utf-8")
            targets = (_target(source, link) for link in LINK.findall(CODE.sub("", text)))
            waiting += [target for target in targets if target and files.get_file_from_path(target) is None]
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """A page with links to where files are in the site, and with lists as Python-Markdown reads them."""
    source = page.file.src_uri
    if source.startswith("log/20"):
        page.meta["search"] = {"exclude": True}

    def titled(found: re.Match[str]) -> str:
        target = _target(source, found[2])
        title = target and re.search(r"^# (.+)$", _path_of(target).read_text(encoding="utf-8"), flags=re.MULTILINE)
        return f"[{title[1]}]({found[2]}" if title else found[0]

    def link(found: re.Match[str]) -> str:
        target = _target(source, found[1])
        return posixpath.relpath(target, posixpath.dirname(source) or ".") if target else found[1]

    pieces, end = [], 0
    for code in CODE.finditer(markdown):
        pieces += [LINK.sub(link, FILE_LINK.sub(titled, markdown[end : code.start()])), code[0]]
        end = code.end()
    return lists_indented("".join([*pieces, LINK.sub(link, FILE_LINK.sub(titled, markdown[end:]))]))


def notebook_page(text: str) -> str:
    """A notebook as Markdown: its cells of code, each with what it printed."""
    blocks: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        blocks += [f"```text\n{''.join(output['text']).rstrip()}\n```" for output in cell.get("outputs", [])]
    return "\n\n".join([*blocks, ""])


def api_pages(root: Path) -> dict[str, str]:
    """The pages of the Python reference, as directives for mkdocstrings."""
    homes = vars(d2llm)["_HOME_OF"]  # so that nothing is imported
    groups = re.findall(r"^(\w[\w ]*):\n((?: {4}\w+ {2,}.+\n)+)", d2llm.__doc__ or "", flags=re.MULTILINE)
    pages = {
        f"api/{title.removeprefix('the ')}.md": (title, re.findall(r"^ +(\w+)", lines, flags=re.MULTILINE))
        for title, lines in groups
    }
    listed = [name for _, names in pages.values() for name in names]
    if sorted(listed) != sorted(homes):
        raise PluginError("d2llm's docstring lists other names than d2llm has")
    written = {
        address: _api_page(
            f"Python: {title}", {each: f"{homes[name]}.{each}" for name in names for each in _with_kinds(name)}
        )
        for address, (title, names) in pages.items()
    }
    texts = [page.read_text(encoding="utf-8") for page in (root / "docs").rglob("*.md") if page.parent.name != "log"]
    others = sorted({name for text in texts for name in NAME.findall(text) if _is_defined(name)})
    return written | {"api/submodules.md": _api_page("Python: submodules", {name: name for name in others})}


def _with_kinds(name: str) -> list[str]:
    """A public name; after the base of all errors also the others, in the order of their module."""
    kinds = [each.__name__ for each in vars(errors).values() if getattr(each, "__module__", "") == errors.__name__]
    return kinds if name == kinds[0] else [name]


def _api_page(title: str, names: dict[str, str]) -> str:
    return "\n".join(
        [f"# {title}", "", *(f"::: {home}\n    options: {{heading: {name}}}\n" for name, home in names.items())]
    )


def _is_defined(name: str) -> bool:
    """Whether a name is that of a class or function, and is not one of the public names; nothing is imported."""
    module, _, attribute = name.rpartition(".")
    path = ROOT / "src" / f"{module.replace('.', '/')}.py"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    is_public = vars(d2llm)["_HOME_OF"].get(attribute) == module
    return not is_public and re.search(rf"^(?:def|class) {attribute}\b", text, flags=re.MULTILINE) is not None


def _nav_pages(nav: Any) -> list[str]:
    """The pages named in the navigation."""
    if isinstance(nav, str):
        return [nav]
    children = nav.values() if isinstance(nav, dict) else nav
    return [page for child in children for page in _nav_pages(child)]


def _path_of(source: str) -> Path:
    """The file that a page of the site is made from."""
    inside = source.removeprefix(f"{OUTSIDE}/")
    return ROOT / inside if inside != source else ROOT / "docs" / source


def _target(source: str, link: str) -> str | None:
    """Where a link of a page leads in the site; None if it leads out of the repository."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = Path(posixpath.normpath(posixpath.join(_path_of(source).parent.as_posix(), link)))
    if not path.exists() or not path.is_relative_to(ROOT):
        return None  # MkDocs reports it
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", name.removeprefix("docs/"))
    return f"{OUTSIDE}/{name}" + ("/README.md" if path.is_dir() else "")


def _outside(source: str, config: MkDocsConfig) -> File:
    """A file of the repository as one of the site; for a folder without a page, a list of its files."""
    path = _path_of(source)
    if path.is_file():
        return File.generated(config, source, abs_src_path=str(path))
    lines = [f"- `{each.name}`" for each in sorted(path.parent.iterdir()) if not each.name.startswith(("_", "."))]
    name = path.parent.relative_to(ROOT).as_posix()
    content = "\n".join([f"# {name}", "", "The files of this folder:", "", *lines, ""])
    return File.generated(config, source, content=content)


def lists_indented(markdown: str) -> str:
    """The text with what belongs to an item of a list indented by four spaces, and an empty line where one is needed.

    CommonMark indents it as far as the item's text, and lets a list follow a line of a paragraph.
    """
    lines = markdown.split("\n")
    depths, columns, marks, first = [0] * len(lines), [0] * len(lines), [""] * len(lines), set[int]()
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type in ("bullet_list_open", "ordered_list_open") and token.map:
            first.add(token.map[0])
        if token.type == "list_item_open" and token.map:
            begin, end = token.map
            mark = re.match(r"\s*([-*+]|\d+[.)])\s*", lines[begin])
            if mark is None:  # pragma: no cover - the parser found one
                continue
            depth = token.level // 2 + 1
            for number in range(begin, end):
                depths[number], columns[number] = depth, mark.end()
            marks[begin] = mark[1]
    out: list[str] = []
    last_mark = 0
    for number, line in enumerate(lines):
        depth, column = depths[number], columns[number]
        after_paragraphs = marks[number] and "" in out[last_mark:]
        if (number in first or after_paragraphs) and out and out[-1].strip():
            out.append("")
        if marks[number]:
            last_mark = len(out)
        if not depth or not line.strip():
            out.append(line)
        elif marks[number]:
            out.append(" " * 4 * (depth - 1) + marks[number].ljust(3) + " " + line[column:])
        else:
            indent = min(column, len(line) - len(line.lstrip()))
            out.append(" " * 4 * depth + line[indent:])
    return "\n".join(out)
