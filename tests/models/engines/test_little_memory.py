"""Where memory is lacking, an engine gives right vectors or an error; OpenVINO itself gives those of an older batch."""

from __future__ import annotations

import sys

import pytest

from prepared_process import PreparedProcess, script

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux can"),
    pytest.mark.timeout(600),
]
RUN = """
import resource, sys
from pathlib import Path

import numpy as np
import torch

from d2llm import Student
from tiny_models import TEXTS

torch.set_num_threads(1)
student = Student.load(sys.argv[1], device="cpu", dtype="float32", engine="openvino")
batches = [[" ".join([text] * times) for text in TEXTS[:count]] for times in range(1, 7) for count in (1, 3, 4)]
student.encode_passages(TEXTS)
unlimited = resource.getrlimit(resource.RLIMIT_DATA)
used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used - 400_000, unlimited[1]))
found = []
for batch in batches:
    try:
        found.append(student.encode_passages(batch).vectors)
    except MemoryError:
        found.append(None)
resource.setrlimit(resource.RLIMIT_DATA, unlimited)
counts = dict.fromkeys(("right", "wrong", "refused"), 0)
again = Student.load(sys.argv[1], device="cpu", dtype="float32", engine="openvino")
for batch, vectors in zip(batches, found, strict=True):
    right = again.encode_passages(batch).vectors
    is_right = vectors is not None and np.allclose(vectors, right, atol=1e-4)
    counts["refused" if vectors is None else "right" if is_right else "wrong"] += 1
print(counts["wrong"], counts["refused"])
"""


def test_openvino_refuses_what_it_did_not_compute(tmp_path):
    pytest.importorskip("openvino")
    from tiny_server import write_tiny_student

    with PreparedProcess(script, RUN, str(write_tiny_student(tmp_path))) as process:
        assert process.wait() == 0, process.errors
        wrong, refused = map(int, process.output.split()[-2:])
    assert wrong == 0
    assert refused > 0
