"""What ``d2llm doctor`` reports for each kind of damage, which the tests cause on purpose."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from itertools import cycle, islice

import numba
import numpy as np
import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from d2llm import Index, Passage
from d2llm.core.errors import ModelError
from d2llm.doctor import doctor
from d2llm.doctor import machine as doctor_machine
from d2llm.doctor.doctor import examine, install_checks
from d2llm.doctor.findings import Check
from d2llm.doctor.machine import machine_checks, openmp_runtimes
from d2llm.models.engines.engines import choose_engine
from d2llm.models.hub import find_student
from d2llm.ops import kernels
from d2llm.ops.kernels import compiler
from e2e.command_line import d2llm, succeed_with_report
from fake_hub import FakeHub
from plain_cpu import without_bfloat16
from tiny_models import TEXTS
from tiny_store import edit_manifest

STUDENT = "d2llm-minilm-cosine"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes") / "docs.index"
    Index.create(folder, STUDENT).add([Passage(str(number), text) for number, text in enumerate(TEXTS)])
    return folder


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A temporary folder that holds the caches and reports of one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def finding_named(findings, name: str):
    [match] = [finding for finding in findings if finding.subject == name]
    return match


def machine(name: str, device: str | None = None):
    """The finding of the machine check with this name."""
    [check] = [check for check in machine_checks(device) if check.subject == name]
    return finding_named(check.findings(), name)


def install():
    return [finding for check in install_checks() for finding in check.findings()]


NUM_CHECKS = 19  # with an index
ERRORS = (RuntimeError("no such\n  product here"), KeyError("avx"), ModelError("away; look"))


class TestCompiledLoops:
    def test_without_numba(self, monkeypatch):
        monkeypatch.setattr(kernels, "ALL", (kernels.CompiledLoops("missing"),))
        [finding] = doctor_machine.loops_check().findings()
        assert finding.level == "note"
        assert "NumPy does their work" in finding.result

    def test_without_a_folder_to_keep_them(self, monkeypatch):
        monkeypatch.setattr(compiler, "_kernels", [numba.njit(lambda number: number)])
        [finding] = doctor_machine.loops_check().findings()
        assert finding.level == "note"
        assert "cannot be kept" in finding.result
        assert "NUMBA_CACHE_DIR" in finding.advice

    def test_loaded_ones_are_not_compiled_again(self, monkeypatch):
        code = compiler.CompiledCode(2, 0, 2, ["somewhere"])
        monkeypatch.setattr(compiler, "compiled_code", lambda: code)
        [finding] = doctor_machine.loops_check().findings()
        assert finding.level == "ok"
        assert finding.result.startswith("0 of 2 compiled in ")
        assert finding.result.endswith("kept in somewhere")


class TestChecksThatFail:
    @pytest.mark.parametrize(("broken", "error"), enumerate(islice(cycle(ERRORS), NUM_CHECKS)))
    def test_a_failing_check_is_a_finding_and_the_others_run(self, broken, error, sandbox, index, monkeypatch):
        checks = []

        def findings(check):
            number = len(checks)
            checks.append(check)
            run = fail if number == broken else lambda: doctor.Finding(check.area, check.subject, "ok", "good")
            yield from original(Check(check.area, check.subject, run))

        def fail():
            raise error

        original = Check.findings
        monkeypatch.setattr(Check, "findings", findings)
        results = list(examine(student=STUDENT, index=index))
        # After a failed import no more checks are run.
        assert len(checks) == NUM_CHECKS or checks[broken].subject == "import"
        [problem] = [finding for finding in results if finding.level == "problem"]
        assert (problem.area, problem.subject) == (checks[broken].area, checks[broken].subject)
        assert problem.advice
        messages = {
            "RuntimeError": "this check failed: RuntimeError: no such product here",
            "KeyError": "KeyError: 'avx'",
        }
        assert messages.get(type(error).__name__, "away") in problem.result
        assert len(results) == len(checks)

    def test_a_failing_check_does_not_end_the_program(self, sandbox, monkeypatch):
        def broken():
            raise RuntimeError("bf16 path needs the cpu support avx_ne_convert")

        monkeypatch.setattr(doctor_machine, "_interaction", broken)
        result = d2llm("doctor", "--student", STUDENT, "--json", sandbox / "report.json")
        assert result.exit_code == 1
        [problem] = problems_in(sandbox)
        assert problem["result"] == "this check failed: RuntimeError: bf16 path needs the cpu support avx_ne_convert"

    def test_machine_checks_that_fail_to_import_are_a_problem(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "d2llm.doctor.machine", None)
        finding = finding_named(examine(student=STUDENT), "import")
        assert (finding.area, finding.level) == ("device", "problem")


class TestInstall:
    def test_this_installation_has_no_problems(self):
        findings = install()
        assert [finding for finding in findings if finding.level == "problem"] == []
        assert finding_named(findings, "packages").level == "ok"

    def test_a_missing_extra_is_a_note_with_its_command(self, monkeypatch):
        fake_version(monkeypatch, "fastapi", None)
        finding = finding_named(install(), "extra serve")
        assert (finding.level, finding.advice) == ("note", "if you need it: pip install 'd2llm[serve]'")
        assert "fastapi is not installed" in finding.result

    @pytest.mark.parametrize(("version", "message"), [(None, "is not installed"), ("0.1", "is 0.1, but d2llm needs")])
    def test_a_missing_or_outdated_package_is_a_problem(self, monkeypatch, version, message):
        fake_version(monkeypatch, "scipy", version)
        finding = finding_named(install(), "scipy")
        assert finding.level == "problem"
        assert message in finding.result
        assert finding.advice.startswith("pip install 'scipy>=1")

    def test_a_broken_import_stops_further_checks(self, monkeypatch):
        original = doctor.importlib.import_module

        def broken(name):
            if name == "faiss":
                raise ImportError("libgomp.so.1: cannot open shared object file")
            return original(name)

        monkeypatch.setattr(doctor.importlib, "import_module", broken)
        findings = list(examine(student=STUDENT))
        assert {finding.area for finding in findings} == {"install"}
        assert finding_named(findings, "import").advice == "pip install --force-reinstall faiss-cpu"
        assert "libgomp.so.1" in finding_named(findings, "import").result

    def test_a_missing_installation_is_a_note(self, monkeypatch):
        def unknown(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "requires", unknown)
        monkeypatch.setattr(metadata, "metadata", unknown)
        findings = install()
        assert finding_named(findings, "packages").level == "note"
        assert finding_named(findings, "Python").level == "ok"


def fake_version(monkeypatch, package: str, version: str | None) -> None:
    original = metadata.version

    def version_of(name):
        if name != package:
            return original(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", version_of)


class TestMachine:
    def test_the_requested_device_is_checked(self):
        assert machine("computes on", "cpu").result.startswith("cpu in ")
        assert machine("computes on", "cuda:99").level == "problem"

    def test_more_threads_than_cores_is_a_note(self, monkeypatch):
        monkeypatch.setattr(doctor_machine.torch, "get_num_threads", lambda: 64)
        monkeypatch.setattr(doctor_machine, "usable_cores", lambda: 4)
        finding = machine("threads", "cpu")
        assert (finding.level, finding.advice) == ("note", "more threads than cores are slower: OMP_NUM_THREADS=4")

    def test_two_openmp_libraries_are_a_note(self, monkeypatch):
        both = {("gomp", "/torch/libgomp.so.1"), ("iomp5", "/faiss/libiomp5.so")}
        monkeypatch.setattr(doctor_machine, "openmp_runtimes", lambda: both)
        assert machine("OpenMP", "cpu").level == "note"

    def test_openmp_libraries_of_this_process_are_found(self):
        runtimes = openmp_runtimes()
        assert runtimes or not sys.platform.startswith("linux")  # torch has loaded one
        assert all(family in ("gomp", "iomp5", "omp") and path.startswith("/") for family, path in runtimes)

    def test_the_allocator_is_recognised(self, monkeypatch):
        monkeypatch.setattr(doctor_machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
        monkeypatch.setattr(doctor_machine, "replaced_allocator", lambda: None)
        assert "LD_PRELOAD" in machine("allocator", "cpu").advice
        monkeypatch.setattr(doctor_machine, "replaced_allocator", lambda: "tcmalloc")
        assert (machine("allocator", "cpu").level, machine("allocator", "cpu").result) == ("note", "tcmalloc")
        assert "OpenVINO" in machine("allocator", "cpu").advice

    def test_little_memory_is_a_note(self, monkeypatch):
        monkeypatch.setattr(doctor_machine, "available_memory", lambda: 1 << 29)
        assert machine("memory", "cpu").level == "note"
        assert machine("memory", "cpu").result == "0.5 GiB available"

    def test_products_agree_on_this_machine(self):
        for what in ("product", "scan", "interaction", "speed"):
            assert machine(what).level != "problem"

    def test_products_agree_on_a_cpu_without_bfloat16(self, monkeypatch):
        without_bfloat16(monkeypatch)
        finding = machine("interaction")
        assert finding.level == "ok"
        assert "computed in float32" in finding.result

    @pytest.mark.parametrize("error", [0.5, float("nan")])
    def test_disagreeing_products_are_a_problem(self, monkeypatch, error):
        monkeypatch.setattr(doctor_machine, "_interaction_error", lambda query, passages: error)
        assert machine("interaction").level == "problem"

    def test_wrong_rows_of_a_scan_are_a_problem(self, monkeypatch):
        import faiss

        original = faiss.knn

        def shifted(queries, passages, count, **options):
            scores, rows = original(queries, passages, count, **options)
            return scores, np.roll(rows, 1, axis=1)

        monkeypatch.setattr(faiss, "knn", shifted)
        assert machine("scan").level == "problem"

    def test_slow_bfloat16_reported_as_fast_is_a_note(self, monkeypatch):
        monkeypatch.setattr(doctor_machine, "cpu_has_fast_bfloat16", lambda: True)
        monkeypatch.setattr(doctor_machine, "_rate", lambda dtype: 50.0 if "float32" in str(dtype) else 10.0)
        assert machine("speed").level == "note"


class TestCaches:
    def test_an_unwritable_cache_is_a_problem(self, sandbox, monkeypatch):
        (sandbox / "file").write_text("")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(sandbox / "file" / "hub"))
        finding = doctor._hub_cache()
        assert finding.level == "problem"
        assert "HF_HOME" in finding.advice

    def test_the_hub_is_contacted_unless_offline(self, sandbox, monkeypatch):
        hub = FakeHub()
        set_client_factory(hub.client)
        try:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            assert "HF_HUB_OFFLINE" in doctor._hub().result
            assert hub.log == []
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            assert doctor._hub().level == "ok"
            hub.reachable = False
            assert doctor._hub().level == "note"
        finally:
            set_client_factory(default_client_factory)


class TestStudentAndIndex:
    def test_a_good_student_and_index_have_no_problems(self, index, sandbox):
        result, report = succeed_with_report("doctor", "--student", STUDENT, "--index", index, folder=sandbox)
        assert report["result"]["num_problems"] == 0
        by_check = {(finding["area"], finding["subject"]): finding for finding in report["result"]["findings"]}
        assert by_check["index", "contents"]["result"].startswith("8 passages")
        assert by_check["index", "search"]["level"] == "ok"
        assert by_check["student", "scores"]["level"] == "ok"
        assert "8 passages" in result.stdout

    @pytest.mark.slow
    @pytest.mark.rest
    def test_loops_are_compiled_on_request(self, sandbox):
        code = "import sys; from d2llm.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "doctor", "--student", STUDENT, "--warm", "--json", "report.json"]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(sandbox / "numba"), "XDG_CACHE_HOME": str(sandbox / "cache")}
        subprocess.run(command, cwd=sandbox, env=environment, capture_output=True, check=True)
        findings = json.loads((sandbox / "report.json").read_text())["result"]["findings"]
        [finding] = [finding for finding in findings if finding["subject"] == "compiled loops"]
        assert finding["level"] == "ok"
        assert re.match(r"(\d+) of \1 compiled in ", finding["result"])
        assert str(sandbox / "numba") in finding["result"]
        [finding] = [finding for finding in findings if finding["subject"] == "engine"]
        graphs = [*(sandbox / "cache" / "d2llm" / "engines").glob("*/text.onnx")]
        assert finding["result"] == f"{choose_engine('auto')} reads texts"
        assert bool(graphs) == (choose_engine("auto") != "torch")

    def test_a_missing_student_is_a_problem(self, sandbox):
        result = d2llm("doctor", "--student", "nobody", "--json", sandbox / "report.json")
        assert result.exit_code == 1
        assert "1 problem: see the last column" in result.stderr
        [problem] = problems_in(sandbox)
        assert (problem["area"], problem["subject"]) == ("student", "nobody")
        assert "no student at 'nobody'" in problem["result"]

    def test_a_damaged_student_is_a_problem(self, sandbox):
        folder = shutil.copytree(find_student(STUDENT), sandbox / "student")
        content = bytearray((folder / "adapter_model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "adapter_model.safetensors").write_bytes(bytes(content))
        [problem] = [f for f in examine(student=str(folder)) if f.level == "problem"]
        assert "damaged or belong to another student" in problem.result
        assert problem.advice == "fetch or restore the folder again"

    def test_a_missing_index_is_a_problem(self, sandbox):
        d2llm("doctor", "--student", STUDENT, "--index", sandbox / "none", "--json", sandbox / "report.json")
        [problem] = problems_in(sandbox)
        assert (problem["area"], problem["advice"]) == ("index", "check the path")

    def test_an_index_of_another_student_is_a_problem(self, index, sandbox):
        folder = shutil.copytree(index, sandbox / "index")
        edit_manifest(folder, student="0123456789abcdef")
        [problem] = [f for f in examine(student=STUDENT, index=folder) if f.level == "problem"]
        assert "the index was made by student d2llm-minilm-cosine (0123456789abcdef)" in problem.result
        assert problem.advice.startswith("search with the student that made it")

    def test_an_index_with_a_damaged_table_is_a_problem(self, index, sandbox):
        folder = shutil.copytree(index, sandbox / "index")
        (folder / "passages.db").write_bytes(b"damaged")
        [problem] = [f for f in examine(student=STUDENT, index=folder) if f.level == "problem"]
        assert problem.area == "index"
        assert problem.advice


def problems_in(folder):
    findings = json.loads((folder / "report.json").read_text())["result"]["findings"]
    return [finding for finding in findings if finding["level"] == "problem"]
