"""Names of variables, parameters, fields and functions say what things are, in the words of this field."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "d2llm"
WORD_FOR = {
    "each": "what it is: a query, a row, a score",
    "number": "what it counts or numbers: count, index, line_number, num_pairs",
    "own": "what it is: weights, ids, settings",
    "parts": "what they are: sentences, fields, batches, blocks",
    "place": "position, index, row, rank or offset",
    "places": "positions, indices, rows, extents or offsets",
    "evidence": "score_features",
    "reach": "bound",
    "share": "fraction or weight",
    "take_up": "load",
    "put_back": "restore",
    "quiet_price": "off_task_penalty",
    "never_worse": "non_inferior",
    "first_look": "precheck",
}
PREFIXES = {"MOST": "MAX", "FEWEST": "MIN", "LARGEST": "MAX"}  # of constants
ALLOWED = {
    ("core/document.py", "parts"),  # a section's, which are of class Part
    ("evaluation/report.py", "parts"),  # the parts of the score, as reports have them in JSON
    ("retrieval/reading.py", "parts"),  # a passage's windows and tokens (PartKind)
    ("retrieval/shard.py", "parts"),  # likewise
    ("store/index_store.py", "parts"),  # likewise
    ("sizing/size.py", "parts"),  # of class PartBytes, as `d2llm size` has them in JSON
    ("core/types.py", "number"),  # a shard's, in JSON
    ("retrieval/context.py", "number"),  # a source's, by which an answer cites it: [1]
    ("server/response_schemas.py", "number"),  # the same, in JSON
    ("training/alternate.py", "number"),  # a round's, in JSON
}
"""What is called so for a reason: (file, name)."""


def names_given(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that code gives to variables, parameters, attributes, functions and classes, with their lines."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.ClassDef(name=name):
                yield name, node.lineno
            case _:
                pass


def better_word(name: str) -> str | None:
    """What to say instead of a name; None if it is a good one."""
    first, _, rest = name.lstrip("_").partition("_")
    return f"{PREFIXES[first]}_{rest}" if first in PREFIXES and rest else WORD_FOR.get(name)


def test_names_say_what_things_are():
    problems, used = list[str](), set[tuple[str, str]]()
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for name, line in names_given(ast.parse(path.read_text(encoding="utf-8"))):
            better = better_word(name)
            if better is not None and (file, name) in ALLOWED:
                used.add((file, name))
            elif better is not None:
                problems.append(f"{file}:{line}: {name}; say {better}")
    assert not problems
    assert used == ALLOWED, "an exception that nothing needs any more"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("own = 1", ["own"]),
        ("for place, (_, parts) in pairs: pass", ["parts", "place"]),
        ("[number for number in numbers]", ["number"]),
        ("def f(places, *, own_ids): pass", ["places"]),
        ("self.parts = pieces", ["parts"]),
        ("class A:\n    number: int\n    def own(self): pass", ["number", "own"]),
        ("MOST_TOKENS, _LARGEST_PART, most_tokens, MAX_TOKENS = sizes", ["MOST_TOKENS", "_LARGEST_PART"]),
        ("path.parts[0], read(parts=kinds)", []),
    ],
)
def test_what_counts_as_such_a_name(code, names):
    assert sorted(name for name, _ in names_given(ast.parse(code)) if better_word(name)) == sorted(names)


def test_no_word_is_recommended_and_refused():
    recommended = {word for text in WORD_FOR.values() for word in re.findall(r"\w+", text)}
    assert not recommended & WORD_FOR.keys()
