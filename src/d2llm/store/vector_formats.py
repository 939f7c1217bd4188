"""Storage formats of vectors: a format converts float32 vectors to rows of bytes and back.

float32, bfloat16, float16   the numbers themselves
int8, int4, int3, binary     8, 4, 3 or 1 bits per dimension of the rotated vector, for vectors with a norm near
                             sqrt(dim), as d2llm's students produce them

No format needs training, so all passages of an index are stored in the same way, and a row means the same in every
index. The quantised formats first rotate the vectors: a rotation preserves inner products and spreads the energy of a
vector evenly over its dimensions, which are then close to standard normal, so one fixed step suits all of them (as in
Vargaftik et al., "EDEN", ICML 2022, and Gao and Long, "RaBitQ", SIGMOD 2024). A format also provides the FAISS index
whose codes equal its rows (``store.scan``).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.names import counted, did_you_mean
from d2llm.core.registry import Registered, Registry
from d2llm.store.index_spec import FORMATS

_NORMS_AT_ONCE = 1_024
_ON_ONE_CORE = 1 << 18  # products of numbers; OpenBLAS uses more cores for more


def make_format(name: str, dim: int) -> VectorFormat:
    """The format called ``name`` for vectors of width ``dim``.

    Raises:
        InputError: there is no such format, or the package that should have it does not.
    """
    try:
        return VectorFormat.kinds.find(name)(dim)
    except ValueError as error:
        known = VectorFormat.kinds.kinds
        if name in known:
            raise InputError(str(error)) from error
        hint = did_you_mean(name, known)
        raise InputError(f"vector format {name!r} is unknown; use one of {', '.join(known)}{hint}") from None


class Multiplier(NamedTuple):
    """Inner products of codes with some queries: ``scale`` times ``multiply(codes)`` [n, queries], plus ``shift``.

    They are the same whichever other codes are multiplied with them. ``scale`` is above 0, so the highest product can
    be found before it is applied. ``whole`` are the queries [m, dim] as they are multiplied with the numbers in codes,
    if these have 4 or 8 ``bits`` each, so that a compiled loop can do it.
    """

    multiply: Callable[[NDArray[np.uint8]], NDArray[np.floating[Any]]]
    scale: float
    shift: NDArray[np.float64]
    whole: NDArray[np.int8] | None = None
    bits: int = 0


class VectorFormat(Registered, ABC):
    """Converts vectors [n, dim] to rows [n, code_size] and back, with the operations that a scan of such rows needs.

    Another format is a subclass with a ``kind``, by which indexes name it.

    Attributes:
        dim: the width of the vectors.
        code_size: bytes of a row.
        selects: whether its FAISS index can exclude rows from a search.
    """

    kinds: ClassVar[Registry[Any]] = Registry("vector format", dict.fromkeys(FORMATS, __name__), "d2llm.vector_formats")
    dim: int
    code_size: int
    selects: bool = True

    @abstractmethod
    def __init__(self, dim: int) -> None: ...

    @abstractmethod
    def encode(self, vectors: NDArray[np.float32], ids: Sequence[str]) -> NDArray[np.uint8]:
        """Rows [n, code_size], rounded to the nearest; ``ids`` name the vectors in an error.

        Raises:
            InputError: a vector is not finite, or the format cannot hold it.
        """

    @abstractmethod
    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The vectors [n, dim] of rows."""

    @abstractmethod
    def levels(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Like ``decode``, but in the format's own basis, which is cheaper: ``levels @ turn(query)`` is the product."""

    @abstractmethod
    def turn(self, query: NDArray[np.float32]) -> NDArray[np.float64]:
        """A query [dim] in the basis of ``levels``."""

    @abstractmethod
    def multiplier(self, queries: NDArray[np.float32]) -> Multiplier:
        """Multiplies rows with queries [m, dim], whichever other rows are multiplied with them."""

    def largest_norm(self, codes: NDArray[np.uint8]) -> float:
        """An upper bound, within .1 %, on the norms of ``levels(codes)``; reads all of them."""
        largest = 0.0
        for start in range(0, len(codes), _NORMS_AT_ONCE):
            levels = self.levels(codes[start : start + _NORMS_AT_ONCE])
            largest = max(largest, float(np.einsum("ij,ij->i", levels, levels).max()))
        return 1.001 * largest**0.5  # the float32 sum may be a little low

    @abstractmethod
    def empty_faiss_index(self, faiss: Any) -> Any:
        """An empty inner-product FAISS index whose codes are these rows.

        Raises:
            AttributeError: this version of FAISS has no such index; rows are then scanned without FAISS.
        """

    def faiss_query(self, query: NDArray[np.float32]) -> NDArray[np.float32]:
        """A query [dim] as this index expects it, [1, n]; its scores are then the inner products."""
        return query[None]


class FloatFormat(VectorFormat):
    """Each number as a float of 32 or 16 bits."""

    stored_as: ClassVar[np.dtype[Any]]
    """The array type of the rows."""
    faiss_kind: ClassVar[str] = ""
    """The kind of scalars of its FAISS index; "" for whole floats."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.code_size = dim * self.stored_as.itemsize

    def rounded(self, vectors: NDArray[np.float32]) -> NDArray[Any]:
        """The vectors in the array type of the rows."""
        with np.errstate(over="ignore"):  # overflows are detected and reported below
            return np.asarray(vectors).astype(self.stored_as)

    def encode(self, vectors: NDArray[np.float32], ids: Sequence[str]) -> NDArray[np.uint8]:
        """Rows [n, code_size], rounded to the nearest."""
        codes = np.ascontiguousarray(self.rounded(vectors)).view(np.uint8)
        bad = np.flatnonzero(~np.isfinite(self.decode(codes)).all(axis=1))
        if len(bad):
            raise InputError(
                f"{counted(len(bad), 'vector is', 'vectors are')} not finite as {self.kind}, the first is that of "
                f"passage {ids[int(bad[0])]!r}; check the student"
            )
        return codes

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The vectors [n, dim] of rows; exact."""
        return np.ascontiguousarray(codes).view(self.stored_as).astype(np.float32)

    def levels(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The vectors themselves."""
        return self.decode(codes)

    def turn(self, query: NDArray[np.float32]) -> NDArray[np.float64]:
        """The query itself."""
        return query.astype(np.float64)

    def multiplier(self, queries: NDArray[np.float32]) -> Multiplier:
        """Multiplies rows with queries [m, dim], summed in float64 in a fixed order."""
        exact = queries.astype(np.float64)

        def multiply(codes: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
            levels = self.decode(codes).astype(np.float64)
            # Not a matrix product: the order of summation in BLAS depends on the number of rows.
            return np.stack([np.einsum("ij,j->i", levels, query) for query in exact], axis=1)

        return Multiplier(multiply, 1.0, np.zeros(len(queries)))

    def empty_faiss_index(self, faiss: Any) -> Any:
        """``IndexFlatIP``, or ``IndexScalarQuantizer`` with 16-bit floats."""
        if not self.faiss_kind:
            return faiss.IndexFlatIP(self.dim)
        kind = getattr(faiss.ScalarQuantizer, self.faiss_kind)
        return faiss.IndexScalarQuantizer(self.dim, kind, faiss.METRIC_INNER_PRODUCT)


class Float32(FloatFormat, kind="float32"):
    """Whole floats, as they are."""

    measured = (
        "1,536 bytes at 384 dimensions; the reference ([195 to 300 dev queries](index.md#how-vectors-are-stored))"
    )
    stored_as = np.dtype("<f4")


class Float16(FloatFormat, kind="float16"):
    """IEEE half precision."""

    measured = (
        "768 bytes at 384 dimensions; .00 % of nDCG@10 lost by the full score on squad-sent, banking77, "
        "qnli and checkthat2020 ([195 to 300 dev queries](index.md#how-vectors-are-stored))"
    )

    stored_as, faiss_kind = np.dtype("<f2"), "QT_fp16"


class BFloat16(FloatFormat, kind="bfloat16"):
    """The upper half of a float32; stored as 16-bit integers, because .npy has no such type."""

    measured = (
        "768 bytes at 384 dimensions; less than .01 % of nDCG@10 lost by the full score on squad-sent, banking77, "
        "qnli and checkthat2020 ([195 to 300 dev queries](index.md#how-vectors-are-stored))"
    )

    stored_as, faiss_kind = np.dtype("<u2"), "QT_bf16"

    def rounded(self, vectors: NDArray[np.float32]) -> NDArray[Any]:
        """The vectors, to the nearest bfloat16, as integers."""
        import torch  # not needed to read an index

        rounded = torch.from_numpy(np.array(vectors, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy()

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The vectors [n, dim] of rows; exact."""
        wide = np.ascontiguousarray(codes).view(self.stored_as).astype(np.uint32)
        wide <<= 16  # in place: a shift that widens goes through a buffer and takes twice as long
        return wide.view(np.float32)


class RotatedFormat(VectorFormat):
    """Each dimension of the rotated vector as one of 2^bits levels, evenly spaced around 0.

    With 8 or 4 bits, a row holds the dimensions in order. With fewer bits, a row holds one bit plane after another,
    the highest bit first, with one bit per dimension each. A level is then a sum of one signed weight per plane, so
    8 bits of a plane share a table of 256 products: the scan of FAISS' product quantiser, three times faster here than
    its scan of 3-bit scalars.
    """

    paper = "after Vargaftik et al., ICML 2022 (EDEN); Gao and Long, SIGMOD 2024 (RaBitQ)"
    costs = "vectors with a norm near the square root of the width, as students have them"
    bits: ClassVar[int]
    step: ClassVar[float]
    """Distance of adjacent levels: 8 bits span +-8 standard deviations; the others preserve a normal vector's norm."""
    largest_error: ClassVar[float]
    """A vector is refused if the stored one differs from it by more than this fraction of its norm."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._plane_bytes = -(-dim // 8)
        self._in_planes = self.bits < 4
        self.code_size = self.bits * self._plane_bytes if self._in_planes else -(-dim * self.bits // 8)
        self.selects = not self._in_planes  # FAISS' product quantiser cannot select rows

    def encode(self, vectors: NDArray[np.float32], ids: Sequence[str]) -> NDArray[np.uint8]:
        """Rows [n, code_size] of the levels nearest to the rotated vectors [n, dim]; as for ``FloatFormat``."""
        vectors = np.asarray(vectors, np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise InputError(
                f"{counted(len(bad), 'vector is', 'vectors are')} not finite, the first is that of passage "
                f"{ids[int(bad[0])]!r}; check the student"
            )
        rotated = _rotate(vectors)
        half = 2 ** (self.bits - 1)
        numbers = np.clip(np.floor(rotated / np.float32(self.step)) + half, 0, 2 * half - 1).astype(np.uint8)
        codes = self._planes(numbers) if self._in_planes else self._packed(numbers)
        self._refuse_inaccurate(rotated, codes, ids)
        return codes

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Vectors [n, dim]: the levels, rotated back."""
        return _rotate_back(self.levels(codes))

    def levels(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Levels [n, dim] of the rotated vectors."""
        numbers = self._level_indices(codes)
        return (numbers.astype(np.float32) + np.float32(0.5 - 2 ** (self.bits - 1))) * np.float32(self.step)

    def _level_indices(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The numbers [n, dim] of the levels, from 0."""
        if self.bits == 8:
            return codes
        if self.bits == 4:
            halves = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=2, dtype=np.uint8)
            return halves.reshape(len(codes), 2 * self.code_size)[:, : self.dim]
        planes = codes.reshape(-1, self.bits, self._plane_bytes)
        set_bits = np.unpackbits(planes, axis=2, count=self.dim, bitorder="little")
        numbers = set_bits[:, 0]
        for bit in range(1, self.bits):
            numbers = numbers << 1 | set_bits[:, bit]
        return numbers.astype(np.uint8, copy=False)

    def multiplier(self, queries: NDArray[np.float32]) -> Multiplier:
        """Multiplies rows with queries [m, dim] that are rounded to whole numbers.

        The numbers of levels are whole, too, so that all products and their sums are whole numbers below 2^24, which
        float32 holds exactly: the order of summation in BLAS does not matter. Those of queries have 8 bits, for the
        compiled loop: the error is a twentieth of that of codes of 4 bits.
        """
        turned = _rotate(queries.astype(np.float64))
        largest = 2**self.bits - 1
        limit = min((2**24 - 1) / (largest * self.dim), 2**7 - 1)
        unit = float(np.abs(turned).max(initial=0.0)) / limit or 1.0
        unit *= 1.01  # so that rounding up cannot reach the limit
        whole = np.round(turned / unit)
        columns = whole.T.astype(np.float32, order="C")

        def multiply(codes: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
            return _product_on_one_core(self._level_indices(codes).astype(np.float32), columns)

        # A level is step times its number, less half of the range of levels.
        shift = -unit * self.step * largest / 2 * whole.sum(1)
        return Multiplier(
            multiply, unit * self.step, shift, None if self._in_planes else whole.astype(np.int8), self.bits
        )

    def turn(self, query: NDArray[np.float32]) -> NDArray[np.float64]:
        """The rotated query."""
        return _rotate(query.astype(np.float64)[None])[0]

    def largest_norm(self, codes: NDArray[np.uint8]) -> float:  # noqa: ARG002
        """The norm of a row with the highest level in every dimension."""
        return self.dim**0.5 * self.step * 2 ** (self.bits - 1)

    def empty_faiss_index(self, faiss: Any) -> Any:
        """8 or 4 bits: ``IndexScalarQuantizer`` with one range. Fewer: ``IndexPQ`` with sign vectors as centroids."""
        if not self._in_planes:
            kind = getattr(faiss.ScalarQuantizer, f"QT_{self.bits}bit_uniform")
            index = faiss.IndexScalarQuantizer(self.dim, kind, faiss.METRIC_INNER_PRODUCT)
            half = 2 ** (self.bits - 1)
            lowest_and_range = np.array([-half * self.step, (2 * half - 1) * self.step], np.float32)
            faiss.copy_array_to_vector(lowest_and_range, index.sq.trained)
        else:
            num_tables = self.code_size
            index = faiss.IndexPQ(8 * num_tables, num_tables, 8, faiss.METRIC_INNER_PRODUCT)
            bytes_ = np.arange(256, dtype=np.uint8)[:, None]
            signs = 2 * np.unpackbits(bytes_, axis=1, bitorder="little").astype(np.float32) - 1
            faiss.copy_array_to_vector(np.tile(signs, (num_tables, 1)).ravel(), index.pq.centroids)
        index.is_trained = True
        return index

    def faiss_query(self, query: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rotated query [1, dim]; with bit planes, repeated for each plane and multiplied by its weight."""
        turned = self.turn(query)
        if not self._in_planes:
            return turned[None].astype(np.float32)
        planes = np.zeros((self.bits, 8 * self._plane_bytes))
        planes[:, : self.dim] = turned
        planes *= (self.step / 2 * 2.0 ** np.arange(self.bits)[::-1])[:, None]
        return planes.reshape(1, -1).astype(np.float32)

    def _packed(self, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One byte for each number of 8 bits, or for two of 4 bits, the first of them in its lower half."""
        if self.bits == 8:
            return numbers
        even = np.zeros((len(numbers), 2 * self.code_size), np.uint8)
        even[:, : self.dim] = numbers
        return np.bitwise_or(even[:, ::2], np.left_shift(even[:, 1::2], 4, dtype=np.uint8), dtype=np.uint8)

    def _planes(self, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
        shifts = range(self.bits - 1, -1, -1)
        return np.concatenate([np.packbits(numbers >> shift & 1, axis=1, bitorder="little") for shift in shifts], 1)

    def _refuse_inaccurate(self, rotated: NDArray[np.float32], codes: NDArray[np.uint8], ids: Sequence[str]) -> None:
        limit = self.largest_error
        norms = np.linalg.norm(rotated, axis=1)
        errors = np.linalg.norm(self.levels(codes) - rotated, axis=1)
        bad = np.flatnonzero(errors > limit * norms) if np.isfinite(limit) else []
        if len(bad):
            first = int(bad[0])
            raise InputError(
                f"{counted(len(bad), 'vector')} cannot be stored as {self.kind}, the first is that of passage "
                f"{ids[first]!r}: its norm is {norms[first]:.3g}, and the format is made for norms near sqrt(dim) = "
                f"{self.dim**0.5:.3g}; use bfloat16"
            )


class Int8(RotatedFormat, kind="int8"):
    """8 bits for each dimension of the rotated vector; usual error .02 of the norm."""

    measured = (
        "384 bytes at 384 dimensions; at most .03 % of nDCG@10 lost by the full score on squad-sent, banking77, "
        "qnli and checkthat2020 ([195 to 300 dev queries](index.md#how-vectors-are-stored))"
    )

    bits, step, largest_error = 8, 1 / 16, 0.1


class Int4(RotatedFormat, kind="int4"):
    """4 bits for each dimension of the rotated vector; usual error .11 of the norm.

    It holds any vector of the right norm: those of tokens are too many and too short for none to be unusual.
    """

    measured = (
        "192 bytes at 384 dimensions; at most .87 % of nDCG@10 lost by the full score on squad-sent, banking77, "
        "qnli and checkthat2020 ([195 to 300 dev queries](index.md#how-vectors-are-stored))"
    )

    bits, step, largest_error = 4, 0.3352, 0.75


class Int3(RotatedFormat, kind="int3"):
    """3 bits for each dimension of the rotated vector; usual error .19 of the norm."""

    measured = (
        "144 bytes at 384 dimensions; at most .10 % of nDCG@10 lost by the full score on squad-sent, banking77, "
        "qnli and checkthat2020 ([195 to 300 dev queries](index.md#how-vectors-are-stored))"
    )

    bits, step, largest_error = 3, 0.5975, 0.5


class Binary(RotatedFormat, kind="binary"):
    """The signs of the rotated vector, for shortlists; usual error .6 of the norm."""

    measured = (
        "48 bytes at 384 dimensions; 2.9 to 4.9 % of nDCG@10 lost by the full score on squad-sent, banking77, "
        "qnli and checkthat2020 ([195 to 300 dev queries](index.md#how-vectors-are-stored))"
    )

    bits, step, largest_error = 1, 2.0, np.inf


def _product_on_one_core(rows: NDArray[np.float32], columns: NDArray[np.float32]) -> NDArray[np.float32]:
    """``rows @ columns`` in parts so small that OpenBLAS does not share them among cores.

    It would gain little, and its threads would take the cores from other queries, and from those that are encoded.
    """
    products = np.empty((len(rows), columns.shape[1]), np.float32)
    size = max(1, _ON_ONE_CORE // max(1, columns.size))
    for start in range(0, len(rows), size):
        np.matmul(rows[start : start + size], columns, out=products[start : start + size])
    return products


def _rotate(vectors: NDArray[Any]) -> NDArray[Any]:
    """Fixed signs, then the orthonormal cosine transform of each row of [n, dim]; the same in every index.

    By NumPy's Fourier transform, because importing SciPy's takes longer than a search. Source: Makhoul, "A fast cosine
    transform in one and two dimensions", IEEE Transactions on Acoustics, Speech, and Signal Processing, 1980.
    """
    dim = vectors.shape[1]
    signed = vectors * _signs(dim)
    waves = np.fft.rfft(np.concatenate([signed[:, ::2], signed[:, 1::2][:, ::-1]], axis=1), axis=1)
    waves *= _twiddles(dim).astype(waves.dtype)
    return np.concatenate([waves.real, -waves.imag[:, 1 : (dim + 1) // 2][:, ::-1]], axis=1)


def _rotate_back(vectors: NDArray[Any]) -> NDArray[Any]:
    dim = vectors.shape[1]
    mirrored = np.zeros((len(vectors), dim // 2 + 1), vectors.dtype)
    mirrored[:, 1:] = vectors[:, ::-1][:, : dim // 2]
    waves = vectors[:, : dim // 2 + 1] - 1j * mirrored
    waves = (waves / _twiddles(dim)).astype(np.complex64 if vectors.dtype == np.float32 else np.complex128)
    halves = np.fft.irfft(waves, dim, axis=1)
    signed = np.empty_like(halves)
    signed[:, ::2], signed[:, 1::2] = halves[:, : -(-dim // 2)], halves[:, -(-dim // 2) :][:, ::-1]
    return signed * _signs(dim)


@lru_cache(maxsize=4)
def _twiddles(dim: int) -> NDArray[np.complex128]:
    factors = np.exp(-0.5j * np.pi * np.arange(dim // 2 + 1) / dim) * (2 / dim) ** 0.5
    factors[0] = dim**-0.5
    return factors


@lru_cache(maxsize=4)
def _signs(dim: int) -> NDArray[np.float32]:
    digest = hashlib.shake_256(b"d2llm rotation").digest(-(-dim // 8))
    return 2 * np.unpackbits(np.frombuffer(digest, np.uint8), count=dim).astype(np.float32) - 1
