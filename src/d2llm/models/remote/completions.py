"""Prompts for an OpenAI-compatible endpoint, the texts of its answers and their tokens, and refusals of a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from d2llm.core.progress import Advance
from d2llm.models.length_limit import TextLengths
from d2llm.models.remote.endpoint import Answers, Endpoint
from d2llm.recipe import CompletionConfig

_Answer = TypeVar("_Answer")
_CONTENT_POLICY = re.compile(r"content.?(filter|policy|management)|moderation|safety (system|polic)", re.I)
_FAULTS_OF_THE_REQUEST = (400, 403, 422)  # statuses with which endpoints refuse a text that their policy forbids
_THOUGHTS = re.compile(r"^.*?</think(?:ing)?>", re.S | re.I)
_UNFINISHED_THOUGHTS = re.compile(r"^\s*<think(?:ing)?>", re.I)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote; the numbers of tokens are None if the endpoint did not report them."""

    text: str
    is_complete: bool
    """False if the text ended at the length limit."""
    num_prompt_tokens: int | None = None
    num_written_tokens: int | None = None
    refusal: str | None = None
    """Why the endpoint refuses to answer, if it does."""


def read_completion(answer: Any) -> Completion:
    """Parse the JSON of an answer, in the chat or the completions form.

    A field with what a reasoning model thought (``reasoning_content``) is not read.

    Raises:
        LookupError, TypeError: the answer has another form.
    """
    choice = answer["choices"][0]
    refusal: object = None
    if "message" in choice:
        text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
    else:
        text = choice["text"]
    if text is not None and not isinstance(text, str):
        raise TypeError(f"the text of the answer is {type(text).__name__}")
    reason = choice.get("finish_reason")
    if refusal is None and reason == "content_filter":
        refusal = "its content filter"
    usage = answer.get("usage") or {}
    return Completion(
        text or "",
        reason != "length",
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        None if refusal is None else f"the endpoint refuses to answer: {refusal}",
    )


def read_content_refusal(status: int, reason: str) -> Completion | None:
    """An answer without text, for a text that the endpoint's policy forbids; such a request costs nothing."""
    if status not in _FAULTS_OF_THE_REQUEST or not _CONTENT_POLICY.search(reason):
        return None
    return Completion("", True, 0, 0, f"the endpoint refuses this text ({status}): {reason}")


def without_thoughts(text: str) -> str | None:
    """The text after what a reasoning model thinks between <think> and </think>; None if it never ends to think."""
    rest = _THOUGHTS.sub("", text, count=1)
    return None if _UNFINISHED_THOUGHTS.match(rest) else rest


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class Completions(Endpoint[_Answer]):
    """An endpoint that continues prompts; arguments as for ``Endpoint``."""

    def __init__(
        self,
        model: str,
        config: CompletionConfig,
        read: Callable[[Any], _Answer],
        *,
        kept_as: type[_Answer],
        section: str,
        shorten: str,
        read_refusal: Callable[[int, str], _Answer | None],
    ) -> None:
        self._is_chat = config.api == "chat"
        super().__init__(
            model,
            config,
            read,
            path="chat/completions" if self._is_chat else "completions",
            section=section,
            text="a prompt",
            answer="a completion",
            shorten=shorten,
            check='first whether the model is served by api = "completions" or "chat"',
            kept_as=kept_as,
            read_refusal=read_refusal,
        )
        self.lengths = TextLengths.of_endpoint(config)

    def complete(
        self, prompts: Sequence[str], settings: Iterable[Mapping[str, Any]], *, advance: Advance | None = None
    ) -> Answers[_Answer]:
        """The answers to prompts (``ask``); ``settings`` are the other fields of each request, like ``max_tokens``."""
        return self.ask(
            ({**self._fields(prompt), **fields} for prompt, fields in zip(prompts, settings, strict=True)),
            advance=advance,
        )

    def count_tokens(self, prompt: str, answer: Completion) -> tuple[int, int, bool]:
        """How many tokens were read and written, and whether these are estimates, as the endpoint reports none."""
        read, written = answer.num_prompt_tokens, answer.num_written_tokens
        is_estimated = read is None or written is None
        if is_estimated:
            self.warn_once(
                "estimated",
                "does not report how many tokens it reads and writes; they are estimated at %g characters each "
                "(characters_per_token), and so is what they cost",
                self.config.characters_per_token,
            )
        estimate = self.lengths.estimate
        return (
            estimate(prompt) if read is None else read,
            estimate(answer.text) if written is None else written,
            is_estimated,
        )

    def _fields(self, prompt: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": prompt}]} if self._is_chat else {"prompt": prompt}
