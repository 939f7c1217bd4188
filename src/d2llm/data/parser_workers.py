"""Reads files in other processes, so that a parser that crashes or hangs costs one file and not the whole work.

A worker is a plain ``python -c``, started with the first file: unlike one of ``multiprocessing``, it does not import
the program's main module (which need not guard against that) and shares nothing with a process that has threads. It
writes an empty line when it has started; then it receives a line with a path, and answers with a line of JSON.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any, cast

from d2llm.core.errors import MissingExtraError
from d2llm.core.machine import usable_cores
from d2llm.core.types import MetadataValue, Passage, Section
from d2llm.data.contents import FileContents, SkippedPart, UnreadableFileError
from d2llm.data.file_contents import read_contents
from d2llm.data.ocr import Recogniser
from d2llm.data.settings import ReadingSettings

_MAX_WORKERS = 4
_PATIENCE_SECONDS = 1.0  # after waiting as long as this in all, more workers than one are started
_START_SECONDS = 120.0  # more than importing everything takes on the busiest machine
_GRACE_SECONDS = 5.0  # after the limit, a worker whose program has ended without it ends by itself
_OUT_OF_MEMORY = frozenset({"SIGABRT", "SIGTRAP", "SIGILL", "SIGSEGV", "SIGBUS"})
_PROGRAM = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {0} import serve; serve(*sys.argv[2:])"

Reader = Callable[..., FileContents]
Outcome = FileContents | UnreadableFileError


@dataclass(frozen=True, slots=True)
class TextLimits:
    """The most characters of text: of a document, which is a file or a row of a table, and of a file."""

    document: int
    file: int

    def problem_of(self, contents: FileContents) -> str | None:
        """How the contents of a file exceed the limits, if they do."""
        whole = sum(len(section.text) for section in contents.sections)
        rows = [len(row.text) for row in contents.rows]
        if (longest := max([whole, *rows])) > self.document:
            what = "a row of it" if rows else "it"
            return f"{what} has {longest:,} characters of text, more than {self.document:,}; split it into several"
        if sum(rows) > self.file:
            return f"it has {sum(rows):,} characters of text, more than {self.file:,}; split it into several"
        return None


def read_in_workers(
    paths: Sequence[Path],
    settings: ReadingSettings | None = None,
    *,
    chars: TextLimits | None = None,
    ocr: str = "",
    reader: Reader = read_contents,
) -> Generator[Outcome]:
    """Read files in up to four processes, one for each core; yields contents, or why there are none, in order.

    No more files are read ahead than twice the number of processes. A file on which a worker dies is unreadable; if the
    worker had read others before, the file is first tried in a new one. Close the generator to end the workers.

    Args:
        paths: the files.
        settings: how much time and memory one file may take; the start of a process does not count. Linux alone sees
            to the memory, which is that of a process's data.
        chars: how much text may be in a file: a small one can unpack to a lot. None: any amount.
        ocr: the languages of text in pictures (``data.ocr.languages_of``); "": it is not recognised.
        reader: a function of a module that the workers can import; gets a path, and a ``Recogniser`` with ``ocr``.

    Raises:
        MissingExtraError: a format needs a library that is not installed.
    """
    pool = _Pool(paths, settings or ReadingSettings(), chars, ocr, reader)
    try:
        for index in range(len(paths)):
            yield pool.outcome(index)
    finally:
        pool.close()


@dataclass(eq=False)
class _Worker:
    """A process that reads files. ``file_index`` is that of the file that it is reading, if any, until ``deadline``.

    ``has_started`` is false as long as it imports what it needs.
    """

    process: subprocess.Popen[bytes]
    messages: IO[bytes]  # its standard error
    file_index: int | None = None
    deadline: float = 0.0
    num_files: int = 0
    has_started: bool = False

    def reason_of_death(self, limit: int) -> str:
        """How the process ended, with the last line that it wrote on standard error; ``limit``: of its memory."""
        status = self.process.wait()
        self.messages.seek(0)
        lines = self.messages.read().decode(errors="replace").strip().splitlines()
        message = f": {lines[-1].strip()[:200]}" if lines else ""
        if status >= 0:
            return f"its parser ended with exit status {status}{message}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        memory = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        if name in _OUT_OF_MEMORY:  # compiled code ends like this if it is given no more memory
            memory = f", perhaps because it takes more than {_gibibytes(limit)} of memory"
        return f"its parser was ended by {name}{memory}{message}"

    def close(self) -> None:
        """End the process, even if it is reading."""
        with contextlib.suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it has started
            else:
                self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # what was not sent to it
            cast("IO[bytes]", self.process.stdin).close()
        self.messages.close()


class _Pool:
    """The workers that read some files; used by one thread."""

    def __init__(
        self,
        paths: Sequence[Path],
        settings: ReadingSettings,
        chars: TextLimits | None,
        ocr: str,
        reader: Reader,
    ) -> None:
        self._paths, self._reader = paths, reader
        self._seconds, self._memory = settings.seconds_per_file, settings.memory_per_file
        limits = None if chars is None else asdict(chars)
        self._request = {"seconds": self._seconds, "memory": self._memory, "chars": limits, "ocr": ocr}
        self._workers: list[_Worker] = []
        self._replies: SimpleQueue[tuple[_Worker, bytes]] = SimpleQueue()
        self._outcomes: dict[int, Outcome] = {}
        self._again: list[int] = []  # files to try in a new worker
        self._next = 0
        self._waited = 0.0  # seconds
        self._max_workers = min(usable_cores(), _MAX_WORKERS)

    def outcome(self, index: int) -> Outcome:
        """Wait until a file has been read. Call for each file once, in order."""
        self._assign(index)
        while index not in self._outcomes:
            began = time.monotonic()
            self._receive()
            self._waited += time.monotonic() - began
            self._assign(index)
        return self._outcomes.pop(index)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def _assign(self, oldest: int) -> None:
        """Give files to idle and to new workers, as long as not too many are read ahead of the oldest."""
        while self._again and len(self._workers) < self._max_workers:
            self._send(self._start(), self._again.pop())
        limit = self._max_workers if self._waited > _PATIENCE_SECONDS else 1
        while self._next < min(len(self._paths), oldest + 2 * self._max_workers):
            worker = next((worker for worker in self._workers if worker.file_index is None), None)
            if worker is None and len(self._workers) < limit:
                worker = self._start()
            if worker is None:
                return
            self._send(worker, self._next)
            self._next += 1

    def _start(self) -> _Worker:
        program = _PROGRAM.format(__name__)
        function = [self._reader.__module__, self._reader.__name__]
        messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(sys.path), *function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            start_new_session=True,  # Ctrl-C is for the main process
        )
        worker = _Worker(process, messages)
        Thread(target=self._listen, args=(worker,), name="d2llm-parser", daemon=True).start()
        self._workers.append(worker)
        return worker

    def _listen(self, worker: _Worker) -> None:
        """Hand on what a worker writes, and at last an empty line."""
        with cast("IO[bytes]", worker.process.stdout) as lines:
            for line in lines:
                self._replies.put((worker, line))
        self._replies.put((worker, b""))

    def _send(self, worker: _Worker, index: int) -> None:
        worker.file_index = index
        worker.deadline = time.monotonic() + self._limit(worker)
        request = {"path": str(self._paths[index]), **self._request}
        with contextlib.suppress(OSError):  # it has died while idle, which its listener reports
            pipe = cast("IO[bytes]", worker.process.stdin)
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.flush()

    def _limit(self, worker: _Worker) -> float:
        """How many seconds a worker may take to read a file, or first to start."""
        return self._seconds if worker.has_started else _START_SECONDS

    def _receive(self) -> None:
        """Wait for a reply, the end of a worker or a deadline."""
        deadline = min(worker.deadline for worker in self._workers if worker.file_index is not None)
        try:
            worker, line = self._replies.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            for worker in [busy for busy in self._workers if busy.file_index is not None and busy.deadline <= deadline]:
                too_slow = "to read" if worker.has_started else "to start its parser"
                self._remove(worker, UnreadableFileError(f"it takes more than {self._limit(worker):g} s {too_slow}"))
            return
        if worker not in self._workers:  # it was ended
            return
        if line == b"\n":
            worker.has_started = True
            worker.deadline = time.monotonic() + self._limit(worker)
        elif line.endswith(b"\n") and worker.file_index is not None:
            self._outcomes[worker.file_index] = _outcome(json.loads(line))
            worker.file_index = None
            worker.num_files += 1
        elif worker.file_index is not None and worker.num_files:
            self._again.append(worker.file_index)
            self._remove(worker)
        else:
            self._remove(worker, UnreadableFileError(worker.reason_of_death(self._memory)))

    def _remove(self, worker: _Worker, error: UnreadableFileError | None = None) -> None:
        if worker.file_index is not None and error is not None:
            self._outcomes[worker.file_index] = error
        self._workers.remove(worker)
        worker.close()


def _outcome(reply: dict[str, Any]) -> Outcome:
    if "missing" in reply:
        raise MissingExtraError(reply["missing"])
    if "unreadable" in reply:
        return UnreadableFileError(reply["unreadable"])
    sections = (Section(text, tuple(headings), page) for text, headings, page in reply["sections"])
    rows = (
        Passage(name, text, title, document_id, position, _unpacked(metadata))
        for name, text, title, document_id, position, metadata in reply["rows"]
    )
    return FileContents(
        reply["title"],
        tuple(sections),
        _unpacked(reply["metadata"]),
        tuple(rows),
        is_corpus=reply["is_corpus"],
        columns=tuple(reply["columns"]),
        skipped=tuple(SkippedPart(name, reason) for name, reason in reply["skipped"]),
        has_pictures=reply["has_pictures"],
    )


def _packed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as JSON can have them: each value with whether it is a time."""
    return {
        name: [value.isoformat(), True] if isinstance(value, datetime) else [value, False]
        for name, value in metadata.items()
    }


def _unpacked(metadata: Mapping[str, tuple[Any, bool]]) -> dict[str, MetadataValue]:
    return {name: datetime.fromisoformat(value) if is_time else value for name, (value, is_time) in metadata.items()}


def serve(module: str, function: str) -> None:
    """Read the files whose paths are on standard input, and write what they contain to standard output, as JSON."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a parser prints is no reply
    with contextlib.suppress(OSError):  # if memory runs out, Linux ends this process before the main one
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    reader: Reader = getattr(import_module(module), function)
    replies.write(b"\n")
    replies.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["seconds"] + _GRACE_SECONDS, exit=True)
        _limit_memory(request["memory"])
        try:
            chars = None if request["chars"] is None else TextLimits(**request["chars"])
            recognisers = [Recogniser(request["ocr"], request["seconds"])] if request["ocr"] else []
            reply = json.dumps(_reply(reader, Path(request["path"]), recognisers, chars)).encode()
            ran_out = False
        except MemoryError:
            reason = f"it takes more than {_gibibytes(request['memory'])} of memory to read"
            reply, ran_out = json.dumps({"unreadable": reason}).encode(), True
        replies.write(reply + b"\n")
        replies.flush()
        faulthandler.cancel_dump_traceback_later()
        if ran_out:  # what it still holds is not the next file's fault
            return


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"


def _reply(reader: Reader, path: Path, recognisers: Sequence[Recogniser], chars: TextLimits | None) -> dict[str, Any]:
    try:
        contents = reader(path, *recognisers)
    except MissingExtraError as error:
        return {"missing": str(error)}
    except UnreadableFileError as error:
        return {"unreadable": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - one file must not end the work
        return {"unreadable": f"it cannot be parsed ({type(error).__name__}: {error})"}
    if chars is not None and (problem := chars.problem_of(contents)) is not None:
        return {"unreadable": problem}
    return {
        "title": contents.title,
        "sections": [(section.text, section.headings, section.page) for section in contents.sections],
        "metadata": _packed(contents.metadata),
        "rows": [
            (row.id, row.text, row.title, row.document_id, row.position, _packed(row.metadata)) for row in contents.rows
        ],
        "is_corpus": contents.is_corpus,
        "columns": contents.columns,
        "skipped": [(part.name, part.reason) for part in contents.skipped],
        "has_pictures": contents.has_pictures,
    }
