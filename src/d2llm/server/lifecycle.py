"""Whether the server can answer: starting, ready, broken or stopping."""

from __future__ import annotations

import logging
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from d2llm.server.access import is_open
from d2llm.server.errors import NotReadyError, answer_problem

State = Literal["starting", "ready", "broken", "stopping"]
_log = logging.getLogger(__name__)


class Lifecycle:
    """The state of a server, with a sentence that explains it; each change is logged."""

    def __init__(self) -> None:
        self.state: State = "starting"
        self.message = "the student and the index are being loaded"

    def become(self, state: State, message: str = "") -> None:
        """Change the state."""
        if (state, message) != (self.state, self.message):
            level = logging.ERROR if state == "broken" else logging.INFO
            _log.log(level, "%s%s", state, f": {message}" if message else "")
        self.state, self.message = state, message


class ReadyGate:
    """Answers 503 until the server is ready, except to requests that need no model."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 503."""
        state = self._lifecycle.state
        # A stopping server still answers accepted requests.
        if scope["type"] == "http" and state in ("starting", "broken") and not _needs_no_model(scope["path"]):
            error = NotReadyError(f"the server is {state}: {self._lifecycle.message}")
            await answer_problem(scope, receive, send, error.problem)
        else:
            await self.app(scope, receive, send)


def _needs_no_model(path: str) -> bool:
    return is_open(path) or path == "/metrics"
