"""No file of the package has over 600 lines, and no function over 60."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "d2llm"
MAX_FILE, MAX_FUNCTION = 600, 60


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
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE}


def test_no_function_is_long():
    lengths = {f"{file}: {name}": length for file, text in sources() for name, length in functions_of(ast.parse(text))}
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION}


def test_a_docstring_is_no_code():
    text = (
        'class A:\n    async def f(self):\n        """One.\n\n        Two."""\n        def g():\n            return 1\n'
    )
    assert dict(functions_of(ast.parse(text))) == {"A.f": 3, "A.f.g": 2}
