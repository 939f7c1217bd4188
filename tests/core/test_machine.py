"""What a process may use: memory of the machine, its control groups (as files) and its limits, and cores."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2llm.core import machine as core_machine
from d2llm.core.machine import available_memory, replaced_allocator, usable_cores

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free, whose process is in no control group."""
    for name in ("_MEMINFO", "_STATUS", "_GROUP", "_GROUPS"):
        monkeypatch.setattr(core_machine, name, tmp_path / name)
    write(tmp_path / "_MEMINFO", f"MemTotal: {9 << 20} kB\nMemAvailable:    {8 << 20} kB\nHugePages_Total:   0\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def group(folder: Path, limit: str, used: int, files: int) -> None:
    write(folder / "memory.max", limit + "\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 5\ninactive_file {files}\n")


def test_free_memory_of_the_system(machine: Path) -> None:
    assert available_memory() == 8 * GIB
    (machine / "_MEMINFO").unlink()
    assert available_memory() is None


def test_the_tightest_group_counts_without_cached_files(machine: Path) -> None:
    write(machine / "_GROUP", "0::/outer/inner\n")
    group(machine / "_GROUPS" / "outer" / "inner", "max", 0, 0)
    group(machine / "_GROUPS" / "outer", str(4 * GIB), 3 * GIB, 2 * GIB)
    assert available_memory() == 3 * GIB
    group(machine / "_GROUPS" / "outer" / "inner", str(2 * GIB), GIB, 0)
    assert available_memory() == GIB
    group(machine / "_GROUPS" / "outer" / "inner", str(2 * GIB), 3 * GIB, 0)  # the limit was lowered meanwhile
    assert available_memory() == 0


def test_a_container_sees_its_own_group_as_the_root(machine: Path) -> None:
    write(machine / "_GROUP", "0::/docker/0123\n")
    group(machine / "_GROUPS", str(2 * GIB), GIB // 2, 0)
    assert available_memory() == 3 * GIB // 2


def test_cgroups_version_1(machine: Path) -> None:
    write(machine / "_GROUP", "9:name=systemd:/\n4:memory:/a\n0::/\n")
    folder = machine / "_GROUPS" / "memory" / "a"
    write(folder / "memory.limit_in_bytes", f"{3 * GIB}\n")
    write(folder / "memory.usage_in_bytes", f"{2 * GIB}\n")
    write(folder / "memory.stat", f"inactive_file 0\ntotal_inactive_file {GIB}\n")
    write(machine / "_GROUPS" / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")  # means no limit
    write(machine / "_GROUPS" / "memory" / "memory.usage_in_bytes", f"{5 * GIB}\n")
    assert available_memory() == 2 * GIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process has taken")
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_left_by_ulimit(kind: str) -> None:
    code = f"""
import resource
from d2llm.core.machine import available_memory
resource.setrlimit(resource.{kind}, (1 << 30, 1 << 30))
before = available_memory()
taken = bytearray(200 << 20)
print(before, available_memory())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert 0 < before < 1 << 30
    assert before - after == pytest.approx(200 << 20, rel=0.02)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot bind a process to cores")
def test_a_process_bound_to_one_core_has_one() -> None:
    code = """
import os
from d2llm.core.machine import usable_cores
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(usable_cores())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) == 1 <= usable_cores()


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another allocator may be preloaded")
def test_the_c_librarys_allocator_is_no_replacement() -> None:
    assert replaced_allocator() is None


@pytest.mark.parametrize("name", ["tcmalloc_minimal", "jemalloc", "mimalloc"])
def test_a_preloaded_allocator_is_recognised(name: str) -> None:
    library = ctypes.util.find_library(name)
    if library is None or not sys.platform.startswith("linux"):
        pytest.skip(f"there is no {name} here (Debian: apt install lib{name.replace('_', '-')}...)")
    code = "from d2llm.core.machine import replaced_allocator; print(replaced_allocator())"
    source = str(Path(core_machine.__file__).parents[2])
    environment = {**os.environ, "LD_PRELOAD": library, "PYTHONPATH": source}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == name.removesuffix("_minimal")


NAMES = ("GOMP_SPINCOUNT", "OPENBLAS_THREAD_TIMEOUT")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ["3000", "10"]),
        ({"GOMP_SPINCOUNT": "7", "OPENBLAS_THREAD_TIMEOUT": "20"}, ["7", "20"]),
        ({"OMP_WAIT_POLICY": "passive"}, ["None", "10"]),
    ],
)
def test_importing_the_package_sets_what_the_user_has_not_set(own: dict[str, str], expected: list[str]) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in (*NAMES, "OMP_WAIT_POLICY")}
    code = (
        f"import d2llm, os, sys; print(*map(os.environ.get, {NAMES}), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=kept | own, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [*expected, "False", "False"]  # they are read when these are loaded
