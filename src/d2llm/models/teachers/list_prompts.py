"""Prompts that show a query with several numbered passages: from the TOML files in ``prompts``, or a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import Task
from d2llm.models.prompt_sets import read_prompt_section

_FOLDER = Path(__file__).parent / "prompts"


@dataclass(frozen=True, slots=True)
class ListPrompt:
    """A template cut at its two slots: ``head`` query ``middle`` passages ``tail``."""

    head: str
    middle: str
    tail: str

    @property
    def fingerprint(self) -> str:
        """Identity of the question, since another text gives other labels."""
        return fingerprint_json([self.head, self.middle, self.tail])

    def fill(self, query: str, passages: Sequence[str]) -> str:
        """The whole text. Each passage is one line, so that none can pass for another's beginning."""
        lines = [f"[{place}] {' '.join(text.split())}" for place, text in enumerate(passages, start=1)]
        return f"{self.head}{' '.join(query.split())}{self.middle}{chr(10).join(lines)}{self.tail}"


def load_list_prompt(kind: str, name: str, task: Task) -> ListPrompt:
    """The prompt set ``name`` of a kind of teacher (``graded``, ``listwise``) for ``task``.

    Args:
        kind: whose prompts.
        name: a set shipped with d2llm, or a TOML file with a section per task.
        task: the section.

    Raises:
        InputError: no such set, or a template without ``{query}`` before ``{passages}``.
    """
    section, where = read_prompt_section(name, task, folder=_FOLDER / kind, keys=("template",))
    head, query_slot, rest = section["template"].partition("{query}")
    middle, passages_slot, tail = rest.partition("{passages}")
    if not query_slot or not passages_slot or not tail.strip():
        raise InputError(f"{where}: the template needs {{query}}, then {{passages}}, then what to answer")
    return ListPrompt(head.lstrip("\n"), middle, tail)
