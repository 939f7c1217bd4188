"""One call of the command line: what to print, and where."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import date
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from d2llm.core.errors import InputError
from d2llm.core.settings import Settings

if TYPE_CHECKING:
    import typer
    from rich.console import Console, RenderableType

    from d2llm.core.document import Document

STANDARD_INPUT, STANDARD_OUTPUT = "standard input", "standard output"
SCHEMA_VERSION = 1
"""Version of the schema of the files that ``--json`` writes."""
GIVEN = "d2llm.given"
"""Where the words of the command line are until there is a session."""
_FILE_WIDTH = 140  # width of tables that go to a file or another program


@dataclass(frozen=True)
class Session:
    """Results go to standard output; progress, remarks, warnings and errors to standard error.

    If a file is written to standard output (``--json -``), results go to standard error as well.
    """

    verbose: bool = False
    quiet: bool = False
    given: tuple[str, ...] = ()
    """The words of the command line, as they were given."""
    streams: dict[str, str] = field(default_factory=dict[str, str])
    """For each stream that an option names, the option or the file with a copy of what was read from it."""

    def take(self, stream: str, user: str) -> None:
        """Note what uses a stream; standard input is read, and standard output written, only once.

        Raises:
            InputError: something else uses it already.
        """
        if stream in self.streams:
            raise InputError(f"{stream} is given twice, but can only be used once; give a file for one of them")
        self.streams[stream] = user

    @cached_property
    def _out(self) -> Console:
        from rich.console import Console

        if STANDARD_OUTPUT in self.streams:  # which then has the file alone, for other programs to read
            return self._err
        console = Console(highlight=False, emoji=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = _FILE_WIDTH
        return console

    @cached_property
    def _err(self) -> Console:
        from rich.console import Console

        return Console(stderr=True, highlight=False, emoji=False)

    @property
    def has_styles(self) -> bool:
        """Whether results are shown in bold and colours."""
        return self._out.is_terminal

    def show(self, result: RenderableType) -> None:
        """Print a result."""
        # Tables and wrapped texts respect the width; only ids are wider, and must stay in one piece to be copied.
        with self._out.capture() as captured:
            self._out.print(result, markup=False, crop=False)
        shown = captured.get()
        if not self._out.is_terminal:  # rich fills each line up to the width
            shown = re.sub(r" +$", "", shown, flags=re.MULTILINE)
        self._out.file.write(shown)

    def write(self, text: str) -> None:
        """Print a text exactly as it is, for other programs to read."""
        self._out.file.write(text + "\n")

    def say(self, remark: str) -> None:
        """Print a remark; silent with ``--quiet``."""
        if not self.quiet:
            self._err.print(remark, markup=False, soft_wrap=True)

    def complain(self, kind: str, message: str) -> None:
        """Print an error or a warning as one line, to be searched for; the copy of a stream has its name."""
        for stream, user in self.streams.items():
            message = message.replace(user, stream) if Path(user).is_absolute() else message
        style = "red" if kind == "error" else "yellow"
        self._err.print(f"{kind}: {message}", markup=False, soft_wrap=True, style=style)

    def write_document(self, document: Document, markdown: Path | None = None, html: Path | None = None) -> None:
        """Write a report for people to read, where a path is given."""
        from d2llm.core.files import write_bytes

        if markdown is not None:
            write_bytes(markdown, document.to_markdown().encode())
        if html is not None:
            from d2llm.reports.html import page

            write_bytes(html, page(document).encode())

    def write_report(self, context: typer.Context, path: Path | None, result: object) -> None:
        """Write the result of a verb with its arguments as JSON; nothing if ``path`` is None."""
        if path is None:
            return
        from d2llm import __version__
        from d2llm.core.files import write_json

        names = {copy: stream for stream, copy in self.streams.items()}
        arguments = {name: _named(value, names) for name, value in context.params.items() if name != "json_path"}
        report = {
            "schema_version": SCHEMA_VERSION,
            "d2llm": __version__,
            "verb": context.info_name,
            "arguments": _plain(arguments),
            "result": _plain(result),
        }
        write_json(path, report)

    def write_lines(self, path: Path | None, rows: Iterable[object]) -> None:
        """Write one line of JSON for each row; nothing if ``path`` is None."""
        if path is None:
            return
        from d2llm.core.files import write_bytes

        lines = (json.dumps(_plain(row), ensure_ascii=False) for row in rows)
        write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def session_of(context: typer.Context) -> Session:
    """The session that the program's options created."""
    return cast(Session, context.obj)


_REMARKS = "d2llm.remarks"
"""The logger of remarks, which deserve a line on the screen but are not warnings."""


class _Relay(logging.Handler):
    """Shows log records through a session, so that they do not break a progress bar."""

    def __init__(self, session: Session, threshold: int, *, repeats: bool) -> None:
        super().__init__()
        self._session, self._threshold, self._repeats = session, threshold, repeats
        self._warnings: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record; the same warning again only with ``repeats``."""
        message = record.getMessage()
        if record.name == _REMARKS:
            self._session.say(message)
        elif record.levelno >= self._threshold and (self._repeats or message not in self._warnings):
            self._session.complain(record.levelname.lower(), message)
            if not self._repeats:
                self._warnings.add(message)


def start_logging(session: Session, *, repeats: bool = False) -> Callable[[], None]:
    """Show remarks and warnings (``--quiet``: errors only; ``--verbose``: everything).

    A warning is shown once, though each step that reads a data set finds the same; with ``repeats``, which is for
    verbs that never end, whenever it occurs.

    Returns:
        A function that restores the previous logging.
    """
    logger, remarks = logging.getLogger("d2llm"), logging.getLogger(_REMARKS)
    level = logger.level
    remarks.setLevel(logging.INFO)
    threshold = logging.DEBUG if session.verbose else logging.ERROR if session.quiet else logging.WARNING
    handler = _Relay(session, threshold, repeats=repeats or session.verbose)
    logger.addHandler(handler)
    if session.verbose:
        logger.setLevel(logging.DEBUG)
    else:
        _hush_libraries()

    def stop() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)
        remarks.setLevel(logging.NOTSET)

    return stop


def _hush_libraries() -> None:
    """Silence progress bars and advice of libraries, which users of the command line cannot act on."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")


def _named(value: object, names: Mapping[str, str]) -> object:
    """An argument as it was given, where it is the copy of a stream."""
    if isinstance(value, list):
        return [_named(item, names) for item in cast("list[object]", value)]
    return names.get(str(value), value) if isinstance(value, str | Path) else value


def _plain(value: object) -> Any:
    """Convert dataclasses, paths, dates, numpy numbers and containers to plain JSON; NaN and infinity become null."""
    if hasattr(value, "to_json"):
        value = cast(Any, value).to_json()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Settings):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in cast("list[object]", value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, date):  # a time, too
        return value.isoformat()
    if hasattr(value, "tolist"):  # numpy, whole arrays too
        return _plain(cast(Any, value).tolist())
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value
