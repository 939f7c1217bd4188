"""The teacher's questions: templates from the data files beside this one, or from the user's own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import Task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KEYS = {"template", "yes", "no"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template cut at its two slots: ``head`` query ``middle`` passage ``tail``, and the two answer words."""

    head: str
    middle: str
    tail: str
    yes: str
    no: str

    @property
    def fingerprint(self) -> str:
        """Identity of the question: labels asked with another text are other labels."""
        return fingerprint_json([self.head, self.middle, self.tail, self.yes, self.no])


def load_prompt(name: str, task: Task) -> Prompt:
    """The prompt set ``name`` for ``task``: one shipped with d2llm, or a TOML file with a section per task.

    Raises:
        InputError: no such set, or a template without ``{query}`` before ``{passage}``.
    """
    if name.endswith(".toml"):
        section, where = _read_file(Path(name), task), f"{name}: [{task}]"
    else:
        sets = tomllib.loads((files("d2llm.models.prompts") / f"{task}.toml").read_text(encoding="utf-8"))
        if name not in sets:
            raise InputError(f"no prompt set '{name}'; use one of {', '.join(sets)}, or the path of a TOML file")
        section, where = sets[name], f"prompt set '{name}' ({task})"
    return _parse(section, where)


def _read_file(path: Path, task: Task) -> dict[str, Any]:
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path of the prompt file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    if task not in sections:
        raise InputError(f"{path}: no section [{task}]; add one with the keys template, yes, no")
    if not isinstance(sections[task], dict):
        raise InputError(f"{path}: '{task}' should be a table: write [{task}] and below it template, yes, no")
    return sections[task]


def _parse(section: dict[str, Any], where: str) -> Prompt:
    if set(section) != _KEYS:
        raise InputError(f"{where}: needs exactly the keys template, yes, no; found {', '.join(sorted(section))}")
    if not all(isinstance(value, str) for value in section.values()):
        raise InputError(f"{where}: template, yes and no must be texts in quotes")
    template: str = section["template"]
    head, query_slot, rest = template.partition("{query}")
    middle, passage_slot, tail = rest.partition("{passage}")
    if not query_slot or not passage_slot or not tail:
        raise InputError(f"{where}: the template needs {{query}}, then {{passage}}, then the question")
    return Prompt(head.lstrip("\n"), middle, tail, section["yes"], section["no"])
