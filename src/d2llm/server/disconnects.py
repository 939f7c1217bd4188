"""A client that goes away frees its place: the work for it is cancelled."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelWhenGone:
    """Cancels a request's work when its connection is closed before the answer is complete.

    Starlette itself goes on working for nobody. What waits in a queue is taken out of it (``batching``).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and listen for its end meanwhile."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue(1)  # one: a body is read no faster than it is used
        answered = False

        async def listen() -> None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                await messages.put(message)

        async def next_message() -> Message:
            waiting = asyncio.ensure_future(messages.get())
            await asyncio.wait({waiting, listener}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            waiting.cancel()
            return {"type": "http.disconnect"}

        async def send_on(message: Message) -> None:
            nonlocal answered
            await send(message)
            answered = answered or (message["type"] == "http.response.body" and not message.get("more_body", False))

        listener = asyncio.ensure_future(listen())
        work = asyncio.ensure_future(self.app(scope, next_message, send_on))
        try:
            await asyncio.wait({listener, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not answered:
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            listener.cancel()
            work.cancel()
