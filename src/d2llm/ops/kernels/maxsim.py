"""The loop of MaxSim (``store.part_vectors``): the best product of each token of a query with one of a passage, summed.

Everything is a whole number: codes of 4 or 8 bits, and queries that are rounded to 8 (``store.vector_formats``). Sums
of whole numbers do not depend on their order, so the result is NumPy's, and the same on every processor.

Codes are read as two halves of numbers below 16, which makes one loop of two: of 4 bits, the even and the odd
dimensions; of 8 bits, the lower and the higher four of every dimension. Four products and their sum are one instruction
of a processor that has it (VNNI). With AVX2, two products are, and eight such sums fit 16 bits (``_PAIRS``).
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownArgumentType=false
# pyright: reportCallIssue=false
# (numba and llvmlite ship no types)

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray

from d2llm.ops.kernels.compiler import compiled, read_only, written

_CODE: Any = cpu_target.target_context
_FEATURES = frozenset(_CODE.codegen().magic_tuple()[2].split(","))  # of the processor that is compiled for
_WIDE = "+avx512bw" in _FEATURES  # registers of 512 bits, else 256
_VNNI = bool({"+avx512vnni", "+avxvnni"} & _FEATURES)
LANES = 8
"""Tokens of a query that are multiplied at once, as many as there are whole numbers of 32 bits in 256 bits."""
SIDE = 2 if _WIDE else 1
"""Tokens of a passage that are multiplied with each of them in one register, so that the widest registers are full."""
_BLOCKS = 2  # of LANES, multiplied with the same tokens of a passage
_ROWS = 4  # registers of tokens of a passage that are multiplied at once: sums do not wait for one another
_PAIRS = 8  # sums of two products of a number below 16 and a signed one of 8 bits that 16 bits hold
_BYTES = 16  # of a code that are split at once
_LOWEST = -(1 << 31)
_INT8, _INT16, _INT32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_WIDTH = SIDE * LANES  # products in a register
_SUMS, _PAIRS_OF_SUMS = ir.VectorType(_INT32, _WIDTH), ir.VectorType(_INT16, 2 * _WIDTH)
_QUADS = ir.VectorType(_INT8, 4 * _WIDTH)
_OF_TOKENS = ir.IntType(32 * SIDE)  # four numbers of each token in a register
_OF_CODE = ir.VectorType(_INT8, _BYTES)


def arranged(queries: NDArray[np.int8], bits: int) -> NDArray[np.int8]:
    """Queries [m, dim] as ``sum_of_best`` reads them: [m / LANES, 2, quads, LANES, SIDE, 4], filled up with zeros.

    The two halves are those of codes of so many ``bits``. Each quad stands there once for each token in a register.
    """
    halves = (queries[:, ::2], queries[:, 1::2]) if bits == 4 else (queries, queries)
    blocks, quads = -(-len(queries) // LANES), -(-halves[0].shape[1] // 4)
    filled = np.zeros((blocks * LANES, 2, 4 * quads), np.int8)
    for index, half in enumerate(halves):
        filled[: len(half), index, : half.shape[1]] = half
    arranged = filled.reshape(blocks, LANES, 2, quads, 1, 4).transpose(0, 2, 3, 1, 4, 5)
    return np.repeat(arranged, SIDE, axis=4)


def _call(builder: Any, name: str, returned: Any, *values: Any) -> Any:
    """A function of LLVM."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(returned, [value.type for value in values]), name
    )
    return builder.call(function, values)


def _vector(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _chosen(builder: Any, vector: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_INT32, len(lanes)), [*lanes])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _repeated(builder: Any, value: Any) -> Any:
    """A whole number in all lanes of its size."""
    kind = ir.VectorType(value.type, 32 * _WIDTH // value.type.width)
    alone = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT32(0))
    return _chosen(builder, alone, [0] * kind.count)


def _sum_of_pairs(builder: Any, numbers: Any, query: Any) -> Any:
    """The sums of two products each, of numbers and a query [4 LANES], in 16 bits."""
    if "+avx2" in _FEATURES:
        name = "llvm.x86.avx512.pmaddubs.w.512" if _WIDE else "llvm.x86.avx2.pmadd.ub.sw"
        return _call(builder, name, _PAIRS_OF_SUMS, numbers, query)
    wide = ir.VectorType(_INT16, 4 * _WIDTH)
    products = builder.mul(builder.zext(numbers, wide), builder.sext(query, wide))
    return builder.add(*(_chosen(builder, products, range(start, 4 * _WIDTH, 2)) for start in (0, 1)))


def _sum_of_two(builder: Any, pairs: Any) -> Any:
    """The sums of two numbers of 16 bits each, in 32 bits."""
    if "+avx2" in _FEATURES:
        name = "llvm.x86.avx512.pmaddw.d.512" if _WIDE else "llvm.x86.avx2.pmadd.wd"
        return _call(builder, name, _SUMS, pairs, _vector(_PAIRS_OF_SUMS, 1))
    lanes = builder.bitcast(pairs, _SUMS)
    first = builder.ashr(builder.shl(lanes, _vector(_SUMS, 16)), _vector(_SUMS, 16))
    return builder.add(first, builder.ashr(lanes, _vector(_SUMS, 16)))


def _sum_of_fours(builder: Any, total: Any, numbers: Any, query: Any) -> Any:
    """A total, and the sums of four products each, of numbers and a query [4 LANES], in 32 bits."""
    return _call(builder, f"llvm.x86.avx512.vpdpbusd.{512 if _WIDE else 256}", _SUMS, total, numbers, query)


def _add_quads(builder: Any, total: Any, numbers: Any, query: Any) -> None:
    """Add the products of four numbers with four of a query [_WIDTH, 4]; ``total`` has 32 or 16 bits."""
    if _VNNI:
        sums = _sum_of_fours(builder, builder.load(total), numbers, query)
    else:
        sums = builder.add(builder.load(total), _sum_of_pairs(builder, numbers, query))
    builder.store(sums, total)


@intrinsic
def _split(typing_context: Any, codes: Any, code: Any, last: Any, numbers: Any, row: Any) -> Any:  # noqa: ARG001
    """Write the lower and the higher halves of the bytes of codes to a row of ``numbers`` [2, _ROWS, quads, SIDE, 4].

    They are the codes from ``code`` on, one for each token in a register, and instead of those after the ``last`` that
    one again. Written for LLVM, which makes of a loop over 32 bytes a general one that takes longer than all products.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (
            context.make_array(signature.args[index])(context, builder, arguments[index]) for index in (0, 3)
        )
        width = cgutils.unpack_tuple(builder, source.shape)[1]
        num_rows, quads = cgutils.unpack_tuple(builder, target.shape)[1:3]
        size = width.type
        starts: list[Any] = []
        for index in range(SIDE):
            code = builder.add(arguments[1], size(index))
            code = builder.select(builder.icmp_signed("<", code, arguments[2]), code, arguments[2])
            starts.append(builder.gep(source.data, [builder.mul(code, width)]))
        room = builder.mul(quads, size(4 * SIDE))
        low = builder.gep(target.data, [builder.mul(arguments[4], room)])
        high = builder.gep(low, [builder.mul(num_rows, room)])
        end = builder.and_(width, size(-_BYTES))
        with cgutils.for_range_slice(builder, size(0), end, size(_BYTES), intp=size) as (byte, _):
            read = [
                builder.load(builder.bitcast(builder.gep(start, [byte]), _OF_CODE.as_pointer()), align=1)
                for start in starts
            ]
            for address, operation, value in ((low, builder.and_, 15), (high, builder.lshr, 4)):
                half = _side_by_side(builder, [operation(bytes_, _vector(_OF_CODE, value)) for bytes_ in read])
                target_of_half = builder.gep(address, [builder.mul(byte, size(SIDE))])
                builder.store(half, builder.bitcast(target_of_half, half.type.as_pointer()), align=1)
        with cgutils.for_range_slice(builder, end, width, size(1), intp=size) as (byte, _):
            quad, in_quad = builder.and_(byte, size(-4)), builder.and_(byte, size(3))
            for index, start in enumerate(starts):
                value = builder.load(builder.gep(start, [byte]))
                at = builder.add(builder.mul(quad, size(SIDE)), builder.add(in_quad, size(4 * index)))
                builder.store(builder.and_(value, _INT8(15)), builder.gep(low, [at]))
                builder.store(builder.lshr(value, _INT8(4)), builder.gep(high, [at]))
        return context.get_dummy_value()

    return types.void(codes, code, last, numbers, row), generate


def _side_by_side(builder: Any, halves: Sequence[Any]) -> Any:
    """Numbers [quads, 4] of each token in a register as [quads, SIDE, 4]."""
    if SIDE == 1:
        return halves[0]
    num_quads = _BYTES // 4
    first, second = (builder.bitcast(half, ir.VectorType(_INT32, num_quads)) for half in halves)
    order = [token * num_quads + quad for quad in range(num_quads) for token in range(SIDE)]
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT32, len(order)), order))


def _raiser(num_blocks: int) -> Any:
    """The function that raises the best products of so many blocks of the queries."""

    @intrinsic
    def raise_best(typing_context: Any, numbers: Any, queries: Any, block: Any, factor: Any, best: Any) -> Any:  # noqa: ARG001
        """Raise the best products [_WIDTH] of blocks, from ``block`` on, to those with ``SIDE`` times ``_ROWS`` tokens.

        ``numbers`` [2, _ROWS, quads, SIDE, 4] holds four dimensions of a token in 32 bits; the products of the second
        half count ``factor`` times. Written for LLVM, because the sums of an inner loop of Python's would be kept in
        memory: here they stay in registers.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, columns, highest = (
                context.make_array(signature.args[index])(context, builder, arguments[index]) for index in (0, 1, 4)
            )
            quads = cgutils.unpack_tuple(builder, rows.shape)[2]
            halves = [
                _products(builder, rows.data, columns.data, quads, arguments[2], half, num_blocks) for half in (0, 1)
            ]
            times = _repeated(builder, arguments[3])
            for index in range(num_blocks):
                block = builder.add(arguments[2], quads.type(index))
                address = builder.gep(builder.bitcast(highest.data, _SUMS.as_pointer()), [block])
                best_so_far = builder.load(address, align=4)
                for first, second in zip(*(half[index] for half in halves), strict=True):
                    product = builder.add(builder.load(first), builder.mul(builder.load(second), times))
                    best_so_far = builder.select(builder.icmp_signed(">", product, best_so_far), product, best_so_far)
                builder.store(best_so_far, address, align=4)
            return context.get_dummy_value()

        return types.void(numbers, queries, block, factor, best), generate

    return raise_best


def _products(
    builder: Any, rows: Any, columns: Any, quads: Any, block: Any, half: int, num_blocks: int
) -> list[list[Any]]:
    """The products of one half of the numbers of tokens with blocks of the queries: for each block, where they are."""
    size = quads.type

    def sums(kind: Any) -> list[list[Any]]:
        return [[cgutils.alloca_once(builder, kind) for _ in range(_ROWS)] for _ in range(num_blocks)]

    totals = sums(_SUMS)
    chunk, at_once = (totals, quads) if _VNNI else (sums(_PAIRS_OF_SUMS), size(_PAIRS))
    for total in chain(*totals):
        builder.store(_vector(_SUMS, 0), total)
    query, words = builder.bitcast(columns, _QUADS.as_pointer()), builder.bitcast(rows, _OF_TOKENS.as_pointer())
    with cgutils.for_range_slice(builder, size(0), quads, at_once, intp=size) as (first, _):
        if not _VNNI:
            for partial in chain(*chunk):
                builder.store(_vector(_PAIRS_OF_SUMS, 0), partial)
        last = builder.add(first, at_once)
        last = builder.select(builder.icmp_signed("<", last, quads), last, quads)
        with cgutils.for_range_slice(builder, first, last, size(1), intp=size) as (quad, _):
            halves = (builder.add(builder.mul(block, size(2)), size(2 * index + half)) for index in range(num_blocks))
            at = [builder.add(builder.mul(before, quads), quad) for before in halves]
            read = [builder.load(builder.gep(query, [start]), align=1) for start in at]
            for row in range(_ROWS):
                start = builder.add(builder.mul(quads, size(half * _ROWS + row)), quad)
                numbers = builder.bitcast(_repeated(builder, builder.load(builder.gep(words, [start]))), _QUADS)
                for column, of_block in zip(read, chunk, strict=True):
                    _add_quads(builder, of_block[row], numbers, column)
        if not _VNNI:
            for total, partial in zip(chain(*totals), chain(*chunk), strict=True):
                added = _sum_of_two(builder, builder.load(partial))
                builder.store(builder.add(builder.load(total), added), total)
    return totals


_raise_best, _raise_several = _raiser(1), _raiser(_BLOCKS)


@compiled(
    types.void(
        *(read_only(types.uint8, 2), read_only(types.int64), read_only(types.int64)),
        *(read_only(types.int8, 6), types.int64, read_only(types.int64), read_only(types.int64), written(types.int64)),
    )
)
def sum_of_best(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    queries: NDArray[np.int8],
    bits: int,
    left: NDArray[np.int64],
    needed: NDArray[np.int64],
    sums: NDArray[np.int64],
) -> None:
    """The sum over queries of the highest product with a part of each row.

    Where ``needed`` says which sum is of interest, a row is left as soon as it cannot have it. What it gets then is the
    sum of the blocks multiplied so far and of the most that the others can add: an upper bound.

    Args:
        codes: [parts, bytes], numbers of ``bits`` each, as ``RotatedFormat`` stores them.
        starts: [n] the first part of each row.
        counts: [n] its number of parts, at least 1.
        queries: those ``arranged`` for these bits; all products with a part are below 2^31.
        bits: 4 or 8.
        left: [blocks + 1] the most that the queries of each block and those after it add to a sum; or empty.
        needed: [n]; or empty: all sums are of interest.
        sums: [n] gets the sums.
    """
    width, quads = codes.shape[1], queries.shape[2]
    if not 4 * quads - 4 < width <= 4 * quads:
        raise ValueError("queries and parts have different widths")
    numbers = np.zeros((2, _ROWS, quads, SIDE, 4), np.uint8)
    best = np.empty(_WIDTH * len(queries), np.int32)
    factor = np.int32(1 if bits == 4 else 16)
    step = 1 if len(needed) else len(queries)  # blocks multiplied before it is asked whether a row can be left
    for row in range(len(starts)):
        start, end = starts[row], starts[row] + counts[row]
        if start < 0 or end <= start or end > len(codes):
            raise ValueError("the parts of a row are not where they should be")
        total, done = np.int64(0), 0
        while done < len(queries) and not (len(needed) and total + left[done] < needed[row]):
            first, done = done, done + step
            best[_WIDTH * first : _WIDTH * done] = _LOWEST
            for part in range(start, end, SIDE * _ROWS):
                for at in range(_ROWS):
                    _split(codes, part + SIDE * at, end - 1, numbers, at)
                together = first + step - step % _BLOCKS
                for block in range(first, together, _BLOCKS):
                    _raise_several(numbers, queries, block, factor, best)
                for block in range(together, done):
                    _raise_best(numbers, queries, block, factor, best)
            for query in range(_WIDTH * first, _WIDTH * done, SIDE):
                highest = best[query]
                for side in range(1, SIDE):
                    highest = max(highest, best[query + side])
                total += highest
        sums[row] = total + left[done] if len(needed) else total


@compiled(types.int64(read_only(types.uint8, 2), types.int64))
def largest_square(codes: NDArray[np.uint8], bits: int) -> int:
    """The highest sum of squares of the numbers of a code, of 4 or 8 ``bits`` each, twice and less their middle."""
    largest, middle = np.int64(0), np.int64((1 << bits) - 1)
    for code in range(len(codes)):
        total = np.int64(0)
        for byte in codes[code]:
            if bits == 8:
                total += (2 * np.int64(byte) - middle) ** 2
            else:
                total += (2 * np.int64(byte & 15) - middle) ** 2 + (2 * np.int64(byte >> 4) - middle) ** 2
        largest = max(largest, total)
    return int(largest)
