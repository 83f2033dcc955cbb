"""Machine code that walks along one row of float32: exponentials, sums, largest values, rounding.

Like `micro`, in LLVM's vectors: what Numba's own loops would compute one number at a time.
"""

import functools
from typing import Any, no_type_check

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mor.ops.cpu.cpu_features import has_int8_dot
from mor.ops.cpu.microkernel import SIMD_WIDTH, VectorBuilder


@intrinsic
@no_type_check
def exp_row(typing, x, count, subtracted):
    """x[i] = exp(x[i] - subtracted) in place, and their sum; count is a multiple of LANES."""
    signature = types.float32(types.intp, types.intp, types.float32)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count, subtracted = args
        top = code.splat(subtracted)

        def step(at: Any, total: Any) -> Any:
            value = code.exp(builder.fsub(code.load(at, code.floats), top))
            code.store(value, at)
            return builder.fadd(total, value)

        return _horizontal_sum(code, _loop(code, x, count, code.all(0.0), step))

    return signature, generate


@intrinsic
@no_type_check
def max_row(typing, x, count):
    """Largest float32; count is a multiple of LANES, at least LANES."""
    signature = types.float32(types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count = args

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def step(at: Any, total: Any) -> Any:
            return larger(code.load(at, code.floats), total)

        vector = _loop(code, x, count, code.load(x, code.floats), step)
        parts = [
            builder.extract_element(vector, ir.Constant(code.i32, i)) for i in range(SIMD_WIDTH)
        ]
        return functools.reduce(larger, parts)

    return signature, generate


@intrinsic
@no_type_check
def abs_max_row(typing, x, count):
    """Largest magnitude; count is a multiple of LANES."""
    signature = types.float32(types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count = args

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def step(at: Any, total: Any) -> Any:
            value = code.load(at, code.floats)
            return larger(code.call(f"llvm.fabs.v{SIMD_WIDTH}f32", code.floats, value), total)

        vector = _loop(code, x, count, code.all(0.0), step)
        parts = [
            builder.extract_element(vector, ir.Constant(code.i32, i)) for i in range(SIMD_WIDTH)
        ]
        return functools.reduce(larger, parts)

    return signature, generate


@intrinsic
@no_type_check
def round_row(typing, x, count, factor, out):
    """out[i] = x[i] * factor to the nearest integer, for int8 products; count as in `exp_row`.

    Unsigned bytes with 128 for 0 where bytes are multiplied, else int16.
    """
    signature = types.void(types.intp, types.intp, types.float32, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count, factor, out = args
        scale = code.splat(factor)
        size = 1 if has_int8_dot() else 2

        def step(at: Any, total: Any) -> Any:
            value = builder.fmul(code.load(at, code.floats), scale)
            value = code.call(f"llvm.nearbyint.v{SIMD_WIDTH}f32", code.floats, value)
            whole = builder.fptosi(value, code.ints)
            if size == 1:
                whole = builder.add(whole, ir.Constant(code.ints, [128] * SIMD_WIDTH))
            rounded = builder.trunc(whole, ir.VectorType(ir.IntType(8 * size), SIMD_WIDTH))
            moved = builder.lshr(builder.sub(at, x), ir.Constant(code.i64, 3 - size))
            code.store(rounded, builder.add(out, moved))
            return total

        _loop(code, x, count, code.all(0.0), step)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
@no_type_check
def exp_sum_row(typing, x, count, subtracted):
    """Sum of exp(x[i] - subtracted); count is a multiple of LANES, at least LANES."""
    signature = types.float32(types.intp, types.intp, types.float32)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count, subtracted = args
        top = code.splat(subtracted)

        def step(at: Any, total: Any) -> Any:
            value = code.exp(builder.fsub(code.load(at, code.floats), top))
            return builder.fadd(total, value)

        return _horizontal_sum(code, _loop(code, x, count, code.all(0.0), step))

    return signature, generate


@intrinsic
@no_type_check
def sum_row(typing, x, count):
    """Sum of float32; count is a multiple of LANES."""
    signature = types.float32(types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        x, count = args

        def step(at: Any, total: Any) -> Any:
            code.prefetch(code.plus(at, 2048))
            return builder.fadd(total, code.load(at, code.floats))

        return _horizontal_sum(code, _loop(code, x, count, code.all(0.0), step))

    return signature, generate


@intrinsic
@no_type_check
def silu_mul_row(typing, gate, up, out, count):
    """out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]; count is a multiple of LANES."""
    signature = types.void(types.intp, types.intp, types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        gate, up, out, count = args
        to_up, to_out = builder.sub(up, gate), builder.sub(out, gate)

        def step(at: Any, total: Any) -> Any:
            value = code.load(at, code.floats)
            opposite = code.exp(builder.fsub(code.all(0.0), value))
            squashed = builder.fdiv(value, builder.fadd(code.all(1.0), opposite))
            result = builder.fmul(squashed, code.load(builder.add(at, to_up), code.floats))
            code.store(result, builder.add(at, to_out))
            return total

        _loop(code, gate, count, code.all(0.0), step)
        return context.get_dummy_value()

    return signature, generate


def _loop(code: VectorBuilder, start: Any, count: Any, initial: Any, step: Any) -> Any:
    """`total = step(address, total)` for every LANES float32 of a row; the last total."""
    builder = code.builder
    before = builder.block
    loop, after = builder.append_basic_block("row"), builder.append_basic_block("rest")
    end = builder.add(start, builder.mul(count, ir.Constant(code.i64, 4)))
    builder.branch(loop)
    builder.position_at_end(loop)
    at, total = builder.phi(code.i64), builder.phi(code.floats)
    new = step(at, total)
    following = code.plus(at, 4 * SIMD_WIDTH)
    at.add_incoming(start, before)
    at.add_incoming(following, loop)
    total.add_incoming(initial, before)
    total.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
    builder.position_at_end(after)
    return new


def _horizontal_sum(code: VectorBuilder, vector: Any) -> Any:
    total = ir.Constant(code.f32, 0.0)
    for i in range(SIMD_WIDTH):
        part = code.builder.extract_element(vector, ir.Constant(code.i32, i))
        total = code.builder.fadd(total, part)
    return total
