"""What ``d2llm doctor`` says of the installation: Python, the packages and their versions, the extras."""

from __future__ import annotations

import importlib
import platform
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from d2llm.doctor.findings import Check, Finding

# Those that bring libraries of their own, which can fail to load though pip says all is well.
_HEAVY = ("numpy", "torch", "transformers", "pyarrow", "lancedb", "faiss", "safetensors")
_NOT_FOR_USERS = {"dev", "remote-test"}
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")


def install_checks() -> list[Check]:
    """Python, each package that must be there, each extra, and whether the heavy packages can be imported."""
    return [
        Check("install", "Python", _python),
        Check("install", "packages", _packages),
        Check("install", "extras", _extras),
        Check("install", "import", _imports),
    ]


def _requirements() -> list[Requirement]:
    """What d2llm asks for; empty where it runs from a folder and is not installed."""
    try:
        return [Requirement(line) for line in metadata.requires("d2llm") or []]
    except metadata.PackageNotFoundError:
        return []


def _imports() -> Iterator[Finding]:
    for module in _HEAVY:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - a broken library raises what it likes
            advice = f"pip install --force-reinstall {_package_of(module)}"
            yield Finding("install", "import", "problem", f"{module} cannot be imported ({error})", advice)


def _python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}"
    try:
        wanted = str(metadata.metadata("d2llm").json.get("requires_python", ""))
    except metadata.PackageNotFoundError:
        wanted = ""
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Finding("install", "Python", "problem", f"{found}; d2llm needs {wanted}", "use a Python of that version")
    if struct.calcsize("P") != 8:
        return Finding("install", "Python", "problem", f"{found}, 32 bits", "use a Python of 64 bits")
    return Finding("install", "Python", "ok", found)


def _packages() -> Iterator[Finding]:
    requirements = _requirements()
    if not requirements:
        advice = "pip install . in the checkout, so that versions can be compared"
        yield Finding("install", "packages", "note", "d2llm runs from a folder and is not installed", advice)
    wanted = [r for r in requirements if not _extra_of(r) and (r.marker is None or r.marker.evaluate())]
    wrong = [finding for finding in map(_package, wanted) if finding is not None]
    yield from wrong
    if wanted and not wrong:
        torch = metadata.version("torch")
        yield Finding("install", "packages", "ok", f"{len(wanted)} as d2llm wants them, torch {torch} among them")


def _package(requirement: Requirement) -> Finding | None:
    problem = _mismatch(requirement)
    if problem is None:
        return None
    advice = f"pip install '{requirement.name}{requirement.specifier}'"
    return Finding("install", requirement.name, "problem", problem, advice)


def _mismatch(requirement: Requirement) -> str | None:
    """What is wrong with an installed package, or None."""
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "is not installed"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"is {found}, but d2llm needs {requirement.specifier}"


def _extras() -> Iterator[Finding]:
    by_extra: dict[str, list[Requirement]] = defaultdict(list)
    for requirement in _requirements():
        extra = _extra_of(requirement)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if extra and extra not in _NOT_FOR_USERS and requirement.name != "d2llm" and applies:
            by_extra[extra].append(requirement)
    wrong = {extra: [(r.name, p) for r in of_it if (p := _mismatch(r))] for extra, of_it in by_extra.items()}
    if there := [extra for extra, problems in wrong.items() if not problems]:
        yield Finding("install", "extras", "ok", ", ".join(sorted(there)))
    for extra, problems in sorted(wrong.items()):
        if problems:
            found = ", ".join(f"{name} {problem}" for name, problem in problems)
            yield Finding("install", f"extra {extra}", "note", found, f"if you want it: pip install 'd2llm[{extra}]'")


def _extra_of(requirement: Requirement) -> str:
    found = _EXTRA.search(str(requirement.marker or ""))
    return found[1] if found else ""


def _package_of(module: str) -> str:
    return {"faiss": "faiss-cpu"}.get(module, module)
