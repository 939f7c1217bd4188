"""Work in threads that can be stopped: if its client leaves, or the time is up when the server stops."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Executor, wait
from typing import Any, TypeVar

from d2llm.server.errors import NotReadyError

_Value = TypeVar("_Value")
_Item = TypeVar("_Item")
_CHECK_SECONDS = 0.1


class Stop:
    """Tells a thread to stop; it asks between the parts of its work."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """The work is to stop."""
        self._event.set()

    def check(self) -> None:
        """Go on, or stop.

        Raises:
            NotReadyError: the work is to stop.
        """
        if self._event.is_set():
            raise NotReadyError("this was stopped before it was finished; send it again")

    def between(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items, with a check before each.

        Raises:
            NotReadyError: the work is to stop.
        """
        for item in items:
            self.check()
            yield item

    def result(self, work: Coroutine[Any, Any, _Value], loop: asyncio.AbstractEventLoop) -> _Value:
        """The result of work in the event loop, for which this thread waits.

        Raises:
            NotReadyError: the work is to stop.
        """
        future = asyncio.run_coroutine_threadsafe(work, loop)
        while not wait([future], _CHECK_SECONDS).done:
            if self._event.is_set():
                future.cancel()
                self.check()
        return future.result()


async def in_stoppable_thread(threads: Executor, work: Callable[[Stop], _Value], stop: Stop | None = None) -> _Value:
    """Run work in one of some threads, in this request's context; if the request is cancelled, it stops."""
    order, context = stop or Stop(), contextvars.copy_context()
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: context.run(work, order))
    except asyncio.CancelledError:
        order.set()
        raise
