"""A model behind an OpenAI-compatible endpoint: its requests, and errors that say what to do.

A remote teacher and a remote writer differ only in what they ask for and how they read the answer: ``Endpoint`` sends
the requests of both, and ``models.remote_retry`` sends them again.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from d2llm.core.errors import InputError, ModelError, ModelNotFoundError
from d2llm.core.extras import require
from d2llm.core.recipe import EndpointConfig
from d2llm.models.remote_retry import BusyError, Retries, retry_after

if TYPE_CHECKING:
    import httpx2

_Answer = TypeVar("_Answer")

_TOO_LONG = re.compile(r"context.?(length|window|size)|maximum (model|input|context)|too long|longer than", re.I)
_UNKNOWN_MODEL = re.compile(
    r"model.*(not exist|not found|unknown)|(unknown|no such|invalid) model|model_not_found", re.I
)
_QUOTED = 300  # characters of a server's message to quote


class Endpoint(Generic[_Answer]):
    """One model at one address.

    If the address has never answered, a failure is raised at once. Later, while the endpoint is unreachable or
    overloaded (429, 408, 5xx, timeout), requests are retried (``models.remote_retry``). A delay that the endpoint
    requests itself (Retry-After) applies to all requests.

    Args:
        model: the model's name at the endpoint.
        config: address, key and pace.
        read: makes an answer of a successful response's JSON; an answer of another form may raise any ``LookupError``,
            ``TypeError``, ``ValueError`` or ``AttributeError``.
        section: the section of the settings that names the model (``teacher``); ``config`` is its ``remote``. Errors
            name both.
        shorten: what to do if a prompt is too long, for errors.
        read_refusal: makes an answer of a refusal (its status and text), or raises an error of its own; None: it is a
            refusal like any other.

    Raises:
        MissingExtraError: the packages of the extra ``remote`` are not installed.
        InputError: the key's variable is not set, or holds no key.
    """

    def __init__(
        self,
        model: str,
        config: EndpointConfig,
        read: Callable[[Any], _Answer],
        *,
        section: str,
        shorten: str,
        read_refusal: Callable[[int, str], _Answer | None],
    ) -> None:
        for package in ("httpx2", "tenacity"):
            require(package, extra="remote", purpose=f"a remote {section}")
        self.model = model
        self.config = config
        path = "chat/completions" if config.api == "chat" else "completions"
        self.address = f"{config.url.rstrip('/')}/{path}"
        self.retries = Retries(self.address, config)
        self._read, self._read_refusal = read, read_refusal
        self._section, self._shorten = section, shorten
        self._key = _read_key(config.api_key_env)
        self._answered = False

    def send(
        self,
        prompts: Sequence[str],
        settings: Sequence[Mapping[str, Any]],
        *,
        advance: Callable[[int], None] | None = None,
    ) -> list[_Answer]:
        """The answers to prompts, in their order; requests start in this order too.

        Args:
            prompts: one for each request.
            settings: the other fields of each request's body, such as ``max_tokens``.
            advance: called with 1 for each answer, from another thread.

        Raises:
            ModelNotFoundError: the endpoint has no such model, or the address does not exist.
            InputError: a prompt is longer than the model can read.
            ModelError: the endpoint is unreachable, refuses the key, or does not answer with a completion.
        """
        from anyio.from_thread import start_blocking_portal

        bodies = [self._body(prompt, own) for prompt, own in zip(prompts, settings, strict=True)]
        answers: list[_Answer | None] = [None] * len(bodies)
        # A separate event loop in a thread works inside a notebook's loop too, and Ctrl-C cancels running requests.
        with start_blocking_portal() as portal:
            sent = portal.start_task_soon(self._send_all, enumerate(bodies), answers, advance)
            while wait([sent], timeout=1.0).not_done:
                pass  # without a limit, Python would overlook a Ctrl-C that comes just before the wait
            sent.result()
        return cast("list[_Answer]", answers)

    async def _send_all(
        self,
        bodies: Iterator[tuple[int, dict[str, Any]]],
        answers: list[_Answer | None],
        advance: Callable[[int], None] | None,
    ) -> None:
        import httpx2

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.config.concurrency)
        async with httpx2.AsyncClient(headers=headers, timeout=self.config.timeout_seconds, limits=limits) as client:

            async def work() -> None:
                for index, body in bodies:  # all workers share one iterator, so neighbours are sent together
                    answers[index] = await self._send(client, body)
                    if advance is not None:
                        advance(1)

            workers = [asyncio.create_task(work()) for _ in range(min(self.config.concurrency, len(answers)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _send(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> _Answer:
        try:
            return await self.retries.send(lambda: self._post(client, body), worth_it=lambda: self._answered)
        except BusyError as error:
            if not self._answered:
                raise ModelError(
                    f"{self.address} cannot be reached: {error}; start the server there, or correct "
                    f"{self._section}.remote.url"
                ) from error
            raise ModelError(
                f"{self.address}: {error}; {self.retries.why_ended(error)}. Run the "
                "command again when the endpoint works again: it continues where it stopped. Or raise "
                f"{self._section}.remote.patience_minutes, or send fewer requests (concurrency, requests_per_minute)"
            ) from error

    async def _post(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> _Answer:
        import httpx2

        try:
            response = await client.post(self.address, json=body)
        except httpx2.TimeoutException as error:
            raise BusyError(f"no answer within {self.config.timeout_seconds:g} seconds") from error
        except httpx2.TransportError as error:
            raise BusyError(f"no connection ({error or type(error).__name__})") from error
        self._answered = True
        if not response.is_success:
            refusal = self._read_refusal(response.status_code, self._quote(response))
            if refusal is None:
                raise self._error_of(response)
            return refusal
        try:
            return self._read(response.json())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{self.address} did not answer with a completion: {self._quote(response)}; give the address of an "
                "OpenAI-compatible endpoint, up to /v1"
            ) from error

    def _body(self, prompt: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        if self.config.api == "chat":
            return {"model": self.model, "messages": [{"role": "user", "content": prompt}], **settings}
        return {"model": self.model, "prompt": prompt, **settings}

    def _error_of(self, response: httpx2.Response) -> Exception:
        """The exception for an unsuccessful response, from its status and text."""
        status, reason = response.status_code, self._quote(response)
        if status in (401, 403):
            remedy = f"set {self._section}.remote.api_key_env"
            if self._key:
                remedy = f"check the key in {self.config.api_key_env}"
            return ModelError(
                f"{self.address} refuses {'the key' if self._key else 'access'} ({status}): {reason}; {remedy}"
            )
        if status in (408, 429) or status >= 500:
            wait = retry_after(response.headers.get("Retry-After"))
            if wait:
                self.retries.pause(wait)
            return BusyError(f"answers {status}: {reason}", wait=wait)
        if status == 404 or _UNKNOWN_MODEL.search(reason):
            return ModelNotFoundError(
                f"{self.address} has no model '{self.model}', or the address is wrong ({status}): {reason}; check "
                f"{self._section}.model and {self._section}.remote.url (up to /v1)"
            )
        if status == 413 or _TOO_LONG.search(reason):
            return InputError(
                f"{self.address}: a prompt is longer than '{self.model}' can read there ({status}): {reason}; "
                f"{self._shorten}, or start the server with a longer context"
            )
        return ModelError(
            f"{self.address} refuses the request ({status}): {reason}; check [{self._section}.remote], "
            'first whether the model is served by api = "completions" or "chat"'
        )

    def _quote(self, response: httpx2.Response) -> str:
        """The beginning of the server's message, on one line and without the key."""
        text = response.text
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + " ...")


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"the environment variable {variable} is not set; put the endpoint's key there")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"the environment variable {variable} holds characters that no key has; set it again")
    return key
