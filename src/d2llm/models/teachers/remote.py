"""The remote teacher: an LLM behind an OpenAI-compatible endpoint that returns next-token log-probabilities.

It uses the prompt of a local causal teacher (``models.teachers.causal``), with one request per pair and one token per
answer. The log-odds are logp(yes) - logp(no) for exactly the answer words of the prompt set, including space and case:
" yes", "Yes" and "yes" are different tokens, and only one of them is the answer that the prompt asks for.

An endpoint returns only the most likely tokens. If one answer word is not among them, its log-probability is at most
the smallest one returned, and that value is used: the log-odds are then a bound, and counted as such. If both are
missing, nothing is known about the pair: depending on ``remote.unanswered``, this is an error, or the pair is counted
as undecided (log-odds 0).
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
from d2llm.ops.truncation import cut_pair

_log = logging.getLogger(__name__)

_TRIAL: TextPair = ("what do cows drink", "Cows drink water.")
_SPACES = str.maketrans("▁Ġ", "  ")  # how vocabularies write a leading space; some endpoints return it in this form


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
