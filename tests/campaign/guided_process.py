"""The process in which libFuzzer calls a parser of others' bytes and sees which lines of Python it reaches.

    PYTHONPATH=tests python -m campaign.guided_process NAME FAULTS CORPUS -runs=1000 -seed=1

A line of the file FAULTS is a fault of a new kind: its exception, its traceback and the input. ``guided_files.py`` runs
this for all targets.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from campaign.guided_documents import DOCUMENTS
from campaign.guided_models import MODELS
from campaign.guided_targets import Read, Target
from campaign.mutations import restructured

TARGETS = DOCUMENTS | MODELS
INSTRUMENTED = ["d2llm", "markdown_it", "mdit_py_plugins", "docutils", "yaml", "multipart", "sqlglot", "gguf"]
MAX_ERROR = 9_000  # characters
_RESTRUCTURED = 0.5  # of the mutations of JSON


class Watched:
    """A parser, and the faults seen of it."""

    def __init__(self, target: Target, read: Read, faults: Path) -> None:
        from d2llm.core.errors import D2LLMError

        self._refusal, self._expected, self._read, self._faults = D2LLMError, target.expected, read, faults
        self._seen: set[tuple[str, str]] = set()

    def __call__(self, data: bytes) -> None:
        """Read bytes; whatever comes out besides an error of d2llm's is a fault."""
        try:
            self._read(data)
        except self._refusal as error:
            if len(str(error)) > MAX_ERROR:
                self._note("an error of many characters", str(error)[:80], str(error)[:300], data)
        except Exception as error:  # noqa: BLE001
            if type(error).__name__ not in self._expected:
                frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/d2llm/" in frame.filename]
                last = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
                self._note(type(error).__name__, last, traceback.format_exc()[-1_500:], data)

    def _note(self, kind: str, last: str, text: str, data: bytes) -> None:
        if (kind, last) not in self._seen:
            self._seen.add((kind, last))
            begin = base64.b64encode(data[:600]).decode()
            with self._faults.open("a") as file:
                file.write(json.dumps({"kind": kind, "text": text, "bytes": len(data), "input": begin}) + "\n")


def fuzz(name: str, faults: Path, arguments: Sequence[str]) -> None:
    """Give a target mutated bytes until libFuzzer ends the process."""
    import atheris

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        lines = data.split(b"\n")
        at = chance.randrange(len(lines))
        if chance.random() < _RESTRUCTURED:
            with contextlib.suppress(ValueError, RecursionError):
                lines[at] = json.dumps(restructured(json.loads(lines[at]), chance)).encode()
                return b"\n".join(lines)[:most]
        return atheris.Mutate(data, most)

    target = TARGETS[name]
    with atheris.instrument_imports(include=INSTRUMENTED):
        call = Watched(target, target.make(Path(tempfile.mkdtemp(dir=faults.parent))), faults)
        for content in target.seeds:
            call(content)  # what it imports then is not counted as the work for one input
        setup: dict[str, Any] = {"custom_mutator": mutate} if target.json else {}
        atheris.Setup(["guided", *arguments], call, **setup)
        atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
