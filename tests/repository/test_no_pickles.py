"""No code of d2llm loads what could run code: pickles, marshalled code, texts that are evaluated."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "d2llm"
MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
CALLS = {"eval", "exec", "torch.load", "torch.jit.load", "yaml.load", "pd.read_pickle", "pandas.read_pickle"}
ALLOWED = {"runners/ray_runner.py": 1}
"""Uses per file: a function for Ray's workers of the same program, which Ray itself sends as pickles."""


def loads_of_code(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                full = [f"{module}.{alias.name}" for alias in names]
                yield from (name for name in full if module.split(".")[0] in MODULES or name in CALLS)
            case ast.Call(func=function, keywords=keywords):
                name = ast.unparse(function)
                if name in CALLS or (name.endswith(".loads") and name.split(".")[-2] in MODULES):
                    yield name
                for word in keywords:
                    is_refused = isinstance(word.value, ast.Constant) and word.value.value is False
                    if word.arg == "allow_pickle" and not is_refused:
                        yield "allow_pickle"
            case _:
                pass


def test_nothing_that_could_run_code_is_loaded():
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if names := list(loads_of_code(ast.parse(path.read_text(encoding="utf-8")))):
            found[path.relative_to(PACKAGE).as_posix()] = names
    assert {file: len(names) for file, names in found.items()} == ALLOWED, found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "ray.cloudpickle.loads(data)",
        "eval(text)",
    ],
)
def test_what_counts_as_loading_code(code: str):
    assert list(loads_of_code(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["model.eval()", "np.load(path)", "np.load(path, allow_pickle=False)", "json.loads(text)"]
)
def test_what_does_not(code: str):
    assert not list(loads_of_code(ast.parse(code)))
