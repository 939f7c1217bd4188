"""The tests run on the oldest Python that pyproject.toml allows; pyright sees to the rest of the repository."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

OLDEST = (3, 10)
NEWER = {
    "": {"annotationlib", "compression", "tomllib"},
    "asyncio": {"Runner", "TaskGroup", "timeout", "timeout_at"},
    "builtins": {"BaseExceptionGroup", "ExceptionGroup"},
    "contextlib": {"chdir"},
    "copy": {"replace"},
    "datetime": {"UTC"},
    "enum": {"ReprEnum", "StrEnum", "member", "nonmember", "verify"},
    "hashlib": {"file_digest"},
    "http": {"HTTPMethod"},
    "inspect": {"getmembers_static"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "fma", "sumprod"},
    "operator": {"call"},
    "os": {"process_cpu_count"},
    "typing": {"LiteralString", "Never", "NotRequired", "ReadOnly", "Required", "Self", "TypeAliasType", "TypeVarTuple"}
    | {"TypeIs", "Unpack", "assert_never", "assert_type", "override", "reveal_type"},
    "warnings": {"deprecated"},
}
"""What modules of the standard library have since 3.11 or later, as far as tests may want it."""


def newer(tree: ast.Module) -> Iterator[str]:
    """What Python 3.10 lacks of a file: names of the standard library, and inner comprehensions that wait."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(imported):
                module, names = "", [name.name for name in imported]
            case ast.ImportFrom(module, imported, 0):
                names = [name.name for name in imported]
                yield from {module} & NEWER[""]
            case ast.Attribute(ast.Name(module), name):
                names = [name]
            case ast.Name(name):
                module, names = "builtins", [name]
            case ast.ListComp(ast.ListComp() | ast.SetComp() | ast.DictComp() as inner):
                yield from {"await in an inner comprehension" for x in ast.walk(inner) if isinstance(x, ast.Await)}
                continue
            case _:
                continue
        yield from NEWER.get(str(module), set()).intersection(names)


def test_the_tests_need_no_newer_python(repository: Path):
    files = {path: path.read_text(encoding="utf-8") for path in (repository / "tests").rglob("*.py")}
    trees = {path: ast.parse(text, feature_version=OLDEST) for path, text in files.items()}
    assert {str(path): found for path, tree in trees.items() if (found := [*newer(tree)])} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import tomllib",
        "from typing import Any, Self",
        "datetime.UTC",
        "raise ExceptionGroup('', [])",
        "async def f():\n    return [[await x for x in y] for y in z]",
    ],
)
def test_what_is_newer_is_found(text: str):
    assert [*newer(ast.parse(text))]
