"""Teachers that answer in words: an LLM behind any OpenAI-compatible endpoint grades or ranks a query's passages.

They need no log-probabilities, so every hosted model can be one, reasoning models too. ``GradedTeacher`` asks for a
grade from 0 to 100 for each passage. ``ListwiseTeacher`` asks for the passages' order, of a long list in windows that
move from its end to its top (Sun et al., "Is ChatGPT Good at Search?", EMNLP 2023).

A model favours places in a list, so passages are shown in a random order, or in several, whose seed is among the
settings. What an answer leaves out is shown again, in another order. A list that is too long for the model, or that its
endpoint refuses for its content, is graded in halves.

A grade g becomes the log-odds (g - 70) / 12: in the rubric, 70 is where an answer begins, and over five data sets whose
relevance scores are known, the fit of Platt's function to a large language model's grades is (g - 68) / 11.4. Between
data sets it differs (from 45 to 92, and 4 to 12), so ``d2llm ensemble`` with this teacher alone fits it on a data set's
dev queries. A ranking becomes the logarithms of the strengths of Plackett and Luce, which say nothing across queries.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.progress import Advance
from d2llm.core.types import TASKS, Task
from d2llm.models.remote.completions import (
    Completion,
    Completions,
    read_completion,
    read_content_refusal,
)
from d2llm.models.remote.endpoint import TOO_LONG, quoted
from d2llm.models.teachers.list_answers import ListPrompt, load_list_prompt, read_grades, read_ranking
from d2llm.models.teachers.pair_teacher import PartialScores, TeacherScores, TextPair, shared_steps, whole_queries
from d2llm.models.teachers.remote import EndpointTeacher
from d2llm.ops.fusion import strengths
from d2llm.recipe import GradedTeacherConfig, ListEndpointConfig, ListsConfig, ListwiseTeacherConfig

GRADE_OF_ANSWERS, GRADES_PER_LOGIT = 70.0, 12.0
_TRIAL = ("what do cows drink", ("Cows drink water.",))
_QUOTED = 120  # characters of an answer to quote
_TOO_LONG_STATUS = 413
_TOO_LONG = "too long "  # how a refusal begins because of a prompt's length


@dataclass(slots=True)
class _Shown:
    """Passages (positions among the pairs of a call) to show in one request, and how often they were shown before."""

    query: str
    order: int
    passages: list[int]
    num_shown: int = 0

    def halves(self) -> list[_Shown]:
        """Two requests with a half of the passages each."""
        half = len(self.passages) // 2
        halves = (self.passages[:half], self.passages[half:])
        return [_Shown(self.query, self.order, part, self.num_shown) for part in halves]


@dataclass(slots=True)
class _Call:
    """One call of ``score_pairs``: its texts, and what has come of it so far."""

    prompt: ListPrompt
    texts: list[str]
    num_read: int = 0
    num_written: int = 0
    """Tokens of prompts and answers."""
    problem: str = ""
    """What was wrong with the last answer that was of no use."""
    error: BaseException | None = None
    """What ended the call early."""


class ListTeacher(EndpointTeacher):
    """What teachers that are shown lists share."""

    divides: ClassVar[bool] = False
    """Whether a list can be shown in halves."""
    ranks_lists = False
    """Whether log-odds compare only the passages of one query (``pair_teacher.ranks_lists``)."""

    def __init__(self, config: GradedTeacherConfig | ListwiseTeacherConfig) -> None:
        super().__init__(config)
        self.lists: Any = config.lists
        self.prompts = {task: load_list_prompt(self.kind, config.prompt, task) for task in TASKS}
        self.endpoint = Completions(
            config.model,
            self.remote,
            read_completion,
            kept_as=Completion,
            section="teacher",
            shorten="lower teacher.lists.max_passage_tokens, size or max_answer_tokens",
            read_refusal=_read_refusal,
        )

    @classmethod
    def question(cls, config: GradedTeacherConfig | ListwiseTeacherConfig, task: Task) -> list[Any]:
        """Prompt, how passages are shown, and what is asked for."""
        remote, lists = cls.address(config), config.lists
        shown = cls.shown(lists)
        unit = remote.tokenizer or remote.characters_per_token
        sent = remote.body(max_tokens=lists.max_answer_tokens, temperature=0)
        return [load_list_prompt(cls.kind, config.prompt, task).fingerprint, shown, unit, remote.api, sent]

    @classmethod
    def shown(cls, lists: ListsConfig) -> dict[str, Any]:
        """The settings of lists that are a part of the question."""
        return lists.model_dump(mode="json", exclude={"max_answer_tokens", "attempts"})

    def try_out(self) -> BaseException | None:
        """Ask about a list of one passage, whatever the answer is."""
        call = _Call(self.prompts["asymmetric"], list(_TRIAL[1]))
        self._ask(call, [_Shown(_TRIAL[0], 0, [0])])
        return call.error

    def score_until_error(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> PartialScores:
        """Score pairs until the first error (``InterruptibleTeacher``): a pair is scored when all its orders are
        answered.

        Those with one query text are shown together. For a teacher that ranks lists, all pairs of its query must be
        scored too. Pairs without a grade or a place in the order after all attempts are not scored, unless they count
        as undecided. ``features`` is None, because an endpoint returns no states. ``advance`` is called from another
        thread. The errors are:

        - InputError: a passage alone, with its query, is longer than the endpoint can read.
        - ModelError: some passages were not scored in ``lists.attempts`` answers, and ``remote.unanswered`` is
          ``error``; the endpoint failed for longer than ``remote.patience_minutes``, or refuses requests.
        """
        room = self.endpoint.lengths.room(self.lists.max_passage_tokens)
        cut = self.endpoint.lengths.cut([("", text) for _, text in pairs], room)
        call = _Call(self.prompts[task], [text for _, text in cut])
        by_query: dict[str, list[int]] = {}
        for index, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(index)
        log_odds, grades, is_scored = self._score_lists(call, by_query, shared_steps(advance, self.lists.orders))
        has_answer = np.isfinite(log_odds)
        if self.remote.unanswered == "error":
            lacking = np.flatnonzero(is_scored & ~has_answer)
            if len(lacking):
                call.error = call.error or self._unanswered(len(lacking), pairs, int(lacking[0]), call)
            is_scored &= has_answer
        if self.ranks_lists:
            is_scored = whole_queries(pairs, is_scored)
        num_undecided = int((is_scored & ~has_answer).sum())
        if num_undecided:
            self.endpoint.warn_once(
                "undecided", "%d of %d pairs have no answer: %s", num_undecided, len(pairs), call.problem
            )
        is_cut = [text != whole for text, (_, whole) in zip(call.texts, pairs, strict=True)]
        scores = TeacherScores(
            np.nan_to_num(log_odds).astype(np.float32),
            None,
            num_truncated=int((is_scored & np.array(is_cut, np.bool_)).sum()),
            num_tokens=call.num_read,
            num_undecided=num_undecided,
            num_written_tokens=call.num_written,
            cost=self.remote.cost(call.num_read, call.num_written) or 0.0,
            grades=None if grades is None else grades.astype(np.float32),
        )
        return PartialScores(scores, is_scored, call.error)

    def _score_lists(
        self, call: _Call, by_query: dict[str, list[int]], step: Advance
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, NDArray[np.bool_]]:
        """The log-odds of a call's pairs, NaN where there is no answer, their grades, if there are any, and which pairs
        are finished: all, unless ``call.error`` is set.
        """
        raise NotImplementedError

    def _ask(self, call: _Call, requests: Sequence[_Shown]) -> list[tuple[_Shown, Completion]]:
        """The answers to requests, in order; one that cannot be answered as a whole is sent in halves.

        After an error (``call.error``), those that came before it.
        """
        answered: list[tuple[_Shown, Completion]] = []
        todo = list(requests)
        while todo and call.error is None:
            prompts = [call.prompt.fill(shown.query, [call.texts[index] for index in shown.passages]) for shown in todo]
            body = self.remote.body(max_tokens=self.lists.max_answer_tokens, temperature=0)
            asked = self.endpoint.complete(prompts, [body] * len(prompts))
            call.error = asked.error
            divided: list[_Shown] = []
            for position, answer in asked.by_index.items():
                shown = todo[position]
                num_read, num_written, _ = self.endpoint.count_tokens(prompts[position], answer)
                call.num_read += num_read
                call.num_written += num_written
                if answer.refusal is not None and self.divides and len(shown.passages) > 1:
                    divided += shown.halves()
                elif answer.refusal is not None and answer.refusal.startswith(_TOO_LONG):
                    reason = answer.refusal.removeprefix(_TOO_LONG)
                    call.error = call.error or self._too_long(len(shown.passages), reason)
                else:
                    answered.append((shown, answer))
            if divided:
                self.endpoint.warn_once(
                    "divided", "lists that it refuses (too long, or their content) are shown in halves"
                )
            todo = divided
        return answered

    def _order(self, passages: Sequence[int], *identity: object) -> list[int]:
        """The passages in a random order that depends on ``lists.seed`` and on what it is for."""
        order = list(passages)
        random.Random("\0".join(map(str, ("order", self.lists.seed, *identity)))).shuffle(order)
        return order

    def _describe(self, answer: Completion) -> str:
        if answer.refusal is not None:
            return answer.refusal
        what = quoted(answer.text, _QUOTED) if answer.text.strip() else "the answer is empty"
        if answer.is_complete:
            return what
        limit = self.lists.max_answer_tokens
        return f"{what}, which ended at the length limit: raise teacher.lists.max_answer_tokens ({limit})"

    def _unanswered(self, num_missing: int, pairs: Sequence[TextPair], first: int, call: _Call) -> ModelError:
        query, passage = pairs[first]
        noun = "grade" if self.kind == "graded" else "place in the order"
        return ModelError(
            f"'{self.config.model}' at {self.remote.url}: {num_missing} of {len(pairs)} pairs have no {noun} after "
            f"{self.lists.attempts} attempts; the first is query {query[:60]!r}, passage {passage[:60]!r}. The last "
            f"answer without them: {call.problem}. Use a model or a prompt whose answers are numbers as asked, or "
            'count such pairs as undecided (teacher.remote.unanswered = "undecided")'
        )

    def _too_long(self, num_passages: int, reason: str) -> InputError:
        what = "a query and one passage are" if num_passages == 1 else f"a query and {num_passages} passages are"
        remedy = "teacher.lists.max_passage_tokens" if num_passages == 1 else "teacher.lists.size or max_passage_tokens"
        return InputError(
            f"{self.endpoint.address}: {what} longer than '{self.config.model}' can read there: {reason}; lower "
            f"{remedy}, or max_answer_tokens ({self.lists.max_answer_tokens}), which takes room too, or start the "
            "server with a longer context"
        )


class GradedTeacher(ListTeacher):
    """A language model that gives every passage a grade from 0 to 100; several orders are averaged."""

    kind = "graded"
    divides = True
    gives_grades = True

    @classmethod
    def address(cls, config: GradedTeacherConfig) -> ListEndpointConfig:
        """The section ``remote``, which a teacher of recorded grades does not need."""
        if config.remote is None:
            raise InputError(
                f"the graded teacher '{config.model}' has no address; add [teacher.remote] with url = ..., or "
                "[teacher.recorded] with lists = ..., if its grades were recorded"
            )
        return config.remote

    @classmethod
    def shown(cls, lists: ListsConfig) -> dict[str, Any]:
        """With a number that was among the settings of all lists: labels on disk have their keys from it."""
        return super().shown(lists) | {"step": 10}

    def _score_lists(
        self, call: _Call, by_query: dict[str, list[int]], step: Advance
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, NDArray[np.bool_]]:
        num_left = np.full(len(call.texts), self.lists.orders)  # orders in which a passage may still get a grade
        found: list[list[float]] = [[] for _ in call.texts]
        todo = [
            _Shown(query, order, part)
            for query, positions in by_query.items()
            for order in range(self.lists.orders)
            for part in _even_slices(self._order(positions, order, query), self.lists.size)
        ]
        while todo and call.error is None:
            missing: list[_Shown] = []
            for shown, answer in self._ask(call, todo):
                grades = read_grades(answer.text, len(shown.passages))
                for index, grade in grades.items():
                    found[shown.passages[index - 1]].append(grade)
                left = [passage for index, passage in enumerate(shown.passages, start=1) if index not in grades]
                num_shown = shown.num_shown + 1
                if left:
                    call.problem = self._describe(answer)
                again: list[int] = []
                if left and num_shown < self.lists.attempts:
                    again = self._order(left, shown.order, shown.query, num_shown)
                    missing.append(_Shown(shown.query, shown.order, again, num_shown))
                num_left[[passage for passage in shown.passages if passage not in again]] -= 1
                step(len(shown.passages) - len(again))
            todo = missing
        grades = np.array([math.fsum(values) / len(values) if values else math.nan for values in found])
        return log_odds_of_grades(grades), grades, num_left == 0


class ListwiseTeacher(ListTeacher):
    """A language model that ranks passages; the rankings of several orders are joined by Plackett and Luce."""

    kind = "listwise"
    ranks_lists = True

    def _score_lists(
        self, call: _Call, by_query: dict[str, list[int]], step: Advance
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, NDArray[np.bool_]]:
        alone = [query for query, positions in by_query.items() if len(positions) == 1]
        if alone:
            call.problem = (
                f"the listwise teacher '{self.config.model}' ranks the passages of a list, and {len(alone)} queries "
                f"come with a single passage; the first is {alone[0][:60]!r}"
            )
            if self.remote.unanswered == "error":
                raise InputError(f"{call.problem}. Give two passages of a query or more, or a teacher of kind graded")
            by_query = {query: positions for query, positions in by_query.items() if len(positions) > 1}
            step(len(alone) * self.lists.orders)
        rankings = [
            (query, order, self._order(positions, order, query))
            for query, positions in by_query.items()
            for order in range(self.lists.orders)
        ]
        ranked: set[int] = set()
        num_left = np.zeros(len(call.texts), np.int64)  # orders in which a passage has no place yet
        for _, _, ranking in rankings:
            num_left[ranking] += 1
        windows = [_windows(len(ranking), self.lists.size, self.lists.step) for _, _, ranking in rankings]
        for round_number in range(max(map(len, windows), default=0)):
            current = [order_index for order_index, starts in enumerate(windows) if round_number < len(starts)]
            shown = {
                order_index: _Shown(query, order, ranking[slice(*windows[order_index][round_number])])
                for order_index in current
                for query, order, ranking in [rankings[order_index]]
            }
            for order_index, (following, placed) in self._rank(call, shown).items():
                rankings[order_index][2][slice(*windows[order_index][round_number])] = following
                ranked |= placed
                if round_number + 1 == len(windows[order_index]):
                    num_left[rankings[order_index][2]] -= 1
                    step(len(rankings[order_index][2]))
            if call.error is not None:
                break
        log_odds = np.full(len(call.texts), math.nan)
        for query, positions in by_query.items():
            items = [passage for passage in positions if passage in ranked]
            number_of = {passage: index for index, passage in enumerate(items)}
            orders = [
                [number_of[p] for p in ranking if p in number_of] for name, _, ranking in rankings if name == query
            ]
            log_odds[items] = strengths(orders, len(items))
        return log_odds, None, num_left == 0

    def _rank(self, call: _Call, windows: dict[int, _Shown]) -> dict[int, tuple[list[int], set[int]]]:
        """Each window's passages in their new order, and those of them that an answer ranked.

        After an error (``call.error``), windows that were not finished before it are left out.
        """
        results: dict[int, tuple[list[int], set[int]]] = {
            index: (list(shown.passages), set[int]()) for index, shown in windows.items()
        }
        todo = dict(windows)
        while todo and call.error is None:
            index_of = {id(shown): index for index, shown in todo.items()}
            for shown, answer in self._ask(call, list(todo.values())):
                index = index_of[id(shown)]
                del todo[index]
                order = [shown.passages[rank - 1] for rank in read_ranking(answer.text, len(shown.passages))]
                if len(order) > len(results[index][1]):
                    placed = set(order)
                    results[index] = (
                        order + [passage for passage in windows[index].passages if passage not in placed],
                        placed,
                    )
                if len(order) < len(shown.passages):
                    call.problem = self._describe(answer)
                    if shown.num_shown + 1 < self.lists.attempts:
                        again = self._order(shown.passages, shown.order, shown.query, shown.num_shown + 1)
                        todo[index] = _Shown(shown.query, shown.order, again, shown.num_shown + 1)
        return {index: result for index, result in results.items() if index not in todo}


def log_odds_of_grades(grades: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-odds of grades from 0 to 100, by a fixed scale: those of an answer begin at ``GRADE_OF_ANSWERS``."""
    return (grades - GRADE_OF_ANSWERS) / GRADES_PER_LOGIT


def _even_slices(order: list[int], size: int) -> list[list[int]]:
    """The order in parts of nearly the same length, at most ``size``."""
    num_parts = math.ceil(len(order) / size)
    ends = [round(len(order) * end / num_parts) for end in range(num_parts + 1)]
    return [order[start:end] for start, end in pairwise(ends)]


def _windows(length: int, size: int, step: int) -> list[tuple[int, int]]:
    """Where windows begin and end that move from the end of a list to its top.

    >>> _windows(30, 20, 10)
    [(10, 30), (0, 20)]
    """
    ends = [*range(length, size, -step), min(length, size)]
    return [(max(0, end - size), end) for end in ends]


def _read_refusal(status: int, reason: str) -> Completion | None:
    if status == _TOO_LONG_STATUS or (status < 500 and TOO_LONG.search(reason)):
        return Completion("", True, 0, 0, _TOO_LONG + f"({status}) {reason}")
    return read_content_refusal(status, reason)
