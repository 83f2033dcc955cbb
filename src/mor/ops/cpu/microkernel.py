"""The machine code inside the CPU kernels: a register-blocked product, and exponentials.

Numba turns Python loops into good scalar code, but keeps no block of sums in vector registers.
These intrinsics write that inner loop as LLVM code with explicit vectors; LLVM then picks the
processor's own instructions (AVX2, AVX-512, NEON). `mor bench ops` measures what it gains.

A register block is `microkernel_rows()` rows of `microkernel_panels()` panels: 6 x 1 where
registers hold 8 numbers (12 sums, 2 weights and 1 input fill 15 of AVX2's 16), 14 x 2 where they
hold 16 (28 sums, 2 weights and 1 input fill 31 of AVX-512's 32).

Pointers travel as integers: `array.ctypes.data` inside Numba, `tensor.data_ptr()` outside.
"""

from typing import Any, Literal, no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mor.ops.cpu.cpu_features import has_int8_dot, has_wide_registers

WeightDType = Literal["float32", "bfloat16", "int8"]

SIMD_WIDTH = 16
"""Numbers in a vector: one register of AVX-512, two of AVX2."""
PANEL = SIMD_WIDTH
"""Columns of one panel of packed weights."""
_NARROW, _WIDE = (6, 1), (14, 2)  # rows and panels of a register block


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call a function of LLVM or of the C library by its name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, args)


class VectorBuilder:
    """Helpers around one LLVM builder."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.f32 = ir.FloatType()
        self.i32 = ir.IntType(32)
        self.i64 = ir.IntType(64)
        self.floats = ir.VectorType(self.f32, SIMD_WIDTH)
        self.ints = ir.VectorType(self.i32, SIMD_WIDTH)

    def call(self, name: str, result: Any, *args: Any) -> Any:
        """Call a function of LLVM or of the C library."""
        return call(self.builder, name, result, *args)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        return self.call(f"llvm.fma.v{SIMD_WIDTH}f32", self.floats, a, b, c)

    def load(self, address: Any, kind: Any) -> Any:
        """What lies at an address, aligned or not."""
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(pointer, align=1)

    def store(self, value: Any, address: Any) -> None:
        """Put a value at an address, aligned or not."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer, align=1)

    def plus(self, address: Any, offset: int) -> Any:
        """An address some bytes further on."""
        return self.builder.add(address, ir.Constant(self.i64, offset))

    def splat(self, scalar: Any, count: int = SIMD_WIDTH) -> Any:
        """A vector of equal numbers."""
        vector = ir.VectorType(scalar.type, count)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(self.i32, 0))
        zeros = ir.Constant(ir.VectorType(self.i32, count), [0] * count)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def all(self, number: float) -> Any:
        """A constant vector."""
        return ir.Constant(self.floats, [number] * SIMD_WIDTH)

    def prefetch(self, address: Any) -> None:
        """Fetch the cache line of an address."""
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        flags = [ir.Constant(self.i32, i) for i in (0, 2, 1)]  # read, into the second cache, data
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *flags)

    def weights(self, address: Any, kind: WeightDType) -> Any:
        """One vector of weights: LANES columns, for int8 of two neighboring k."""
        if kind == "float32":
            return self.load(address, self.floats)
        if kind == "bfloat16":  # the upper half of a float32
            halves = self.load(address, ir.VectorType(ir.IntType(16), SIMD_WIDTH))
            wide = self.builder.zext(halves, self.ints)
            sixteen = ir.Constant(self.ints, [16] * SIMD_WIDTH)
            return self.builder.bitcast(self.builder.shl(wide, sixteen), self.floats)
        count = 4 if has_int8_dot() else 2
        bytes_ = self.load(address, ir.VectorType(ir.IntType(8), count * SIMD_WIDTH))
        if count == 4:
            return bytes_
        return self.builder.sext(bytes_, ir.VectorType(ir.IntType(16), count * SIMD_WIDTH))

    def integer_product(self, total: Any, x: Any, weights: Any) -> Any:
        """total + the products of a step's k: of four unsigned bytes, or of two int16."""
        if has_int8_dot():
            x = self.builder.bitcast(x, ir.VectorType(ir.IntType(8), 4 * SIMD_WIDTH))
            return self.call("llvm.x86.avx512.vpdpbusd.512", self.ints, total, x, weights)
        x = self.builder.bitcast(x, ir.VectorType(ir.IntType(16), 2 * SIMD_WIDTH))
        return self.builder.add(total, self.pair_product(x, weights))

    def pair_product(self, a: Any, b: Any) -> Any:
        """a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in int32: one instruction, e.g. x86's pmaddwd."""
        wide = ir.VectorType(self.i32, 2 * SIMD_WIDTH)
        product = self.builder.mul(self.builder.sext(a, wide), self.builder.sext(b, wide))
        undefined = ir.Constant(wide, ir.Undefined)
        index = ir.VectorType(self.i32, SIMD_WIDTH)
        even = ir.Constant(index, list(range(0, 2 * SIMD_WIDTH, 2)))
        odd = ir.Constant(index, list(range(1, 2 * SIMD_WIDTH, 2)))
        return self.builder.add(
            self.builder.shuffle_vector(product, undefined, even),
            self.builder.shuffle_vector(product, undefined, odd),
        )

    def exp(self, x: Any) -> Any:
        """exp of a vector to 2 ulp (Cody and Waite's reduction, a polynomial); 0 below -87."""
        low, high = self.all(-87.0), self.all(88.0)
        kept = self.builder.select(self.builder.fcmp_ordered("<", x, high), x, high)
        kept = self.builder.select(self.builder.fcmp_ordered(">", kept, low), kept, low)
        scaled = self.builder.fmul(kept, self.all(1.4426950408889634))
        whole = self.call(f"llvm.nearbyint.v{SIMD_WIDTH}f32", self.floats, scaled)
        rest = self.fma(whole, self.all(-0.693359375), kept)
        rest = self.fma(whole, self.all(2.12194440e-4), rest)
        value = self.all(1.9875691500e-4)
        for coefficient in (
            *(1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5, 1.0, 1.0),
        ):
            value = self.fma(value, rest, self.all(coefficient))
        exponent = self.builder.fptosi(whole, self.ints)
        bias = ir.Constant(self.ints, [127] * SIMD_WIDTH)
        shift = ir.Constant(self.ints, [23] * SIMD_WIDTH)
        power = self.builder.shl(self.builder.add(exponent, bias), shift)
        result = self.builder.fmul(value, self.builder.bitcast(power, self.floats))
        return self.builder.select(self.builder.fcmp_ordered("<", x, low), self.all(0.0), result)


def _product(code: VectorBuilder, kind: WeightDType, rows: int, args: list[Any]) -> list[list[Any]]:
    """The loop over k: sums of a block of x @ w, by row and panel, still in registers."""
    builder, (_, panels) = code.builder, _shape()
    x, row_bytes, w, w_bytes, ahead, steps, ws = args
    int8 = kind == "int8"
    sums_type = code.ints if int8 else code.floats
    # Before the first step: inputs that are unsigned bytes are 128 too large.
    initial = [
        code.load(code.plus(s, 4 * SIMD_WIDTH), code.ints) if int8 else code.all(0.0)
        for s in ws[:panels]
    ]
    starts = [builder.add(x, builder.mul(row_bytes, ir.Constant(code.i64, i))) for i in range(rows)]
    before = builder.block
    loop = builder.append_basic_block("k")
    after = builder.append_basic_block("sums")
    builder.branch(loop)
    builder.position_at_end(loop)
    walked = [ir.Constant(code.i64, 0), *w[:panels], *ahead[:panels]]
    strides = [ir.Constant(code.i64, 4)] + [w_bytes] * (2 * panels)
    phis = [builder.phi(code.i64) for _ in walked]
    at, weight_at, ahead_at = phis[0], phis[1 : 1 + panels], phis[1 + panels :]
    sums = [[builder.phi(sums_type) for _ in range(panels)] for _ in range(rows)]
    columns = [code.weights(address, kind) for address in weight_at]
    for address in ahead_at:
        code.prefetch(address)
    done: list[list[Any]] = []
    for row, totals in zip(starts, sums, strict=True):
        four_bytes = builder.add(row, at)  # one float32, two int16 or four bytes
        value = code.splat(code.load(four_bytes, code.i32 if int8 else code.f32))
        pairs = list(zip(totals, columns, strict=True))
        if int8:
            done.append([code.integer_product(total, value, c) for total, c in pairs])
        else:
            done.append([code.fma(value, c, total) for total, c in pairs])
    following = [builder.add(phi, stride) for phi, stride in zip(phis, strides, strict=True)]
    for phi, start, step in zip(phis, walked, following, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(step, loop)
    for old, new in zip(sums, done, strict=True):
        for phi, start, value in zip(old, initial, new, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
    end = builder.mul(steps, ir.Constant(code.i64, 4))
    builder.cbranch(builder.icmp_signed("<", following[0], end), loop, after)
    builder.position_at_end(after)
    return done


def _shape() -> tuple[int, int]:
    return _WIDE if has_wide_registers() else _NARROW


@intrinsic
@no_type_check
def microkernel_rows(typing):
    """Rows of the register block at most."""
    return types.int64(), lambda *_: ir.Constant(ir.IntType(64), _shape()[0])


@intrinsic
@no_type_check
def microkernel_panels(typing):
    """Panels of the register block."""
    return types.int64(), lambda *_: ir.Constant(ir.IntType(64), _shape()[1])


@intrinsic
@no_type_check
def int8_steps(typing):
    """Neighboring k of a step with int8 weights: 4 where bytes are multiplied, else 2."""
    count = 4 if has_int8_dot() else 2
    return types.int64(), lambda *_: ir.Constant(ir.IntType(64), count)


@intrinsic(prefer_literal=True)
@no_type_check
def gemm_microkernel(
    typing, kind, rows, add, x, row_bytes, w, w_bytes, ahead, steps, out, out_bytes, xs, ws
):
    """out[rows, PANEL] = x @ w, or += if `add`, for one panel or two.

    Args:
        kind: literal `WeightDType`: of w. int8 weights meet unsigned bytes, four k to a step, or
            int16, two k to a step.
        rows: 1..microkernel_rows().
        add: 0 or 1.
        x, row_bytes: inputs, and bytes from one row to the next.
        w, w_bytes: weights of one step, of the first and the second panel, and bytes from one
            step to the next.
        ahead: two addresses, walked like w and fetched into the cache: what is needed next.
        steps: of the sum; 1 or more.
        out, out_bytes: float32 results of either panel. Two equal panels with equal results are
            computed twice and stored once: that is how an odd one is done.
        xs, ws: int8 only: float32 scales of the rows; of either panel's columns the scales and
            then the int32 sums to begin with.
    """
    of_weights = kind.literal_value
    pair = types.UniTuple(types.intp, 2)
    kinds = [types.intp] * 12
    for i in (4, 6, 8, 11):  # w, ahead, out, ws
        kinds[i] = pair
    signature = types.void(kind, *kinds)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        flat = [
            part
            for arg in args[1:]
            for part in (
                cgutils.unpack_tuple(builder, arg) if isinstance(arg.type, ir.ArrayType) else [arg]
            )
        ]
        builder.call(_block_function(builder.module, of_weights), flat)
        return context.get_dummy_value()

    return signature, generate


def _block_function(module: Any, kind: WeightDType) -> Any:
    """`gemm_microkernel` of one kind of weights as a function of its own.

    Never inlined: it is called from many places, and to compile it once takes seconds.
    """
    name = f"mor_block_{kind}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 16), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    rows, add, x, row_bytes, w, w2, w_bytes, ahead, ahead2, steps, *rest = function.args
    out, out2, out_bytes, xs, ws, ws2 = rest
    maximum, _ = _shape()
    variants = [builder.append_basic_block(f"rows{i + 1}") for i in range(maximum)]
    switch = builder.switch(rows, variants[-1])
    for i, variant in enumerate(variants):
        if i + 1 < maximum:
            switch.add_case(ir.Constant(ir.IntType(64), i + 1), variant)
        builder.position_at_end(variant)
        code = VectorBuilder(builder)
        product = [x, row_bytes, (w, w2), w_bytes, (ahead, ahead2), steps, (ws, ws2)]
        sums = _product(code, kind, i + 1, product)
        _store_block(code, kind, sums, (add, (out, out2), out_bytes, xs, (ws, ws2)))
        builder.ret_void()
    return function


def _store_block(code: VectorBuilder, kind: WeightDType, sums: list[list[Any]], args: Any) -> None:
    """The end of a block: scales of int8, what was there before, and the stores."""
    add, outs, out_bytes, xs, ws = args
    builder = code.builder
    adds = builder.icmp_signed("!=", add, ir.Constant(code.i64, 0))
    for i, row in enumerate(sums):
        down = builder.mul(out_bytes, ir.Constant(code.i64, i))
        addresses = [builder.add(out, down) for out in outs[: len(row)]]
        # All is read before anything is written: both panels may be the same one.
        old = [
            builder.select(adds, code.load(address, code.floats), code.all(0.0))
            for address in addresses
        ]
        for address, before, total, scales in zip(addresses, old, row, ws, strict=False):
            value = total
            if kind == "int8":
                scale = code.splat(code.load(code.plus(xs, 4 * i), code.f32))
                value = builder.sitofp(value, code.floats)
                value = builder.fmul(builder.fmul(value, scale), code.load(scales, code.floats))
            code.store(builder.fadd(value, before), address)


@intrinsic
@no_type_check
def cycles(typing):
    """The processor's time stamp; 0 where a program may not read it (anything but x86)."""
    signature = types.int64()

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        if not builder.module.triple.startswith("x86"):
            return ir.Constant(code.i64, 0)
        return code.call("llvm.readcyclecounter", code.i64)

    return signature, generate
