from __future__ import annotations

import ast
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from pathlib import Path

import pytest

import conftest
import d2llm
import d2llm.recipe
from d2llm.core.toml import read_toml

SOURCE = Path(d2llm.__file__).parent
PUBLIC = sorted(d2llm._HOME_OF)
FUNCTIONS = [name for name in PUBLIC if name.islower()]


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


def test_importing_d2llm_is_cheap():
    code = """
import sys
before = set(sys.modules)
import d2llm
import d2llm.recipe
print(*sorted(set(sys.modules) - before))
"""
    loaded = run_python(code).stdout.split()
    modules = {name.partition(".")[0] for name in loaded}
    assert "d2llm" in modules
    assert len(loaded) < 60  # a measure of import cost that does not depend on the machine's load
    assert not {"torch", "transformers", "pydantic", "rich", "typer", "numpy", "pyarrow"} & modules


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_imported(name: str):
    value = getattr(d2llm, name)
    if name != "Task":  # a Literal, which has no name of its own
        assert value.__name__ == name
        assert value.__module__.startswith("d2llm.")


PATHS = [
    (name, parameter.name, str(parameter.annotation))
    for name in [*FUNCTIONS, "Index", "Index.open", "Run", "Student.load", "Student.save"]
    for parameter in inspect.signature(attrgetter(name)(d2llm)).parameters.values()
    if "Path" in str(parameter.annotation)
]


@pytest.mark.parametrize(("name", "parameter", "annotation"), PATHS)
def test_a_path_may_be_given_as_a_string(name: str, parameter: str, annotation: str):
    assert "str" in annotation


@pytest.mark.parametrize("module", [d2llm, d2llm.recipe])
def test_help_is_one_page_while_completion_and_a_star_import_have_the_names(module):
    assert set(module._HOME_OF) <= set(dir(module))
    assert dir(module) == module.__all__
    assert len(pydoc.plain(pydoc.render_doc(module)).splitlines()) < 100


@pytest.mark.parametrize(("package", "names"), [("", PUBLIC), ("recipe", sorted(d2llm.recipe._HOME_OF))])
def test_public_names_are_those_for_type_checkers(package: str, names: list[str]):
    """The names imported under TYPE_CHECKING come from the same modules as in the lazy import."""
    tree = ast.parse((SOURCE / package / "__init__.py").read_text(encoding="utf-8"))
    type_checked = {
        alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(type_checked) == names
    assert type_checked == importlib.import_module(f"d2llm.{package}".rstrip("."))._HOME_OF


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_not_shadowed_by_their_modules(name: str):
    module = importlib.import_module(d2llm._HOME_OF[name])
    assert getattr(d2llm, name) is getattr(module, name)
    assert callable(getattr(d2llm, name))


def test_no_subpackage_has_a_public_name():
    """Importing a subpackage with the name of a public function would replace the function."""
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert len(folders) > 10
    assert not folders & set(d2llm._HOME_OF)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'d2llm' has no attribute 'serach'"):
        _ = d2llm.serach  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(d2llm, "torch")


def test_version_is_the_installed_version():
    from importlib.metadata import version

    assert version("d2llm") == d2llm.__version__


def declared_packages(*lines: str) -> set[str]:
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in lines}
    return declared | {IMPORTED_AS[name] for name in declared & IMPORTED_AS.keys()}


def test_every_imported_package_is_a_declared_dependency(repository: Path):
    project = read_toml(repository / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    declared = declared_packages(*requirements)
    imported = {package for path in SOURCE.rglob("*.py") for package in imported_packages(path)}
    assert imported - declared - set(sys.stdlib_module_names) - {"d2llm", "tomllib"} == INDIRECT & imported


def required_modules(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Modules that calls of ``require`` name, and the extras that they say have them."""
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        loops = {
            loop.target.id: [getattr(element, "value", None) for element in loop.iter.elts]
            for loop in ast.walk(function)
            if isinstance(loop, ast.For) and isinstance(loop.target, ast.Name) and isinstance(loop.iter, ast.Tuple)
        }
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            extras = [option.value for option in call.keywords if option.arg == "extra"]
            if extras and isinstance(extras[0], ast.Constant) and isinstance(extras[0].value, str) and call.args:
                module = call.args[0]
                named = loops.get(module.id, []) if isinstance(module, ast.Name) else [getattr(module, "value", None)]
                yield from ((name, extras[0].value) for name in named if isinstance(name, str))


def test_an_extra_has_what_its_message_says(repository: Path):
    """A message that says ``pip install 'd2llm[serve]'`` names a package that this installs."""
    extras = read_toml(repository / "pyproject.toml")["project"]["optional-dependencies"]
    checked = 0
    for path in SOURCE.rglob("*.py"):
        for module, extra in required_modules(ast.parse(path.read_text(encoding="utf-8"))):
            has = declared_packages(*extras[extra]) | INDIRECT | ({"datasets"} if extra == "mteb" else set())  # mteb's
            assert module.partition(".")[0] in has, (path, module, extra)
            checked += 1
    assert checked > 10


def test_tests_import_what_every_python_has(repository: Path):
    """A package that comes with another, or only from some Python on, is imported by ``pytest.importorskip``."""
    project = read_toml(repository / "pyproject.toml")["project"]
    lines = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    known = declared_packages(*(line for line in lines if "python_version" not in line)) | INDIRECT | {"d2llm"}
    known |= {path.stem for folder in ("tests", "benchmarks") for path in (repository / folder).iterdir()}
    known |= {*sys.stdlib_module_names, "_pytest", "pytrec_eval"}
    for path in (repository / "tests").rglob("*.py"):
        skips = re.findall(r"importorskip\(\"(\w+)", path.read_text(encoding="utf-8"))
        assert imported_packages(path, only_at_start=True) - known <= {*skips}, path


# Packages whose module name differs from the distribution name.
IMPORTED_AS = {
    "faiss_cpu": "faiss",
    "haystack_ai": "haystack",
    "llama_index_core": "llama_index",
    "markdown_it_py": "markdown_it",
    "pyyaml": "yaml",
}

# Dependencies of declared packages that come with every version we allow; "opentelemetry" is the namespace of
# packages that are declared one by one.
INDIRECT = {"huggingface_hub", "packaging", "tokenizers", "pydantic_core", "typing_extensions", "click", "starlette"}
INDIRECT |= {"opentelemetry", "anyio"}


def imported_packages(path: Path, *, only_at_start: bool = False) -> set[str]:
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if only_at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_docstrings_hold_whole_characters():
    """Python 3.13 encodes docstrings when it compiles a module, and fails at half of a surrogate pair."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                (ast.get_docstring(node) or "").encode()


def test_the_licence_is_the_standard_text(repository: Path):
    import hashlib

    text = (repository / "LICENSE").read_bytes()
    # SHA-256 of https://www.apache.org/licenses/LICENSE-2.0.txt
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["mine", "tune-teacher", "label", "distill", "run"])
def test_a_missing_recipe_is_an_error_before_torch_is_loaded(verb, tmp_path):
    code = (
        "import sys; from d2llm.cli.main import main; sys.argv = ['d2llm', sys.argv[1], sys.argv[2]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, verb, str(tmp_path / "none.toml")], capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == ["2", "False"], result.stderr


def test_the_files_that_conftest_names_exist():
    names = (*conftest.NUMERIC_FILES, *conftest.SLOW_FILES, *conftest.REST_FILES)
    assert [name for name in names if not conftest.file_of(name).is_file()] == []
