"""The remote teacher: an LLM behind an OpenAI-compatible endpoint that gives log-probabilities of the next token.

It gets the prompt of a local causal teacher (``models.teachers.causal``): one request a pair, one token an answer.
Its log-odds are logp(yes) - logp(no) for exactly the answer words of the prompt set, space and case included: " yes",
"Yes" and "yes" are different tokens, and only one of them is what the prompt asks for.

An endpoint gives the likeliest tokens only. Where one answer word is not among them, its log-probability is at most the
smallest one given, which is taken: the log-odds are a bound, and counted. Where both are missing, nothing is known of
the pair: an error, or counted and undecided (log-odds 0), as ``remote.unanswered`` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from d2llm.core.errors import AnswerTokenError, InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.recipe import RemoteConfig, TeacherConfig
from d2llm.core.types import TASKS, Task
from d2llm.models.teachers.identity import TeacherIdentity
from d2llm.models.teachers.judge import Judgements, TextPair
from d2llm.models.teachers.prompts import Prompt, load_prompt
from d2llm.models.teachers.remote_endpoint import Endpoint, NextToken
from d2llm.ops.truncation import fit_pair

_log = logging.getLogger(__name__)

_TRIAL: TextPair = ("what do cows drink", "Cows drink water.")
_SPACES = str.maketrans("▁Ġ", "  ")  # how vocabularies write a word's leading space; some endpoints show it so


class RemoteTeacher:
    """A teacher that runs elsewhere; ``fingerprint`` tells its model's name and declared revision, not where it is.

    Args:
        config: ``model`` is the model's name at the endpoint, ``remote`` says where that is.

    Raises:
        InputError: no section ``remote``, no such prompt set, or no key where one is named.
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
        """A teacher whose endpoint has answered once, so that a wrong address, key or model is reported at once.

        ``device`` and ``dtype`` are the endpoint's own affair and ignored.

        Raises:
            ModelNotFoundError: no such model or address there.
            ModelError: unreachable, key refused, or no log-probabilities.
        """
        del device, dtype
        teacher = cls(config)
        teacher.endpoint.ask([_join(teacher.prompts["asymmetric"], *_TRIAL)])
        return teacher

    @staticmethod
    def identify(config: TeacherConfig) -> TeacherIdentity:
        """The identity of the teacher that ``load(config)`` gives, found without asking the endpoint.

        Raises:
            InputError: no section ``remote``, or no such prompt set.
        """
        remote = _section(config)
        fingerprint = fingerprint_json(["remote", config.model, remote.revision])
        return TeacherIdentity(fingerprint, {task: _fingerprint_prompt(config, remote, task) for task in TASKS})

    @property
    def fingerprint(self) -> str:
        """Identity of model name and revision."""
        return self.identify(self.config).fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """Identity of the question, with all that decides what is read of a pair and what is heard of the answer."""
        return _fingerprint_prompt(self.config, self.remote, task)

    def judge(
        self,
        pairs: Sequence[TextPair],
        task: Task,
        *,
        with_features: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Judgements:
        """Judge pairs; the result is in their order. ``features`` is None: an endpoint gives no states.

        The pairs of one query go out one after the other, so that a server that keeps common beginnings (prefix
        caching) reads the query once.

        Args:
            pairs: query text and full passage text.
            task: which question to ask.
            with_features: without effect.
            advance: called with the number of pairs finished, from another thread.

        Raises:
            AnswerTokenError: neither answer word was given for some pair, and ``remote.unanswered`` is ``error``.
            InputError: a pair is longer than the endpoint reads, or the prompt alone fills ``max_tokens``.
            ModelError: the endpoint failed for longer than ``remote.patience_minutes``, or refuses.
        """
        del with_features
        prompt = self.prompts[task]
        texts, cut = self._write(prompt, pairs)
        first_seen: dict[str, int] = {}
        for query, _ in pairs:
            first_seen.setdefault(query, len(first_seen))
        order = sorted(range(len(pairs)), key=lambda index: first_seen[pairs[index][0]])
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
        read = [answers[index].num_prompt_tokens for index in range(len(pairs))]
        cut_there = [n is not None and mine is not None and n < mine for n, mine in zip(read, lengths, strict=True)]
        self._report(len(pairs), len(bounded), len(unanswered), sum(cut_there))
        return Judgements(
            log_odds,
            None,
            num_truncated=sum(here or there for here, there in zip(cut, cut_there, strict=True)),
            num_tokens=sum(n or mine or 0 for n, mine in zip(read, lengths, strict=True)),
            num_bounded=len(bounded),
            num_undecided=len(unanswered),
        )

    def _write(self, prompt: Prompt, pairs: Sequence[TextPair]) -> tuple[list[str], list[bool]]:
        """The text to send for each pair, and whether some of it was cut; the same rule as a local teacher's."""
        distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
        ends = dict(zip(distinct, self._ends(distinct), strict=True))
        room = self._room(prompt)
        texts: list[str] = []
        cut: list[bool] = []
        for query, passage in pairs:
            num_query, num_passage = fit_pair(len(ends[query]), len(ends[passage]), room)
            kept_query = _keep(query, ends[query], num_query)
            kept_passage = _keep(passage, ends[passage], num_passage)
            texts.append(_join(prompt, kept_query, kept_passage))
            cut.append((kept_query, kept_passage) != (query, passage))
        return texts, cut

    def _room(self, prompt: Prompt) -> int:
        """Units (tokens, or characters without a tokenizer) that are left for query and passage."""
        parts = [prompt.head, prompt.middle, prompt.tail]
        limit = self.config.max_tokens
        if self._tokenizer is None:
            limit = int(limit * self.remote.characters_per_token)
        else:
            limit -= int(self._tokenizer.num_special_tokens_to_add())
        room = limit - sum(map(len, self._ends(parts)))
        if room < 2:
            raise InputError(
                f"max_tokens is {self.config.max_tokens}, which prompt '{self.config.prompt}' alone fills; raise "
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
        """How many tokens an endpoint should read of each text; None without a tokenizer."""
        if self._tokenizer is None or not texts:
            return [None] * len(texts)
        return [len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]]

    def _unanswered(self, count: int, num_pairs: int, pair: TextPair, answer: NextToken, prompt: Prompt) -> Exception:
        likeliest = sorted(answer.log_probabilities, key=answer.log_probabilities.__getitem__, reverse=True)
        shown = f"the likeliest are {likeliest[:5]}" if likeliest else "the model ended its text without a word"
        return AnswerTokenError(
            f"'{self.config.model}' at {self.remote.url}: for {count} of {num_pairs} pairs neither {prompt.yes!r} nor "
            f"{prompt.no!r} is among the {self.remote.top_logprobs} likeliest next tokens; the first is query "
            f"{pair[0][:60]!r}, where {shown}. Use a prompt whose answer words are what the "
            "model says (mind case and leading space), raise teacher.remote.top_logprobs, or let such pairs count as "
            'undecided (teacher.remote.unanswered = "undecided")'
        )

    def _report(self, num_pairs: int, num_bounded: int, num_undecided: int, num_cut_there: int) -> None:
        """The first call where something was not plain is a warning; the rest is told by the counts of the result."""
        if not (num_bounded or num_undecided or num_cut_there):
            return
        level = logging.INFO if self._reported else logging.WARNING
        self._reported = True
        _log.log(
            level,
            "of %d pairs asked at %s: %d log-odds are bounds (one answer word not among the %d likeliest tokens), "
            "%d undecided (neither), %d cut by the server",
            *(num_pairs, self.remote.url, num_bounded, self.remote.top_logprobs, num_undecided, num_cut_there),
        )


def read_log_odds(log_probabilities: dict[str, float], prompt: Prompt) -> tuple[float | None, bool]:
    """logp(yes) - logp(no), and whether it is exact rather than a bound; None where neither word is given."""
    probabilities = {token.translate(_SPACES): value for token, value in log_probabilities.items()}
    if prompt.yes not in probabilities and prompt.no not in probabilities:
        return None, False
    least = min(probabilities.values())
    value = probabilities.get(prompt.yes, least) - probabilities.get(prompt.no, least)
    return value, prompt.yes in probabilities and prompt.no in probabilities


def _section(config: TeacherConfig) -> RemoteConfig:
    if config.remote is None:
        raise InputError(f"the teacher '{config.model}' is remote; say where: write [teacher.remote] with url = ...")
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

    # A folder needs no weights here.
    return load_tokenizer(name if Path(name).is_dir() else find_model(name))


def _join(prompt: Prompt, query: str, passage: str) -> str:
    return f"{prompt.head}{query}{prompt.middle}{passage}{prompt.tail}"


def _keep(text: str, ends: Sequence[int], count: int) -> str:
    """The first ``count`` units of ``text``; the whole text, trailing space included, where it has no more."""
    if count >= len(ends):
        return text
    return text[: ends[count - 1]] if count else ""
