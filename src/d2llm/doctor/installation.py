"""Checks of the installation: Python, the packages and their versions, the extras."""

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

# These contain shared libraries, which can fail to load even if pip reports no problem.
_HEAVY = ("numpy", "torch", "transformers", "pyarrow", "faiss", "safetensors")
_NOT_FOR_USERS = {"dev", "remote-test"}
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")


def install_checks() -> list[Check]:
    """Checks of Python, of required packages and extras, and of whether the heavy packages can be imported."""
    return [
        Check("install", "Python", _python),
        Check("install", "packages", _packages),
        Check("install", "extras", _extras),
        Check("install", "import", _imports),
    ]


def _requirements() -> list[Requirement]:
    """What d2llm requires; empty if it runs from a folder and is not installed."""
    try:
        return [Requirement(line) for line in metadata.requires("d2llm") or []]
    except metadata.PackageNotFoundError:
        return []


def _imports() -> Iterator[Finding]:
    for module in _HEAVY:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - a broken library may raise anything
            package = "faiss-cpu" if module == "faiss" else module
            advice = f"pip install --force-reinstall {package}"
            yield Finding("install", "import", "problem", f"{module} cannot be imported ({error})", advice)


def _python() -> Finding:
    python = f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}"
    try:
        required = str(metadata.metadata("d2llm").json.get("requires_python", ""))
    except metadata.PackageNotFoundError:
        required = ""
    if not SpecifierSet(required).contains(platform.python_version(), prereleases=True):
        return Finding(
            "install", "Python", "problem", f"{python}; d2llm needs {required}", "use such a version of Python"
        )
    if struct.calcsize("P") != 8:
        return Finding("install", "Python", "problem", f"{python}, 32-bit", "use a 64-bit Python")
    return Finding("install", "Python", "ok", python)


def _packages() -> Iterator[Finding]:
    requirements = _requirements()
    if not requirements:
        advice = "run pip install . in the checkout, so that versions can be checked"
        yield Finding("install", "packages", "note", "d2llm runs from a folder and is not installed", advice)
    required = [r for r in requirements if not _extra_of(r) and (r.marker is None or r.marker.evaluate())]
    wrong = {requirement: problem for requirement in required if (problem := _mismatch(requirement))}
    for requirement, problem in wrong.items():
        advice = f"pip install '{requirement.name}{requirement.specifier}'"
        yield Finding("install", requirement.name, "problem", problem, advice)
    if required and not wrong:
        torch = metadata.version("torch")
        yield Finding("install", "packages", "ok", f"{len(required)} in the required versions, including torch {torch}")


def _mismatch(requirement: Requirement) -> str | None:
    """What is wrong with a package, or None."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"is {version}, but d2llm needs {requirement.specifier}"


def _extras() -> Iterator[Finding]:
    by_extra: dict[str, list[Requirement]] = defaultdict(list)
    for requirement in _requirements():
        extra = _extra_of(requirement)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if extra and extra not in _NOT_FOR_USERS and requirement.name != "d2llm" and applies:
            by_extra[extra].append(requirement)
    mismatches = {
        extra: [f"{r.name} {problem}" for r in requirements if (problem := _mismatch(r))]
        for extra, requirements in by_extra.items()
    }
    if complete := sorted(extra for extra, problems in mismatches.items() if not problems):
        yield Finding("install", "extras", "ok", ", ".join(complete))
    for extra, problems in sorted(mismatches.items()):
        if problems:
            advice = f"if you need it: pip install 'd2llm[{extra}]'"
            yield Finding("install", f"extra {extra}", "note", ", ".join(problems), advice)


def _extra_of(requirement: Requirement) -> str:
    match = _EXTRA.search(str(requirement.marker or ""))
    return match[1] if match else ""
