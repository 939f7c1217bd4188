"""Has a language model write queries for the passages of a corpus, as many as a budget allows.

Passages are taken in rounds over the documents, so that a budget that ends early has reached every document before
it reaches every passage. A passage gets one kind of query in the first pass over the corpus, and another in each
further pass. Everything written is kept (``fitting.write_queries``), and a call that was interrupted continues there.

What was written is in a file that grows line by line, so that no answer is paid for twice. Each line is the answer for
one passage and one kind of query, under the hash of the passage's text. When documents change, the queries of unchanged
passages are still there, and those of others are left alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.names import counted
from d2llm.core.progress import progress_bar, remarks
from d2llm.core.types import Passage
from d2llm.fitting.settings import DEFAULT_KINDS
from d2llm.models.remote.endpoint import Limits
from d2llm.models.remote.kept_answers import KeptAnswers
from d2llm.models.writers.writer import Assignment, QueryKind, Writer, write_until_error
from d2llm.recipe import WriterConfig

MIN_CHARACTERS = 80
"""Passages with a shorter text are too short to ask anything that others do not answer."""
QUERIES_PER_ANSWER = 2

_ASSIGNMENTS_AT_ONCE = 32
_IN_WORDS = {"minutes": "{:.0f} minutes", "tokens": "{:,} tokens", "cost": "a cost of {:g}"}


@dataclass(frozen=True, slots=True)
class WritingBudget:
    """What the writing may cost; None: no limit.

    ``seconds`` count in each call, ``tokens`` (read and written) and ``money`` over all calls with the same store.
    ``queries`` limits how many queries these passages have at the end.
    """

    seconds: float | None = None
    tokens: int | None = None
    money: float | None = None
    queries: int | None = None


@dataclass(frozen=True, slots=True)
class WritingReport:
    """What has been written, by this call and earlier ones.

    ``num_answers``, ``num_queries`` and ``num_problems`` (answers that could not be parsed) are those for the present
    passages, tokens and ``cost`` also those for earlier ones. ``num_short`` passages were too short to ask about.
    ``ended_by`` is the limit of the budget that ended the writing, or None if every passage has a query of every kind.
    ``cost`` is in the currency of the writer's prices, and None without prices.
    """

    num_answers: int
    num_queries: int
    num_problems: int
    num_short: int
    num_prompt_tokens: int
    num_written_tokens: int
    cost: float | None
    seconds: float
    ended_by: str | None


@dataclass(frozen=True, slots=True)
class _PassageAssignment:
    passage_hash: str
    kind: QueryKind
    task: Assignment


def write_queries(
    passages: Sequence[Passage],
    writer: Writer,
    store: DraftStore,
    *,
    config: WriterConfig,
    budget: WritingBudget,
    kinds: Mapping[QueryKind, float] = DEFAULT_KINDS,
    examples: Sequence[tuple[str, str]] = (),
    seed: int = 0,
) -> WritingReport:
    """Have queries written until the budget is spent.

    Args:
        passages: the corpus.
        writer: writes the queries.
        store: drafts of this writer; what it holds is not written again.
        config: the writer's settings, of which the prices are read.
        budget: when to stop.
        kinds: the kinds of queries, with the probability of each to be a passage's first.
        examples: pairs (passage, query) that show the writer how users ask.
        seed: seed of the order of passages and kinds, and of the writer's sampling.

    Raises:
        InputError: no passage is long enough, there are no kinds, or a budget in money is given for a writer without
            prices.
        ModelError: the writer failed for longer than its patience; what was written is kept.
    """
    _check(kinds, budget, config, store)
    started = time.monotonic()
    eligible = _eligible(passages)
    hashes = {passage_hash(passage) for passage in eligible}
    drafts = store.of(hashes)
    pending = _pending(_assignments(eligible, kinds, examples, seed), store)
    num_asked = len(hashes) * sum(weight > 0 for weight in kinds.values())
    seconds = math.inf if budget.seconds is None else budget.seconds
    answers = KeptAnswers(store.path.with_name("answers"), writer.fingerprint)
    with answers.used(), progress_bar("writing queries", num_asked, done=len(drafts), seconds=seconds) as advance:
        while True:
            ended_by = _spent(budget, drafts, store, config, time.monotonic() - started)
            if ended_by is not None:
                break
            batch = list(islice(pending, _ASSIGNMENTS_AT_ONCE))
            if not batch:
                break
            added, error = _write(batch, writer)
            store.add(added)
            answers.clear()
            if error is not None:
                raise error
            drafts += added
            cost = config.cost(*store.num_tokens)
            advance(len(batch), f"cost {cost:.2f}" if cost else "")
    num_problems = sum(draft.problem is not None for draft in drafts)
    if num_problems:
        remarks.warning("%d of %d answers hold no queries", num_problems, len(drafts))
    return WritingReport(
        len(drafts),
        _num_queries(drafts),
        num_problems,
        len(passages) - len(eligible),
        *store.num_tokens,
        cost=config.cost(*store.num_tokens),
        seconds=time.monotonic() - started,
        ended_by=ended_by,
    )


def _check(kinds: Mapping[QueryKind, float], budget: WritingBudget, config: WriterConfig, store: DraftStore) -> None:
    if not any(kinds.values()):
        raise InputError("there are no kinds of queries to write; name at least one: question, keywords or statement")
    if budget.money is not None and config.cost(*store.num_tokens) is None:
        raise InputError(
            "a budget in money needs the writer's prices: set price_per_million_prompt_tokens and "
            "price_per_million_written_tokens in its section remote, or give the budget in tokens"
        )


def _eligible(passages: Sequence[Passage]) -> list[Passage]:
    """The passages that are long enough to ask about."""
    eligible = [passage for passage in passages if len(passage.text.strip()) >= MIN_CHARACTERS]
    if not eligible:
        raise InputError(
            f"none of the {len(passages):,} passages has {MIN_CHARACTERS} characters of text to ask about; give longer "
            "documents, or larger passages"
        )
    return eligible


def _write(batch: Sequence[_PassageAssignment], writer: Writer) -> tuple[list[Draft], BaseException | None]:
    """What the writer answered, and the error that ended it, if one did."""
    written = write_until_error(writer, [assignment.task for assignment in batch])
    drafts = [
        Draft(
            batch[index].passage_hash,
            batch[index].kind,
            answer.queries,
            answer.num_prompt_tokens,
            answer.num_written_tokens,
            answer.problem,
        )
        for index, answer in written.by_index.items()
    ]
    return drafts, written.error


def in_rounds(passages: Iterable[Passage], seed: int) -> list[Passage]:
    """Passages in rounds: one of every document, then a second one of each, and so on; random within a document."""
    by_document: dict[str, list[Passage]] = {}
    for passage in passages:
        by_document.setdefault(passage.document_id or passage.id, []).append(passage)
    rng = random.Random(seed)
    documents = [by_document[name] for name in sorted(by_document)]
    rng.shuffle(documents)
    for document in documents:
        document.sort(key=lambda passage: passage.id)
        rng.shuffle(document)
    longest = max((len(document) for document in documents), default=0)
    return [document[turn] for turn in range(longest) for document in documents if turn < len(document)]


def _assignments(
    passages: Sequence[Passage], kinds: Mapping[QueryKind, float], examples: Sequence[tuple[str, str]], seed: int
) -> Iterator[_PassageAssignment]:
    ordered = in_rounds(passages, seed)
    hashes = [passage_hash(passage) for passage in ordered]
    orders = [_kinds_in_order(text_hash, kinds, seed) for text_hash in hashes]
    for turn in range(len(orders[0])):
        for passage, text_hash, order in zip(ordered, hashes, orders, strict=True):
            task = Assignment(
                passage=passage.text,
                title=passage.title,
                kind=order[turn],
                num_queries=QUERIES_PER_ANSWER,
                examples=tuple(examples),
                seed=random.Random(f"{seed}:{text_hash}:{order[turn]}").getrandbits(31),
            )
            yield _PassageAssignment(text_hash, order[turn], task)


def _pending(assignments: Iterable[_PassageAssignment], store: DraftStore) -> Iterator[_PassageAssignment]:
    """The assignments without an answer; passages with the same text share theirs."""
    seen: set[DraftKey] = set()
    for assignment in assignments:
        key = assignment.passage_hash, assignment.kind
        if key not in store and key not in seen:
            seen.add(key)
            yield assignment


def _kinds_in_order(text_hash: str, kinds: Mapping[QueryKind, float], seed: int) -> list[QueryKind]:
    """A random order of the kinds; a kind of greater weight tends to come earlier (Efraimidis and Spirakis 2006)."""
    rng = random.Random(f"{seed}:{text_hash}")
    keys: dict[QueryKind, float] = {
        kind: rng.random() ** (1 / weight) for kind, weight in sorted(kinds.items()) if weight > 0
    }
    return sorted(keys, key=keys.__getitem__, reverse=True)


def _spent(
    budget: WritingBudget, drafts: Sequence[Draft], store: DraftStore, config: WriterConfig, seconds: float
) -> str | None:
    """The limit of the budget that has been reached, or None."""
    minutes = None if budget.seconds is None else budget.seconds / 60
    limit = Limits(minutes, budget.tokens, budget.money).reached(
        seconds / 60, sum(store.num_tokens), config.cost(*store.num_tokens)
    )
    if limit is not None:
        name, value = limit
        return _IN_WORDS[name].format(value)
    if budget.queries is not None and _num_queries(drafts) >= budget.queries:
        return counted(budget.queries, "query")
    return None


def _num_queries(drafts: Sequence[Draft]) -> int:
    return sum(len(draft.queries) for draft in drafts)


DraftKey = tuple[str, str]
"""Hash of a passage's text, kind of query."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A writer's answer for one passage and kind: queries that no rule or critic has looked at yet.

    ``problem`` says why an answer could not be parsed; tokens are those of this answer.
    """

    passage_hash: str
    kind: QueryKind
    queries: tuple[str, ...]
    num_prompt_tokens: int
    num_written_tokens: int
    problem: str | None = None

    @property
    def key(self) -> DraftKey:
        """What identifies it in the store of one writer."""
        return self.passage_hash, self.kind


def passage_hash(passage: Passage) -> str:
    """Hash of a passage's title and text."""
    return hashlib.blake2b(passage.full_text.encode(errors="surrogatepass"), digest_size=12).hexdigest()


_DRAFTS = TypeAdapter(Draft)


class DraftStore:
    """The drafts of one writer (fingerprint) in a folder; a line that an interruption left unfinished is dropped."""

    def __init__(self, folder: Path, writer: str) -> None:
        """Open a store.

        Args:
            folder: its folder, created if need be.
            writer: fingerprint of the writer.

        Raises:
            DataFormatError: a line, other than an unfinished last one, is not a draft.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"drafts-{writer}.jsonl"
        self._drafts: dict[DraftKey, Draft] = {}
        self.num_tokens = 0, 0
        """Tokens of all prompts, and all tokens written."""
        if self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._drafts)

    def __contains__(self, key: DraftKey) -> bool:
        return key in self._drafts

    def get(self, key: DraftKey) -> Draft | None:
        """The draft with this key, if there is one."""
        return self._drafts.get(key)

    def of(self, passage_hashes: Collection[str]) -> list[Draft]:
        """The drafts for some passages, of every kind."""
        return [draft for draft in self._drafts.values() if draft.passage_hash in passage_hashes]

    def add(self, drafts: Iterable[Draft]) -> None:
        """Append drafts to the file and wait until they are on the disk."""
        added = list(drafts)
        lines = "".join(json.dumps(asdict(draft), ensure_ascii=False) + "\n" for draft in added)
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        for draft in added:
            self._remember(draft)

    def _read(self) -> None:
        content = self.path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            with self.path.open("r+b") as file:
                file.truncate(complete)
        for line_number, line in enumerate(content[:complete].splitlines(), start=1):
            try:
                draft = _DRAFTS.validate_json(line)
            except ValidationError as error:
                what = error.errors(include_url=False)[0]["msg"]
                problem = f"is not a written query ({what}); delete the line, and it will be written again"
                raise DataFormatError(self.path, problem, line=line_number) from error
            self._remember(draft)

    def _remember(self, draft: Draft) -> None:
        self._drafts[draft.key] = draft
        num_read, num_written = self.num_tokens
        self.num_tokens = num_read + draft.num_prompt_tokens, num_written + draft.num_written_tokens
