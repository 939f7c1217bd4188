"""The last question of a conversation, rewritten by a language model so that it can be searched without the rest.

What the model writes is used as the text of the query and as nothing else, so a turn that gives orders can at most
change the question. Where the model fails, the question is searched as it is, and the ranking says so
(``QueryRewriting.problem``).

Source: Elgohary, Peskov, Boyd-Graber, "Can You Unpack That? Learning to Rewrite Questions-in-Context", EMNLP 2019.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, cast

from d2llm.core.errors import InputError, ModelError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.inputs import list_of, shown
from d2llm.core.types import QueryRewriting, Ranking
from d2llm.data.python_records import QueryLike, one_query_of
from d2llm.models.writers.writer import Assignment, Writer, WrittenQueries
from d2llm.retrieval.settings import ConversationSettings, Turn

_TURNS_READ = 8
_KEPT_QUERIES = 256

TurnLike = Turn | Mapping[str, Any] | str
"""A dictionary has ``role`` (user or assistant) and ``content``; a text is the user's."""
History = Iterable[TurnLike] | TurnLike


class Rewriter:
    """Rewrites the questions of conversations, and remembers the last 256 queries that it has written.

    Args:
        writer: an untuned writer (``load_writer``).
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._kept: OrderedDict[str, QueryRewriting] = OrderedDict()
        self._lock = Lock()

    def rewrite(self, question: str, history: History) -> QueryRewriting:
        """The question as a query that can be understood without the earlier turns, which are the oldest first.

        The writer reads the last 8 turns. A failure of the writer is a ``problem``, not an error.

        Raises:
            InputError: a turn is none, or there are too many; or the writer cannot rewrite queries.
        """
        turns = turns_of(history)
        if (rewriting := self.kept(question, turns)) is not None:
            return rewriting
        begin = time.perf_counter()
        problem, written = None, WrittenQueries((), 0, 0)
        try:
            (written,) = self.writer.write([Assignment(question, "standalone", history=_read(turns))])
            problem = written.problem
        except ModelError as error:
            problem = str(error)
        rewriting = QueryRewriting(
            question,
            written.queries[0] if written.queries else question,
            time.perf_counter() - begin,
            written.num_dropped,
            max(0, len(turns) - _TURNS_READ),
            written.truncated,
            problem,
        )
        if problem is None:
            with self._lock:
                self._kept[_key(question, turns)] = replace(rewriting, seconds=0.0)
                if len(self._kept) > _KEPT_QUERIES:
                    self._kept.popitem(last=False)
        return rewriting

    def kept(self, question: str, history: History) -> QueryRewriting | None:
        """What has been written for the same question after the same turns, if it is remembered."""
        with self._lock:
            return self._kept.get(_key(question, turns_of(history)))


def _read(turns: Sequence[Turn]) -> tuple[tuple[str, str], ...]:
    return tuple((turn.role, turn.content) for turn in turns[-_TURNS_READ:])


def _key(question: str, turns: Sequence[Turn]) -> str:
    return fingerprint_json([question, len(turns), _read(turns)])


def turns_of(history: History) -> tuple[Turn, ...]:
    """The turns of a conversation.

    Raises:
        InputError: a turn is none, or there are too many.
    """
    turns = [history] if isinstance(history, str | Mapping | Turn) else list_of(history, "history")
    return ConversationSettings.of(history=turns).history


def with_rewriting(rankings: list[Ranking], rewriting: QueryRewriting | None) -> list[Ranking]:
    """The rankings; that for a query that was rewritten says so."""
    if rewriting is None:
        return rankings
    (ranking,) = rankings
    return [replace(ranking, rewriting=rewriting, seconds={"rewriting": rewriting.seconds, **ranking.seconds})]


def rewritten(
    queries: Iterable[QueryLike] | QueryLike, history: History, rewriter: Rewriter | None
) -> tuple[Iterable[QueryLike] | QueryLike, QueryRewriting | None]:
    """What to search for, and how it was made; the queries as they are if there is no history.

    Raises:
        InputError: there is a history, but no rewriter, or several queries; or as for ``Rewriter.rewrite``.
    """
    turns = turns_of(history)
    if not turns:
        return queries, None
    if rewriter is None:
        raise InputError(
            "history is for a language model that rewrites the query, and there is none: give one as rewriter, leave "
            "history out and give a query that can be understood alone"
        )
    if not hasattr(rewriter, "rewrite"):
        raise InputError(f"rewriter is {shown(rewriter)}, but must be a Rewriter (d2llm.retrieval.rewriting)")
    query = one_query_of(cast("QueryLike", queries), "a rewriting")
    rewriting = rewriter.rewrite(query.text, turns)
    return replace(query, text=rewriting.text), rewriting
