"""The documentation site: it builds without a warning, and its pages have all that a code host shows of them."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import d2llm
from d2llm.core import errors

pytest.importorskip("mkdocs", reason="needs MkDocs: pip install 'd2llm[docs]'")
ROOT = Path(__file__).parents[2]
PAGES = sorted(page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md"))


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    built = build(ROOT, out)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return out


def address(page: Path) -> Path:
    if page == Path("index.md"):
        return Path("indexes.html")
    return page.with_name("index.html" if page.name == "README.md" else f"{page.stem}.html")


def article(site: Path, page: Path) -> str:
    text = (site / address(page)).read_text(encoding="utf-8")
    found = re.search(r"<article.*?</article>", text, flags=re.DOTALL)
    assert found is not None
    return found[0]


def counts(html: str) -> Counter[str]:
    html = re.sub(r'<table class="highlighttable">.*?</table>', "<pre></pre>", html, flags=re.DOTALL)
    return Counter(re.findall(r"<(li|pre|table|tr|h[1-6]|ul|ol|img|blockquote)\b", html))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_has_the_lists_tables_and_blocks_that_a_code_host_shows(site: Path, page: Path):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    expected = counts(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))
    assert counts(article(site, page)) == expected


def links(site: Path) -> list[tuple[Path, str]]:
    return [
        (page, link)
        for page in site.rglob("*.html")
        for link in re.findall(r'(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8"))
    ]


def test_links_lead_to_files_of_the_site(site: Path):
    inside = [(page, link.partition("#")[0]) for page, link in links(site) if not re.match("[a-z]+:|#|/", link)]
    assert len(inside) > 1000
    broken = {f"{page.relative_to(site)}: {link}" for page, link in inside if not (page.parent / link).exists()}
    assert {each for each in broken if not each.startswith("404.html")} == set()


def test_a_file_outside_docs_is_part_of_the_site(site: Path):
    assert (site / "repository" / "benchmarks" / "results" / "gpu.json").is_file()
    assert "results/gpu.json" in article(site, Path("how-to/gpu.md"))
    assert 'href="../../../quality.html' not in article(site, Path("how-to/gpu.md"))


def test_a_notebook_is_a_page_with_its_outputs(site: Path):
    text = re.sub(r"<[^>]+>", "", article(site, Path("notebooks/intents.md")))
    assert "Intents with ten examples each" in text
    assert "8 of 8" in text
    assert not list(site.rglob("*.ipynb"))


def test_a_link_that_shows_a_file_name_shows_the_title_of_its_page(site: Path):
    text = article(site, Path("settings.md"))
    assert '<a href="names.html">Names of search settings</a>' in text
    assert ".md</a>" not in text


def test_nothing_is_fetched_from_other_hosts(site: Path):
    fetched = [
        tag
        for page in site.rglob("*.html")
        for tag in re.findall(r"<(?:script|img|iframe)\b[^>]*>|<link\b[^>]*>", page.read_text(encoding="utf-8"))
        if re.search(r'(?:src|href)="(?:https?:)?//', tag) and 'rel="canonical"' not in tag
    ]
    assert fetched == []


def test_the_search_finds_pages(site: Path):
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "tutorial.html" in index
    assert "how-to/fit.html" in index
    assert "log/2026-11.html" not in index


def test_every_public_name_is_described_with_its_example(site: Path):
    pages = [page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html")]
    names = set(d2llm._HOME_OF)
    sections = {name: [re.split(rf'<h2 id="d2llm\.[\w.]+\.{name}"', page)[1:] for page in pages] for name in names}
    described = {name: [section for page in found for section in page] for name, found in sections.items()}
    assert {name: len(found) for name, found in described.items()} == dict.fromkeys(names, 1)
    for name in ("Index", "SearchSettings", "fit"):
        assert re.search(r"&gt;&gt;&gt;.*?</pre>", described[name][0].partition("<h2")[0], flags=re.DOTALL), name


def test_every_error_is_described_with_what_to_do(site: Path):
    page = (site / "api" / "rest.html").read_text(encoding="utf-8")
    kinds = [name for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, BaseException)]
    assert len(kinds) == 20
    for name in kinds:
        section = re.split(rf'<h2 id="d2llm\.core\.errors\.{name}"', page)[1].partition("<h2")[0]
        assert section.count("<p>") >= 2, f"{name}: says when it is raised, but not what to do"


def test_a_setting_has_its_type_and_help_and_a_function_of_a_page_its_place(site: Path):
    text = re.sub(r"<[^>]+>|\s+", " ", (site / "api" / "searching.html").read_text(encoding="utf-8"))
    assert re.search(r"num_candidates +int +Passages that get the full score", text)
    assert 'id="d2llm.retrieval.shard.shard"' in (site / "api" / "submodules.html").read_text(encoding="utf-8")


@pytest.mark.rest
def test_broken_links_are_errors(tmp_path: Path):
    for folder in ("docs", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for folder in ("benchmarks", "src"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for file in [*ROOT.glob("*.md"), ROOT / "mkdocs.yml"]:
        shutil.copy(file, tmp_path)
    for page, link in [
        ("tutorial.md", "gone.md"),
        ("tutorial.md", "cli.md#no-such-heading"),
        ("README.md", "../benchmarks/gone.json"),
    ]:
        with (tmp_path / "docs" / page).open("a", encoding="utf-8") as file:
            file.write(f"\n[a link]({link})\n")
    built = build(tmp_path, tmp_path / "out")
    assert built.returncode != 0
    for missing in ("'gone.md'", "'#no-such-heading'", "gone.json'"):
        assert re.search(rf"WARNING.*{missing}", built.stderr), missing
