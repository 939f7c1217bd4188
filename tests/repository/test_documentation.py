"""Files, links, Python names, commands and options mentioned in the documentation exist."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer
from pydantic import BaseModel

from d2llm.cli.main import app
from d2llm.core.errors import MissingExtraError
from d2llm.recipe import Recipe
from d2llm.recipe.losses import LOSSES, Objective
from d2llm.recipe.recipe import load_recipe_text
from d2llm.recipe.sections import SectionOfKind

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


def test_architecture_mentions_only_existing_files(repository):
    files = tracked_files(repository)
    folders = {parent for file in files for parent in file.parents}
    names = set(FILE.findall((repository / "ARCHITECTURE.md").read_text(encoding="utf-8"))) - WRITTEN_AT_RUN_TIME
    assert len(names) > 50
    missing = [name for name in names if not any(p.match(name.removeprefix("../")) for p in [*files, *folders])]
    assert missing == []


def current_pages(repository: Path) -> list[Path]:
    """Pages about the current version; the log also mentions things that are gone."""
    return [page for page in pages(repository) if page.parent.name != "log"]


def files_in(text: str) -> set[str]:
    """Names of source files, and paths that start with a folder of the repository."""
    return set(re.findall(r"`((?:src|tests|docs|benchmarks|scripts|deploy)/[\w./-]+|[\w/-]+\.(?:py|js|sh))`", text))


def python_names_in(text: str) -> set[str]:
    """Dotted names that start with ``d2llm``, and names that examples import from it."""
    names = set(re.findall(r"(?<![\w./\"-])(d2llm(?:\.[A-Za-z_]\w*)+)", text)) - LOGGERS - ENTRY_POINTS
    for module, imported in re.findall(r"from (d2llm[\w.]*) import \(?([\w, ]+)", text):
        names |= {f"{module}.{name.split(' as ')[0].strip()}" for name in imported.split(",") if name.strip()}
    return names


LOGGERS = {"d2llm.remarks"}
ENTRY_POINTS = {"d2llm.teachers", "d2llm.poolings", "d2llm.rerankers", "d2llm.writers"}


def python_name_exists(name: str) -> bool:
    parts = name.split(".")
    value: object = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(parts[:number]))
            except MissingExtraError:  # the module exists, but a library it needs is missing
                return True
            except ModuleNotFoundError:
                return False
        value = getattr(value, part)
    return True


def options_in(text: str) -> set[str]:
    """Recipe options written as ``section.option`` between backticks."""
    names = re.findall(r"`\[*([a-z_]+(?:\.[a-z_]+)+)[`\] ]", text)
    sections = {*Recipe.model_fields} - {"student"} | {
        f"student.{name}" for name in ("backbone", "pooling", "interaction")
    }
    return {
        name
        for name in names
        if any(name.startswith(f"{section}.") for section in sections) and not name.endswith((".py", ".json"))
    }


def option_exists(name: str) -> bool:
    section: type[BaseModel] | None = Recipe
    for part in name.split("."):
        if section is None or part not in section.model_fields:
            return False
        annotation = section.model_fields[part].annotation
        if annotation is Objective:
            kind, *setting = name.split(".")[1:]
            return kind in LOSSES.kinds and all(each in LOSSES.find(kind).model_fields for each in setting[:1])
        candidates = [annotation, *get_args(annotation)]
        kinds = next((c for c in candidates if isinstance(c, type) and issubclass(c, SectionOfKind)), None)
        if kinds is not None:
            setting = name.split(".")[name.split(".").index(part) + 1 :][:1]
            known = {"kind"}.union(*(kinds.kinds.find(kind).model_fields for kind in kinds.kinds.kinds))
            return known.issuperset(setting)
        section = next((c for c in candidates if isinstance(c, type) and hasattr(c, "model_fields")), None)
    return True


def test_pages_mention_only_existing_files(repository):
    files = tracked_files(repository)
    known = [*files, *{parent for file in files for parent in file.parents}]
    mentions = [
        (page, name) for page in current_pages(repository) for name in files_in(page.read_text(encoding="utf-8"))
    ]
    assert len(mentions) > 60
    missing = [f"{page.name}: {name}" for page, name in mentions if not any(path.match(name) for path in known)]
    assert missing == []


def test_pages_mention_only_importable_names(repository):
    texts = [(page, page.read_text(encoding="utf-8")) for page in current_pages(repository)]
    mentions = [(page, name) for page, text in texts for name in python_names_in(text)]
    assert len(mentions) > 30
    assert [f"{page.name}: {name}" for page, name in mentions if not python_name_exists(name)] == []


def test_pages_mention_only_existing_recipe_options(repository):
    texts = [(page, page.read_text(encoding="utf-8")) for page in current_pages(repository)]
    mentions = [(page, name) for page, text in texts for name in options_in(text)]
    assert len(mentions) > 10
    assert [f"{page.name}: {name}" for page, name in mentions if not option_exists(name)] == []
    examples = [
        (page, block)
        for page, text in texts
        for block in re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
        if (tables := re.findall(r"^\[+([a-z_]+)", block, flags=re.MULTILINE)) and {*tables} <= {*Recipe.model_fields}
    ]
    assert len(examples) > 3
    for page, block in examples:
        load_recipe_text(block, where=page.name)


@pytest.mark.parametrize(
    ("exists", "name"),
    [
        (python_name_exists, "d2llm.Student.load"),
        (python_name_exists, "d2llm.store.bm25"),
        (option_exists, "training.residual.epochs"),
    ],
)
def test_the_checks_detect_unknown_names(exists, name):
    assert exists(name)
    assert not exists(f"{name}_gone")


def test_links_between_pages_are_not_broken(repository):
    broken = [
        f"{page.relative_to(repository)}: {target}"
        for page in pages(repository)
        for target in link_targets(page)
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def headings(page: Path) -> list[str]:
    """Addresses of the page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return [
        slug if not (before := slugs[:index].count(slug)) else f"{slug}-{before}" for index, slug in enumerate(slugs)
    ]


def links_to_headings(page: Path) -> list[tuple[Path, str]]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text)
    return [(page.parent / target if target else page, heading) for target, heading in links]


def test_links_to_headings_are_not_broken(repository):
    links = [(page, *link) for page in pages(repository) for link in links_to_headings(page)]
    assert len(links) > 200
    broken = [
        f"{page.relative_to(repository)}: {target.name}#{heading}"
        for page, target, heading in links
        if target.suffix == ".md" and heading not in headings(target)
    ]
    assert broken == []


def test_the_log_has_a_file_for_each_month_and_an_index_of_all_entries(repository):
    folder = repository / "docs" / "log"
    months = sorted(page for page in folder.iterdir() if page.name != "README.md")
    assert months
    entries = []
    for month in months:
        assert re.fullmatch(r"\d{4}-\d\d\.md", month.name)
        titles = re.findall(r"^## (.+)$", month.read_text(encoding="utf-8"), flags=re.MULTILINE)
        dates = [title.partition(": ")[0] for title in titles]
        assert all(re.fullmatch(rf"{month.stem}-\d\d", date) for date in dates)
        assert dates == sorted(dates), "newest last"
        entries += [(month.name, heading) for heading in headings(month)[1:]]
    index = [(target.name, heading) for target, heading in links_to_headings(folder / "README.md")]
    assert sorted(index) == sorted(entries)


def test_the_logs_index_answers_each_question_in_one_line(repository):
    text = (repository / "docs" / "log" / "README.md").read_text(encoding="utf-8")
    lines = text.partition("## Index by question")[2].splitlines()
    for line, answer in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("- "):
            assert re.fullmatch(r"- \[[^\]]+\?\]\([^)]+\)", line)
            assert answer.startswith("  ")
            assert answer.endswith(".")
        elif line.startswith("  "):
            assert not answer.startswith("  ")


def test_the_changelog_is_one_page(repository):
    assert len((repository / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_cli_page_lists_exactly_the_commands(repository):
    verbs = set(typer.main.get_command(app).commands)
    mentions = re.findall(
        r"^\| `d2llm ([\w-]+)", (repository / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert set(mentions) == verbs


def _command_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Commands in a page, with line numbers: from code blocks and between backticks."""
    block, start, text = False, 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            block = not block
        elif block:
            start, text = (start, text + line) if text else (number, line)
            if text.endswith("\\"):
                text = text[:-1]
                continue
            yield start, text
            text = ""
        else:
            yield from ((number, span) for span in re.findall(r"`(d2llm (?!serves )[^`]+)`", line))


def _calls(line: str) -> Iterator[list[str]]:
    """The arguments of each ``d2llm`` call in a line."""
    for part in re.split(r"&&|\|", line.partition(" #")[0]):
        try:
            words = shlex.split(part)
        except ValueError:  # prose in a block of program output
            continue
        if words[:1] in (["from"], ["import"]):  # Python
            continue
        positions = [index for index, word in enumerate(words) if word == "d2llm" or word.endswith("/bin/d2llm")]
        if positions:
            yield words[
                positions[-1 if words[0] == "docker" else 0] + 1 :
            ]  # with docker, the container's name may come first


PROGRAM = typer.main.get_command(app)


def _problem(words: list[str]) -> str | None:
    """The unknown command or option in the words, if any."""
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


def test_documented_commands_and_options_exist(repository: Path):
    pages = [page for page in (repository / "docs").rglob("*.md") if page.parent.name != "log"]
    num_commands, problems = 0, []
    for page in [repository / "README.md", *pages]:
        for number, line in _command_lines(page):
            for words in _calls(line):
                num_commands += 1
                if (problem := _problem(words)) and not line.lstrip().startswith(("docker", "useradd", "pip")):
                    problems.append(f"{page.name}:{number}: {problem}: {line}")
    assert num_commands > 100
    assert problems == []


def test_readme_names_the_two_commands_that_set_up_everything(repository):
    blocks = "\n".join(re.findall(r"```\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL))
    assert re.search(r"^make demo\b", blocks, re.MULTILINE)
    assert re.search(r"^make test\b", blocks, re.MULTILINE)
