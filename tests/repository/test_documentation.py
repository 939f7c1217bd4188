"""What the documentation names exists: files in ARCHITECTURE.md, links between pages, verbs of the command line."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import typer

from d2llm.apps.cli import app

PAGES = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")
FILE = re.compile(r"`([\w*.-]*(?:/[\w*.-]+)+|[\w*-]+\.(?:py|js|toml|sh|md|yaml|json))`")
WRITTEN_AT_RUN_TIME = {"manifest.json"}


def pages(repository: Path) -> list[Path]:
    return [*(repository / name for name in PAGES), *sorted((repository / "docs").rglob("*.md"))]


def link_targets(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)


def tracked_files(repository: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    return [Path(line) for line in listed.stdout.splitlines()]


def test_the_tour_names_only_what_exists(repository):
    files = tracked_files(repository)
    folders = {parent for file in files for parent in file.parents}
    names = set(FILE.findall((repository / "ARCHITECTURE.md").read_text(encoding="utf-8"))) - WRITTEN_AT_RUN_TIME
    assert len(names) > 50
    missing = [name for name in names if not any(p.match(name.removeprefix("../")) for p in [*files, *folders])]
    assert missing == []


def test_links_between_pages_lead_somewhere(repository):
    broken = [
        f"{page.relative_to(repository)}: {target}"
        for page in pages(repository)
        for target in link_targets(page)
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_verb_in_the_readme_exists_and_every_verb_is_there(repository):
    verbs = set(typer.main.get_command(app).commands)
    named = re.findall(
        r"^\| `d2llm ([\w-]+)", (repository / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert set(named) == verbs
