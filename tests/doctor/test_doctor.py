"""What ``d2llm doctor`` finds, each kind of damage made on purpose."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import metadata

import numpy as np
import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from d2llm import Index, Passage
from d2llm.core.errors import ModelError
from d2llm.doctor import doctor
from d2llm.doctor import installation as doctor_install
from d2llm.doctor import machine as doctor_machine
from d2llm.doctor.doctor import examine
from d2llm.doctor.findings import Check
from d2llm.doctor.installation import install_checks
from d2llm.doctor.machine import machine_checks, openmp_runtimes
from d2llm.models.hub import find_student
from e2e.command_line import d2llm, succeed_with_report
from fake_hub import FakeHub
from plain_cpu import without_bfloat16
from tiny_models import TEXTS
from tiny_store import forget_checksums

STUDENT = "d2llm-minilm-cosine"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes") / "docs.index"
    Index.create(folder, STUDENT).add([Passage(str(number), text) for number, text in enumerate(TEXTS)])
    return folder


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Cache folders of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def look_at(findings, what: str):
    [found] = [finding for finding in findings if finding.what == what]
    return found


def machine(what: str, device: str | None = None):
    """What the check of the machine with this name finds."""
    [check] = [check for check in machine_checks(device) if check.what == what]
    return look_at(check.findings(), what)


def install():
    return [finding for check in install_checks() for finding in check.findings()]


NUM_CHECKS = 19  # of an examination with an index


class TestChecksThatFail:
    @pytest.mark.parametrize(
        "error", [RuntimeError("no such\n  product here"), KeyError("avx"), ModelError("away; look")]
    )
    @pytest.mark.parametrize("broken", range(NUM_CHECKS))
    def test_each_is_a_finding_and_the_others_are_made(self, broken, error, places, index, monkeypatch):
        made = []

        def findings(check):
            number = len(made)
            made.append(check)
            look = fail if number == broken else lambda: doctor_install.Finding(check.area, check.what, "ok", "good")
            yield from real(Check(check.area, check.what, look))

        def fail():
            raise error

        real = Check.findings
        monkeypatch.setattr(Check, "findings", findings)
        found = list(examine(student=STUDENT, index=index))
        assert len(made) == NUM_CHECKS or made[broken].what == "import"  # without which nothing more can be tried
        [problem] = [finding for finding in found if finding.level == "problem"]
        assert (problem.area, problem.what) == (made[broken].area, made[broken].what)
        assert problem.advice
        words = {"RuntimeError": "this check failed: RuntimeError: no such product here", "KeyError": "KeyError: 'avx'"}
        assert words.get(type(error).__name__, "away") in problem.found
        assert len(found) == len(made)

    def test_none_breaks_off_the_program(self, places, monkeypatch):
        def broken():
            raise RuntimeError("bf16 path needs the cpu support avx_ne_convert")

        monkeypatch.setattr(doctor_machine, "_interaction", broken)
        result = d2llm("doctor", "--student", STUDENT, "--json", places / "report.json")
        assert result.exit_code == 1
        [problem] = problems_in(places)
        assert problem["found"] == "this check failed: RuntimeError: bf16 path needs the cpu support avx_ne_convert"

    def test_machine_checks_that_cannot_be_imported(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "d2llm.doctor.machine", None)
        found = look_at(examine(student=STUDENT), "import")
        assert (found.area, found.level) == ("device", "problem")


class TestInstall:
    def test_what_the_tests_run_with_is_fine(self):
        findings = install()
        assert [finding for finding in findings if finding.level == "problem"] == []
        assert look_at(findings, "packages").level == "ok"

    def test_a_missing_extra_is_a_note_with_its_command(self, monkeypatch):
        pretend(monkeypatch, "fastapi", None)
        found = look_at(install(), "extra serve")
        assert (found.level, found.advice) == ("note", "if you need it: pip install 'd2llm[serve]'")
        assert "fastapi is not installed" in found.found

    @pytest.mark.parametrize(("version", "says"), [(None, "is not installed"), ("0.1", "is 0.1, but d2llm needs")])
    def test_a_package_that_is_missing_or_too_old(self, monkeypatch, version, says):
        pretend(monkeypatch, "scipy", version)
        found = look_at(install(), "scipy")
        assert found.level == "problem"
        assert says in found.found
        assert found.advice.startswith("pip install 'scipy>=1")

    def test_without_a_package_that_cannot_be_imported_nothing_more_is_tried(self, monkeypatch):
        real = doctor_install.importlib.import_module

        def broken(name):
            if name == "faiss":
                raise ImportError("libgomp.so.1: cannot open shared object file")
            return real(name)

        monkeypatch.setattr(doctor_install.importlib, "import_module", broken)
        findings = list(examine(student=STUDENT))
        assert {finding.area for finding in findings} == {"install"}
        assert look_at(findings, "import").advice == "pip install --force-reinstall faiss-cpu"
        assert "libgomp.so.1" in look_at(findings, "import").found

    def test_run_from_a_folder(self, monkeypatch):
        def unknown(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "requires", unknown)
        monkeypatch.setattr(metadata, "metadata", unknown)
        findings = install()
        assert look_at(findings, "packages").level == "note"
        assert look_at(findings, "Python").level == "ok"


def pretend(monkeypatch, package: str, version: str | None) -> None:
    real = metadata.version

    def found(name):
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)


class TestMachine:
    def test_the_device_asked_for(self):
        assert machine("computes on", "cpu").found.startswith("cpu in ")
        assert machine("computes on", "cuda:99").level == "problem"

    def test_more_threads_than_cores(self, monkeypatch):
        monkeypatch.setattr(doctor_machine.torch, "get_num_threads", lambda: 64)
        monkeypatch.setattr(doctor_machine, "_num_cpus", lambda: 4)
        found = machine("threads", "cpu")
        assert (found.level, found.advice) == ("note", "more threads than cores are slower: OMP_NUM_THREADS=4")

    def test_two_openmp_libraries(self, monkeypatch):
        both = {("gomp", "/torch/libgomp.so.1"), ("iomp5", "/faiss/libiomp5.so")}
        monkeypatch.setattr(doctor_machine, "openmp_runtimes", lambda: both)
        assert machine("OpenMP", "cpu").level == "note"

    def test_openmp_libraries_of_this_process_are_found(self):
        assert all(family in ("gomp", "iomp5", "omp") and path.startswith("/") for family, path in openmp_runtimes())

    def test_allocator(self, monkeypatch):
        monkeypatch.setattr(doctor_machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
        monkeypatch.setattr(doctor_machine, "_loaded_files", lambda: {"/usr/lib/libc.so.6"})
        assert "LD_PRELOAD" in machine("allocator", "cpu").advice
        monkeypatch.setattr(doctor_machine, "_loaded_files", lambda: {"/usr/lib/libtcmalloc_minimal.so.4.5.10"})
        assert (machine("allocator", "cpu").level, machine("allocator", "cpu").found) == ("ok", "tcmalloc")

    def test_little_memory(self, monkeypatch):
        monkeypatch.setattr(doctor_machine, "available_memory", lambda: 1 << 29)
        assert machine("memory", "cpu").level == "note"
        assert machine("memory", "cpu").found == "0.5 GiB available"

    def test_products_agree_here(self):
        for what in ("product", "scan", "interaction", "speed"):
            assert machine(what).level != "problem"

    def test_products_agree_on_a_cpu_without_bfloat16(self, monkeypatch):
        without_bfloat16(monkeypatch)
        found = machine("interaction")
        assert found.level == "ok"
        assert "computed in float32" in found.found

    @pytest.mark.parametrize("error", [0.5, float("nan")])
    def test_products_that_do_not_agree(self, monkeypatch, error):
        monkeypatch.setattr(doctor_machine, "_interaction_error", lambda query, passages: error)
        assert machine("interaction").level == "problem"

    def test_wrong_rows_of_a_scan_are_noticed(self, monkeypatch):
        import faiss

        real = faiss.knn

        def shifted(queries, passages, count, **options):
            scores, rows = real(queries, passages, count, **options)
            return scores, np.roll(rows, 1, axis=1)

        monkeypatch.setattr(faiss, "knn", shifted)
        assert machine("scan").level == "problem"

    def test_bfloat16_that_is_called_fast_and_is_slow(self, monkeypatch):
        monkeypatch.setattr(doctor_machine, "cpu_has_fast_bfloat16", lambda: True)
        monkeypatch.setattr(doctor_machine, "_rate", lambda dtype: 50.0 if "float32" in str(dtype) else 10.0)
        assert machine("speed").level == "note"


class TestPlaces:
    def test_a_cache_that_cannot_be_written(self, places, monkeypatch):
        (places / "file").write_text("")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(places / "file" / "hub"))
        found = doctor._hub_cache()
        assert found.level == "problem"
        assert "HF_HOME" in found.advice

    def test_the_hub_is_asked_unless_offline(self, places, monkeypatch):
        hub = FakeHub()
        set_client_factory(hub.client)
        try:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            assert "HF_HUB_OFFLINE" in doctor._hub().found
            assert hub.log == []
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            assert doctor._hub().level == "ok"
            hub.reachable = False
            assert doctor._hub().level == "note"
        finally:
            set_client_factory(default_client_factory)


class TestStudentAndIndex:
    def test_a_good_student_and_its_index(self, index, places):
        result, report = succeed_with_report("doctor", "--student", STUDENT, "--index", index, folder=places)
        assert report["result"]["num_problems"] == 0
        found = {(finding["area"], finding["what"]): finding for finding in report["result"]["findings"]}
        assert found["index", "contents"]["found"].startswith("8 passages")
        assert found["index", "search"]["level"] == "ok"
        assert found["student", "scores"]["level"] == "ok"
        assert "8 passages" in result.stdout

    def test_a_student_that_is_not_there(self, places):
        result = d2llm("doctor", "--student", "nobody", "--json", places / "report.json")
        assert result.exit_code == 1
        assert "1 problem: see the last column" in result.stderr
        [problem] = problems_in(places)
        assert (problem["area"], problem["what"]) == ("student", "nobody")
        assert "no student at 'nobody'" in problem["found"]

    def test_a_damaged_student(self, places):
        folder = shutil.copytree(find_student(STUDENT), places / "student")
        content = bytearray((folder / "adapter.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "adapter.safetensors").write_bytes(bytes(content))
        [problem] = [f for f in examine(student=str(folder)) if f.level == "problem"]
        assert "fingerprint" in problem.found
        assert problem.advice == "fetch or restore the folder again"

    def test_no_index(self, places):
        d2llm("doctor", "--student", STUDENT, "--index", places / "none", "--json", places / "report.json")
        [problem] = problems_in(places)
        assert (problem["area"], problem["advice"]) == ("index", "check the path")

    def test_an_index_of_another_student(self, index, places):
        folder = shutil.copytree(index, places / "index")
        forget_checksums(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["student"] = "0123456789abcdef"
        (folder / "manifest.json").write_text(json.dumps(manifest))
        [problem] = [f for f in examine(student=STUDENT, index=folder) if f.level == "problem"]
        assert "the index was made by student d2llm-minilm-cosine (0123456789abcdef)" in problem.found
        assert problem.advice.startswith("search with the student that made it")

    def test_an_index_with_a_damaged_table(self, index, places):
        folder = shutil.copytree(index, places / "index")
        shutil.rmtree(folder / "passages.lance" / "_versions")
        [problem] = [f for f in examine(student=STUDENT, index=folder) if f.level == "problem"]
        assert problem.area == "index"
        assert problem.advice


def problems_in(folder):
    findings = json.loads((folder / "report.json").read_text())["result"]["findings"]
    return [finding for finding in findings if finding["level"] == "problem"]
