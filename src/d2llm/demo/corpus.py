"""The demo's corpus: the docstrings of the installed Python standard library.

Python sources are parsed, not run; only modules written in C (builtins, ``time``, ``itertools``, ...) are imported,
from a short list without side effects.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import inspect
import platform
import re
import sys
import sysconfig
import types
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.types import Passage

MAX_WORDS = 120
"""Longer docstrings are split into several passages, between paragraphs if possible."""
MIN_WORDS = 4
"""Shorter docstrings ("See base class.") are left out."""
MIN_PASSAGES = 3_000
MAX_TITLE = 120

# Tests, programs, and tables without documentation.
_SKIPPED = {"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "this", "turtledemo"}
_SKIPPED_PACKAGES = {"encodings"}  # only the package itself is documented, not its hundred tables

_WITH_C_PARTS = (
    *("builtins", "array", "atexit", "binascii", "bz2", "cmath", "codecs", "collections", "contextvars", "csv"),
    *("datetime", "decimal", "errno", "faulthandler", "fcntl", "functools", "gc", "grp", "hashlib", "io", "itertools"),
    *("lzma", "marshal", "math", "mmap", "operator", "os", "pickle", "pwd", "queue", "random", "re", "resource"),
    *("select", "signal", "socket", "sqlite3", "struct", "sys", "syslog", "termios", "threading", "time", "types"),
    *("unicodedata", "weakref", "xml.parsers.expat", "zlib", "zoneinfo"),
)
_C_FUNCTIONS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.ClassMethodDescriptorType)
_C_VALUES = (types.GetSetDescriptorType, types.MemberDescriptorType)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The passages and their counts.

    ``num_documented``: modules, classes, functions and properties whose docstrings are in the passages.
    ``num_tiny`` and ``num_duplicates``: docstrings left out.
    """

    passages: tuple[Passage, ...]
    python: str
    num_modules: int
    num_documented: int
    num_tiny: int
    num_duplicates: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One docstring; ``signature`` is the qualified name, with parameters if it is callable."""

    name: str
    signature: str
    docstring: str


def build_corpus(stdlib: Path | None = None) -> Corpus:
    """Collect the docstrings of the standard library, ordered by name.

    Args:
        stdlib: the folder with the sources; by default that of the running Python.

    Returns:
        Passages whose id is the qualified name ("sched.scheduler.enter"; builtins without a module) and whose title is
        the qualified name with its parameters. The ids of later pieces of long docstrings end in "#2", "#3", ...

    Raises:
        InputError: this Python was installed without its sources, so there are too few passages.
    """
    folder = stdlib or Path(sysconfig.get_path("stdlib"))
    entries: dict[str, _Entry] = {}
    modules = list(_find_modules(folder))
    for module, path in modules:
        for entry in _read_module(module, path, folder):
            entries.setdefault(entry.name, entry)
    for entry in _read_c_parts():
        entries.setdefault(entry.name, entry)
    corpus = _to_passages([entries[name] for name in sorted(entries)], num_modules=len(modules))
    if stdlib is None and len(corpus.passages) < MIN_PASSAGES:
        raise InputError(
            f"{folder}: only {len(corpus.passages):,} docstrings were found, because this Python was installed without "
            "the sources of its standard library; run the demo with a Python that has them"
        )
    return corpus


def _to_passages(entries: Iterable[_Entry], *, num_modules: int) -> Corpus:
    passages: list[Passage] = []
    known: set[tuple[str, str]] = set()
    num_documented = num_tiny = num_duplicates = 0
    for entry in entries:
        # A lone surrogate in a docstring is legal Python, but cannot be written to a file.
        text = inspect.cleandoc(entry.docstring).encode("utf-8", "replace").decode()
        # The same text under the same last name is a duplicate; under another one ("Return the name.") it is not.
        key = (entry.name.rpartition(".")[2], text)
        if len(text.split()) < MIN_WORDS:
            num_tiny += 1
        elif key in known:
            num_duplicates += 1
        else:
            known.add(key)
            num_documented += 1
            for piece_number, piece in enumerate(cut(text), start=1):
                passage_id = entry.name if piece_number == 1 else f"{entry.name}#{piece_number}"
                passages.append(Passage(passage_id, piece, entry.signature))
    return Corpus(
        passages=tuple(passages),
        python=platform.python_version(),
        num_modules=num_modules,
        num_documented=num_documented,
        num_tiny=num_tiny,
        num_duplicates=num_duplicates,
    )


def group_of(passage_id: str) -> str:
    """The name of the package, module or builtin: "sched" for "sched.scheduler.enter#2"."""
    return passage_id.partition("#")[0].partition(".")[0]


def choose_groups(passages: Iterable[Passage], num_passages: int, needed: Collection[str]) -> set[str]:
    """Groups with at least ``num_passages`` passages in total: those of ``needed``, then others in a random order.

    The order depends only on the names, so a smaller number gives a subset of the groups of a larger one.
    """
    sizes = Counter(group_of(passage.id) for passage in passages)
    chosen = sizes.keys() & set(needed)
    num_chosen = sum(sizes[group] for group in chosen)
    for group in sorted(sizes.keys() - chosen, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if num_chosen >= num_passages:
            break
        chosen.add(group)
        num_chosen += sizes[group]
    return chosen


def cut(text: str, max_words: int = MAX_WORDS) -> list[str]:
    """Split a text into pieces of at most ``max_words`` words, between paragraphs, else between lines, else words.

    Nothing is lost or repeated: the words of the pieces in order are the words of the text.
    """
    pieces: list[str] = []
    room = 0
    for paragraph in re.split(r"\n\s*\n", text):
        separator = "\n\n"
        paragraphs = [paragraph] if len(paragraph.split()) <= max_words else _lines(paragraph, max_words)
        for part in paragraphs:
            num_words = len(part.split())
            if pieces and num_words <= room:
                pieces[-1] += separator + part
            else:
                pieces.append(part)
                room = max_words
            room -= num_words
            separator = "\n"
    return pieces


def _lines(paragraph: str, max_words: int) -> Iterator[str]:
    for line in paragraph.splitlines():
        words = line.split()
        if len(words) <= max_words:
            yield line
        else:
            yield from (" ".join(words[start : start + max_words]) for start in range(0, len(words), max_words))


def _find_modules(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """Public modules with Python sources, as (name, path), sorted by name."""
    if (stdlib / "_collections_abc.py").is_file():
        yield "collections.abc", stdlib / "_collections_abc.py"  # its only source since Python 3.13
    for top in sorted(sys.stdlib_module_names - _SKIPPED):
        if top.startswith("_"):
            continue
        if (stdlib / f"{top}.py").is_file():
            yield top, stdlib / f"{top}.py"
        elif (stdlib / top / "__init__.py").is_file():
            paths = [stdlib / top / "__init__.py"] if top in _SKIPPED_PACKAGES else sorted((stdlib / top).rglob("*.py"))
            for path in paths:
                names = path.relative_to(stdlib).with_suffix("").parts
                names = names[:-1] if names[-1] == "__init__" else names
                hidden = any(part.startswith("_") or part in _SKIPPED for part in names)
                if not hidden and names != ("collections", "abc"):
                    yield ".".join(names), path


def _read_module(module: str, path: Path, stdlib: Path) -> Iterator[_Entry]:
    """The docstrings of a module, and of what it exports from a private module (``from ._local import *``)."""
    tree = _parse(path)
    if docstring := ast.get_docstring(tree, clean=False):
        yield _Entry(module, f"module {module}", docstring)
    yield from _read_body(module, tree.body)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    exports = _static_all(tree)
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom) and (home := _private_source(node, package, stdlib)):
            imported = {alias.name for alias in node.names}
            names = None if "*" in imported else imported & exports
            yield from _read_body(module, _parse(home).body, only=names)


def _private_source(node: ast.ImportFrom, package: str, stdlib: Path) -> Path | None:
    """The source of the module that a ``from ... import`` reads, if the module is private and has sources."""
    name = node.module or ""
    if node.level:
        parents = package.split(".")
        name = ".".join([*parents[: len(parents) - node.level + 1], name])
    if not name.rpartition(".")[2].startswith("_"):
        return None
    stem = stdlib.joinpath(*name.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn about escapes in old modules
        return ast.parse(path.read_bytes())


def _static_all(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            is_all = any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
            if is_all and isinstance(node.value, ast.List | ast.Tuple):
                names |= {str(item.value) for item in node.value.elts if isinstance(item, ast.Constant)}
    return names


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, also those under ``if`` and ``try``."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            for handler in node.handlers if isinstance(node, ast.Try) else ():
                yield from _statements(handler.body)
            yield from _statements(node.orelse)


def _read_body(parent: str, body: Sequence[ast.stmt], *, only: set[str] | None = None) -> Iterator[_Entry]:
    """Public classes and functions, with the members of classes. ``only`` restricts the outermost names."""
    for node in _statements(body):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") or (only is not None and node.name not in only):
            continue
        name = f"{parent}.{node.name}"
        if docstring := ast.get_docstring(node, clean=False):
            yield _Entry(name, _shorten(name, _parameters(node)), docstring)
        if isinstance(node, ast.ClassDef):
            yield from _read_body(name, node.body)


def _parameters(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The parameters without annotations and without ``self``; None if the object is not callable."""
    if isinstance(node, ast.ClassDef):
        for member in _statements(node.body):
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return _parameters(member)
        return ""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if decorators & {"property", "functools.cached_property", "cached_property"}:
        return None
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    for argument in (arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    return re.sub(r"^(self|cls)(, /)?(, |$)", "", ast.unparse(arguments))


def _shorten(name: str, parameters: str | None) -> str:
    """The name with its parameters, which are shortened if the title gets too long."""
    if parameters is None:
        return name
    title = f"{name}({parameters})"
    if len(title) <= MAX_TITLE:
        return title
    kept = parameters[: max(0, MAX_TITLE - len(name) - len("(, ...)"))].rpartition(", ")[0]
    return f"{name}({kept}, ...)" if kept else f"{name}(...)"


def _read_c_parts() -> Iterator[_Entry]:
    described: set[int] = set()
    for module_name in _WITH_C_PARTS:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # not available on this system or in this build of Python
            continue
        prefix = "" if module is builtins else f"{module_name}."
        if isinstance(module.__doc__, str) and not getattr(module, "__file__", None):
            yield _Entry(module_name, f"module {module_name}", module.__doc__)
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            value = getattr(module, name, None)
            if name.endswith("hook"):  # sys.excepthook may have been replaced; sys.__excepthook__ is the original
                value = getattr(module, f"__{name}__", value)
            if name.startswith("_") or id(value) in described:
                continue
            if isinstance(value, types.BuiltinFunctionType) or (isinstance(value, type) and _is_c_type(value)):
                described.add(id(value))
                yield from _describe(f"{prefix}{name}", value)


def _is_c_type(value: type) -> bool:
    return not any(isinstance(member, types.FunctionType) for member in vars(value).values())


def _describe(name: str, value: Any) -> Iterator[_Entry]:
    docstring = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    if isinstance(docstring, str):
        yield _Entry(name, _shorten(name, _call_parameters(value)), docstring)
    if isinstance(value, type):
        for member_name, member in sorted(vars(value).items()):
            function = member.__func__ if isinstance(member, staticmethod) else member
            if member_name.startswith("_") or not isinstance(function, _C_FUNCTIONS + _C_VALUES):
                continue
            if isinstance(function.__doc__, str):
                parameters = None if isinstance(function, _C_VALUES) else _call_parameters(function)
                yield _Entry(f"{name}.{member_name}", _shorten(f"{name}.{member_name}", parameters), function.__doc__)


def _call_parameters(value: Any) -> str:
    # Not inspect.signature: it evaluates the defaults, which fails for some functions in C.
    parameters = getattr(value, "__text_signature__", None) or "(...)"
    return re.sub(r"^\$\w+(, /)?(, |$)", "", parameters[1:-1])
