"""The writer's prompts: templates from the TOML files in this folder, or from the user's own file.

A passage, or a query to expand, is data, whatever it says: a prompt encloses it in marks that no text can imitate, and
control words of chat templates lose their effect in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.models.length_limit import TextLengths
from d2llm.models.prompt_sets import read_prompt_section
from d2llm.models.writers.writer import EXPANSION_KINDS, QUERY_KINDS, Assignment, ExpansionKind, QueryKind

_SLOT = re.compile(r"\{([a-z_]+)\}")
_SLOTS = {
    "template": ({"num_queries", "examples", "title", "passage"}, {"mark"}),
    "title": ({"title"}, {"mark"}),
    "example": ({"passage", "query"}, {"mark"}),
}
"""The slots that each key of a prompt for queries must have, and those that it may have."""
_EXPANSION_SLOTS = {
    "rephrasing": {"template": ({"num_queries", "query"}, {"mark"})},
    "answer": {"template": ({"query"}, {"mark"})},
    "standalone": {"template": ({"history", "query"}, {"mark"}), "turn": ({"role", "text"}, {"mark"})},
}
_CONTROL = re.compile(r"[<\[](?=\||/?INST\]|/?SYS>|/?s>|(?:start|end)_of_turn>)", re.I)


@dataclass(frozen=True, slots=True)
class WriterPrompt:
    """The templates of one kind of query or expansion; ``prompts/question.toml`` says which slots they have."""

    template: str
    title: str = ""
    example: str = ""
    turn: str = ""

    @property
    def fingerprint(self) -> str:
        """Identity of the prompt, since another text gives other queries."""
        return fingerprint_json([self.template, self.title, self.example])

    def fill(self, assignment: Assignment) -> str:
        """The whole prompt. Slots that occur in a text of the assignment are not filled."""
        pairs = (*assignment.examples, *assignment.history)
        texts = [assignment.title, assignment.passage, *(text for pair in pairs for text in pair)]
        mark = _unused_mark("query" if assignment.kind in EXPANSION_KINDS else "passage", texts)
        examples = "".join(
            _fill(self.example, {"mark": mark, "passage": as_data(passage), "query": as_data(query)})
            for passage, query in assignment.examples
        )
        history = "".join(
            _fill(self.turn, {"mark": mark, "role": role, "text": as_data(text)}) for role, text in assignment.history
        )
        title = as_data(assignment.title)
        values = {
            "mark": mark,
            "num_queries": str(assignment.num_queries),
            "examples": examples,
            "history": history,
            "title": _fill(self.title, {"mark": mark, "title": title}) if title else "",
            "passage": as_data(assignment.passage),
            "query": as_data(assignment.passage),
        }
        return _fill(self.template, values).strip()

    def known_text(self, assignment: Assignment) -> str:
        """What an answer may repeat of the prompt without being a query: the template, and the examples' queries."""
        return " ".join([_SLOT.sub(" ", self.template), *(query for _, query in assignment.examples)])


def cut_assignments(
    assignments: Sequence[Assignment], lengths: TextLengths, *, max_tokens: int
) -> tuple[list[Assignment], list[bool]]:
    """Assignments with passages of at most ``max_tokens`` each, and whether anything of an assignment was cut.

    The end of a passage is cut first; a title that would take more than half of the room is itself cut to half. The
    passage of an example and a turn of a conversation are cut too.
    """
    room = lengths.room(max_tokens)
    # A passage must not lose its text to the white space before it.
    assignments = [replace(assignment, passage=assignment.passage.strip()) for assignment in assignments]
    pairs = [(assignment.title, assignment.passage) for assignment in assignments]
    pairs += [("", passage) for assignment in assignments for passage, _ in assignment.examples]
    pairs += [("", text) for assignment in assignments for _, text in assignment.history]
    cut = dict(zip(pairs, lengths.cut(pairs, room), strict=True))
    kept: list[Assignment] = []
    for assignment in assignments:
        title, passage = cut[assignment.title, assignment.passage]
        shown = tuple((cut["", passage][1], query) for passage, query in assignment.examples)
        history = tuple((role, cut["", text][1]) for role, text in assignment.history)
        kept.append(replace(assignment, title=title, passage=passage, examples=shown, history=history))
    return kept, [cut != whole for cut, whole in zip(kept, assignments, strict=True)]


def as_data(text: str) -> str:
    """A text in which control words of chat templates (``<|im_end|>``, ``[INST]``, ``</s>``, ``<end_of_turn>``) have
    a space after their first character, so that a tokenizer reads them as plain text.
    """
    return _CONTROL.sub(lambda match: f"{match.group()} ", text)


class WriterPrompts:
    """A prompt set by kind.

    Prompts for queries are loaded at once, those for expansions when they are first used: a user's file need not have
    both.

    Raises:
        InputError: as for ``load_writer_prompt``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loaded: dict[QueryKind | ExpansionKind, WriterPrompt] = {}
        for kind in QUERY_KINDS:
            self._loaded[kind] = load_writer_prompt(name, kind)

    def __getitem__(self, kind: QueryKind | ExpansionKind) -> WriterPrompt:
        if kind not in self._loaded:
            self._loaded[kind] = load_writer_prompt(self._name, kind)
        return self._loaded[kind]

    @property
    def fingerprints(self) -> list[str]:
        """Identities of the prompts for queries; expansions are not kept, so theirs do not matter."""
        return [self[kind].fingerprint for kind in QUERY_KINDS]


def load_writer_prompt(name: str, kind: QueryKind | ExpansionKind) -> WriterPrompt:
    """The prompt set ``name`` for ``kind``: one shipped with d2llm, or a TOML file with a section per kind.

    Raises:
        InputError: no such set, or a template that lacks a slot or has an unknown one.
    """
    all_slots = _EXPANSION_SLOTS.get(kind, _SLOTS)
    section, where = read_prompt_section(name, kind, folder=Path(__file__).parent, keys=tuple(all_slots))
    for key, (needed, optional) in all_slots.items():
        slots = set(_SLOT.findall(section[key]))
        if missing := needed - slots:
            raise InputError(f"{where}: {key} needs the slots {_listed(needed)}; it lacks {_listed(missing)}")
        if unknown := slots - needed - optional:
            raise InputError(
                f"{where}: {key} has the unknown slots {_listed(unknown)}; it can have {_listed(needed | optional)}"
            )
    return WriterPrompt(
        section["template"].strip("\n"),
        section.get("title", ""),
        section.get("example", "").rstrip("\n"),
        section.get("turn", ""),
    )


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _SLOT.sub(lambda match: values[match.group(1)], template)


def _unused_mark(word: str, texts: list[str]) -> str:
    """The first of passage, passage-2, passage-3 ... that is in no tag of any of the texts, if ``word`` is passage."""
    together = "\n".join(texts).casefold()
    names = (word if suffix == 1 else f"{word}-{suffix}" for suffix in count(1))
    return next(name for name in names if f"<{name}>" not in together and f"</{name}>" not in together)


def _listed(slots: set[str]) -> str:
    return ", ".join(f"{{{slot}}}" for slot in sorted(slots))
