"""The remote teacher: an LLM behind an OpenAI-compatible endpoint that returns next-token log-probabilities.

It uses the prompt of a local causal teacher (``models.teachers.causal``), with one request per pair and one token per
answer. The log-odds are logp(yes) - logp(no) for exactly the answer words of the prompt set, including space and case:
" yes", "Yes" and "yes" are different tokens, and only one of them is the answer that the prompt asks for.

An endpoint returns only the most likely tokens. If one answer word is not among them, its log-probability is at most
the smallest one returned, and that value is used: the log-odds are then a bound, and counted as such. If both are
missing, nothing is known about the pair: depending on ``remote.unanswered``, this is an error, or the pair is counted
as undecided (log-odds 0).

``RemoteTeacher`` makes log-odds of answers; ``Endpoint`` sends the requests, with rate limit and retries.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from d2llm.core.errors import AnswerTokenError, InputError, ModelError, ModelNotFoundError
from d2llm.core.extras import require
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.recipe import RemoteConfig, TeacherConfig
from d2llm.core.types import TASKS, Task
from d2llm.models.teachers.identity import TeacherIdentity
from d2llm.models.teachers.judge import Judgements, TextPair
from d2llm.models.teachers.prompts import Prompt, load_prompt
from d2llm.ops.truncation import cut_pair

if TYPE_CHECKING:
    import httpx2
    import tenacity

_log = logging.getLogger(__name__)

_TRIAL: TextPair = ("what do cows drink", "Cows drink water.")
_SPACES = str.maketrans("▁Ġ", "  ")  # how vocabularies write a leading space; some endpoints return it in this form
_LONGEST_BACK_OFF = 60.0  # seconds
_LONG_WAIT = 10.0  # seconds: waits of at least this long are logged as warnings
_TOO_LONG = re.compile(r"context.?(length|window|size)|maximum (model|input|context)|too long|longer than", re.I)
_UNKNOWN_MODEL = re.compile(
    r"model.*(not exist|not found|unknown)|(unknown|no such|invalid) model|model_not_found", re.I
)
_QUOTED = 300  # characters of a server's message to quote


class RemoteTeacher:
    """A teacher at a remote endpoint; ``fingerprint`` depends on its model name and declared revision, not its address.

    Raises:
        InputError: there is no section ``remote``, no such prompt set, or the key's variable is not set.
        AnswerTokenError: yes and no are the same word.
        ModelNotFoundError: the tokenizer cannot be loaded.
        MissingExtraError: the extra ``remote`` is not installed.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.remote = _section(config)
        self.prompts = {task: load_prompt(config.prompt, task) for task in TASKS}
        for task, prompt in self.prompts.items():
            if prompt.yes == prompt.no:
                raise AnswerTokenError(f"prompt '{config.prompt}' ({task}): yes and no are both {prompt.yes!r}")
        self.endpoint = Endpoint(config.model, self.remote)
        self._tokenizer = _load_tokenizer(self.remote.tokenizer)
        self._reported = False

    @classmethod
    def load(cls, config: TeacherConfig, *, device: Any = None, dtype: Any = None) -> RemoteTeacher:
        """Create a teacher and send one trial request, so that a wrong address, key or model is reported at once.

        ``device`` and ``dtype`` do not apply to a remote teacher and are ignored.

        Raises:
            ModelNotFoundError: the endpoint has no such model, or the address does not exist.
            ModelError: the endpoint is unreachable, refuses the key, or gives no log-probabilities.
        """
        del device, dtype
        teacher = cls(config)
        teacher.endpoint.ask([_join(teacher.prompts["asymmetric"], *_TRIAL)])
        return teacher

    @staticmethod
    def identify(config: TeacherConfig) -> TeacherIdentity:
        """The identity of ``load(config)``, computed without contacting the endpoint.

        Raises:
            InputError: there is no section ``remote``, or no such prompt set.
        """
        remote = _section(config)
        fingerprint = fingerprint_json(["remote", config.model, remote.revision])
        return TeacherIdentity(fingerprint, {task: _fingerprint_prompt(config, remote, task) for task in TASKS})

    @property
    def fingerprint(self) -> str:
        """Fingerprint of model name and revision."""
        return self.identify(self.config).fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """Identity of the question and of all settings that affect how a pair is cut or its answer is read."""
        return _fingerprint_prompt(self.config, self.remote, task)

    def judge(
        self,
        pairs: Sequence[TextPair],
        task: Task,
        *,
        with_features: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Judgements:
        """Judge pairs (``Judge.judge``). ``features`` is None, because an endpoint returns no states.

        The pairs of one query are sent one after the other, so that a server with prefix caching reads the query only
        once. ``advance`` is called from another thread.

        Raises:
            AnswerTokenError: neither answer word was returned for some pair, and ``remote.unanswered`` is ``error``.
            InputError: a pair is longer than the endpoint can read, or the prompt alone fills ``max_tokens``.
            ModelError: the endpoint failed for longer than ``remote.patience_minutes``, or refuses requests.
        """
        del with_features
        prompt = self.prompts[task]
        texts, cut_here = self._write(prompt, pairs)
        query_order: dict[str, int] = {}
        for query, _ in pairs:
            query_order.setdefault(query, len(query_order))
        order = sorted(range(len(pairs)), key=lambda index: query_order[pairs[index][0]])
        answers: dict[int, NextToken] = dict(
            zip(order, self.endpoint.ask([texts[index] for index in order], advance=advance), strict=True)
        )
        log_odds = np.zeros(len(pairs), dtype=np.float32)
        bounded: list[int] = []
        unanswered: list[int] = []
        for index in range(len(pairs)):
            value, is_exact = read_log_odds(answers[index].log_probabilities, prompt)
            if value is None:
                unanswered.append(index)
            else:
                log_odds[index] = value
                if not is_exact:
                    bounded.append(index)
        if unanswered and self.remote.unanswered == "error":
            raise self._unanswered(len(unanswered), len(pairs), pairs[unanswered[0]], answers[unanswered[0]], prompt)
        lengths = self._count(texts)
        num_read = [answers[index].num_prompt_tokens for index in range(len(pairs))]
        cut_there = [n is not None and sent is not None and n < sent for n, sent in zip(num_read, lengths, strict=True)]
        self._report(len(pairs), len(bounded), len(unanswered), sum(cut_there))
        return Judgements(
            log_odds,
            None,
            num_truncated=sum(here or there for here, there in zip(cut_here, cut_there, strict=True)),
            num_tokens=sum(n or sent or 0 for n, sent in zip(num_read, lengths, strict=True)),
            num_bounded=len(bounded),
            num_undecided=len(unanswered),
        )

    def _write(self, prompt: Prompt, pairs: Sequence[TextPair]) -> tuple[list[str], list[bool]]:
        """The text to send for each pair, and whether it was cut, by the same rule as for a local teacher."""
        distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
        ends = dict(zip(distinct, self._ends(distinct), strict=True))
        room = self._room(prompt)
        texts: list[str] = []
        cut: list[bool] = []
        for query, passage in pairs:
            kept = cut_pair((query, passage), (ends[query], ends[passage]), room)
            texts.append(_join(prompt, *kept))
            cut.append(kept != (query, passage))
        return texts, cut

    def _room(self, prompt: Prompt) -> int:
        """Units (tokens, or characters without a tokenizer) left for query and passage."""
        parts = [prompt.head, prompt.middle, prompt.tail]
        limit = self.config.max_tokens
        if self._tokenizer is None:
            limit = int(limit * self.remote.characters_per_token)
        else:
            limit -= int(self._tokenizer.num_special_tokens_to_add())
        room = limit - sum(map(len, self._ends(parts)))
        if room < 2:
            raise InputError(
                f"max_tokens is {self.config.max_tokens}, but prompt '{self.config.prompt}' alone fills it; raise "
                "max_tokens or use a shorter prompt"
            )
        return room

    def _ends(self, texts: list[str]) -> list[Sequence[int]]:
        """Where in each text its tokens end; without a tokenizer, where its characters end."""
        if self._tokenizer is None or not texts:
            return [range(1, len(text) + 1) for text in texts]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]

    def _count(self, texts: list[str]) -> Sequence[int | None]:
        """How many tokens the endpoint should read for each text; None without a tokenizer."""
        if self._tokenizer is None or not texts:
            return [None] * len(texts)
        return [len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]]

    def _unanswered(self, count: int, num_pairs: int, pair: TextPair, answer: NextToken, prompt: Prompt) -> Exception:
        tokens = sorted(answer.log_probabilities, key=answer.log_probabilities.__getitem__, reverse=True)
        reason = f"the most likely are {tokens[:5]}" if tokens else "the model ended its text at once"
        return AnswerTokenError(
            f"'{self.config.model}' at {self.remote.url}: for {count} of {num_pairs} pairs neither {prompt.yes!r} nor "
            f"{prompt.no!r} is among the {self.remote.top_logprobs} most likely next tokens; the first is query "
            f"{pair[0][:60]!r}, where {reason}. Use a prompt with the answer words that the model gives (mind case and "
            "leading space), raise teacher.remote.top_logprobs, or count such pairs as undecided "
            '(teacher.remote.unanswered = "undecided")'
        )

    def _report(self, num_pairs: int, num_bounded: int, num_undecided: int, num_cut_there: int) -> None:
        """Log bounded, undecided or cut pairs: a warning the first time, later only at level INFO."""
        if not (num_bounded or num_undecided or num_cut_there):
            return
        level = logging.INFO if self._reported else logging.WARNING
        self._reported = True
        _log.log(
            level,
            "of %d pairs judged by %s: %d log-odds are bounds (one answer word not among the %d most likely tokens), "
            "%d undecided (neither), %d cut by the server",
            *(num_pairs, self.remote.url, num_bounded, self.remote.top_logprobs, num_undecided, num_cut_there),
        )


def read_log_odds(log_probabilities: dict[str, float], prompt: Prompt) -> tuple[float | None, bool]:
    """logp(yes) - logp(no), and whether it is exact rather than a bound; None if neither word is returned."""
    probabilities = {token.translate(_SPACES): value for token, value in log_probabilities.items()}
    if prompt.yes not in probabilities and prompt.no not in probabilities:
        return None, False
    least = min(probabilities.values())
    value = probabilities.get(prompt.yes, least) - probabilities.get(prompt.no, least)
    return value, prompt.yes in probabilities and prompt.no in probabilities


def _section(config: TeacherConfig) -> RemoteConfig:
    if config.remote is None:
        raise InputError(f"the remote teacher '{config.model}' has no address; add [teacher.remote] with url = ...")
    return config.remote


def _fingerprint_prompt(config: TeacherConfig, remote: RemoteConfig, task: Task) -> str:
    unit = "tokens" if remote.tokenizer else remote.characters_per_token
    question = load_prompt(config.prompt, task).fingerprint
    return fingerprint_json([question, config.max_tokens, unit, remote.api, remote.top_logprobs])


def _load_tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from pathlib import Path

    from d2llm.models.sources import find_model, load_tokenizer

    # A tokenizer's folder needs no weights.
    return load_tokenizer(name if Path(name).is_dir() else find_model(name))


def _join(prompt: Prompt, query: str, passage: str) -> str:
    return f"{prompt.head}{query}{prompt.middle}{passage}{prompt.tail}"


@dataclass(frozen=True, slots=True)
class NextToken:
    """Log-probabilities of the most likely next tokens by their text, and how many tokens the endpoint read."""

    log_probabilities: dict[str, float]
    num_prompt_tokens: int | None


class _BusyError(Exception):
    """A temporary failure that can be retried; ``wait`` is the delay in seconds that the endpoint requests."""

    def __init__(self, reason: str, *, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoLogProbabilitiesError(Exception):
    """The answer is a completion without log-probabilities."""


class _RateLimiter:
    """Starts one request at a time, at most so many per minute, and none during a pause that the endpoint requested."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def acquire(self) -> None:
        while (wait := self._next - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._next = time.monotonic() + self._interval

    def pause(self, seconds: float) -> None:
        self._next = max(self._next, time.monotonic() + seconds)


class Endpoint:
    """One model at one address.

    If the address has never answered, a failure is raised at once. Later, while the endpoint is unreachable or
    overloaded (429, 408, 5xx, timeout), requests are retried with exponential backoff and jitter for up to
    ``patience_minutes``. A delay that the endpoint requests itself (Retry-After) applies to all requests.

    Raises:
        MissingExtraError: the packages of the extra ``remote`` are not installed.
        InputError: the key's variable is not set, or holds no key.
    """

    def __init__(self, model: str, config: RemoteConfig) -> None:
        for package in ("httpx2", "tenacity"):
            require(package, extra="remote", purpose="a remote teacher")
        self.model = model
        self.config = config
        self.num_retries = 0
        path = "chat/completions" if config.api == "chat" else "completions"
        self.address = f"{config.url.rstrip('/')}/{path}"
        self._key = _read_key(config.api_key_env)
        self._rate_limiter = _RateLimiter(config.requests_per_minute)
        self._answered = False

    def ask(self, prompts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> list[NextToken]:
        """The most likely next tokens after each prompt; requests start in the order of ``prompts``.

        ``advance`` is called with 1 for each answer, from another thread.

        Raises:
            ModelNotFoundError: the endpoint has no such model, or the address does not exist.
            InputError: a prompt is longer than the model can read.
            ModelError: the endpoint is unreachable, refuses the key, or gives no log-probabilities.
        """
        from anyio.from_thread import start_blocking_portal

        answers: list[NextToken | None] = [None] * len(prompts)
        # A separate event loop in a thread works inside a notebook's loop too, and Ctrl-C cancels running requests.
        with start_blocking_portal() as portal:
            portal.call(self._ask_all, enumerate(prompts), answers, advance)
        return cast("list[NextToken]", answers)

    async def _ask_all(
        self,
        prompts: Iterator[tuple[int, str]],
        answers: list[NextToken | None],
        advance: Callable[[int], None] | None,
    ) -> None:
        import httpx2

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.config.concurrency)
        async with httpx2.AsyncClient(headers=headers, timeout=self.config.timeout_seconds, limits=limits) as client:

            async def work() -> None:
                for index, prompt in prompts:  # all workers share one iterator, so neighbours are sent together
                    answers[index] = await self._ask(client, prompt)
                    if advance is not None:
                        advance(1)

            workers = [asyncio.create_task(work()) for _ in range(min(self.config.concurrency, len(answers)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, client: httpx2.AsyncClient, prompt: str) -> NextToken:
        import tenacity

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, _BusyError) and self._answered),
            wait=_pause,
            stop=tenacity.stop_before_delay(60 * self.config.patience_minutes),
            before_sleep=self._log_retry,
            reraise=True,
        )
        try:
            return await retrying(self._post, client, prompt)
        except _BusyError as error:
            if not self._answered:
                raise ModelError(
                    f"{self.address} cannot be reached: {error}; start the server there, or correct teacher.remote.url"
                ) from error
            raise ModelError(
                f"{self.address}: {error}; retried for up to {self.config.patience_minutes:g} minutes. Run the "
                "command again when the endpoint works again: it continues where it stopped. Or raise "
                "teacher.remote.patience_minutes, or send fewer requests (concurrency, requests_per_minute)"
            ) from error

    async def _post(self, client: httpx2.AsyncClient, prompt: str) -> NextToken:
        import httpx2

        await self._rate_limiter.acquire()
        try:
            response = await client.post(self.address, json=self._body(prompt))
        except httpx2.TimeoutException as error:
            raise _BusyError(f"no answer within {self.config.timeout_seconds:g} seconds") from error
        except httpx2.TransportError as error:
            raise _BusyError(f"no connection ({error or type(error).__name__})") from error
        self._answered = True
        if not response.is_success:
            raise self._refusal(response)
        try:
            return _read_answer(response.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{self.address} did not answer with a completion: {self._quote(response)}; give the address of an "
                "OpenAI-compatible endpoint, up to /v1"
            ) from error
        except _NoLogProbabilitiesError as error:
            raise self._no_log_probabilities(str(error)) from error

    def _body(self, prompt: str) -> dict[str, Any]:
        common = {"model": self.model, "max_tokens": 1, "temperature": 0}
        if self.config.api == "chat":
            messages = [{"role": "user", "content": prompt}]
            return {**common, "messages": messages, "logprobs": True, "top_logprobs": self.config.top_logprobs}
        return {**common, "prompt": prompt, "logprobs": self.config.top_logprobs}

    def _refusal(self, response: httpx2.Response) -> Exception:
        """The exception for an unsuccessful response, from its status and text."""
        status, reason = response.status_code, self._quote(response)
        if "logprobs" in reason:  # must come first: llama-cpp-python reports this with status 500
            return self._no_log_probabilities(f"it says {reason}")
        if status in (401, 403):
            remedy = f"check the key in {self.config.api_key_env}" if self._key else "set teacher.remote.api_key_env"
            return ModelError(
                f"{self.address} refuses {'the key' if self._key else 'access'} ({status}): {reason}; {remedy}"
            )
        if status in (408, 429) or status >= 500:
            wait = _retry_after(response.headers.get("Retry-After"))
            if wait:
                self._rate_limiter.pause(wait)
            return _BusyError(f"answers {status}: {reason}", wait=wait)
        if status == 404 or _UNKNOWN_MODEL.search(reason):
            return ModelNotFoundError(
                f"{self.address} has no model '{self.model}', or the address is wrong ({status}): {reason}; check "
                "teacher.model and teacher.remote.url (up to /v1)"
            )
        if status == 413 or _TOO_LONG.search(reason):
            return InputError(
                f"{self.address}: a prompt is longer than '{self.model}' can read there ({status}): {reason}; lower "
                "teacher.max_tokens (or characters_per_token, or set the tokenizer in teacher.remote), or start the "
                "server with a longer context"
            )
        return ModelError(
            f"{self.address} refuses the request ({status}): {reason}; check [teacher.remote], "
            'first whether the model is served by api = "completions" or "chat"'
        )

    def _no_log_probabilities(self, problem: str) -> ModelError:
        return ModelError(
            f"{self.address} does not return the log-probabilities of {self.config.top_logprobs} tokens: {problem}; "
            "lower teacher.remote.top_logprobs, or start the server so that it returns them (vLLM: --max-logprobs)"
        )

    def _quote(self, response: httpx2.Response) -> str:
        """The beginning of the server's message, on one line and without the key."""
        text = response.text
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + " ...")

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        self.num_retries += 1
        wait = state.next_action.sleep if state.next_action else 0.0
        error = state.outcome.exception() if state.outcome else None
        level = logging.WARNING if wait >= _LONG_WAIT else logging.INFO
        _log.log(level, "%s: %s; trying again in %.1f seconds", self.address, error, wait)


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"the environment variable {variable} is not set; put the endpoint's key there")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"the environment variable {variable} holds characters that no key has; set it again")
    return key


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try: the endpoint's own delay, or else a random time up to 1, 2, 4 ... 60."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _BusyError) and error.wait is not None:
        return error.wait
    return random.uniform(0, min(_LONGEST_BACK_OFF, 2.0 ** (state.attempt_number - 1)))


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a header with seconds or a date; None if it is missing or unreadable."""
    if header is None:
        return None
    try:
        if re.fullmatch(r"\s*[0-9.]+\s*", header):
            return float(header)
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


def _read_answer(answer: Any) -> NextToken:
    """Parse the JSON of an answer, in the completions or the chat form (llama.cpp uses the chat form for both)."""
    logprobs = answer["choices"][0].get("logprobs")
    if logprobs is None:
        raise _NoLogProbabilitiesError("the answer has none")
    content = _chat_form(logprobs["content"]) if "content" in logprobs else _completion_form(logprobs["top_logprobs"])
    if len(content) == 1:
        raise _NoLogProbabilitiesError("the answer has only that of the chosen token")
    usage = answer.get("usage") or {}
    return NextToken(content, usage.get("prompt_tokens"))


def _completion_form(positions: Any) -> dict[str, float]:
    # No position: the model's first token was its end token, which the endpoint omits.
    return _highest(positions[0].items()) if positions else {}


def _chat_form(positions: Any) -> dict[str, float]:
    return _highest((item["token"], item["logprob"]) for item in positions[0]["top_logprobs"]) if positions else {}


def _highest(items: Any) -> dict[str, float]:
    """Log-probabilities by text; the highest if several tokens have the same text. Non-finite values are dropped."""
    values: dict[str, float] = {}
    for token, value in items:
        if value is not None and math.isfinite(value):
            values[token] = max(float(value), values.get(token, -math.inf))
    return values
