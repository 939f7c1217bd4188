"""What a code host reads: workflows, forms for issues, the citation; and the licences of what is installed."""

from __future__ import annotations

import ast
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import d2llm
from repository_scripts import load_script


def read_yaml(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def needs_arguments(program: str) -> bool:
    """Whether a script's parser has an argument that must be given; that of ``run_parser`` has two."""
    for call in ast.walk(ast.parse(program)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "run_parser":
            return True
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".add_argument"):
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            positional = not ast.literal_eval(call.args[0]).startswith("-") and options.get("nargs", "'+'") == "'+'"
            if positional or options.get("required") == "True":
                return True
    return False


def test_make_bench_leaves_out_what_needs_arguments(repository: Path):
    makefile = (repository / "Makefile").read_text()
    [left_out] = re.findall(r"^WITH_ARGUMENTS := ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    scripts = (repository / "benchmarks").glob("*.py")
    assert {path.stem for path in scripts if needs_arguments(path.read_text())} == set(left_out.split()) - {"\\"}


def test_workflows_run_what_there_is(repository: Path):
    makefile = (repository / "Makefile").read_text()
    workflows = {path.stem: read_yaml(path) for path in (repository / ".github" / "workflows").glob("*.yml")}
    assert {"tests", "release"} <= workflows.keys()
    for content in workflows.values():
        assert content["permissions"] == {"contents": "read"}  # a job that needs more says so
        for job in content["jobs"].values():
            commands = "\n".join(step.get("run", "") for step in job["steps"])
            for target in re.findall(r"\bmake ([a-z][a-z-]*)", commands):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
            for name in re.findall(r"(?<=-e )packages/[\w-]+", commands):
                assert (repository / name / "pyproject.toml").is_file()
    versions = workflows["release"]["jobs"]["install"]["strategy"]["matrix"]["python"]
    project = (repository / "pyproject.toml").read_text()
    assert versions == re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    assert f'requires-python = ">={versions[0]}"' in project
    jobs = workflows["tests"]["jobs"]
    one = jobs["all"]["steps"][1]["with"]["python-version"]
    assert sorted([one, *jobs["versions"]["strategy"]["matrix"]["python"]]) == versions
    assert jobs["docs"]["steps"][-1]["run"] == "make docs"
    assert re.search(r"^strict: true$", (repository / "mkdocs.yml").read_text(), re.MULTILINE)  # links are checked
    audit = jobs["audit"]["steps"][-1]["run"]
    assert "pip-audit --requirement constraints.txt" in audit
    assert audit.count("--ignore-vuln") == 1  # a second one has its reason in SECURITY.md, too


def test_a_release_is_audited_and_has_a_list_of_what_is_in_it(repository: Path):
    workflows = repository / ".github" / "workflows"
    jobs = read_yaml(workflows / "release.yml")["jobs"]
    steps = jobs["build"]["steps"]
    commands = [step.get("run", "") for step in steps]
    assert read_yaml(workflows / "tests.yml")["jobs"]["audit"]["steps"][-1]["run"] in commands
    (listing,) = [command for command in commands if "cyclonedx-py requirements constraints.txt" in command]
    assert listing.endswith("-o sbom.json")
    assert "sbom.json" in [step.get("with", {}).get("path") for step in steps]
    assert (jobs["install"]["needs"], jobs["publish"]["needs"]) == ("build", "install")  # so a fault stops the release


def test_forms_for_issues_have_what_the_host_requires(repository: Path):
    forms = [read_yaml(path) for path in (repository / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    assert len(forms) >= 2
    for form in forms:
        assert form["name"]
        assert form["description"]
        assert all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_is_of_this_version(repository: Path):
    citation = read_yaml(repository / "CITATION.cff")
    assert citation["version"] == d2llm.__version__
    assert citation["preferred-citation"]["year"] == 2024


def test_every_pinned_package_has_a_licence_that_is_permissive_or_explained(repository, monkeypatch):
    licences = load_script("licences")
    listed = dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", licences.PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    listed = {name: licence for name, licence in listed.items() if name not in {"package", "---"}}
    assert list(listed) == licences.pinned((repository / "constraints.txt").read_text())
    assert {name: listed[name] for name in licences.COPYLEFT} == licences.COPYLEFT
    monkeypatch.setattr(licences, "COPYLEFT", {})
    monkeypatch.setattr(licences, "pinned", lambda text: ["certifi"])  # not all are installed on every Python
    with pytest.raises(SystemExit, match=r"certifi: .*MPL.* is not permissive"):
        licences.page()


def test_what_is_pinned_for_a_python_can_be_installed_there(repository: Path):
    project = (repository / "pyproject.toml").read_text()
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    lines = (repository / "constraints.txt").read_text().splitlines()
    looked_at, problems = 0, list[str]()
    for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
        try:
            package = metadata(pin.name)
        except PackageNotFoundError:
            continue  # of another Python or machine
        if package["Version"].partition("+")[0] not in pin.specifier:
            continue
        looked_at += 1
        allowed = SpecifierSet(package.get("Requires-Python", ""))
        for python in pythons:
            is_pinned = pin.marker is None or pin.marker.evaluate({"python_version": python})
            if is_pinned and f"{python}.99" not in allowed:
                problems.append(f"{pin}: requires Python {allowed}, not {python}: it needs a marker")
    assert not problems
    assert looked_at > 100


def test_results_name_no_folder_of_the_machine_that_measured_them(repository: Path):
    found = [
        path.relative_to(repository).as_posix()
        for path in (repository / "benchmarks" / "results").rglob("*.json")
        if re.search(r'"/[a-z]+/', path.read_text(encoding="utf-8"))
    ]
    assert not found
