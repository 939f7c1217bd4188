"""The teacher's prompts: templates from the TOML files in this folder, or from the user's own file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import Task
from d2llm.models.prompt_sets import read_prompt_section

_SWITCH = "spaced"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template cut at its two slots: ``head`` query ``middle`` passage ``tail``, and the two answer words.

    ``space`` goes before query and passage. It is " " if the template sets ``spaced``: LLM tokenizers merge the space
    before a word into the word's token, and a model that was tuned on whole texts expects these tokens.
    """

    head: str
    middle: str
    tail: str
    yes: str
    no: str
    space: str = ""

    @property
    def fingerprint(self) -> str:
        """Identity of the question, since another text gives other labels."""
        spaced = [self.space] if self.space else []
        return fingerprint_json([self.head, self.middle, self.tail, self.yes, self.no, *spaced])

    def fill(self, query: str, passage: str) -> str:
        """The whole text, for models that tokenize it in one piece."""
        return f"{self.head}{self.space}{query}{self.middle}{self.space}{passage}{self.tail}"


def load_prompt(name: str, task: Task) -> Prompt:
    """The prompt set ``name`` for ``task``: one shipped with d2llm, or a TOML file with a section per task.

    Raises:
        InputError: no such set, or a template without ``{query}`` before ``{passage}``.
    """
    section, where = read_prompt_section(
        name, task, folder=Path(__file__).parent, keys=("template", "yes", "no"), optional=(_SWITCH,)
    )
    if not isinstance(spaced := section.get(_SWITCH, False), bool):
        raise InputError(f"{where}: {_SWITCH} must be true or false")
    template: str = section["template"]
    head, query_slot, rest = template.partition("{query}")
    middle, passage_slot, tail = rest.partition("{passage}")
    if not query_slot or not passage_slot or not tail:
        raise InputError(f"{where}: the template needs {{query}}, then {{passage}}, then the question")
    head = head.lstrip("\n")
    if not spaced:
        return Prompt(head, middle, tail, section["yes"], section["no"])
    if not head.endswith(" ") or not middle.endswith(" "):
        raise InputError(f"{where}: with {_SWITCH}, a space must come before {{query}} and before {{passage}}")
    return Prompt(head[:-1], middle[:-1], tail, section["yes"], section["no"], space=" ")
