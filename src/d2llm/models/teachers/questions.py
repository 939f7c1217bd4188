"""A causal model's questions as token ids, without the model: prompt, query, passage, and the two answer words.

``CausalTeacher`` and ``VllmTeacher`` ask with the same ids and read the same two answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from d2llm.core.errors import AnswerTokenError, InputError
from d2llm.core.types import TASKS, Task
from d2llm.models.length_limit import fit_pair
from d2llm.models.sources import leading_special_ids
from d2llm.models.teachers.pair_teacher import TextPair
from d2llm.models.teachers.prompts import Prompt, load_prompt
from d2llm.recipe import PromptedTeacherConfig

Question = tuple[tuple[int, ...], list[int]]
"""An input in two parts: the prefix that it may share with others (everything before the passage), and the rest."""

_ADVICE = "use a prompt file with answer words that are one token each (mind the space before the word)"


class Questions:
    """Makes the inputs of a causal model; ``answer_ids`` are the tokens of yes and no by task."""

    def __init__(self, config: PromptedTeacherConfig, tokenizer: Any) -> None:
        """Prepare the prompts of ``config`` for a tokenizer.

        Raises:
            InputError: there is no such prompt set.
            AnswerTokenError: an answer word is not one distinct token.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._special_ids = leading_special_ids(tokenizer)  # those after a text must not come before the answer
        self.prompts: dict[Task, Prompt] = {task: load_prompt(config.prompt, task) for task in TASKS}
        self.answer_ids: dict[Task, tuple[int, int]] = {
            task: find_answers(config, tokenizer, prompt, prompt.tail, _ADVICE) for task, prompt in self.prompts.items()
        }

    def inputs(self, pairs: Sequence[TextPair], task: Task) -> tuple[list[Question], int]:
        """The question about each pair in two parts, and how many pairs lost text to the limit ``max_tokens``.

        Excess tokens are cut from the end of the passage; a query that would leave the passage less than half of the
        room is itself cut to half. The prompt and the position of the answer never change.

        Raises:
            InputError: the prompt alone fills ``max_tokens``.
        """
        prompt = self.prompts[task]
        head, middle, tail = self.ids([prompt.head, prompt.middle, prompt.tail])
        room = self._config.max_tokens - len(self._special_ids) - len(head) - len(middle) - len(tail)
        if room < 2:
            raise InputError(
                f"max_tokens is {self._config.max_tokens}, but prompt '{self._config.prompt}' alone takes "
                f"{self._config.max_tokens - room} tokens; raise max_tokens or use a shorter prompt"
            )
        # Each distinct text is tokenized only once.
        queries, passages = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True)) if pairs else ([], [])
        query_ids = dict(zip(queries, self.ids([prompt.space + query for query in queries]), strict=True))
        passage_ids = dict(zip(passages, self.ids([prompt.space + passage for passage in passages]), strict=True))
        in_prompt = self.ids([prompt.space + query + prompt.middle for query in queries] if prompt.space else [])
        whole_queries = dict(zip(queries, in_prompt, strict=False))
        inputs: list[Question] = []
        num_truncated = 0
        for query, passage in pairs:
            own_query, own_passage = query_ids[query], passage_ids[passage]
            num_query, num_passage = fit_pair(len(own_query), len(own_passage), room)
            kept_query, kept_passage = own_query[:num_query], own_passage[:num_passage]
            is_cut = len(kept_query) < len(own_query)
            num_truncated += is_cut or len(kept_passage) < len(own_passage)
            query_part = whole_queries[query] if prompt.space and not is_cut else [*kept_query, *middle]
            inputs.append(((*self._special_ids, *head, *query_part), [*kept_passage, *tail]))
        return inputs, num_truncated

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts, without special tokens."""
        return token_ids(self._tokenizer, texts)


def find_answers(
    config: PromptedTeacherConfig, tokenizer: Any, prompt: Prompt, after: str, advice: str
) -> tuple[int, int]:
    """The tokens of the answer words yes and no that follow a text; ``advice`` completes the error.

    Raises:
        AnswerTokenError: a word is not one token there, or both are the same.
    """
    tail, with_yes, with_no = token_ids(tokenizer, [after, after + prompt.yes, after + prompt.no])
    for word, ids in ((prompt.yes, with_yes), (prompt.no, with_no)):
        if ids[: len(tail)] != tail or len(ids) != len(tail) + 1:
            tokens = tokenizer.convert_ids_to_tokens(token_ids(tokenizer, [word])[0])
            where = "after the prompt for" if after else "for"
            raise AnswerTokenError(
                f"the answer word {word!r} of prompt '{config.prompt}' is not one token {where} the tokenizer "
                f"of '{config.model}': alone it gives {tokens}; {advice}"
            )
    if with_yes == with_no:
        raise AnswerTokenError(
            f"the answer words {prompt.yes!r} and {prompt.no!r} are the same token for the tokenizer of "
            f"'{config.model}'; use a prompt file with two distinct words"
        )
    return with_yes[-1], with_no[-1]


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of texts, without special tokens and without a limit."""
    if not texts:
        return []
    return cast(
        "list[list[int]]",
        tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"],
    )
