"""Mutation score of a part of the library: of its small changes to the code, how many does a test notice?

    python scripts/mutation.py src/d2llm/ops --tests tests/ops [--mutants 60] [--seed 0] [--json FILE]

A copy of the working tree is changed, never the tree itself. The tests run once, to learn which of them execute which
line; then once a mutant, with the tests that execute its line. A mutant changes one place: a comparison, an arithmetic
or Boolean operator, a number, a condition, a value returned. Type annotations, defaults of settings and texts are left
alone. The score is the fraction of a random sample that makes a test fail or run over its time; a line that no test
executes counts as not noticed. A constant of a module is tried with the tests that execute anything of the module.

Packages exist (mutmut, cosmic-ray), but they run all tests for each mutant, or each test in a process of its own, which
loads PyTorch anew: minutes a mutant here, where a fork of a process that has loaded it takes seconds.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "/",
    ast.Mod: "*",
    ast.MatMult: "*",
}
MAX_TESTS = 40  # of those that execute a line
MAX_SECONDS = 180.0  # of the tests of one mutant


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: the characters `start` to `end` (byte offsets) of `path` become `text`."""

    path: str
    line: int
    start: int
    end: int
    text: str
    what: str


class MutantFinder(ast.NodeVisitor):
    """Collects the mutants of one module."""

    def __init__(self, path: Path, source: bytes) -> None:
        self.path, self.source, self.mutants = path, source, list[Mutant]()
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self.starts = starts

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.expr) -> str:
        start, end = self._span(node)
        return self.source[start:end].decode()

    def _add(self, node: ast.expr | ast.stmt, text: str, what: str) -> None:
        start, end = self._span(node)
        self.mutants.append(Mutant(str(self.path), node.lineno, start, end, text, what))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Its statements: no annotations, no defaults, no decorators."""
        for statement in node.body:
            self.visit(statement)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Its methods: the defaults of fields are settings."""
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Its value."""
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Left alone: most of it is the text of an error."""

    def visit_If(self, node: ast.If) -> None:
        """Its condition turned round."""
        if self._text(node.test) != "TYPE_CHECKING":
            self._add(node.test, f"(not ({self._text(node.test)}))", "condition turned round")
            self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        """None in place of the value."""
        if node.value is not None:
            if self._text(node.value) != "None":
                self._add(node.value, "None", "None returned")
            self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Another comparison."""
        if len(node.ops) == 1:
            left, right = self._text(node.left), self._text(node.comparators[0])
            self._add(node, f"({left} {COMPARISONS[type(node.ops[0])]} {right})", "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Another operator."""
        other = OPERATORS.get(type(node.op))
        if other is not None and not isinstance(node.left, ast.Constant | ast.JoinedStr):
            self._add(node, f"(({self._text(node.left)}) {other} ({self._text(node.right)}))", "arithmetic")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """And for or, or for and."""
        word = " or " if isinstance(node.op, ast.And) else " and "
        self._add(node, "(" + word.join(f"({self._text(value)})" for value in node.values) + ")", "and/or")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """The other truth value, or one more."""
        if isinstance(node.value, bool):
            self._add(node, str(not node.value), "truth value")
        elif isinstance(node.value, int | float):
            self._add(node, f"({node.value} + 1)", "number")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Left alone: texts."""


def mutants_of(folder: Path, root: Path) -> list[Mutant]:
    """All mutants of the modules below `folder`, in order."""
    found: list[Mutant] = []
    for path in sorted(folder.rglob("*.py")):
        finder = MutantFinder(path.relative_to(root), path.read_bytes())
        finder.visit(ast.parse(path.read_bytes()))
        found.extend(finder.mutants)
    return found


def tests_by_line(copy: Path, folder: str, tests: list[str]) -> dict[tuple[str, int], list[str]]:
    """Which tests (`file::function`) execute each line below `folder`, by one run of all `tests`."""
    settings = copy / "mutation.coveragerc"
    settings.write_text(f"[run]\ndynamic_context = test_function\nsource = {folder}\ndata_file = {copy}/.mutation\n")
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", "-q"]
    done = subprocess.run([*command, "-p", "no:cacheprovider", *tests], cwd=copy, env=environment(copy), check=False)
    if done.returncode != 0:
        raise SystemExit(f"the tests fail without a mutant (exit code {done.returncode}): nothing can be measured")
    from coverage import CoverageData

    data = CoverageData(str(copy / ".mutation"))
    data.read()
    files = {f"{path.relative_to(copy).with_suffix('')}".replace("/", "."): path for path in copy.glob("tests/**/*.py")}
    found: dict[tuple[str, int], list[str]] = {}
    for path in data.measured_files():
        lines = {
            line: {node for context in contexts if context and (node := node_of(context, files, copy))}
            for line, contexts in data.contexts_by_lineno(path).items()
        }
        whole = set[str]().union(*lines.values())  # a line that an import executed can change what any of them does
        for line, nodes in lines.items():
            found[str(Path(path).relative_to(copy)), line] = sorted(nodes or whole)
    return found


def node_of(context: str, files: dict[str, Path], copy: Path) -> str:
    """The test's id for pytest: `tests.ops.test_a.Test.test_b` -> `tests/ops/test_a.py::Test::test_b`."""
    parts = context.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        for module, path in files.items():
            if module == ".".join(parts[:cut]) or module.endswith("." + ".".join(parts[:cut])):
                return "::".join([str(path.relative_to(copy)), *parts[cut:]])
    return ""


def environment(copy: Path) -> dict[str, str]:
    """Variables with which the tests import the copy."""
    return os.environ | {"PYTHONPATH": f"{copy / 'src'}", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def is_noticed(mutant: Mutant, nodes: list[str], copy: Path) -> bool:
    """Whether one of these tests fails with the mutant, or runs over its time. In a fork, which has loaded PyTorch."""
    path = copy / mutant.path
    whole = path.read_bytes()
    path.write_bytes(whole[: mutant.start] + mutant.text.encode() + whole[mutant.end :])
    try:
        child = os.fork()
        if child == 0:
            os.setsid()
            run_tests(nodes, copy)
        started = time.monotonic()
        while True:
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                return os.waitstatus_to_exitcode(status) != 0
            if time.monotonic() - started > MAX_SECONDS:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True
            time.sleep(0.05)
    finally:
        path.write_bytes(whole)


def run_tests(nodes: list[str], copy: Path) -> None:
    """Of the child: the tests, from the copy; never returns."""
    import pytest

    os.chdir(copy)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    sys.path[:0] = [str(copy / "src"), str(copy)]
    try:
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *nodes]))
    except BaseException:  # noqa: BLE001 - an import that fails is a mutant that was noticed
        code = 1
    os._exit(code)


def copied_tree(root: Path, parent: str) -> Path:
    """A copy of the tracked files."""
    copy = Path(parent) / "tree"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    return copy


def results(given: argparse.Namespace, root: Path) -> Iterator[dict[str, Any]]:
    """Each mutant of the sample, and whether it was noticed."""
    with tempfile.TemporaryDirectory() as parent:
        copy = copied_tree(root, parent)
        everything = mutants_of(copy / given.folder, copy)
        sample = random.Random(given.seed).sample(everything, min(given.mutants, len(everything)))
        lines = tests_by_line(copy, given.folder, given.tests)
        os.environ.update(environment(copy))
        importlib.import_module("torch")  # once, for all forks

        for count, mutant in enumerate(sample, start=1):
            nodes = lines.get((mutant.path, mutant.line), [])
            random.Random(given.seed).shuffle(nodes)
            noticed = bool(nodes) and is_noticed(mutant, nodes[:MAX_TESTS], copy)
            word, location = "noticed" if noticed else "SURVIVED", f"{mutant.path}:{mutant.line}"
            print(f"{count:4} {word} {location} {mutant.what} ({len(nodes)} tests)", flush=True)
            yield asdict(mutant) | {"noticed": noticed, "tests": len(nodes), "of": len(everything)}


def main() -> None:
    """Measure, print, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="part of the library, such as src/d2llm/ops")
    parser.add_argument("--tests", nargs="+", required=True, help="the tests that are to notice")
    parser.add_argument("--mutants", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = list(results(given, Path(__file__).resolve().parent.parent))
    noticed = sum(bool(row["noticed"]) for row in rows)
    print(f"{given.folder}: {noticed} of {len(rows)} mutants were noticed ({noticed / len(rows):.0%})")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
