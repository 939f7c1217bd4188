"""The text of an answer from an OpenAI-compatible endpoint, its tokens, and refusals for a text's content."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

TOKENS_ARE_ESTIMATED = (
    "%s does not report how many tokens it reads and writes; they are estimated at %g characters each "
    "(characters_per_token), and so is what they cost"
)
"""A warning about an endpoint, by its address and ``characters_per_token``."""
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


def quoted(text: str, most: int) -> str:
    """The beginning of a text, at most ``most`` characters, on one line and in quotes."""
    text = " ".join(text.split())
    return repr(text if len(text) <= most else text[:most] + " ...")


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
