"""The loop of MaxSim (``store.part_vectors``): the best product of each token of a query with one of a passage, summed.

Everything is a whole number: codes of 4 or 8 bits, and queries that are rounded to 16 (``store.vector_formats``). Sums
of whole numbers do not depend on their order, so the result is NumPy's, and the same on every processor.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownArgumentType=false
# pyright: reportCallIssue=false
# (numba and llvmlite ship no types)

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from d2llm.ops.kernels.compiler import compiled, read_only, written

LANES = 16
"""Tokens of a query that are multiplied at once: the whole numbers of 32 bits in the widest registers there are."""
_AT_ONCE = 4  # tokens of a passage that are multiplied at once, so that additions do not wait for one another
_LOWEST = -(1 << 31)
_INT16, _INT32 = ir.IntType(16), ir.IntType(32)


def arranged(queries: NDArray[np.int16]) -> NDArray[np.int16]:
    """Queries [m, dim] as ``sum_of_best`` reads them: [m / LANES, dim / 2, LANES, 2], filled up with zeros."""
    num, dim = queries.shape
    blocks, pairs = -(-num // LANES), -(-dim // 2)
    filled = np.zeros((blocks * LANES, 2 * pairs), np.int16)
    filled[:num, :dim] = queries
    return np.ascontiguousarray(filled.reshape(blocks, LANES, pairs, 2).swapaxes(1, 2))


@intrinsic
def _raise_best(typing_context: Any, numbers: Any, queries: Any, block: Any, best: Any) -> Any:  # noqa: ARG001
    """Raise the best products [LANES] of a block of the queries to those with ``_AT_ONCE`` rows of numbers.

    ``numbers`` [_AT_ONCE, pairs] holds two dimensions in each 32 bits. Written for LLVM, because the sums of an inner
    loop of Python's would be kept in memory: here they stay in registers, and two products and two additions of all
    lanes are one instruction where a processor has it (``pmaddwd``, ``vpdpwssd``).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, columns, _, highest = signature.args
        rows = context.make_array(rows)(context, builder, arguments[0])
        columns = context.make_array(columns)(context, builder, arguments[1])
        highest = context.make_array(highest)(context, builder, arguments[3])
        lanes, halves, products = (
            ir.VectorType(_INT32, LANES),
            ir.VectorType(_INT16, 2 * LANES),
            ir.VectorType(_INT32, 2 * LANES),
        )
        first_lane = ir.Constant(lanes, [0] * LANES)
        num_pairs = cgutils.unpack_tuple(builder, rows.shape)[1]
        column = builder.gep(builder.bitcast(columns.data, halves.as_pointer()), [builder.mul(arguments[2], num_pairs)])
        sums = [cgutils.alloca_once(builder, lanes) for _ in range(_AT_ONCE)]
        for total in sums:
            builder.store(ir.Constant(lanes, [0] * LANES), total)
        with cgutils.for_range(builder, num_pairs) as loop:
            query = builder.load(builder.gep(column, [loop.index]), align=2)
            query = builder.sext(query, products)
            for at, total in enumerate(sums):
                address = builder.add(builder.mul(num_pairs, ir.Constant(num_pairs.type, at)), loop.index)
                pair = builder.load(builder.gep(rows.data, [address]))
                pair = builder.insert_element(ir.Constant(lanes, ir.Undefined), pair, _INT32(0))
                pair = builder.shuffle_vector(pair, ir.Constant(lanes, ir.Undefined), first_lane)
                product = builder.mul(builder.sext(builder.bitcast(pair, halves), products), query)
                even, odd = (
                    builder.shuffle_vector(
                        product,
                        ir.Constant(products, ir.Undefined),
                        ir.Constant(lanes, list(range(start, 2 * LANES, 2))),
                    )
                    for start in (0, 1)
                )
                builder.store(builder.add(builder.load(total), builder.add(even, odd)), total)
        address = builder.gep(builder.bitcast(highest.data, lanes.as_pointer()), [arguments[2]])
        best_so_far = builder.load(address, align=4)
        for total in sums:
            product = builder.load(total)
            best_so_far = builder.select(builder.icmp_signed(">", product, best_so_far), product, best_so_far)
        builder.store(best_so_far, address, align=4)
        return context.get_dummy_value()

    return types.void(numbers, queries, block, best), generate


@compiled(
    types.void(
        *(read_only(types.uint8, 2), read_only(types.int64), read_only(types.int64)),
        *(read_only(types.int16, 4), types.int64, written(types.int64)),
    )
)
def sum_of_best(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    queries: NDArray[np.int16],
    bits: int,
    sums: NDArray[np.int64],
) -> None:
    """The sum over queries of the highest product with a part of each row.

    Args:
        codes: [parts, bytes], numbers of ``bits`` each, as ``RotatedFormat`` stores them.
        starts: [n] the first part of each row.
        counts: [n] its number of parts, at least 1.
        queries: those ``arranged``; all products with a part are below 2^31.
        bits: 4 or 8.
        sums: [n] gets the sums.
    """
    num_pairs = queries.shape[1]
    if codes.shape[1] != (num_pairs if bits == 4 else 2 * num_pairs - codes.shape[1] % 2):
        raise ValueError("queries and parts have different widths")
    numbers = np.zeros((_AT_ONCE, num_pairs), np.int32)
    best = np.empty(LANES * len(queries), np.int32)
    for row in range(len(starts)):
        start, end = starts[row], starts[row] + counts[row]
        if start < 0 or end <= start or end > len(codes):
            raise ValueError("the parts of a row are not where they should be")
        best[:] = _LOWEST
        for part in range(start, end, _AT_ONCE):
            for at in range(_AT_ONCE):
                code = codes[min(part + at, end - 1)]  # the last one again, which changes nothing
                if bits == 4:
                    for pair in range(num_pairs):
                        numbers[at, pair] = np.int32(code[pair] & 15 | (np.int32(code[pair]) >> 4) << 16)
                else:
                    for pair in range(len(code) // 2):
                        numbers[at, pair] = np.int32(code[2 * pair] | np.int32(code[2 * pair + 1]) << 16)
                    if len(code) % 2:
                        numbers[at, num_pairs - 1] = np.int32(code[-1])
            for block in range(len(queries)):
                _raise_best(numbers, queries, block, best)
        total = np.int64(0)
        for product in best:
            total += product
        sums[row] = total
