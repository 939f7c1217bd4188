"""What this process may use of the machine: cores, and memory within the limits of system, container and process.

``limit_spinning``: a library with several threads lets those without work spin for a while, since it takes a few
microseconds to wake one that sleeps. By default GNU OpenMP (PyTorch, Faiss) spins for milliseconds and OpenBLAS (NumPy)
for longer. Between the many small operations of a search this takes the cores from the threads that do have work, above
all if other programs run on them too. A search of 2,355 passages on two cores took 102 ms with the defaults and 41 ms
with these settings; beside a program that kept one of the two busy, 115 and 55 ms, and a pass of training 5.2 and
2.9 s. Large operations take as long as before (``benchmarks/waiting_threads.py``).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO, _STATUS, _GROUP = Path("/proc/meminfo"), Path("/proc/self/status"), Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_ALLOCATOR = re.compile(r"lib(jemalloc|tcmalloc|mimalloc)")


def cpu_fact(name: str) -> str:
    """What the system says of the CPU: "vendor_id" (as in "AuthenticAMD"), "model name"; empty if it does not."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    facts = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in facts if key.strip() == name), "")


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that this process can still use without swapping or being killed; None if the system does not report it.

    The minimum of the system's free memory, what is left within the limit of a container or another control group, and
    what `ulimit` leaves of the address space (-v) or of the data (-d).
    """
    free = _first_numbers(_MEMINFO).get("MemAvailable")
    if free is None:
        return None
    return max(0, min([free * 1024, *_left_by_groups(), *_left_by_limits()]))


def resident_memory() -> int | None:
    """Bytes of memory that this process occupies now; None if the system does not report it."""
    size = _first_numbers(_STATUS).get("VmRSS")
    return None if size is None else size * 1024


def replaced_allocator() -> str | None:
    """The memory allocator that takes the place of the C library's, as one in LD_PRELOAD does, such as "tcmalloc".

    None if there is none among those known here (jemalloc, tcmalloc, mimalloc), or the system does not say.
    """

    class Info(ctypes.Structure):
        _fields_ = (
            ("file", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("symbol", ctypes.c_char_p),
            ("address", ctypes.c_void_p),
        )

    info = Info()
    try:
        process = ctypes.CDLL(None)
        resolved = process.dladdr(ctypes.cast(process.malloc, ctypes.c_void_p), ctypes.byref(info))
    except (OSError, TypeError, AttributeError):  # Windows, or a C library without dladdr
        return None
    match = _ALLOCATOR.search(Path(os.fsdecode(info.file or b"")).name) if resolved else None
    return match[1] if match else None


def _left_by_groups() -> Iterator[int]:
    """Bytes left to each control group of this process, from its own up to the outermost visible one."""
    try:
        lines = _GROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:path, with no controllers for version 2
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _left_by_group(_GROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left_by_group(_GROUPS / "memory", path, *names)


def _left_by_group(root: Path, path: str, limit: str, used: str, files: str) -> Iterator[int]:
    for group in (PurePosixPath(path), *PurePosixPath(path).parents):
        folder = root / str(group).lstrip("/")
        try:
            maximum, current = ((folder / name).read_text(encoding="ascii").strip() for name in (limit, used))
        except OSError:  # the outermost group has no limit, and a container does not see those above its own
            continue
        if maximum != "max":
            # The page cache counts as used, but is freed when memory is needed.
            yield int(maximum) - max(0, int(current) - _first_numbers(folder / "memory.stat").get(files, 0))


def _left_by_limits() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    usage = _first_numbers(_STATUS)
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and name in usage:
            yield limit - usage[name] * 1024


def _first_numbers(path: Path) -> dict[str, int]:
    """Name and first number of each line of a kernel file; empty if there is no such file."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    fields = [line.replace(":", " ").split() for line in lines]
    return {words[0]: int(words[1]) for words in fields if len(words) > 1 and words[1].isdigit()}


def limit_spinning() -> None:
    """Set the environment variables that the libraries read when they are loaded, if the user has not set them."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")  # the binary logarithm of processor cycles
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # rounds
