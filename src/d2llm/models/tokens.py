"""Texts as tokens, and what is read of them: everything about it that needs no weights, and so no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.inputs import texts_of
from d2llm.core.types import Span, is_text
from d2llm.models.fitted_part import Widths
from d2llm.models.sources import load_arrays, load_metadata
from d2llm.ops.token_bounds import bounded_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from d2llm.recipe import BackboneConfig

TextKind = Literal["query", "passage"]

NO_TOKENS = "this student has no token embeddings; train them with `d2llm fit-tokens`"
TOKENIZING = Lock()
"""Held while a student's tokenizer runs: its truncation setting is state that all threads share."""


class TokenVectors(NamedTuple):
    """The vectors [sum of counts, token_dim] of the tokens of n texts, text after text, and their counts [n]."""

    vectors: NDArray[np.float32]
    counts: NDArray[np.int64]

    @classmethod
    def join(cls, texts: Sequence[NDArray[np.float32]], dim: int) -> TokenVectors:
        """The tokens of all texts, given by text."""
        counts = np.array([len(text) for text in texts], np.int64)
        return cls(np.concatenate([np.zeros((0, dim), np.float32), *texts]), counts)

    def split(self) -> list[NDArray[np.float32]]:
        """The vectors [tokens, token_dim] of each text."""
        return np.split(self.vectors, np.cumsum(self.counts)[:-1]) if len(self.counts) else []


class ChosenTokens:
    """Says which tokens of a text get vectors.

    Attributes:
        rarities: how rare each token of the vocabulary is, at least 0; those of rarity 0 have no vectors.
        max_query_tokens: of a query only so many tokens have vectors, the rarest.
    """

    file_name: ClassVar[str] = "tokens.safetensors"
    rarities: list[float]
    max_query_tokens: int

    def positions(self, token_ids: Sequence[int]) -> list[int]:
        """The places of a passage's tokens that get a vector."""
        return [index for index, token in enumerate(token_ids) if self._rarity_of(token) > 0]

    def chosen(self, token_ids: Sequence[int], kind: TextKind) -> tuple[list[int], float]:
        """The places of a text's tokens that get a vector, and the fraction of its tokens that they are."""
        if kind == "passage":
            return self.positions(token_ids), 1.0
        return self.query_positions(token_ids), self.query_fraction(token_ids)

    def query_positions(self, token_ids: Sequence[int]) -> list[int]:
        """The places of a query's tokens that get a vector."""
        positions = self.positions(token_ids)
        positions.sort(key=lambda index: -self._rarity_of(token_ids[index]))  # stable: of equal tokens the first
        return sorted(positions[: self.max_query_tokens])

    def query_fraction(self, token_ids: Sequence[int]) -> float:
        """The fraction of a query's tokens that get a vector; 1 for all but long queries."""
        return min(1.0, self.max_query_tokens / max(len(self.positions(token_ids)), 1))

    def _rarity_of(self, token: int) -> float:
        return self.rarities[max(token, ~token)]  # a query's tokens may be below 0 (``TokenizedTexts``)


class StoredProjection(ChosenTokens):
    """What makes the vectors of tokens (``models.token_vectors``), as arrays: the map [token_dim, dim], rarities."""

    def __init__(self, weight: NDArray[np.float32], rarity: NDArray[np.float32], max_query_tokens: int) -> None:
        self.weight, self.rarity, self.max_query_tokens = weight, rarity, max_query_tokens
        self.rarities = rarity.tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Content hash."""
        digest = hashlib.sha256(str(self.max_query_tokens).encode())
        for array in (self.weight, self.rarity):
            digest.update(str(array.shape).encode())
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def read(cls, folder: Path, student: str, widths: Widths) -> StoredProjection | None:
        """The projection in the folder of the student with this fingerprint; None if there is none.

        Raises:
            ModelError: it cannot be read, does not fit the width of the states, or belongs to another student.
        """
        path = folder / cls.file_name
        if not path.is_file():
            return None
        remedy = "restore the student's folder"
        arrays = load_arrays(path, remedy=remedy)
        weight, rarity = arrays.get("weight"), arrays.get("rarity")
        if weight is None or rarity is None or weight.ndim != 2 or weight.shape[1] != widths.states or rarity.ndim != 1:
            raise ModelError(f"{path} does not fit a student whose states have {widths.states} dimensions; {remedy}")
        metadata = load_metadata(path)
        if (owner := metadata.get("student")) != student:
            raise ModelError(f"{path} was trained for the student {owner}, but this one is {student}; {remedy}")
        if not (limit := metadata.get("max_query_tokens", "")).isdecimal() or int(limit) < 1:
            raise ModelError(f"{path} does not say how many tokens of a query count; {remedy}")
        return cls(weight, rarity, int(limit))


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Token ids of each text, with special tokens; ``truncated`` has the indices of those over the limit.

    If queries have an adapter of their own, the ids of their tokens are ~id, below 0, so that wherever texts are read
    together, each row says which adapter reads it.

    ``counts`` has the number of tokens of each text, where an id stands for a whole text (a remote backbone).
    """

    ids: list[list[int]]
    truncated: tuple[int, ...] = ()
    counts: tuple[int, ...] | None = None

    @property
    def num_truncated(self) -> int:
        """How many texts were truncated."""
        return len(self.truncated)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each text."""
        return [len(ids) for ids in self.ids] if self.counts is None else [*self.counts]


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Vectors of n texts, the indices of those cut to the length limit, and the tokens read, in total and per text.

    ``tokens`` are the vectors of the texts' tokens, if they were requested (``Student.encode_with_tokens``).
    """

    vectors: NDArray[np.float32]
    truncated: tuple[int, ...]
    num_tokens: int
    lengths: tuple[int, ...] = ()
    tokens: TokenVectors | None = None

    @property
    def num_truncated(self) -> int:
        """How many texts were truncated."""
        return len(self.truncated)

    @classmethod
    def join(cls, batches: Sequence[EncodedTexts], dim: int) -> EncodedTexts:
        """The texts of all parts, which have vectors [n, dim], in order."""
        starts = np.cumsum([0, *(len(part.vectors) for part in batches)]).tolist()
        tokens = [part.tokens for part in batches if part.tokens is not None]
        return cls(
            np.concatenate([np.zeros((0, dim), np.float32), *(part.vectors for part in batches)]),
            tuple(start + index for start, part in zip(starts, batches, strict=False) for index in part.truncated),
            sum(part.num_tokens for part in batches),
            tuple(length for part in batches for length in part.lengths),
            TokenVectors(*(np.concatenate(arrays) for arrays in zip(*tokens, strict=True))) if tokens else None,
        )


@contextmanager
def _failures_named() -> Generator[None]:
    """Turn what tokenizers, in Rust, raises for a text (a plain ``Exception``, or a panic) into an error of d2llm's."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the tokenizer fails on a text ({error}); use another model, or its original files"
        ) from error


class TextReader:
    """Turns texts into tokens, with a tokenizer of ``transformers`` or one with the same interface.

    Attributes:
        config: prefixes and limits.
        tokenizer: the tokenizer.
        query_model: what reads queries, if that is another model than that of passages.
    """

    config: BackboneConfig
    tokenizer: PreTrainedTokenizerBase
    query_model: Any

    def tokenize(
        self, texts: Sequence[str], kind: TextKind, *, prefix: str | None = None, limit: int | None = None
    ) -> TokenizedTexts:
        """Token ids of each text with its prefix, cut to the limit; cuts are counted. Thread-safe.

        If ``prefix`` or ``limit`` is None, the configuration's value for the kind is used, as in training.

        Raises:
            InputError: ``texts`` is a single string, or a text holds a lone surrogate.
            ModelError: the tokenizer fails on a text.
        """
        prefixed, limit = self._prepare(texts, kind, prefix, limit)
        if not prefixed:
            return TokenizedTexts([])
        # Only texts over the limit are tokenized twice, so that the tokenizer keeps its closing special token.
        with TOKENIZING, _failures_named():
            ids = cast("list[list[int]]", self.tokenizer(prefixed, truncation=False, verbose=False)["input_ids"])
            too_long = [index for index, row in enumerate(ids) if len(row) > limit]
            if too_long:
                cut = self.tokenizer([prefixed[index] for index in too_long], truncation=True, max_length=limit)
                for index, row in zip(too_long, cast("list[list[int]]", cut["input_ids"]), strict=True):
                    ids[index] = row
        # A tokenizer without special tokens returns no token for an empty text, but a model needs at least one.
        fallback = self.tokenizer.eos_token_id or self.tokenizer.pad_token_id or 0
        rows = [row or [cast(int, fallback)] for row in ids]
        if kind == "query" and self.query_model is not None:
            rows = [[~token for token in row] for row in rows]
        return TokenizedTexts(rows, tuple(too_long))

    def _prepare(
        self, texts: Sequence[str], kind: TextKind, prefix: str | None, limit: int | None
    ) -> tuple[list[str], int]:
        """The texts with their prefix, checked, and their limit in tokens (``tokenize``)."""
        texts = texts_of(texts)
        if prefix is None:
            prefix = self.config.query_prefix if kind == "query" else self.config.passage_prefix
        if limit is None:
            limit = self.config.max_query_tokens if kind == "query" else self.config.max_passage_tokens
        _check_text(prefix)
        return [prefix + text for text in texts], limit

    def num_tokens(self, text: str) -> int:
        """How many tokens a text has, with special tokens.

        Raises:
            InputError: the text holds a lone surrogate.
        """
        _check_text(text)
        with TOKENIZING:
            ids = cast("list[list[int]]", self.tokenizer([text], truncation=False, verbose=False)["input_ids"])
        return len(ids[0])

    def first_own_tokens(self, texts: Sequence[str], prefix: str) -> list[int]:
        """The place of each text's first token in its ids with this prefix; a token of both belongs to the text.

        Raises:
            InputError: the tokenizer gives no character offsets.
        """
        texts_offsets = _encoded(self.tokenizer, [prefix + text for text in texts_of(texts)])["offset_mapping"]
        return [
            next((index for index, (_, end) in enumerate(offsets) if end > len(prefix)), len(offsets))
            for offsets in texts_offsets
        ]

    def token_ends(self, text: str) -> list[int]:
        """Where the tokens of a text end, in characters, without prefix and special tokens (``token_ends``)."""
        return token_ends(self.tokenizer, text)

    def token_spans(self, text: str, num_tokens: int, kind: TextKind = "passage") -> list[Span]:
        """Character spans in a text, by default a passage, of the ``num_tokens`` tokens of ``tokenize``.

        Needs a fast tokenizer. The span of a special token is empty.
        """
        prefix = self.config.query_prefix if kind == "query" else self.config.passage_prefix
        (offsets,) = _encoded(self.tokenizer, [prefix + text], max_tokens=num_tokens)["offset_mapping"]
        return [(start - len(prefix), end - len(prefix)) for start, end in offsets]


def tokenize_search(
    reader: TextReader, texts: Sequence[str], kind: TextKind, *, instruction: str | None, limit: int
) -> TokenizedTexts:
    """``TextReader.tokenize`` as a search does: queries are cut to ``limit``; an ``instruction`` replaces the prefix.

    Raises:
        InputError: the instruction leaves no room for a query, or the texts are passages.
    """
    if instruction is not None:
        if kind != "query":
            raise InputError("an instruction is put before queries; leave it out for passages")
        num_tokens = reader.num_tokens(instruction)
        if num_tokens >= limit:
            raise InputError(
                f"the instruction has {num_tokens} tokens, but the student reads only {limit} of "
                "instruction and query together; shorten it"
            )
    return reader.tokenize(texts, kind, prefix=instruction, limit=limit if kind == "query" else None)


def _check_text(text: str) -> None:
    if not is_text(text):
        raise InputError(f"{text[:100]!r}: is not valid Unicode text; write it as UTF-8")


def token_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Where the tokens of a text end, in characters, without special tokens; their number is the text's length.

    What the vocabulary lacks, or the tokenizer leaves out, counts as many tokens as it may be for a model that reads it
    (``ops.token_bounds``): long strings of letters, emoji, blank lines.

    Raises:
        InputError: the tokenizer gives no character offsets.
    """
    encoded = _encoded(tokenizer, [text], add_special_tokens=False)
    unknown: int | None = getattr(tokenizer, "unk_token_id", None)
    is_unknown = [token == unknown for token in encoded["input_ids"][0]]
    return bounded_ends(text, encoded["offset_mapping"][0], is_unknown)


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    max_tokens: int | None = None,
    add_special_tokens: bool = True,
) -> Mapping[str, Any]:
    """The tokens of each text, cut to ``max_tokens``, and their spans in characters; that of a special one is empty."""
    try:
        with TOKENIZING:
            return tokenizer(
                texts,
                truncation=max_tokens is not None,
                max_length=max_tokens,
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                verbose=False,
            )
    except NotImplementedError as error:
        raise InputError(
            "this tokenizer gives no character offsets, so its tokens cannot be counted; name another tokenizer"
        ) from error


def search_query_tokens(config: BackboneConfig) -> int:
    """How many tokens of a query a search reads: as many as of a passage, even if training read fewer.

    The backbone encodes both in the same way, and queries of the usual length keep their vectors (docs/log).
    """
    return max(config.max_query_tokens, config.max_passage_tokens)
