"""No module imports, for its work or for a type, what imports it; import-linter checks the layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src"
MODULES = {".".join(path.relative_to(SOURCES).with_suffix("").parts): path for path in SOURCES.rglob("*.py")}
ALLOWED = {
    ("d2llm.models.backbone", "d2llm.models.pretrained"),  # the base class opens a subclass, in a function
    ("d2llm.models.engines.engines", "d2llm.models.student_encoder"),  # the type of what is exported
}


def imported(tree: ast.AST, *, for_types: bool) -> Iterator[str]:
    """The modules that a module imports, wherever it does; ``for_types``: also those that only annotations name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif for_types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imported(node, for_types=for_types)


def imports_of(module: str, text: str) -> set[str]:
    """Its imports of other modules here. A section of a recipe may name types above it: its hooks get such objects."""
    found = imported(ast.parse(text), for_types=not module.startswith("d2llm.recipe."))
    return {name for name in found if name in MODULES and (module, name) not in ALLOWED}


def test_no_module_imports_what_imports_it():
    graph = {name: imports_of(name, path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
    for module, name in ALLOWED:
        with pytest.raises(CycleError):
            TopologicalSorter(graph | {module: graph[module] | {name}}).prepare()


@pytest.mark.parametrize(
    "text",
    [
        "from d2llm.core.errors import InputError",
        "import d2llm.core.errors",
        "from d2llm.core import errors",
        "def f():\n    from d2llm.core.errors import InputError",
        "if TYPE_CHECKING:\n    from d2llm.core.errors import InputError",
    ],
)
def test_what_counts_as_an_import(text: str):
    assert imports_of("d2llm.data.beir", text) == {"d2llm.core.errors"}
    assert imports_of("d2llm.recipe.losses", text) == (set() if text.startswith("if") else {"d2llm.core.errors"})
