"""How long a student reads a question of twelve words: its vector alone, and with its token embeddings, by engine.

Each number of threads has a process of its own, in which the engines take turns of some calls; figures are medians in
milliseconds, tokenizing included; ``cpu`` is the time of all threads together, which a busy machine changes little.
``cold`` is a process that reads one question and ends, such as `d2llm search`: milliseconds from opening to the first
vector, after the imports of d2llm, by the lean student and by each runtime with the graph alone, its import included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import get_args

RESULT = Path(__file__).parent / "results" / "query-encoding.json"
QUESTION = "what is the best temperature of water for brewing a green tea"
LEAN = "numpy (lean student)"
TURN = 20
"""Calls of one engine before the next has its turn, so that threads of the one do not wait busily beside the other."""
_COLD = {
    LEAN: """
from d2llm.models.engines.lean import open_lean
student = open_lean(sys.argv[1])
student.encode_with_tokens([sys.argv[3]], "query")
""",
    "onnx": """
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
ids = numpy.full((1, 14), 5)
session.run(None, {"input_ids": ids, "attention_mask": numpy.ones_like(ids)})
""",
    "openvino": """
sys.modules["openvino_telemetry"] = None
import numpy, openvino
compiled = openvino.Core().compile_model(sys.argv[2], "CPU", {"INFERENCE_NUM_THREADS": 1})
ids = numpy.full((1, 14), 5)
compiled({"input_ids": ids, "attention_mask": numpy.ones_like(ids)})
""",
}


def read_question(name: str, threads: int, calls: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each engine in this process, for the vector alone and with token embeddings."""
    import torch

    from d2llm import Student
    from d2llm.core.types import EngineName
    from d2llm.models.engines.lean import open_lean

    torch.set_num_threads(threads)
    engines = [engine for engine in get_args(EngineName) if engine != "auto"]
    students = {engine: Student.load(name, device="cpu", dtype="float32", engine=engine) for engine in engines}
    readers = {LEAN: open_lean(name), **students}
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(-1, calls // TURN):
        for engine, student in readers.items():
            if student is None:  # not of a kind that has a lean one
                continue
            reads: dict[str, Callable[[], object]] = {"vector": lambda it=student: it.encode_queries([QUESTION])}
            if student.token_dim is not None:
                reads["tokens"] = lambda it=student: it.encode_with_tokens([QUESTION], "query")
            for kind, read in reads.items():
                for _ in range(TURN):
                    begin, cpu = time.perf_counter(), time.process_time()
                    read()
                    if turn >= 0:  # the first one is a warm-up
                        seconds.setdefault((engine, kind), []).append(time.perf_counter() - begin)
                        seconds.setdefault((engine, f"{kind} cpu"), []).append(time.process_time() - cpu)
    rows: dict[str, dict[str, float]] = {}
    for (engine, kind), each in seconds.items():
        rows.setdefault(engine, {})[kind] = round(statistics.median(each) * 1e3, 3)
    return rows


def read_cold(name: str, graph: Path, repeats: int) -> dict[str, float]:
    """Median milliseconds of a process's imports, of opening, and of reading the first question."""
    measured: dict[str, float] = {}
    for engine, code in _COLD.items():
        imports = "import sys, time\nimport d2llm.models.engines.lean"
        timed = f"{imports}\nbegin = time.perf_counter()\n{code}\nprint(time.perf_counter() - begin)"
        command = [sys.executable, "-c", timed, name, str(graph), QUESTION]
        runs = [
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)
        ]
        measured[engine] = round(statistics.median(runs) * 1e3, 1)
    return measured


def write_graph(name: str, folder: Path) -> Path:
    """The student's graph as a file."""
    from d2llm import Student, export

    export(Student.load(name, device="cpu", dtype="float32"), folder, "onnx")
    return folder / "text.onnx"


def main() -> None:
    from tempfile import TemporaryDirectory

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=9, help="Cold processes of each kind.")
    parser.add_argument("--label", default="now", help="Where the rows go in the result, such as `before`.")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(read_question(arguments.student, arguments.one, arguments.calls)))
        return
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for threads in arguments.threads:
        command = [sys.executable, __file__, "--student", arguments.student, "--calls", str(arguments.calls)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        output = subprocess.run(
            [*command, "--one", str(threads)], capture_output=True, text=True, check=True, env=environment
        )
        rows[f"{threads} thread{'s' * (threads > 1)}"] = json.loads(output.stdout.splitlines()[-1])
        print(json.dumps(rows, indent=2))
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    packages = {package: version(package) for package in ("d2llm", "torch", "onnxruntime", "openvino", "numpy")}
    result |= {"student": arguments.student, "question": QUESTION, "packages": packages, arguments.label: rows}
    if arguments.repeats:
        with TemporaryDirectory() as folder:
            graph = write_graph(arguments.student, Path(folder) / "graph")
            result["cold"] = read_cold(arguments.student, graph, arguments.repeats)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
