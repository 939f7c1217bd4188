"""Ctrl-C and SIGTERM in work that must not stop in the middle of a change."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from d2llm.core.errors import Terminated


class StopSignals:
    """Lets Ctrl-C and SIGTERM stop work such as a training at once, but not in the middle of a change of its state.

    Inside the block both raise ``KeyboardInterrupt`` (SIGTERM its subclass ``Terminated``), so that the work can write
    a checkpoint; a ``held`` block is finished first. Another one is ignored until the end of the block, because it
    would keep the checkpoint from being written. Signal handlers that the caller has installed are left alone, and
    outside the main thread nothing is done.
    """

    def __init__(self) -> None:
        self.is_consistent = True
        """Whether the state is between two changes; False during a change, and after an error in one."""
        self._pending: int | None = None
        self._is_stopping = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._is_stopping = False
        if threading.current_thread() is threading.main_thread():
            for signal_number, default in (
                (signal.SIGINT, signal.default_int_handler),
                (signal.SIGTERM, signal.SIG_DFL),
            ):
                if signal.getsignal(signal_number) == default:
                    self._before[signal_number] = signal.signal(signal_number, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        for signal_number, handler in self._before.items():
            signal.signal(signal_number, handler)

    @contextmanager
    def held(self) -> Generator[None]:
        """Delay a stop until the block is finished."""
        self.is_consistent = False
        yield
        self.is_consistent = True
        if self._pending is not None:
            signal_number, self._pending = self._pending, None
            self._raise(signal_number)

    def _stop(self, signal_number: int, frame: object) -> None:
        del frame
        if self._is_stopping:
            return
        if self.is_consistent:
            self._raise(signal_number)
        self._pending = signal_number

    def _raise(self, signal_number: int) -> None:
        self._is_stopping = True
        raise Terminated if signal_number == signal.SIGTERM else KeyboardInterrupt
