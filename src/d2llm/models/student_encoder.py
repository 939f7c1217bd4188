"""From texts to vectors: the part of a student that reads (``Student`` has its folder, its training, its parts)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from numpy.typing import NDArray
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.inputs import stream_of_objects, strings_of, texts_of
from d2llm.core.progress import Advance
from d2llm.core.types import EngineName, Span, WholeText
from d2llm.models.backbone import Backbone
from d2llm.models.device import inference, tokens_to_read
from d2llm.models.document_expansion import DocumentExpansion, LearnedWords
from d2llm.models.engines.core_workers import map_on_cores
from d2llm.models.engines.engines import Engine, open_engine
from d2llm.models.engines.lean_layers import project_tokens
from d2llm.models.fitted_part import TermWeights
from d2llm.models.late_chunking import ChunkReader, EncodedChunks
from d2llm.models.pooling import TextPooling, to_sphere
from d2llm.models.token_vectors import TokenProjection
from d2llm.models.tokens import (
    NO_TOKENS,
    EncodedTexts,
    TextKind,
    TokenizedTexts,
    TokenVectors,
    search_query_tokens,
    tokenize_search,
)
from d2llm.models.vector_scorer import VectorScorer
from d2llm.ops.batching import token_budget_batches
from d2llm.ops.bm25_words import terms, tokens_of_terms
from d2llm.recipe import StudentConfig

_log = logging.getLogger(__name__)
_BATCH_TEXTS, _QUERIES_AT_ONCE = 1_024, 256


class StudentEncoder(VectorScorer):
    """Makes vectors of texts and of their tokens, and weights of words, with a backbone, a pooling and an engine.

    Subclasses set ``pooling``, and what was fitted: ``token_projection``, ``term_weights`` and ``document_expansion``.
    """

    pooling: TextPooling
    token_projection: TokenProjection | None
    term_weights: TermWeights | None
    document_expansion: DocumentExpansion | LearnedWords | None

    def __init__(self, config: StudentConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.max_query_tokens = search_query_tokens(config.backbone)  # may be lowered
        self._engine: Engine | None = None
        self._products: torch.dtype | None = None

    @property
    def vector_dim(self) -> int:
        """Dimension of a text's vector."""
        return self.pooling.dim

    @property
    def device(self) -> torch.device:
        """Where texts are encoded and vectors scored."""
        return self.backbone.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number format of the products, both for encoding texts (with any engine) and for scoring."""
        return self._products or self.backbone.compute_dtype

    @property
    def batch_tokens(self) -> int:
        """Tokens, including padding, that one core or an accelerator encodes at a time."""
        return tokens_to_read(self.device, self.backbone.state_size)

    @property
    def token_dim(self) -> int | None:
        """Width of a token's vector; None if this student has no projection of tokens."""
        return None if self.token_projection is None else self.token_projection.dim

    @property
    def token_fingerprint(self) -> str | None:
        """Content hash of the projection that makes the token embeddings, if there is one."""
        return None if self.token_projection is None else self.token_projection.fingerprint

    def use_engine(self, name: EngineName, *, dtype: torch.dtype | None = None) -> None:
        """Encode texts with this engine from now on, using the current weights; scoring always uses torch.

        ``dtype`` is the number format of the products from now on, including scoring; by default that of the weights.

        Raises:
            InputError: the weights are not float32 on the CPU, which every engine but torch requires.
            MissingExtraError: the engine is not installed.
        """
        self._engine = open_engine(self, name, dtype=dtype or self.backbone.compute_dtype)
        self._products = dtype

    @property
    def engine(self) -> EngineName:
        """The engine that encodes texts (``use_engine``)."""
        return "torch" if self._engine is None else self._engine.name

    def forward(self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        """Vectors [batch, dim] of tokenized texts, float32."""
        return self.pool(*self.backbone(token_ids, mask))

    def pool(self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        """Vectors [batch, dim] of the backbone's states, right-padded."""
        vectors = self.pooling(states, mask)
        return to_sphere(vectors) if self.config.interaction.head == "cosine" else vectors

    def encode_queries(
        self, texts: Sequence[str], *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        """Vectors of queries, cut to ``max_query_tokens``; ``advance`` is called with the number of texts finished.

        An ``instruction`` is put before every query in place of ``backbone.query_prefix``.

        Raises:
            InputError: the instruction leaves no room for a query.
        """
        return self._encode(texts, "query", advance, instruction)

    def encode_passages(self, texts: Sequence[str], *, advance: Advance | None = None) -> EncodedTexts:
        """Vectors of passages (title and text as one string); ``advance`` is called with the number finished."""
        return self._encode(texts, "passage", advance)

    def encode_query(self, texts: Sequence[str] | str, *, instruction: str | None = None) -> NDArray[np.float32]:
        """Vectors of queries as an array: [dim] of one text, [n, dim] of a list; float32.

        They are for queries of ``rank``, ``score`` and indexes; a query's vector differs from a passage's of the same
        text if the backbone has prefixes. Texts longer than ``max_query_tokens`` are cut, and the log says how many;
        ``encode_queries`` returns which.

        Args:
            texts: one text, or a list of them.
            instruction: put before every query in place of ``backbone.query_prefix``.

        Raises:
            InputError: a value is not a text, or the instruction leaves no room for a query.

        Example:
            >>> from d2llm import Student
            >>> student = Student.load("d2llm-minilm", device="cpu")
            >>> student.encode_query("how hot should the water be?").shape
            (384,)
            >>> student.encode_query(["one", "two"]).shape
            (2, 384)
        """
        return self._as_array(texts, partial(self.encode_queries, instruction=instruction))

    def encode_document(self, texts: Sequence[str] | str) -> NDArray[np.float32]:
        """Vectors of passages as an array: [dim] of one text, [n, dim] of a list; float32.

        A title is the first line of its text. Texts longer than the student reads are cut, and the log says how many;
        ``encode_passages`` returns which.

        Raises:
            InputError: a value is not a text.

        Example:
            >>> from d2llm import Student
            >>> student = Student.load("d2llm-minilm", device="cpu")
            >>> student.encode_document(["Green tea needs water of 80 °C.", "Bees make honey."]).shape
            (2, 384)
        """
        return self._as_array(texts, self.encode_passages)

    def _as_array(self, texts: Sequence[str] | str, encode: Callable[[list[str]], EncodedTexts]) -> NDArray[np.float32]:
        read = encode(strings_of(texts, "texts"))
        self._warn_of_cut(len(read.truncated), len(read.vectors))
        return read.vectors[0] if isinstance(texts, str) else read.vectors

    def _warn_of_cut(self, num_cut: int, num_texts: int) -> None:
        if num_cut:
            _log.warning("%d of %d texts are longer than the student reads: their ends are ignored", num_cut, num_texts)

    def encode_with_tokens(
        self, texts: Sequence[str], kind: TextKind, *, instruction: str | None = None, advance: Advance | None = None
    ) -> EncodedTexts:
        """Vectors of queries or passages and of their tokens, from one pass through the backbone.

        Of a long query, only the rarest tokens have vectors, multiplied by their fraction of its tokens, so that the
        mean of their cosines is that of all, if the others' are 0 (``TokenProjection``). The tokens of an
        ``instruction`` have none.

        Raises:
            InputError: this student has no projection of tokens, the instruction leaves no room for a query, or the
                tokenizer gives no character offsets, which an instruction requires.
        """
        texts, projection = texts_of(texts), self._require_projection()
        tokenized = self.tokenize(texts, kind, instruction=instruction)
        starts = [0] * len(texts) if instruction is None else self.backbone.first_own_tokens(texts, instruction)
        token_rows: list[NDArray[np.float32]] = [np.zeros((0, projection.dim), np.float32)] * len(texts)

        def read(batch: list[int]) -> Float32[np.ndarray, "batch dim"]:
            ids, first_tokens = [tokenized.ids[index] for index in batch], [starts[index] for index in batch]
            vectors, rows = self.encode_token_rows(ids, kind, first_tokens)
            for index, row in zip(batch, rows, strict=True):
                token_rows[index] = row
            return vectors

        encoded = self._read_batches(tokenized, read, advance)
        return replace(encoded, tokens=TokenVectors.join(token_rows, projection.dim))

    def encode_token_rows(
        self, ids: Sequence[Sequence[int]], kind: TextKind, starts: Sequence[int]
    ) -> tuple[Float32[np.ndarray, "batch dim"], list[NDArray[np.float32]]]:
        """Like ``encode_tokens``; also the vectors [tokens, token_dim] of the tokens of each text.

        The tokens before each text's start are those of an instruction, which have no vectors.
        """
        projection = self._require_projection()
        with inference(self):
            vectors, states = self._read_ids(ids)
            chosen = [projection.chosen(text_ids[start:], kind) for text_ids, start in zip(ids, starts, strict=True)]
            kept = [
                [start + position for position in positions]
                for start, (positions, _) in zip(starts, chosen, strict=True)
            ]
            tokens = self._token_embeddings(states, kept)
            by_text = np.split(tokens, np.cumsum([len(positions) for positions in kept])[:-1])
            rows = [part * np.float32(fraction) for part, (_, fraction) in zip(by_text, chosen, strict=True)]
            return vectors.cpu().numpy(), rows

    def _token_embeddings(
        self, states: Float[Tensor, "batch tokens states"], positions: Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        """The embeddings of a batch's tokens at these places of each text, text after text."""
        projection = self._require_projection()
        if self._engine is None:
            return projection(torch.cat([states[row, kept] for row, kept in enumerate(positions)])).cpu().numpy()
        # Not by torch, whose threads a busy core keeps waiting for longer than a graph takes.
        rows = states.numpy()
        token_states = np.concatenate([rows[row, kept] for row, kept in enumerate(positions)])
        return project_tokens(token_states, projection.weight.detach().numpy())

    def _require_projection(self) -> TokenProjection:
        if self.token_projection is None:
            raise InputError(NO_TOKENS)
        return self.token_projection

    @property
    def chunk_reader(self) -> ChunkReader:
        """Reads long texts whole and pools chunks of them (late chunking).

        Raises:
            InputError: this student's pooling or tokenizer does not support it.
        """
        return ChunkReader(self.backbone, self.pooling, self.pool)

    def term_states(self, queries: Sequence[str]) -> list[dict[str, Float32[np.ndarray, " dim"]]]:
        """The state [dim] of each BM25 term of the queries: the mean over the tokens of its words.

        Terms beyond the student's limit have none.

        Raises:
            InputError: the backbone is remote, or its tokenizer gives no character offsets.
        """
        self.backbone.require_tokens("a weight for each word of a query")
        if not getattr(self.backbone.tokenizer, "is_fast", False):
            raise InputError("this student's tokenizer gives no character offsets, so words have no states")
        queries = texts_of(queries, "queries")
        tokenized = self.tokenize(queries, "query")
        word_states: list[dict[str, Float32[np.ndarray, " dim"]]] = [{} for _ in queries]
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            batch = range(start, min(start + _QUERIES_AT_ONCE, len(queries)))
            with inference(self):
                _, states = self._read_ids([tokenized.ids[index] for index in batch])
            for index, text_states in zip(batch, states.float().cpu().numpy(), strict=True):
                text = queries[index]
                spans = self.backbone.token_spans(text, len(tokenized.ids[index]), "query")
                by_term = tokens_of_terms(text, spans)
                word_states[index] = {
                    term: text_states[positions].mean(axis=0) for term, positions in by_term.items() if positions
                }
        return word_states

    def term_factors(self, queries: Sequence[str]) -> list[dict[str, float]] | None:
        """How much each BM25 term of the queries counts, and their learned words; None if there is neither."""
        queries, fitted, learned = texts_of(queries, "queries"), self.term_weights, self.document_expansion
        if fitted is None and not isinstance(learned, LearnedWords):
            return None
        factors = [dict.fromkeys(terms(text), 1.0 if fitted is None else fitted.usual) for text in queries]
        if fitted is not None:
            for values, states in zip(factors, self.term_states(queries), strict=True):
                if states:
                    values |= dict(zip(states, fitted.factors(np.stack([*states.values()])).tolist(), strict=True))
        if isinstance(learned, LearnedWords):
            factors = [values | words for values, words in zip(factors, learned.of_queries(queries), strict=True)]
        return factors

    def encode_chunks(
        self, texts: Iterable[tuple[WholeText, Sequence[Span]]], *, with_tokens: bool = False
    ) -> EncodedChunks:
        """Vectors of chunks of long texts, each encoded in the context of its whole text (``ChunkReader.encode``).

        ``with_tokens``: also those of the chunks' tokens, which this student must have.
        """
        chunks = stream_of_objects(texts, "texts", tuple)
        projection = self._require_projection() if with_tokens else None
        with inference(self):
            return ChunkReader(self.backbone, self.pooling, self.pool, projection).encode(chunks)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out compiled and cast weights: a copy casts its weights itself and encodes with torch."""
        return {**super().__getstate__(), "_engine": None, "_products": None}

    def tokenize(self, texts: Sequence[str], kind: TextKind, *, instruction: str | None = None) -> TokenizedTexts:
        """Token ids of each text as in a search, cut to the limit of its kind; cuts are counted.

        An ``instruction`` is put before every query in place of the configured prefix.

        Raises:
            InputError: the instruction leaves no room for a query, or the texts are passages.
        """
        return tokenize_search(self.backbone, texts, kind, instruction=instruction, limit=self.max_query_tokens)

    def encode_tokens(self, ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "batch dim"]:
        """Vectors of one batch of tokenized texts, ideally of similar length (``batch_tokens``)."""
        with inference(self):
            return self._read_ids(ids)[0].cpu().numpy()

    def _read_ids(
        self, ids: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch tokens states"]]:
        """Vectors of one batch of tokenized texts and the states of their tokens, by the engine; for inference."""
        padded, mask = self.backbone.pad(ids)
        if self._engine is not None:
            read = self._engine.run(padded.numpy(), mask.long().numpy())
            return torch.from_numpy(read.vectors), torch.from_numpy(read.states)
        states, mask = self.backbone(padded, mask)
        return self.pool(states, mask), states

    def _encode(
        self, texts: Sequence[str], kind: TextKind, advance: Advance | None, instruction: str | None = None
    ) -> EncodedTexts:
        at_once = self.backbone.texts_at_once
        texts = texts_of(texts)
        if at_once is not None and len(texts) > at_once:
            batches = [texts[start : start + at_once] for start in range(0, len(texts), at_once)]
            encoded = [self._encode(part, kind, advance, instruction) for part in batches]
            return EncodedTexts.join(encoded, self.vector_dim)
        tokenized = self.tokenize(texts, kind, instruction=instruction)

        def read(batch: list[int]) -> Float32[np.ndarray, "batch dim"]:
            return self.encode_tokens([tokenized.ids[index] for index in batch])

        return self._read_batches(tokenized, read, advance)

    def _read_batches(
        self,
        tokenized: TokenizedTexts,
        read: Callable[[list[int]], Float32[np.ndarray, "batch dim"]],
        advance: Advance | None,
    ) -> EncodedTexts:
        """The vectors of tokenized texts; ``read`` gives those of a batch, named by the places of its texts."""
        vectors = np.empty((len(tokenized.ids), self.vector_dim), dtype=np.float32)
        over_batches = map_on_cores if self.backbone.device.type == "cpu" else map
        sizes = list(map(len, tokenized.ids))
        batches = list(token_budget_batches(sizes, max_tokens=self.batch_tokens, max_items=_BATCH_TEXTS))
        with inference(self):
            for batch, encoded in zip(batches, over_batches(read, batches), strict=True):
                vectors[batch] = encoded
                if advance is not None:
                    advance(len(batch))
        return EncodedTexts(vectors, tokenized.truncated, sum(tokenized.lengths), tuple(tokenized.lengths))
