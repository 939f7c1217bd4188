"""The remote teacher: an LLM behind an OpenAI-compatible endpoint that returns next-token log-probabilities.

It uses the prompt of a local causal teacher (``models.teachers.causal``), with one request per pair and one token per
answer. The log-odds are logp(yes) - logp(no) for exactly the answer words of the prompt set, including space and case:
" yes", "Yes" and "yes" are different tokens, and only one of them is the answer that the prompt asks for.

An endpoint returns only the most likely tokens. If one answer word is not among them, its log-probability is at most
the smallest one returned, and that value is used: the log-odds are then a bound, and counted as such. If both are
missing, nothing is known about the pair: depending on ``remote.unanswered``, this is an error, or the pair is counted
as undecided (log-odds 0).

``RemoteTeacher`` makes log-odds of answers; ``models.remote`` sends the requests, with rate limit and retries.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from d2llm.core.errors import AnswerTokenError, InputError, ModelError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import Advance
from d2llm.core.types import TASKS, Task
from d2llm.models.remote.completions import Completions
from d2llm.models.remote.endpoint import Answers
from d2llm.models.remote.kept_answers import using
from d2llm.models.teachers.pair_teacher import (
    IdentifiedTeacher,
    InterruptibleTeacher,
    PartialScores,
    TeacherScores,
    TextPair,
)
from d2llm.models.teachers.prompts import Prompt, load_prompt
from d2llm.recipe import RemoteTeacherConfig, TeacherEndpointConfig, TeacherIdentity

_Teacher = TypeVar("_Teacher", bound="EndpointTeacher")


class EndpointTeacher(IdentifiedTeacher, InterruptibleTeacher):
    """A teacher at a remote endpoint; ``fingerprint`` depends on its model name and declared revision, not its address.

    Raises:
        InputError: there is no address, no such prompt set, or the key's variable is not set.
        ModelNotFoundError: the tokenizer cannot be loaded.
        MissingExtraError: the extra ``remote`` is not installed.
    """

    kind: ClassVar[str]

    def __init__(self, config: Any) -> None:
        self.config = config
        self.remote: Any = self.address(config)
        self._identity = self.identify(config)

    @classmethod
    def load(cls: type[_Teacher], config: Any, *, device: Any = None, dtype: Any = None) -> _Teacher:
        """Create a teacher and send one trial request, so that a wrong address, key or model is reported at once.

        ``device`` and ``dtype`` do not apply to a remote teacher and are ignored.

        Raises:
            ModelNotFoundError: the endpoint has no such model, or the address does not exist.
            ModelError: the endpoint is unreachable, refuses the key or a field of the request, or answers in a form
                that this kind cannot read.
        """
        teacher = cls(config)
        with using(None):
            error = teacher.try_out()
        if error is not None:
            raise error
        return teacher

    @classmethod
    def identify(cls, config: Any) -> TeacherIdentity:
        """The identity of ``load(config)``, computed without contacting the endpoint.

        Raises:
            InputError: there is no address, or no such prompt set.
        """
        fingerprint = fingerprint_json([cls.kind, config.model, cls.address(config).revision])
        return TeacherIdentity(fingerprint, {task: fingerprint_json(cls.question(config, task)) for task in TASKS})

    @classmethod
    def address(cls, config: Any) -> TeacherEndpointConfig:
        """The section ``remote``."""
        return config.remote

    @classmethod
    @abstractmethod
    def question(cls, config: Any, task: Task) -> list[Any]:
        """What identifies the question."""

    @abstractmethod
    def try_out(self) -> BaseException | None:
        """Send a short request; returns its error, if there is one."""


_TRIAL: TextPair = ("what do cows drink", "Cows drink water.")
_SPACES = str.maketrans("▁Ġ", "  ")  # how vocabularies write a leading space; some endpoints return it in this form


class RemoteTeacher(EndpointTeacher):
    """A teacher of one question a pair; also raises an ``AnswerTokenError`` if yes and no are the same word."""

    kind = "remote"

    def __init__(self, config: RemoteTeacherConfig) -> None:
        super().__init__(config)
        self.prompts = {task: load_prompt(config.prompt, task) for task in TASKS}
        for task, prompt in self.prompts.items():
            if prompt.yes == prompt.no:
                raise AnswerTokenError(f"prompt '{config.prompt}' ({task}): yes and no are both {prompt.yes!r}")
        self.endpoint = Completions(
            config.model,
            self.remote,
            self._read,
            kept_as=NextToken,
            section="teacher",
            shorten="lower teacher.max_tokens (or characters_per_token, or set the tokenizer in teacher.remote)",
            read_refusal=self._read_refusal,
        )

    @classmethod
    def question(cls, config: RemoteTeacherConfig, task: Task) -> list[Any]:
        """Prompt, how a pair is cut, and what is asked for."""
        remote = config.remote
        unit = "tokens" if remote.tokenizer else remote.characters_per_token
        sent = remote.body(max_tokens=1, temperature=0)
        prompt = load_prompt(config.prompt, task).fingerprint
        return [prompt, config.max_tokens, unit, remote.api, remote.top_logprobs, sent]

    def try_out(self) -> BaseException | None:
        """Ask about a pair."""
        return self._ask([self.prompts["asymmetric"].fill(*_TRIAL)]).error

    def score_until_error(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> PartialScores:
        """Score pairs until the first error (``InterruptibleTeacher``); a pair that must not be undecided is not
        scored.

        ``features`` is None, because an endpoint returns no states. The pairs of one query are sent one after the
        other, so that a server with prefix caching reads the query only once. ``advance`` is called from another
        thread. The errors are:

        - AnswerTokenError: neither answer word was returned for some pair, and ``remote.unanswered`` is ``error``.
        - InputError: a pair is longer than the endpoint can read, or the prompt alone fills ``max_tokens``.
        - ModelError: the endpoint failed for longer than ``remote.patience_minutes``, or refuses requests.
        """
        prompt = self.prompts[task]
        texts, cut_here = self._write(prompt, pairs)
        query_order: dict[str, int] = {}
        for query, _ in pairs:
            query_order.setdefault(query, len(query_order))
        order = sorted(range(len(pairs)), key=lambda index: query_order[pairs[index][0]])
        asked = self._ask([texts[index] for index in order], advance=advance)
        answers, error = {order[row]: answer for row, answer in asked.by_index.items()}, asked.error
        log_odds = np.zeros(len(pairs), dtype=np.float32)
        bounded: list[int] = []
        unanswered: list[int] = []
        for index in sorted(answers):
            value, is_exact = read_log_odds(answers[index].log_probabilities, prompt)
            if value is None:
                unanswered.append(index)
            else:
                log_odds[index] = value
                if not is_exact:
                    bounded.append(index)
        is_scored = np.zeros(len(pairs), np.bool_)
        is_scored[[*answers]] = True
        if unanswered and self.remote.unanswered == "error":
            first = unanswered[0]
            error = error or self._unanswered(len(unanswered), len(pairs), pairs[first], answers[first], prompt)
            is_scored[unanswered] = False
            unanswered = []
        lengths = self.endpoint.lengths.count(texts)
        num_read = {index: answer.num_prompt_tokens for index, answer in answers.items()}
        cut_there = {
            index for index, read in num_read.items() if read is not None and read < (lengths[index] or 0)
        }  # fmt: skip
        num_tokens = sum(read or lengths[index] or 0 for index, read in num_read.items())
        if bounded or unanswered or cut_there:
            self.endpoint.warn_once(
                "read",
                "of %d pairs scored, %d log-odds are bounds (one answer word not among the %d most likely tokens), %d "
                "undecided (neither), %d cut by the server",
                *(len(answers), len(bounded), self.remote.top_logprobs, len(unanswered), len(cut_there)),
            )
        scores = TeacherScores(
            log_odds,
            None,
            num_truncated=sum(cut_here[index] or index in cut_there for index in np.flatnonzero(is_scored).tolist()),
            num_tokens=num_tokens,
            num_written_tokens=len(answers),
            cost=self.remote.cost(num_tokens, len(answers)) or 0.0,
            num_bounded=len(bounded),
            num_undecided=len(unanswered),
        )
        return PartialScores(scores, is_scored, error)

    def _ask(self, texts: Sequence[str], *, advance: Advance | None = None) -> Answers[NextToken]:
        settings = self.remote.body(max_tokens=1, temperature=0)
        if self.remote.api == "chat":
            settings |= {"logprobs": True, "top_logprobs": self.remote.top_logprobs}
        else:
            settings |= {"logprobs": self.remote.top_logprobs}
        return self.endpoint.complete(texts, [settings] * len(texts), advance=advance)

    def _read(self, answer: Any) -> NextToken:
        """Parse the JSON of an answer, in the completions or the chat form (llama.cpp uses the chat form for both)."""
        logprobs = answer["choices"][0].get("logprobs")
        if logprobs is None:
            raise self._no_log_probabilities("the answer has none")
        content = (
            _chat_form(logprobs["content"]) if "content" in logprobs else _completion_form(logprobs["top_logprobs"])
        )
        if len(content) == 1:
            raise self._no_log_probabilities("the answer has only that of the chosen token")
        usage = answer.get("usage") or {}
        return NextToken(content, usage.get("prompt_tokens"))

    def _read_refusal(self, status: int, reason: str) -> None:
        del status  # llama-cpp-python reports this with status 500
        if "logprobs" in reason:
            raise self._no_log_probabilities(f"it says {reason}")

    def _no_log_probabilities(self, problem: str) -> ModelError:
        return ModelError(
            f"{self.endpoint.address} does not return the log-probabilities of {self.remote.top_logprobs} tokens: "
            f"{problem}; lower teacher.remote.top_logprobs, or start the server so that it returns them (vLLM: "
            "--max-logprobs)"
        )

    def _write(self, prompt: Prompt, pairs: Sequence[TextPair]) -> tuple[list[str], list[bool]]:
        """The text to send for each pair, and whether it was cut, by the same rule as for a local teacher."""
        kept = self.endpoint.lengths.cut(pairs, self._room(prompt))
        return [prompt.fill(*pair) for pair in kept], [cut != pair for cut, pair in zip(kept, pairs, strict=True)]

    def _room(self, prompt: Prompt) -> int:
        """Units (tokens, or characters without a tokenizer) left for query and passage."""
        texts = [prompt.head, prompt.middle, prompt.tail]
        limit = self.endpoint.lengths.room(self.config.max_tokens)
        if self.endpoint.lengths.tokenizer is not None:
            limit -= int(self.endpoint.lengths.tokenizer.num_special_tokens_to_add())
        room = limit - sum(map(len, self.endpoint.lengths.ends(texts))) - 2 * len(prompt.space)
        if room < 2:
            raise InputError(
                f"max_tokens is {self.config.max_tokens}, but prompt '{self.config.prompt}' alone fills it; raise "
                "max_tokens or use a shorter prompt"
            )
        return room

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


def read_log_odds(log_probabilities: dict[str, float], prompt: Prompt) -> tuple[float | None, bool]:
    """logp(yes) - logp(no), and whether it is exact rather than a bound; None if neither word is returned."""
    probabilities = {token.translate(_SPACES): value for token, value in log_probabilities.items()}
    if prompt.yes not in probabilities and prompt.no not in probabilities:
        return None, False
    least = min(probabilities.values())
    value = probabilities.get(prompt.yes, least) - probabilities.get(prompt.no, least)
    return value, prompt.yes in probabilities and prompt.no in probabilities


@dataclass(frozen=True, slots=True)
class NextToken:
    """Log-probabilities of the most likely next tokens by their text, and how many tokens the endpoint read."""

    log_probabilities: dict[str, float]
    num_prompt_tokens: int | None


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
