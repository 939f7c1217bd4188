"""No file of the package has over 600 lines, and no function over 60, but for a list that may only become shorter."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "d2llm"
MAX_FILE, MAX_FUNCTION = 600, 60
LONG_FILES = {"retrieval/index.py": 814, "store/passage_table.py": 643}
LONG_FUNCTIONS = {
    "cli/encode.py: encode": 67,
    "cli/evaluate.py: evaluate": 128,
    "cli/fit.py: fit": 96,
    "cli/fit_scores.py: fit_scores": 118,
    "cli/search.py: search": 93,
    "demo/demo.py: run_demo": 64,
    "fitting/write_queries.py: write_queries": 72,
    "retrieval/build_ann.py: build_ann": 67,
    "retrieval/encode.py: encode": 95,
}
"""What is still over the limit, with its present length. Lower an entry when the code becomes shorter; add none."""


def functions_of(node: ast.AST, owner: str = "") -> Iterator[tuple[str, int]]:
    """Functions and methods with their lines, without decorators and docstring."""
    for child in ast.iter_child_nodes(node):
        name = owner
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{owner}.{child.name}".lstrip(".")
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            first = child.body[0]
            has_docstring = ast.get_docstring(child, clean=False) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
            yield name, (child.end_lineno or 0) - child.lineno + 1 - docstring
        yield from functions_of(child, name)


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def test_no_file_is_long():
    lengths = {name: len(text.splitlines()) for name, text in sources()}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE} == LONG_FILES


def test_no_function_is_long():
    lengths = {f"{file}: {name}": length for file, text in sources() for name, length in functions_of(ast.parse(text))}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == LONG_FUNCTIONS


def test_a_docstring_is_no_code():
    text = (
        'class A:\n    async def f(self):\n        """One.\n\n        Two."""\n        def g():\n            return 1\n'
    )
    assert dict(functions_of(ast.parse(text))) == {"A.f": 3, "A.f.g": 2}
