"""The protocol of all writers: models that read a passage and write queries that it answers.

The same models expand queries: they read a query and write others, or a passage that would answer it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_count, pairs_of
from d2llm.core.progress import Advance
from d2llm.models.remote.endpoint import Answers
from d2llm.recipe import WriterConfig

QueryKind = Literal["question", "keywords", "statement"]
"""What a query is: a question, a few keywords, or a statement that the passage supports."""
QUERY_KINDS: tuple[QueryKind, ...] = get_args(QueryKind)
ExpansionKind = Literal["rephrasing", "answer", "standalone"]
"""What is written for a query: another query with the same meaning, a passage that would answer it, or, for one in a
conversation, a query that can be understood alone."""
EXPANSION_KINDS: tuple[ExpansionKind, ...] = get_args(ExpansionKind)

_SINGLE: tuple[ExpansionKind, ...] = ("answer", "standalone")

DEFAULT_TEMPERATURE = 0.8

_QUESTION_WORD = re.compile(
    r"\W*(?:who|whom|whose|what|when|where|which|why|how|is|are|was|were|am|do|does|did|has|have|had"
    r"|can|could|should|would|will|shall|may|might)\b",
    re.I,
)
_FUNCTION_WORD = re.compile(
    r"an?|the|th(?:is|at|ese|ose)|some|any|of|in|on|at|by|for|from|to|with|without|about|as|into|over|under|between"
    r"|during|after|before|and|or|but|if|than|then|there|its?|he|him|his|she|hers?|they|them|their|we|us|our|you|your"
    r"|i|me|my|one|be|been|being|not|no|so|such|own|same|also|most|more|other|another",
    re.IGNORECASE,
)
_CHINESE_QUESTION = re.compile(r"什么|什麼|为何|為何|如何|怎|哪|谁|誰|几|幾|多少|是否|吗|嗎|呢$")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_SENTENCE_END = (".", "!", "。", "！")
_MAX_KEYWORDS = 6
_ANSWER_LENGTH = 3  # the length of a passage, or of a whole question, in maximum lengths of a query
_LONGEST_CHINESE_KEYWORDS = 12  # characters: about as much as six words


@dataclass(frozen=True, slots=True)
class Assignment:
    """What to write: ``num_queries`` queries of one kind for one passage.

    For an expansion, ``passage`` is the query: ``rephrasing`` writes other queries, ``answer`` a single passage in
    place of them, ``standalone`` a single query that takes from ``history``, the earlier turns of its conversation as
    (role, text), what the query refers to. None of them uses title and examples.

    ``examples`` are passages with a query that the user would write for them. With the same seed, the same writer
    writes the same queries, as far as its kind of writer can promise that.

    Raises:
        InputError: ``num_queries`` is below 1, or above 1 for a single text, or the passage is empty.
    """

    passage: str
    kind: QueryKind | ExpansionKind
    num_queries: int = 1
    title: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    history: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", pairs_of(self.examples, "examples"))
        object.__setattr__(self, "history", pairs_of(self.history, "history"))
        check_count(self.num_queries, "num_queries")
        if self.kind in _SINGLE and self.num_queries > 1:
            raise InputError(
                f"num_queries is {self.num_queries}, but '{self.kind}' is a single text; make several assignments with "
                "different seeds"
            )
        if not self.passage.strip():
            raise InputError("an assignment's passage is empty, so no query can be written for it; leave it out")

    @property
    def num_lengths(self) -> int:
        """How many times the maximum length of a query the whole answer may have."""
        return _ANSWER_LENGTH if self.kind in _SINGLE else self.num_queries


@dataclass(frozen=True, slots=True)
class WrittenQueries:
    """What a writer made of one assignment; there may be fewer queries than were assigned, never more.

    Attributes:
        queries: without repetitions, in the order in which they were written; for an answer, its passage.
        num_prompt_tokens: tokens that the writer read.
        num_written_tokens: tokens that the writer wrote, whether or not they became queries.
        num_dropped: parts of the answer that are no query, repeat one, or exceed the number assigned.
        truncated: whether the passage, its title or an example lost text to ``max_passage_tokens``.
        tokens_are_estimated: whether the numbers of tokens are estimates from characters, because an endpoint did not
            report them.
        problem: why there is no query, with the beginning of the answer; None if there is one.
    """

    queries: tuple[str, ...]
    num_prompt_tokens: int
    num_written_tokens: int
    num_dropped: int = 0
    truncated: bool = False
    tokens_are_estimated: bool = False
    problem: str | None = None


@runtime_checkable
class Writer(Protocol):
    """A writer of any kind."""

    @property
    def fingerprint(self) -> str:
        """Equal if and only if two writers would write the same queries for the same assignments."""
        ...

    def write(self, assignments: Sequence[Assignment], *, advance: Advance | None = None) -> list[WrittenQueries]:
        """Carry out assignments; the results are in the same order.

        An answer that holds no query is a result with a ``problem``, not an error. A call cannot be stopped halfway
        without losing what it has written: pass small batches, such as a few hundred assignments, keep each result,
        and check a budget or a stop signal between them.

        Args:
            assignments: what to write.
            advance: called with the number of assignments finished.
        """
        ...


@runtime_checkable
class LastingWriter(Writer, Protocol):
    """A writer whose answers cost money, or come from afar: an error must not lose those that came before it.

    A class that inherits from it has ``write`` by its ``write_until_error``.
    """

    def write(self, assignments: Sequence[Assignment], *, advance: Advance | None = None) -> list[WrittenQueries]:
        """Carry assignments out (``Writer.write``); the first error is raised."""
        return self.write_until_error(assignments, advance=advance).all()

    def write_until_error(
        self, assignments: Sequence[Assignment], *, advance: Advance | None = None
    ) -> Answers[WrittenQueries]:
        """Like ``write``; an error or an interruption that comes after the first answer is not raised but returned."""
        ...


def write_until_error(
    writer: Writer, assignments: Sequence[Assignment], *, advance: Advance | None = None
) -> Answers[WrittenQueries]:
    """Carry assignments out (``Writer.write``); what a ``LastingWriter`` wrote before an error is returned with it."""
    if isinstance(writer, LastingWriter):
        return writer.write_until_error(assignments, advance=advance)
    return Answers(dict(enumerate(writer.write(assignments, advance=advance))))


def load_writer(config: WriterConfig, *, device: str | None = None, dtype: str | None = None) -> Writer:
    """Load the writer that ``config`` names, by its kind; a remote one is tested with one short request.

    Args:
        config: which writer, its prompt, and how it samples.
        device: where a local writer computes; by default the fastest device available.
        dtype: its number format; by default the fastest on that device.

    Raises:
        ModelNotFoundError: there are no usable weights, or the endpoint has no such model.
        ModelError: the model cannot be used as a writer, or the endpoint is unreachable.
        InputError: there is no such prompt set.
        MismatchError: a tuned writer belongs to other weights than its base model's name refers to here.
        MissingExtraError: the extra ``remote`` is not installed.
    """
    return config.load(device=device, dtype=dtype)


def kind_of_query(text: str) -> QueryKind:
    """The kind of a query that a person wrote, by its form.

    A question ends with a question mark, or begins with a question word or an auxiliary verb (in Chinese: contains a
    question word). Keywords are at most six words, or twelve Chinese characters, that do not end like a sentence.
    """
    text = text.strip()
    if text.endswith(("?", "？")) or _QUESTION_WORD.match(text) or _CHINESE_QUESTION.search(text):
        return "question"
    if text.endswith(_SENTENCE_END):
        return "statement"
    num_chinese = len(_CJK.findall(text))
    is_short = num_chinese <= _LONGEST_CHINESE_KEYWORDS if num_chinese else len(text.split()) <= _MAX_KEYWORDS
    return "keywords" if is_short else "statement"


def keywords_of(question: str) -> str | None:
    """An English question without its function words, as people type it into a search box; None if little is left."""
    words = [word.strip('?!.,;:"()') for word in question.split()]
    function_words = (_FUNCTION_WORD, _QUESTION_WORD)
    kept = [word for word in words if word and not any(pattern.fullmatch(word) for pattern in function_words)]
    is_short = 2 <= len(kept) <= _MAX_KEYWORDS and len(kept) < len(words)
    return " ".join(kept) if is_short else None
