"""Processes that start with the libraries loaded: forked from a server that has only imported them.

Importing torch and Transformers takes seconds of CPU time. A test that needs its own process, to kill it, send
it signals or limit its memory, can avoid that cost here. A test of import cost or of the start itself needs a real
start instead: `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from waiting import PATIENCE, until

_LIBRARIES = (
    "pytest",  # a child imports the main module of its parent, which is pytest's
    "torch",
    "peft",
    "sqlite3",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "fastapi",
    "uvicorn",
    "opentelemetry.sdk.trace.export",
    "opentelemetry.instrumentation.fastapi",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "d2llm.cli.main",
    "d2llm.training.distill",
    "d2llm.training.label",
    "d2llm.training.tune_teacher",
    "d2llm.server.app",
)
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # before any test changes it
_context = multiprocessing.get_context("forkserver")


class PreparedProcess:
    """A process that calls a module-level function; its output and errors go to two files.

    Args:
        function: called with the arguments; an exception ends the process with a traceback and status 1.
        environment: variables in addition to those of this process.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None):
        self._folder = TemporaryDirectory()
        self._output, self._errors = (Path(self._folder.name) / name for name in ("output", "errors"))
        with mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):  # libraries read some variables on import
            _context.set_forkserver_preload(list(_LIBRARIES))
            multiprocessing.forkserver.ensure_running()
        variables = {**os.environ, **(environment or {})}
        self._process = _context.Process(
            target=_call, args=(function, arguments, variables, str(Path.cwd()), str(self._output), str(self._errors))
        )
        self._process.start()

    @property
    def output(self) -> str:
        """Its standard output so far."""
        return self._output.read_text(encoding="utf-8") if self._output.exists() else ""

    @property
    def errors(self) -> str:
        """Its standard error so far."""
        return self._errors.read_text(encoding="utf-8") if self._errors.exists() else ""

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a condition that the process must bring about."""

        def reached() -> bool:
            running = self._process.is_alive()  # checked first: the process may meet the condition and end
            assert condition() or running, f"ended before {what}: {self.errors}"
            return bool(condition())

        until(reached, what)

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> int:
        """Wait for the end of the process and return its exit status."""
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, f"it did not end in {PATIENCE:g} s: {self.errors}"
        return self._process.exitcode

    def __enter__(self) -> PreparedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()


def program(*arguments: str) -> None:
    """Runs the command line, like ``python -m d2llm`` with these arguments."""
    from d2llm.cli.main import main

    sys.argv = ["d2llm", *arguments]
    main()


def script(code: str, *arguments: str) -> None:
    """Runs a script, like ``python -c`` with these arguments."""
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})


def _call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    folder: str,
    output: str,
    errors: str,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a program started from a terminal
    function(*arguments)
