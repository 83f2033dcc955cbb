"""Machine code that walks along one row of float32: exponentials, sums, largest values, rounding.

Like `microkernel`, in LLVM's vectors: what Numba's own loops would compute one number at a time.
Each function is a loop over SIMD_WIDTH numbers at a time (`_loop`) with one vector as its running
result; rows are given by address, and their count is a multiple of SIMD_WIDTH.
"""

import functools
from typing import Any, no_type_check

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mor.ops.cpu.cpu_features import SIMD_WIDTH, has_int8_dot
from mor.ops.cpu.microkernel import VectorBuilder


@intrinsic
@no_type_check
def exp_row(typing, x, count, subtracted):
    """x[i] = exp(x[i] - subtracted) in place; returns the sum of the results."""
    signature = types.float32(types.intp, types.intp, types.float32)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count, subtracted = args
        subtrahend = code.splat(subtracted)

        def body(at: Any, total: Any) -> Any:
            value = code.exp(builder.fsub(code.load(at, code.floats), subtrahend))
            code.store(value, at)
            return builder.fadd(total, value)

        return _horizontal_sum(code, _loop(code, x, count, code.all(0.0), body))

    return signature, generate


@intrinsic
@no_type_check
def max_row(typing, x, count):
    """The largest number; count is at least SIMD_WIDTH."""
    signature = types.float32(types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count = args

        def body(at: Any, total: Any) -> Any:
            return _larger(code, code.load(at, code.floats), total)

        # The row's own first numbers to begin with: all of them may be below 0.
        return _horizontal_max(code, _loop(code, x, count, code.load(x, code.floats), body))

    return signature, generate


@intrinsic
@no_type_check
def abs_max_row(typing, x, count):
    """The largest magnitude."""
    signature = types.float32(types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count = args

        def body(at: Any, total: Any) -> Any:
            value = code.load(at, code.floats)
            magnitude = code.call(f"llvm.fabs.v{SIMD_WIDTH}f32", code.floats, value)
            return _larger(code, magnitude, total)

        return _horizontal_max(code, _loop(code, x, count, code.all(0.0), body))

    return signature, generate


@intrinsic
@no_type_check
def quantize_row(typing, x, count, factor, out):
    """out[i] = x[i] * factor, rounded to the nearest integer, as int8 products take their inputs.

    Unsigned bytes with 128 for 0 where bytes are multiplied, else int16.
    """
    signature = types.void(types.intp, types.intp, types.float32, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count, factor, out = args
        scale = code.splat(factor)
        size = 1 if has_int8_dot() else 2

        def body(at: Any, total: Any) -> Any:
            value = builder.fmul(code.load(at, code.floats), scale)
            value = code.call(f"llvm.nearbyint.v{SIMD_WIDTH}f32", code.floats, value)
            whole = builder.fptosi(value, code.ints)
            if size == 1:  # -128..127 becomes 0..255
                whole = builder.add(whole, ir.Constant(code.ints, [128] * SIMD_WIDTH))
            rounded = builder.trunc(whole, ir.VectorType(ir.IntType(8 * size), SIMD_WIDTH))
            # An output is 1 or 2 bytes where an input has 4: its offset is that of x, shifted.
            offset = builder.lshr(builder.sub(at, x), ir.Constant(code.i64, 3 - size))
            code.store(rounded, builder.add(out, offset))
            return total

        _loop(code, x, count, code.all(0.0), body)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
@no_type_check
def exp_sum_row(typing, x, count, subtracted):
    """Sum of exp(x[i] - subtracted); x stays as it is."""
    signature = types.float32(types.intp, types.intp, types.float32)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count, subtracted = args
        subtrahend = code.splat(subtracted)

        def body(at: Any, total: Any) -> Any:
            value = code.exp(builder.fsub(code.load(at, code.floats), subtrahend))
            return builder.fadd(total, value)

        return _horizontal_sum(code, _loop(code, x, count, code.all(0.0), body))

    return signature, generate


@intrinsic
@no_type_check
def sum_row(typing, x, count):
    """The sum of a row."""
    signature = types.float32(types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count = args

        def body(at: Any, total: Any) -> Any:
            code.prefetch(code.plus(at, 2048))  # far enough ahead of a core's rate of reading
            return builder.fadd(total, code.load(at, code.floats))

        return _horizontal_sum(code, _loop(code, x, count, code.all(0.0), body))

    return signature, generate


@intrinsic
@no_type_check
def silu_mul_row(typing, gate, up, out, count):
    """out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]."""
    signature = types.void(types.intp, types.intp, types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        gate, up, out, count = args
        # One address moves on; the other two lie at a constant distance from it.
        to_up, to_out = builder.sub(up, gate), builder.sub(out, gate)

        def body(at: Any, total: Any) -> Any:
            value = code.load(at, code.floats)
            opposite = code.exp(builder.fsub(code.all(0.0), value))
            squashed = builder.fdiv(value, builder.fadd(code.all(1.0), opposite))
            result = builder.fmul(squashed, code.load(builder.add(at, to_up), code.floats))
            code.store(result, builder.add(at, to_out))
            return total

        _loop(code, gate, count, code.all(0.0), body)
        return context.get_dummy_value()

    return signature, generate


def _loop(code: VectorBuilder, start: Any, count: Any, initial: Any, body: Any) -> Any:
    """The last total of `total = body(address, total)` for every SIMD_WIDTH numbers of a row.

    At least one vector is read.
    """
    builder = code.builder
    before = builder.block
    loop, after = builder.append_basic_block("row"), builder.append_basic_block("rest")
    end = builder.add(start, builder.mul(count, ir.Constant(code.i64, 4)))
    builder.branch(loop)
    builder.position_at_end(loop)
    at, total = builder.phi(code.i64), builder.phi(code.floats)
    new = body(at, total)
    following = code.plus(at, 4 * SIMD_WIDTH)
    at.add_incoming(start, before)
    at.add_incoming(following, loop)
    total.add_incoming(initial, before)
    total.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
    builder.position_at_end(after)
    return new


def _larger(code: VectorBuilder, a: Any, b: Any) -> Any:
    """The larger of two numbers, or of each pair in two vectors; b where one is NaN."""
    return code.builder.select(code.builder.fcmp_ordered(">", a, b), a, b)


def _parts(code: VectorBuilder, vector: Any) -> list[Any]:
    """The SIMD_WIDTH numbers of a vector."""
    return [
        code.builder.extract_element(vector, ir.Constant(code.i32, i)) for i in range(SIMD_WIDTH)
    ]


def _horizontal_max(code: VectorBuilder, vector: Any) -> Any:
    """The largest number of a vector."""
    return functools.reduce(functools.partial(_larger, code), _parts(code, vector))


def _horizontal_sum(code: VectorBuilder, vector: Any) -> Any:
    """The sum of a vector's numbers, from the first to the last."""
    return functools.reduce(code.builder.fadd, _parts(code, vector), ir.Constant(code.f32, 0.0))
