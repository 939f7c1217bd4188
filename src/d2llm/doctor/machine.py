"""Checks of the machine: processor, memory, threads, and whether products are computed correctly."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from d2llm.core.errors import InputError
from d2llm.core.machine import available_memory, replaced_allocator, usable_cores
from d2llm.core.progress import progress_bar
from d2llm.core.types import Task
from d2llm.doctor.findings import Check, Finding
from d2llm.models.device import can_fuse_bfloat16_layers, choose_device, choose_dtype, cpu_has_fast_bfloat16
from d2llm.models.interaction import Interaction
from d2llm.models.scorer import HeadWeights, QueryScorer
from d2llm.ops import kernels
from d2llm.recipe import InteractionConfig
from d2llm.store.scan import load_faiss

_GIB = 1 << 30
_LITTLE_MEMORY = 2 * _GIB
_DIM, _PASSAGES, _TASK = 64, 200, "asymmetric"
_PRODUCT_SIZE = 512
_MEASURED_SECONDS = 0.1
_FEATURES = {
    "AVX2": "_is_avx2_supported",
    "AVX-512": "_is_avx512_supported",
    "VNNI": "_is_vnni_supported",
    "AVX512-BF16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
}
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*$")


def machine_checks(device: str | None = None) -> list[Check]:
    """Checks of processor, accelerators, memory and threads, and of the matrix products that scores depend on."""
    return [
        Check("device", "processor", _processor),
        Check("device", "computes on", lambda: _computes_on(device)),
        Check("device", "memory", _memory),
        Check("device", "threads", _threads),
        Check("device", "OpenMP", _openmp),
        Check("device", "allocator", _allocator),
        Check("kernels", "product", _product),
        Check("kernels", "scan", _scan),
        Check("kernels", "interaction", _interaction),
        Check("kernels", "speed", _speed),
    ]


def loops_check() -> Check:
    """Compiles all loops, unless that was done before, so that no later program has to."""
    return Check("kernels", "compiled loops", _compile_loops)


def _compile_loops() -> Finding:
    begin = time.perf_counter()
    with progress_bar("compile loops", len(kernels.ALL)) as advance:
        for loops in kernels.ALL:
            if loops.load() is None:
                advice = (
                    "pip install --force-reinstall numba; without it, searches of large indexes are slower, not wrong"
                )
                return Finding(
                    "kernels", "compiled loops", "note", "numba cannot be used: NumPy does their work", advice
                )
            advance(1)
    seconds = time.perf_counter() - begin
    from d2llm.ops.kernels.compiler import compiled_code  # needs numba

    code = compiled_code()
    result = f"{code.num_compiled} of {code.num_functions} compiled in {seconds:.1f} s"
    if code.num_kept < code.num_functions:
        advice = "set NUMBA_CACHE_DIR to a folder that can be written"
        return Finding("kernels", "compiled loops", "note", f"{result}; they cannot be kept for the next start", advice)
    return Finding("kernels", "compiled loops", "ok", f"{result}, kept in {', '.join(code.folders)}")


def _processor() -> Finding:
    checks = {name: getattr(torch.cpu, check, lambda: False) for name, check in _FEATURES.items()}
    features = ", ".join(name for name, check in checks.items() if check()) or torch.backends.cpu.get_cpu_capability()
    return Finding("device", "processor", "ok", f"{platform.machine()}, {usable_cores()} usable cores, {features}")


def _computes_on(device: str | None) -> Iterator[Finding]:
    try:
        chosen = choose_device(device)
    except InputError as error:
        yield Finding("device", "computes on", "problem", str(error), "give another --device, or leave it out")
        return
    dtype = str(choose_dtype(chosen)).removeprefix("torch.")
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type
    yield Finding("device", "computes on", "ok", f"{name} in {dtype}")
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        level = "ok" if free > _LITTLE_MEMORY else "note"
        advice = "" if level == "ok" else "stop other programs on it, or use --device cpu"
        memory = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
        yield Finding("device", "its memory", level, memory, advice)


def _product() -> Finding:
    left, right, reference = _example()
    product = (torch.from_numpy(left) @ torch.from_numpy(right).T).numpy()
    error = float(np.abs(product - reference).max())
    return _agreement("product", error, 1e-3, "between float32 and numpy's float64")


def _scan() -> Finding:
    faiss = load_faiss()
    queries, passages, reference = _example()
    scores, rows = faiss.knn(queries, passages, 10, metric=faiss.METRIC_INNER_PRODUCT)
    best = -np.sort(-reference, axis=1)[:, :10]
    of_rows = np.take_along_axis(reference, rows, axis=1)
    error = float(max(np.abs(scores - best).max(), np.abs(scores - of_rows).max()))
    return _agreement("scan", error, 1e-3, "between the inner products of faiss and numpy")


def _interaction() -> Finding:
    left, right, _ = _example()
    bfloat16 = "fused by oneDNN" if can_fuse_bfloat16_layers() else "requested, but computed in float32"
    error = _interaction_error(left[0], right)
    return _agreement("interaction", error, 0.05, f"between bfloat16 ({bfloat16}) and float32; scores are in [-1, 1]")


def _example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two sets of vectors, and their inner products in float64."""
    left, right = np.random.default_rng(0).standard_normal((2, _PASSAGES, _DIM), np.float32)
    return left, right, left.astype(np.float64) @ right.T.astype(np.float64)


def _memory() -> Finding:
    memory = available_memory()
    if memory is None:
        return Finding("device", "memory", "note", "cannot be read on this system")
    if memory < _LITTLE_MEMORY:
        advice = "stop other programs; an index needs its vectors in memory, a student half a GiB"
        return Finding("device", "memory", "note", f"{memory / _GIB:.1f} GiB available", advice)
    return Finding("device", "memory", "ok", f"{memory / _GIB:.1f} GiB available")


def _threads() -> Finding:
    faiss = load_faiss()
    threads, scan, cores = torch.get_num_threads(), int(faiss.omp_get_max_threads()), usable_cores()
    counts = f"torch {threads}, faiss {scan}, of {cores} usable cores"
    if max(threads, scan) > cores:
        advice = f"more threads than cores are slower: OMP_NUM_THREADS={cores}"
        return Finding("device", "threads", "note", counts, advice)
    if max(threads, scan) < cores and not os.environ.get("OMP_NUM_THREADS"):
        return Finding("device", "threads", "note", counts, f"to use them all: OMP_NUM_THREADS={cores}")
    return Finding("device", "threads", "ok", counts)


def _openmp() -> Iterator[Finding]:
    load_faiss()  # may load another OpenMP
    runtimes = openmp_runtimes()
    if len({family for family, _ in runtimes}) > 1:
        names = ", ".join(sorted(path for _, path in runtimes))
        advice = "if d2llm hangs, crashes or is slow, set OMP_NUM_THREADS=1, or install torch and faiss from one source"
        yield Finding("device", "OpenMP", "note", f"different libraries in one process: {names}", advice)
    elif runtimes:
        copies = "one library" if len(runtimes) == 1 else f"{len(runtimes)} copies of one library, used alternately"
        yield Finding("device", "OpenMP", "ok", copies)


def openmp_runtimes() -> set[tuple[str, str]]:
    """Family and path of each OpenMP library in this process; empty if the system does not list them."""
    return {(match[1], path) for path in _loaded_files() if (match := _OPENMP.search(path))}


def _allocator() -> Iterator[Finding]:
    if platform.libc_ver()[0] != "glibc":
        return
    name = replaced_allocator()
    if name is not None:
        advice = "OpenVINO, which encodes faster, crashes with it: unset LD_PRELOAD for anything but training"
        yield Finding("device", "allocator", "note", name, advice)
    else:
        advice = "training on a CPU is faster with tcmalloc: install it, LD_PRELOAD=libtcmalloc_minimal.so.4 d2llm run"
        yield Finding("device", "allocator", "note", "the C library's own", advice)


def _loaded_files() -> set[str]:
    """Paths of the files mapped into this process; empty if the system does not list them."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "/" in line}


def _agreement(name: str, error: float, allowed: float, comparison: str) -> Finding:
    result = f"largest difference {error:.1e} {comparison}"
    if error <= allowed:  # false for NaN too
        return Finding("kernels", name, "ok", result)
    advice = "scores cannot be trusted here: use --dtype float32, and another version of torch or faiss-cpu"
    return Finding("kernels", name, "problem", result, advice)


def _interaction_error(query: np.ndarray, passages: np.ndarray) -> float:
    """Largest difference between bfloat16 and float32 in the tanh of the interaction, with random weights."""
    config = InteractionConfig(hidden_dim=128, feature_dim=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Interaction(config, _DIM).eval()

    def change(dtype: torch.dtype) -> np.ndarray:
        task: Task = _TASK
        scorer = QueryScorer(head, HeadWeights(head, task, dtype), torch.from_numpy(query), task, _PASSAGES)
        return scorer.change(passages)

    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return float(np.abs(change(torch.bfloat16) - change(torch.float32)).max())


def _speed() -> Finding:
    rates = {dtype: _rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    float32, bfloat16 = rates[torch.float32], rates[torch.bfloat16]
    speeds = f"float32 {float32:.0f}, bfloat16 {bfloat16:.0f} GFLOP/s with {torch.get_num_threads()} threads"
    if cpu_has_fast_bfloat16() and bfloat16 < float32:
        advice = "bfloat16 should be fast on this CPU but is not: use --dtype float32, or another version of torch"
        return Finding("kernels", "speed", "note", speeds, advice)
    return Finding("kernels", "speed", "ok", speeds)


def _rate(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest product within a tenth of a second."""
    left, right = (torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE, dtype=dtype) for _ in range(2))
    torch.matmul(left, right)  # warm-up
    best, until = float("inf"), time.perf_counter() + _MEASURED_SECONDS
    while (start := time.perf_counter()) < until:
        torch.matmul(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * _PRODUCT_SIZE**3 / best / 1e9
