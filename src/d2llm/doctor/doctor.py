"""The sequence of checks of ``d2llm doctor``: installation, folders, network, student and index."""

from __future__ import annotations

import importlib
import math
import platform
import re
import shutil
import struct
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from platformdirs import user_cache_path

from d2llm.core.errors import D2LLMError
from d2llm.core.names import counted
from d2llm.doctor.findings import Check, Finding, finding_of

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


_GIB = 1 << 30
_FEW_BYTES = 2 * _GIB
_HUB_SECONDS = 3.0
_TEXTS = ("Iterating over an open file gives its lines.", "Sockets send bytes over a network.")
_QUESTION = "how do I read a file line by line?"


def examine(
    *, student: str, index: Path | None = None, device: str | None = None, warm: bool = False
) -> Iterator[Finding]:
    """Run all checks and yield their findings.

    Args:
        student: a folder or name; it is loaded and scores two sentences.
        index: a folder; it is opened and searched with its own student.
        device: where the student computes.
        warm: compile all loops, and export the student's graph, now.
    """
    usable = True
    for check in install_checks():
        for finding in check.findings():
            usable = usable and not (finding.subject == "import" and finding.level == "problem")
            yield finding
    if not usable:
        return  # everything below needs these packages
    checks = [
        *_machine_checks(device, warm=warm),
        Check("places", "cache folder", lambda: _writable("cache folder", user_cache_path("d2llm"))),
        Check("places", "cache of the Hub", _hub_cache),
        Check("places", "Hugging Face Hub", _hub),
        Check("student", student, lambda: _check_student(student, device, warm=warm)),
    ]
    if index is not None:
        checks.append(Check("index", str(index), lambda: _check_index(index, device)))
    for check in checks:
        yield from check.findings()


def _machine_checks(device: str | None, *, warm: bool) -> list[Check]:
    try:  # imported here, because it imports torch and faiss
        from d2llm.doctor.machine import loops_check, machine_checks
    except Exception as error:  # noqa: BLE001 - a broken library may raise anything
        reason = f"{type(error).__name__}: {error}"
        finding = Finding("device", "import", "problem", reason, "install d2llm again, in a new environment")
        return [Check("device", "import", lambda: finding)]
    return [*machine_checks(device), *([loops_check()] if warm else [])]


def _hub_cache() -> Finding:
    from huggingface_hub import constants

    return _writable("cache of the Hub", Path(constants.HF_HUB_CACHE))


def _writable(name: str, folder: Path) -> Finding:
    advice = (
        "set HF_HOME to a writable folder"
        if "Hub" in name
        else "set XDG_CACHE_HOME to a writable folder, or change the permissions"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("places", name, "problem", f"{folder} is not writable ({error.strerror})", advice)
    if free < _FEW_BYTES:
        return Finding(
            "places", name, "note", f"{folder}, {free / _GIB:.1f} GiB free", "free disk space before indexing"
        )
    return Finding("places", name, "ok", f"{folder}, {free / _GIB:.0f} GiB free")


def _hub() -> Finding:
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
    from huggingface_hub.utils import get_session

    if is_offline_mode():
        advice = "unset it to download models from the Hub by name"
        return Finding("places", "Hugging Face Hub", "note", "not checked: HF_HUB_OFFLINE is set", advice)
    try:
        status = get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS).status_code
    except (HTTPError, OSError) as error:
        advice = "shipped students need no network; for others set a proxy (HTTPS_PROXY) or HF_HUB_OFFLINE=1"
        failure = f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__})"
        return Finding("places", "Hugging Face Hub", "note", failure, advice)
    return Finding("places", "Hugging Face Hub", "ok", f"{constants.ENDPOINT} answers ({status})")


def _check_student(name: str, device: str | None, *, warm: bool) -> Iterator[Finding]:
    from d2llm.models.engines.engines import prepared_engine
    from d2llm.models.hub import find_student
    from d2llm.models.student import Student
    from d2llm.models.student_files import check_content

    try:
        folder = find_student(name)
        check_content(folder)
        yield Finding("student", "weights", "ok", f"{folder}, matching its manifest")
        engine = "auto" if warm else prepared_engine("auto", folder, device=device)
        student = Student.load(folder, device=device, engine=engine)
        base, dtype = student.backbone.location, str(student.compute_dtype).removeprefix("torch.")
        yield Finding("student", "backbone", "ok", f"{base}, {student.vector_dim} wide, in {dtype}")
        yield Finding("student", "engine", "ok", f"{student.engine} reads texts")
        calibrated = ", ".join(sorted(student.calibration.tasks)) or "no task: scores only rank passages"
        yield Finding("student", "probabilities", "ok", f"calibrated for {calibrated}")
        started = time.perf_counter()
        query = student.encode_queries([_QUESTION]).vectors[0]
        passages = student.encode_passages(_TEXTS).vectors
        scores = [float(score) for score in student.score(query, passages, "asymmetric")]
        seconds = time.perf_counter() - started
    except D2LLMError as error:
        yield finding_of("student", name, error, otherwise="restore the student's folder, or name another student")
        return
    if not all(map(math.isfinite, scores)):
        advice = "try --dtype float32; if that does not help, restore the student's folder"
        yield Finding("student", "scores", "problem", f"not finite: {scores}", advice)
        return
    shown = ", ".join(f"{score:.2f}" for score in scores)
    yield Finding("student", "scores", "ok", f"{shown} for two sentences, in {1000 * seconds:.0f} ms")


def _check_index(folder: Path, device: str | None) -> Iterator[Finding]:
    from d2llm import __version__
    from d2llm.retrieval.index import Index

    try:
        index = Index.open(folder, device=device)
        stats = index.stats()
        made_with = index.storage.manifest.get("packages", {}).get("d2llm", "?")
        made = f"made with d2llm {made_with} (this: {__version__})"
        passages = counted(stats.num_passages, "passage")
        yield Finding("index", "contents", "ok", f"{passages} at version {stats.version}, {made}")
        yield Finding("index", "student", "ok", f"{index.student.fingerprint} is available and made this index")
        if stats.num_passages:
            passages = index.search(_QUESTION, top_k=1).passages
            score = passages[0].score if passages else math.nan
            level = "ok" if math.isfinite(score) else "problem"
            advice = "" if level == "ok" else f"d2llm index {folder} verify --repair"
            yield Finding(
                "index", "search", level, f"the best passage for a test question has the score {score:.2f}", advice
            )
        advice = f"d2llm index {folder} verify"
        yield Finding("index", "every byte", "note", "not read, because that takes longer", advice)
    except D2LLMError as error:
        yield finding_of("index", str(folder), error, otherwise="restore it from a copy, or index the corpus again")
