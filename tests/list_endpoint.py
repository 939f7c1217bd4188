"""Teachers that grade and rank lists, behind a real endpoint whose model counts the words that two texts share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local_endpoint import LocalEndpoint, Reply, Request, chat, local_endpoint

KINDS = ("graded", "listwise")


def shared_words(query: str, passage: str) -> int:
    """How many different words of a query a passage has."""
    return len({*query.lower().split()} & {*passage.lower().split()})


def grade(query: str, passage: str) -> int:
    """What the model thinks of a passage, 0 to 100."""
    return min(100, 20 * shared_words(query, passage))


def judged_lists(request: Request) -> tuple[str, list[str]]:
    """The query and the passages of a request."""
    (query,) = re.findall(r"^Query: (.*)$", request.prompt, re.M)
    return query, re.findall(r"^\[\d+\] (.*)$", request.prompt, re.M)


def counts_words(request: Request, number: int) -> Reply:
    """Grades, or the order, of the passages of a request."""
    del number
    query, passages = judged_lists(request)
    if "Rank the" in request.prompt:
        order = sorted(range(len(passages)), key=lambda index: -shared_words(query, passages[index]))
        answer = " > ".join(f"[{index + 1}]" for index in order)
    else:
        answer = "\n".join(f"[{index}] {grade(query, text)}" for index, text in enumerate(passages, start=1))
    return Reply(chat(answer, usage=(10 * len(passages), len(passages))))


def recipe_with_teacher(recipe: Path, teacher: str, settings: str = "") -> str:
    """The text of a recipe with other lines in its section ``teacher``, which learns from its lists alone.

    ``settings`` are more sections, with their heads.
    """
    head, _, rest = recipe.read_text().partition("[teacher]\n")
    tail = "[[data]]" + rest.partition("[[data]]")[2]
    own = "[teacher_tuning]\nepochs = 0\n[losses]\nlist_imitation = 1\n"
    return f"{head}[teacher]\n{teacher}\n{own}{settings}\n{tail}"


@contextmanager
def list_teacher(folder: Path, kind: str) -> Iterator[tuple[Path, LocalEndpoint]]:
    """The TOML file of a teacher of this kind, and its endpoint."""
    with local_endpoint(counts_words) as endpoint:
        file = folder / f"{kind}.toml"
        file.write_text(f'kind = "{kind}"\nmodel = "counts-words"\n[remote]\nurl = "{endpoint.url}"\n')
        yield file, endpoint
