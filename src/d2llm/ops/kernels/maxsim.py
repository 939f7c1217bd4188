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
LANES = 16 if _WIDE else 8
"""Tokens of a query that are multiplied at once: the whole numbers of 32 bits in the widest registers there are."""
_BLOCKS = 1 if _WIDE else 2  # of LANES, multiplied with the same tokens of a passage
_AT_ONCE = 8 // _BLOCKS  # tokens of a passage that are multiplied at once: sums do not wait for one another
_PAIRS = 8  # sums of two products of a number below 16 and a signed one of 8 bits that 16 bits hold
_BYTES = 16  # of a code that are split at once
_LOWEST = -(1 << 31)
_INT8, _INT16, _INT32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_SUMS, _PAIRS_OF_SUMS = ir.VectorType(_INT32, LANES), ir.VectorType(_INT16, 2 * LANES)
_QUADS = ir.VectorType(_INT8, 4 * LANES)


def arranged(queries: NDArray[np.int8], bits: int) -> NDArray[np.int8]:
    """Queries [m, dim] as ``sum_of_best`` reads them: [m / LANES, 2, quads, LANES, 4], filled up with zeros.

    The two halves are those of codes of so many ``bits``.
    """
    halves = (queries[:, ::2], queries[:, 1::2]) if bits == 4 else (queries, queries)
    blocks, quads = -(-len(queries) // LANES), -(-halves[0].shape[1] // 4)
    filled = np.zeros((blocks * LANES, 2, 4 * quads), np.int8)
    for index, half in enumerate(halves):
        filled[: len(half), index, : half.shape[1]] = half
    return np.ascontiguousarray(filled.reshape(blocks, LANES, 2, quads, 4).transpose(0, 2, 3, 1, 4))


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
    """A whole number of 32 bits in all lanes."""
    alone = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), value, _INT32(0))
    return _chosen(builder, alone, [0] * LANES)


def _sum_of_pairs(builder: Any, numbers: Any, query: Any) -> Any:
    """The sums of two products each, of numbers and a query [4 LANES], in 16 bits."""
    if "+avx2" in _FEATURES:
        name = "llvm.x86.avx512.pmaddubs.w.512" if _WIDE else "llvm.x86.avx2.pmadd.ub.sw"
        return _call(builder, name, _PAIRS_OF_SUMS, numbers, query)
    wide = ir.VectorType(_INT16, 4 * LANES)
    products = builder.mul(builder.zext(numbers, wide), builder.sext(query, wide))
    return builder.add(*(_chosen(builder, products, range(start, 4 * LANES, 2)) for start in (0, 1)))


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
    """Add the products of four numbers with four of a query [LANES, 4]; ``total`` has 32 or 16 bits."""
    if _VNNI:
        sums = _sum_of_fours(builder, builder.load(total), numbers, query)
    else:
        sums = builder.add(builder.load(total), _sum_of_pairs(builder, numbers, query))
    builder.store(sums, total)


@intrinsic
def _split(typing_context: Any, codes: Any, code: Any, numbers: Any, at: Any) -> Any:  # noqa: ARG001
    """Write the lower and the higher halves of the bytes of a code to ``numbers`` [2, _AT_ONCE, bytes].

    Written for LLVM, which makes of a loop over 32 bytes a general one that takes longer than all products.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (
            context.make_array(signature.args[index])(context, builder, arguments[index]) for index in (0, 2)
        )
        width = cgutils.unpack_tuple(builder, source.shape)[1]
        size = width.type
        read = builder.gep(source.data, [builder.mul(arguments[1], width)])
        _, num_rows, room = cgutils.unpack_tuple(builder, target.shape)
        low = builder.gep(target.data, [builder.mul(arguments[3], room)])
        high = builder.gep(low, [builder.mul(num_rows, room)])
        end = builder.and_(width, size(-_BYTES))
        for kind, first, last, step in ((ir.VectorType(_INT8, _BYTES), size(0), end, _BYTES), (_INT8, end, width, 1)):
            with cgutils.for_range_slice(builder, first, last, size(step), intp=size) as (byte, _):
                bytes_ = builder.load(builder.bitcast(builder.gep(read, [byte]), kind.as_pointer()), align=1)
                fifteen, four = ((_vector(kind, value) if step > 1 else kind(value)) for value in (15, 4))
                for address, half in ((low, builder.and_(bytes_, fifteen)), (high, builder.lshr(bytes_, four))):
                    builder.store(half, builder.bitcast(builder.gep(address, [byte]), kind.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(codes, code, numbers, at), generate


def _raiser(num_blocks: int) -> Any:
    """The function that raises the best products of so many blocks of the queries."""

    @intrinsic
    def raise_best(typing_context: Any, numbers: Any, queries: Any, block: Any, factor: Any, best: Any) -> Any:  # noqa: ARG001
        """Raise the best products [LANES] of blocks, from ``block`` on, to those with ``_AT_ONCE`` rows of numbers.

        ``numbers`` [2, _AT_ONCE, quads] holds four dimensions in each 32 bits; the products of the second half count
        ``factor`` times. Written for LLVM, because the sums of an inner loop of Python's would be kept in memory: here
        they stay in registers.
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
    """The products of one half of ``_AT_ONCE`` rows with blocks of the queries: for each block, where they are."""
    size, kind = quads.type, _SUMS if _VNNI else _PAIRS_OF_SUMS
    totals, chunk = (
        [[cgutils.alloca_once(builder, of) for _ in range(_AT_ONCE)] for _ in range(num_blocks)] for of in (_SUMS, kind)
    )
    for total in chain(*totals):
        builder.store(_vector(_SUMS, 0), total)
    query = builder.bitcast(columns, _QUADS.as_pointer())
    with cgutils.for_range_slice(builder, size(0), quads, size(_PAIRS), intp=size) as (first, _):
        for partial in chain(*chunk):
            builder.store(_vector(kind, 0), partial)
        last = builder.add(first, size(_PAIRS))
        last = builder.select(builder.icmp_signed("<", last, quads), last, quads)
        with cgutils.for_range_slice(builder, first, last, size(1), intp=size) as (quad, _):
            halves = (builder.add(builder.mul(block, size(2)), size(2 * index + half)) for index in range(num_blocks))
            at = [builder.add(builder.mul(before, quads), quad) for before in halves]
            read = [builder.load(builder.gep(query, [start]), align=1) for start in at]
            for row in range(_AT_ONCE):
                start = builder.add(builder.mul(quads, size(half * _AT_ONCE + row)), quad)
                numbers = builder.bitcast(_repeated(builder, builder.load(builder.gep(rows, [start]))), _QUADS)
                for column, of_block in zip(read, chunk, strict=True):
                    _add_quads(builder, of_block[row], numbers, column)
        for total, partial in zip(chain(*totals), chain(*chunk), strict=True):
            added = builder.load(partial)
            if not _VNNI:
                added = _sum_of_two(builder, added)
            builder.store(builder.add(builder.load(total), added), total)
    return totals


_raise_best, _raise_several = _raiser(1), _raiser(_BLOCKS)


@compiled(
    types.void(
        *(read_only(types.uint8, 2), read_only(types.int64), read_only(types.int64)),
        *(read_only(types.int8, 5), types.int64, read_only(types.int64), read_only(types.int64), written(types.int64)),
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
    numbers = np.zeros((2, _AT_ONCE, 4 * quads), np.uint8)
    read = numbers.view(np.int32)
    best = np.empty(LANES * len(queries), np.int32)
    factor = np.int32(1 if bits == 4 else 16)
    step = 1 if len(needed) else len(queries)  # blocks multiplied before it is asked whether a row can be left
    for row in range(len(starts)):
        start, end = starts[row], starts[row] + counts[row]
        if start < 0 or end <= start or end > len(codes):
            raise ValueError("the parts of a row are not where they should be")
        total, done = np.int64(0), 0
        while done < len(queries) and not (len(needed) and total + left[done] < needed[row]):
            first, done = done, done + step
            best[LANES * first : LANES * done] = _LOWEST
            for part in range(start, end, _AT_ONCE):
                for at in range(_AT_ONCE):
                    code = min(part + at, end - 1)  # the last one again, which changes nothing
                    _split(codes, code, numbers, at)
                together = first + step - step % _BLOCKS
                for block in range(first, together, _BLOCKS):
                    _raise_several(read, queries, block, factor, best)
                for block in range(together, done):
                    _raise_best(read, queries, block, factor, best)
            for product in best[LANES * first : LANES * done]:
                total += product
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
