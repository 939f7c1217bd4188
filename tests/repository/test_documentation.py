"""What the documentation names exists: files in ARCHITECTURE.md, links between pages, verbs and options."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from d2llm.cli.main import app

PAGES = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")
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


def test_every_verb_of_the_page_of_verbs_exists_and_every_verb_is_there(repository):
    verbs = set(typer.main.get_command(app).commands)
    named = re.findall(
        r"^\| `d2llm ([\w-]+)", (repository / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert set(named) == verbs


def _command_lines(page: Path) -> Iterator[tuple[int, str]]:
    """What a page tells one to type, with its line: in blocks of code, and between backticks."""
    block, begun, text = False, 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            block = not block
        elif block:
            begun, text = (begun, text + line) if text else (number, line)
            if text.endswith("\\"):
                text = text[:-1]
                continue
            yield begun, text
            text = ""
        else:
            yield from ((number, span) for span in re.findall(r"`(d2llm (?!serves )[^`]+)`", line))


def _typed(line: str) -> Iterator[list[str]]:
    """The words behind each ``d2llm`` that is called in a line."""
    for part in re.split(r"&&|\|", line.partition(" #")[0]):
        try:
            words = shlex.split(part)
        except ValueError:  # prose in a block of output
            continue
        if words[:1] in (["from"], ["import"]):  # Python
            continue
        places = [place for place, word in enumerate(words) if word == "d2llm" or word.endswith("/bin/d2llm")]
        if places:
            yield words[
                places[-1 if words[0] == "docker" else 0] + 1 :
            ]  # a container's name comes before the program's


PROGRAM = typer.main.get_command(app)


def _problem(words: list[str]) -> str | None:
    """Why the program would not understand the words, as far as names of verbs and options tell."""
    command, rest = PROGRAM, list(words)
    known = {name for parameter in command.params for name in parameter.opts}
    while subcommands := getattr(command, "commands", None):
        verb = next((word for word in rest if word in subcommands), None)
        if verb is None:
            is_verb = command is PROGRAM and rest and re.fullmatch("[a-z-]+", rest[0]) and not rest[0].startswith("-")
            return f"no verb {rest[0]}" if is_verb else None
        rest, command = rest[rest.index(verb) + 1 :], subcommands[verb]
        known |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [
        word for word in rest if word.startswith("--") and word.partition("=")[0] not in {*known, "--", "--help"}
    ]
    return f"no options {unknown}" if unknown else None


def test_every_command_in_the_documentation_has_verbs_and_options_that_exist(repository: Path):
    pages = [page for page in (repository / "docs").rglob("*.md") if page.name != "LOG.md"]
    num_commands, problems = 0, []
    for page in [repository / "README.md", *pages]:
        for number, line in _command_lines(page):
            for words in _typed(line):
                num_commands += 1
                if (problem := _problem(words)) and not line.lstrip().startswith(("docker", "useradd", "pip")):
                    problems.append(f"{page.name}:{number}: {problem}: {line}")
    assert num_commands > 100
    assert problems == []
