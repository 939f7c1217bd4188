"""Vectors of texts from an embedding API (OpenAI-compatible ``/v1/embeddings``), never trained.

The rest of d2llm takes a text for one token: the token's id is that of the text's vector in a cache, its state is the
vector, and the mean over the single token is the vector again. So everything that works on a frozen backbone's own
pooling works here, and what needs the states of real tokens is refused.

A vector is asked for once. The cache is a file in the user's cache folder, shared by all runs, students and processes
of this machine that use the same model; it has hashes of texts, not the texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import re
import sqlite3
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from numpy.typing import NDArray
from platformdirs import user_cache_path
from pydantic import Field, model_validator
from torch import Tensor

from d2llm.core.batches import batched
from d2llm.core.errors import InputError, ModelError, StorageError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import remarks
from d2llm.core.sqlite import HELD, is_locked
from d2llm.models.backbone import Backbone
from d2llm.models.remote.endpoint import Endpoint
from d2llm.models.sources import find_model, load_tokenizer
from d2llm.models.tokens import TOKENIZING, TextKind, TokenizedTexts
from d2llm.recipe import CustomBackbone, EndpointConfig, Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


_TRIAL = "What do cows drink?"
_REQUESTS_AT_ONCE = 4  # times the number of concurrent requests: the texts between two updates of a progress bar


_REACHING = frozenset(
    {"url", "api_key_env", "batch_texts", "concurrency", "requests_per_minute", "timeout_seconds", "patience_minutes"}
)
"""Settings that say how an endpoint is reached; vectors do not depend on them."""


class RemoteBackboneConfig(EndpointConfig):
    """The endpoint, which gives vectors of texts (docs/remote-backbone.md)."""

    dimensions: int = Field(ge=1)
    """Width of the vectors; an answer of another width is an error."""
    shorten: bool = False
    """Send ``dimensions`` with every request, so that a model that was trained for it shortens its vectors."""
    batch_texts: int = Field(default=32, ge=1)
    """Texts in one request."""
    query_body: dict[str, Any] = Field(default={})
    """More fields for requests with queries, such as ``{ input_type = "query" }``."""
    passage_body: dict[str, Any] = Field(default={})
    """The same for requests with passages."""


class Remote(CustomBackbone, kind="remote"):
    """The vectors of an embedding API, never trained, with the head distilled on top (docs/remote-backbone.md).

    The kind of a backbone with the section ``remote``. Its ``tuning`` is ``frozen``, and its pooling ``auto``.
    """

    needs = frozenset({"endpoint"})
    costs = "each text sent once; no training of the vectors"
    measured = (
        "minilm behind a local endpoint: .708 as it comes, .722 with a trained inner product, .741 with the "
        "interaction, .783 with trained weights ([one "
        "seed](log/2026-11.md#2026-11-25-a-head-on-vectors-of-an-embedding-api))"
    )
    reads_tokens = False

    remote: RemoteBackboneConfig

    @model_validator(mode="after")
    def _check_weights(self) -> Remote:
        if self.tuning.kind != "frozen":
            raise ValueError(
                f'tuning is "{self.tuning.kind}", but the weights of a remote backbone are elsewhere and cannot be '
                'trained: set tuning = "frozen", or delete the section remote'
            )
        return self

    @property
    def address(self) -> str | None:
        return self.remote.url

    @classmethod
    def shaping(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        remote = {name: value for name, value in values["remote"].items() if name not in _REACHING}
        return super().shaping({**values, "remote": remote})

    def open(
        self,
        pooling: Pooling | None,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        student: Path | None,
    ) -> RemoteBackbone:
        del pooling  # vectors are finished
        return RemoteBackbone(self, device=device, compute_dtype=compute_dtype, student=student)


@dataclass(frozen=True, slots=True)
class EndpointUsage:
    """What a process has asked of an endpoint.

    ``num_texts`` are those whose vectors were not in the cache. ``num_tokens`` is what the endpoint reports (0 if it
    does not).
    """

    num_texts: int = 0
    num_requests: int = 0
    num_tokens: int = 0
    num_retries: int = 0


class RemoteBackbone(Backbone):
    """A backbone whose vectors come from an embedding API.

    ``tokenize`` asks for the vectors that are not in the cache; ``forward`` only looks them up. A text without words
    (empty, or white space) is not sent, because endpoints refuse it; its vector is 0.
    """

    config: Remote

    def __init__(
        self, config: Remote, *, device: torch.device, compute_dtype: torch.dtype, student: Path | None = None
    ) -> None:
        """Ask for the vector of a short text, unless it is in the cache, so that a wrong setting is reported at once.

        Args:
            config: says which endpoint.
            device: where vectors are scored.
            compute_dtype: number format of the head's products.
            student: folder of the student that it belongs to, whose tokenizer counts tokens.

        Raises:
            MissingExtraError: the extra ``remote`` is not installed.
            InputError: the key's variable is not set, or the tokenizer gives no character offsets.
            ModelNotFoundError: the endpoint has no such model, there is no such address, or no such tokenizer.
            ModelError: the endpoint is unreachable, refuses the key, or gives vectors of another width.
            StorageError: the cache cannot be read or written.
        """
        super().__init__(config, compute_dtype=compute_dtype)
        self.remote = config.remote
        self._section = "student.backbone" if student is None else f"{student / MANIFEST_NAME}: config.backbone"
        self.register_buffer("_place", torch.zeros((), device=device), persistent=False)
        self.tokenizer = _tokenizer(self.remote, student)
        self.endpoint = self._open_endpoint()
        self.location = self.endpoint.address
        self.cache = VectorCache(_cache_file(config.model, self.fingerprint_base()), self.dim)
        self._counting = Lock()  # the counts below
        self._num_texts = self._num_requests = self._num_tokens = 0
        self.tokenize([_TRIAL], "passage", prefix="")

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.remote.dimensions

    @property
    def device(self) -> torch.device:
        """Where vectors are scored."""
        return self.get_buffer("_place").device

    @property
    def texts_at_once(self) -> int:
        """How many texts are asked for before progress is reported."""
        return self.remote.batch_texts * self.remote.concurrency * _REQUESTS_AT_ONCE

    @property
    def usage(self) -> EndpointUsage:
        """What this backbone has asked of its endpoint so far."""
        return EndpointUsage(self._num_texts, self._num_requests, self._num_tokens, self.endpoint.retries.count)

    def fingerprint_base(self) -> str:
        """Fingerprint of everything that decides which vector a text gets, but not of the endpoint's address."""
        remote = self.remote
        fields = [remote.revision, remote.dimensions, remote.shorten, remote.query_body, remote.passage_body]
        return fingerprint_json(["remote backbone", self.config.model, *fields])

    def tokenize(
        self, texts: Sequence[str], kind: TextKind, *, prefix: str | None = None, limit: int | None = None
    ) -> TokenizedTexts:
        """The id of each text's vector, in place of its tokens; their number is in ``TokenizedTexts.counts``.

        Asks the endpoint for the vectors that are not in the cache. If that fails, those that came before are kept.

        Raises:
            InputError: as of ``Backbone.tokenize``, or a text is longer than the endpoint can read.
            ModelError: the endpoint failed for longer than ``remote.patience_minutes``, refuses requests, or gives
                vectors that are too few, not finite, or of another width.
            StorageError: the cache cannot be read or written.
        """
        prefixed, limit = self._prepare(texts, kind, prefix, limit)
        cut, truncated, counts = self._cut(prefixed, limit)
        ids = self._vector_ids(cut, kind)
        return TokenizedTexts([[token_id] for token_id in ids], truncated, counts)

    def forward(
        self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]]:
        """The vectors of texts as the states of one token each."""
        vectors = torch.from_numpy(self.cache.read(token_ids.flatten().tolist())).to(self.device)
        return vectors.view(*token_ids.shape, self.dim), mask.to(self.device, torch.bool)

    def _cut(self, texts: Sequence[str], limit: int) -> tuple[list[str], tuple[int, ...], tuple[int, ...]]:
        """Texts cut to ``limit`` tokens, the places of those that were cut, and how many tokens each has."""
        if not texts:
            return [], (), ()
        around = int(self.tokenizer.num_special_tokens_to_add())
        room = max(1, limit - around)
        with TOKENIZING:
            encoded = self.tokenizer(
                list(texts), add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
            )
        offsets: Any = encoded["offset_mapping"]
        kept = [
            text if len(row) <= room else text[: row[room - 1][1]] for text, row in zip(texts, offsets, strict=True)
        ]
        truncated = tuple(index for index, row in enumerate(offsets) if len(row) > room)
        return kept, truncated, tuple(max(1, min(len(row), room) + around) for row in offsets)

    def _vector_ids(self, texts: Sequence[str], kind: TextKind) -> list[int]:
        """The ids of the texts' vectors; those that are not in the cache are asked for."""
        body = self.remote.query_body if kind == "query" else self.remote.passage_body
        head = json.dumps(body, sort_keys=True).encode() + b"\0"
        keys = [hashlib.sha256(head + text.encode()).digest() if text.strip() else b"" for text in texts]
        by_key = {key: text for key, text in zip(keys, texts, strict=True) if key}
        ids = self.cache.find(by_key)
        if new := [(key, text) for key, text in by_key.items() if key not in ids]:
            self._fetch(new, body)
            ids |= self.cache.find([key for key, _ in new])
        return [ids[key] if key else BLANK for key in keys]

    def _fetch(self, texts: Sequence[tuple[bytes, str]], body: Mapping[str, Any]) -> None:
        """Ask for the vectors of texts, given with their keys, and put each answer into the cache at once."""
        batches = list(batched(texts, self.remote.batch_texts))
        fields = {**({"dimensions": self.dim} if self.remote.shorten else {}), **body}
        before = self.usage
        try:
            self.endpoint.ask(
                [{"input": [text for _, text in part], **fields} for part in batches],
                keep=lambda index, answer: self._keep(batches[index], answer),
            ).all()
        finally:
            remarks.log(
                logging.INFO if len(batches) > 1 else logging.DEBUG,
                "%s: vectors of %d texts in %d requests, %d tokens reported, %d retries",
                self.endpoint.address,
                *map(operator.sub, astuple(self.usage), astuple(before)),
            )

    def _keep(self, part: Sequence[tuple[bytes, str]], answer: _Answer) -> None:
        """Check the answer to one request, and put its vectors into the cache."""
        where, model = self.endpoint.address, self.config.model
        if len(answer.vectors) != len(part):
            raise ModelError(
                f"{where}: {len(answer.vectors)} vectors came back for {len(part)} texts; lower "
                f"{self._section}.remote.batch_texts, or use a server that answers every text"
            )
        if (widths := {vector.shape for vector in answer.vectors}) != {(self.dim,)}:
            shape = next(iter(widths - {(self.dim,)}))
            raise ModelError(
                f"{where}: '{model}' gives vectors of {'x'.join(map(str, shape))} dimensions, but "
                f"{self._section}.remote.dimensions is {self.dim}; name the model that has so many or, for a student "
                "that is not trained yet, set dimensions to the model's (shorten = true asks for fewer than it has)"
            )
        finite = [bool(np.isfinite(vector).all()) for vector in answer.vectors]
        rows = zip(part, answer.vectors, finite, strict=True)
        self.cache.add([(key, vector) for (key, _), vector, is_finite in rows if is_finite])
        with self._counting:
            self._num_texts += sum(finite)
            self._num_requests += 1
            self._num_tokens += answer.num_tokens
        if not all(finite):
            text = part[finite.index(False)][1]
            raise ModelError(
                f"{where}: the vector of the text {text[:60]!r} has numbers that are not finite; repair the server "
                "(often its number format), or leave this text out"
            )

    def _open_endpoint(self) -> Endpoint[_Answer]:
        return Endpoint(
            self.config.model,
            self.remote,
            _read_answer,
            path="embeddings",
            section=self._section,
            text="a text (or all texts of a request together)",
            answer="vectors",
            shorten=(
                f"lower {self._section}.max_passage_tokens and max_query_tokens, or remote.batch_texts; or name the "
                "model's own tokenizer in remote.tokenizer, which counts exactly"
            ),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the endpoint, which has the key; a copy reads it from its environment."""
        return {**self.__dict__, "endpoint": None, "_counting": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the endpoint."""
        super().__setstate__(state)
        self.endpoint, self._counting = self._open_endpoint(), Lock()


@dataclass(frozen=True, slots=True)
class _Answer:
    """The vectors of a request's texts, in order, and how many tokens the endpoint says that it read."""

    vectors: list[NDArray[np.float32]]
    num_tokens: int


def _read_answer(answer: Any) -> _Answer:
    """Parse the JSON of an answer; its vectors may come in any order."""
    rows = {row.get("index", index): row["embedding"] for index, row in enumerate(answer["data"])}
    with np.errstate(over="ignore"):  # a number that is too large becomes infinite, which is reported
        vectors = [np.asarray(rows[index], dtype=np.float32) for index in range(len(answer["data"]))]
    num_tokens = (answer.get("usage") or {}).get("prompt_tokens")
    return _Answer(vectors, num_tokens if isinstance(num_tokens, int) else 0)


def _cache_file(model: str, fingerprint: str) -> Path:
    name = re.sub(r"[^\w.-]+", "-", model)[-60:]
    return user_cache_path("d2llm") / "vectors" / f"{name}-{fingerprint}.sqlite"


def _tokenizer(config: RemoteBackboneConfig, folder: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or the one that the settings name, or else one of pieces of a few characters."""
    if folder is None and config.tokenizer is None:
        return _character_tokenizer(max(1, int(config.characters_per_token)))
    name = str(folder or config.tokenizer)
    tokenizer = load_tokenizer(name if Path(name).is_dir() else find_model(name))
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer '{name}' gives no character offsets, so texts cannot be cut by it; name one with a "
            "tokenizer.json, or none, so that characters are counted"
        )
    return tokenizer


def _character_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are any ``length`` characters: it only counts and cuts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{length}}}"), behavior="isolated")
    tokenizer.pre_tokenizer = pieces  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")


# The vectors on disk --------------------------------------------------------------------------------------------------

BLANK = 0
"""The id of the vector of a text without words, which is 0; SQLite numbers rows from 1."""
_ROWS_AT_ONCE = 500  # SQLite allows so many values in one statement, even in old versions
_BUSY_SECONDS = 60.0  # how long to wait for another process that writes to the cache


class VectorCache:
    """Vectors [dim] under keys, in one SQLite file that several threads and processes can use at a time.

    Vectors are only added. The file can be deleted whenever no program uses it.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self.dim = dim
        self._lock = Lock()
        self._connection: tuple[int, sqlite3.Connection] | None = None  # and the process that opened it

    def find(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """The ids of the vectors under those keys that are there.

        Raises:
            StorageError: the file cannot be read.
        """
        with self._transaction() as connection:
            return {
                key: vector_id
                for part in batched(keys, _ROWS_AT_ONCE)
                for key, vector_id in connection.execute(
                    f"SELECT key, id FROM vectors WHERE key IN ({_marks(part)})", part
                )
            }

    def add(self, rows: Iterable[tuple[bytes, NDArray[np.float32]]]) -> None:
        """Add vectors, all or none, durably; existing keys keep their vectors.

        Raises:
            StorageError: the file cannot be written.
        """
        values = [(key, vector.astype("<f4").tobytes()) for key, vector in rows]
        with self._transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO vectors (key, vector) VALUES (?, ?)", values)

    def read(self, ids: Sequence[int]) -> Float32[np.ndarray, "texts dim"]:
        """The vectors with these ids; that of id 0 is 0.

        Raises:
            StorageError: the file cannot be read, or lacks one of them.
        """
        blobs: dict[int, bytes] = {BLANK: bytes(4 * self.dim)}
        with self._transaction() as connection:
            for part in batched({*ids} - {BLANK}, _ROWS_AT_ONCE):
                blobs |= connection.execute(f"SELECT id, vector FROM vectors WHERE id IN ({_marks(part)})", part)
        if any(len(blobs.get(vector_id, b"")) != 4 * self.dim for vector_id in ids):
            raise StorageError(
                f"{self.path}: lacks a vector that was there, or is damaged; delete it, and run the command again: the "
                "vectors are asked for again"
            )
        content = b"".join(blobs[vector_id] for vector_id in ids)
        return np.frombuffer(content, "<f4").astype(np.float32).reshape(len(ids), self.dim)

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        with self._lock:
            try:
                with self._open() as connection:
                    yield connection
            except (sqlite3.Error, OSError) as error:
                advice = (
                    "check free space and write permission there, or set another cache folder in the environment "
                    "variable XDG_CACHE_HOME"
                )
                if is_locked(error):
                    advice = HELD
                elif not isinstance(error, (sqlite3.OperationalError, OSError)):
                    advice = "it is damaged, so delete it; the vectors are asked for again"
                raise StorageError(f"{self.path}: the cache of vectors cannot be used ({error}); {advice}") from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._connection[0] != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, check_same_thread=False)
            connection.execute(
                "CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, vector BLOB)"
            )
            self._connection = os.getpid(), connection
        return self._connection[1]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy opens the file itself."""
        return VectorCache, (self.path, self.dim)


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
