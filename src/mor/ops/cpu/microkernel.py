"""The machine code inside the CPU kernels: a register-blocked product, and exponentials.

Numba turns Python loops into good scalar code, but keeps no block of sums in vector registers.
These intrinsics write that inner loop as LLVM code with explicit vectors; LLVM then picks the
processor's own instructions (AVX2, AVX-512, NEON). `mor bench ops` measures what it gains.

A register block is `microkernel_rows()` rows of `microkernel_panels()` panels (BLIS: MR, NR): 6 x 1
where registers hold 8 numbers (12 sums, 2 weights and 1 input fill 15 of AVX2's 16), 14 x 2 where
they hold 16 (28 sums, 2 weights and 1 input fill 31 of AVX-512's 32). `mor.ops.cpu` draws it.

Pointers travel as integers: `array.ctypes.data` inside Numba, `tensor.data_ptr()` outside.
"""

from typing import Any, NamedTuple, no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mor.ops.cpu.cpu_features import SIMD_WIDTH, has_int8_dot, has_wide_registers
from mor.ops.cpu.packed_weights import WeightDType

_NARROW, _WIDE = (6, 1), (14, 2)  # rows and panels of a register block


class InputRows(NamedTuple):
    """Rows of the left matrix (BLIS: A). Fields are int64, or LLVM's values for them."""

    address: Any
    """Of the first row's first k."""
    row_bytes: Any
    """From one row to the next."""
    num_rows: Any
    """1..microkernel_rows()."""
    scales: Any
    """int8: address of the rows' float32 scales; else 0."""


class PanelPair(NamedTuple):
    """Weights of two panels (BLIS: B). A kernel of one panel reads the first.

    Two equal panels with equal results are computed twice and stored once: that is how an odd
    panel is done.
    """

    first: Any
    """Address of the first step."""
    second: Any
    step_bytes: Any
    """From one step of a panel to the next."""
    num_steps: Any
    """Steps of the sum, 1 or more: one k, for int8 two or four neighboring ones."""
    prefetch_first: Any
    """Address that is walked like `first`, and fetched into the cache: what is needed next."""
    prefetch_second: Any
    scales_first: Any
    """int8: address of the columns' float32 scales, then of their int32 initial sums; else 0."""
    scales_second: Any


class OutputBlock(NamedTuple):
    """Results in either panel (BLIS: C), float32."""

    first: Any
    """Address of the first row."""
    second: Any
    row_bytes: Any
    add: Any
    """1: results are added to what is there; 0: they replace it."""


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """The result of calling a function of LLVM or of the C library by its name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, args)


class VectorBuilder:
    """Vector instructions of SIMD_WIDTH floats or int32, written with one LLVM builder."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.f32 = ir.FloatType()
        self.i32 = ir.IntType(32)
        self.i64 = ir.IntType(64)
        self.floats = ir.VectorType(self.f32, SIMD_WIDTH)
        self.ints = ir.VectorType(self.i32, SIMD_WIDTH)

    def call(self, name: str, result: Any, *args: Any) -> Any:
        """The result of calling a function of LLVM or of the C library."""
        return call(self.builder, name, result, *args)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        return self.call(f"llvm.fma.v{SIMD_WIDTH}f32", self.floats, a, b, c)

    def load(self, address: Any, kind: Any) -> Any:
        """What lies at an address, aligned or not."""
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(pointer, align=1)

    def store(self, value: Any, address: Any) -> None:
        """Write a value to an address, aligned or not."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer, align=1)

    def plus(self, address: Any, offset: int) -> Any:
        """The address `offset` bytes further on."""
        return self.builder.add(address, ir.Constant(self.i64, offset))

    def splat(self, scalar: Any, count: int = SIMD_WIDTH) -> Any:
        """A vector of `count` times the same number."""
        vector = ir.VectorType(scalar.type, count)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(self.i32, 0))
        zeros = ir.Constant(ir.VectorType(self.i32, count), [0] * count)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def all(self, number: float) -> Any:
        """A constant vector of SIMD_WIDTH times the same number."""
        return ir.Constant(self.floats, [number] * SIMD_WIDTH)

    def prefetch(self, address: Any) -> None:
        """Fetch the cache line of an address, which may be any: prefetching never faults."""
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        flags = [ir.Constant(self.i32, i) for i in (0, 2, 1)]  # read, into the second cache, data
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *flags)

    def weights(self, address: Any, weight_dtype: WeightDType) -> Any:
        """One step of a panel: PANEL columns, for int8 of two or four neighboring k."""
        if weight_dtype == "float32":
            return self.load(address, self.floats)
        if weight_dtype == "bfloat16":  # the upper half of a float32
            halves = self.load(address, ir.VectorType(ir.IntType(16), SIMD_WIDTH))
            extended = self.builder.zext(halves, self.ints)
            sixteen = ir.Constant(self.ints, [16] * SIMD_WIDTH)
            return self.builder.bitcast(self.builder.shl(extended, sixteen), self.floats)
        k_per_step = 4 if has_int8_dot() else 2
        num_bytes = k_per_step * SIMD_WIDTH
        loaded = self.load(address, ir.VectorType(ir.IntType(8), num_bytes))
        if k_per_step == 4:
            return loaded
        return self.builder.sext(loaded, ir.VectorType(ir.IntType(16), num_bytes))

    def int8_dot(self, total: Any, x: Any, weights: Any) -> Any:
        """total + the products of a step's k: of four unsigned bytes, or of two int16."""
        if has_int8_dot():
            x = self.builder.bitcast(x, ir.VectorType(ir.IntType(8), 4 * SIMD_WIDTH))
            return self.call("llvm.x86.avx512.vpdpbusd.512", self.ints, total, x, weights)
        x = self.builder.bitcast(x, ir.VectorType(ir.IntType(16), 2 * SIMD_WIDTH))
        return self.builder.add(total, self.pair_dot(x, weights))

    def pair_dot(self, a: Any, b: Any) -> Any:
        """a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in int32: one instruction, e.g. x86's pmaddwd."""
        extended = ir.VectorType(self.i32, 2 * SIMD_WIDTH)
        product = self.builder.mul(self.builder.sext(a, extended), self.builder.sext(b, extended))
        undefined = ir.Constant(extended, ir.Undefined)
        index = ir.VectorType(self.i32, SIMD_WIDTH)
        # LLVM recognizes just this pattern: widen, multiply, split into even and odd, add.
        even = ir.Constant(index, list(range(0, 2 * SIMD_WIDTH, 2)))
        odd = ir.Constant(index, list(range(1, 2 * SIMD_WIDTH, 2)))
        return self.builder.add(
            self.builder.shuffle_vector(product, undefined, even),
            self.builder.shuffle_vector(product, undefined, odd),
        )

    def exp(self, x: Any) -> Any:
        """exp of a vector to 2 ulp (Cody and Waite's reduction, a polynomial); 0 below -87."""
        low, high = self.all(-87.0), self.all(88.0)  # exp of both is a normal float32
        clamped = self.builder.select(self.builder.fcmp_ordered("<", x, high), x, high)
        clamped = self.builder.select(self.builder.fcmp_ordered(">", clamped, low), clamped, low)
        # exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2.
        scaled = self.builder.fmul(clamped, self.all(1.4426950408889634))  # 1 / ln 2
        n = self.call(f"llvm.nearbyint.v{SIMD_WIDTH}f32", self.floats, scaled)
        # r = x - n ln 2, with ln 2 as the sum of a short number, so that n times it is exact, and
        # a small rest.
        r = self.fma(n, self.all(-0.693359375), clamped)
        r = self.fma(n, self.all(2.12194440e-4), r)
        # exp(r) by Horner's rule; coefficients of degree 7 to 0 (Cephes, expf).
        value = self.all(1.9875691500e-4)
        value = self.fma(value, r, self.all(1.3981999507e-3))
        value = self.fma(value, r, self.all(8.3334519073e-3))
        value = self.fma(value, r, self.all(4.1665795894e-2))
        value = self.fma(value, r, self.all(1.6666665459e-1))
        value = self.fma(value, r, self.all(0.5))
        value = self.fma(value, r, self.all(1.0))
        value = self.fma(value, r, self.all(1.0))
        # 2^n: n + 127 in the exponent bits of a float32, which begin at bit 23.
        exponent = self.builder.fptosi(n, self.ints)
        bias = ir.Constant(self.ints, [127] * SIMD_WIDTH)
        shift = ir.Constant(self.ints, [23] * SIMD_WIDTH)
        power = self.builder.shl(self.builder.add(exponent, bias), shift)
        result = self.builder.fmul(value, self.builder.bitcast(power, self.floats))
        return self.builder.select(self.builder.fcmp_ordered("<", x, low), self.all(0.0), result)


def _register_block() -> tuple[int, int]:
    """Rows and panels of the register block."""
    return _WIDE if has_wide_registers() else _NARROW


@intrinsic
@no_type_check
def microkernel_rows(typing):
    """Rows of the register block: as many as a call of the microkernel may have."""
    return types.int64(), lambda *_: ir.Constant(ir.IntType(64), _register_block()[0])


@intrinsic
@no_type_check
def microkernel_panels(typing):
    """Panels of the register block, 1 or 2."""
    return types.int64(), lambda *_: ir.Constant(ir.IntType(64), _register_block()[1])


@intrinsic
@no_type_check
def int8_k_per_step(typing):
    """Neighboring k of a step with int8 weights: 4 where bytes are multiplied, else 2."""
    k_per_step = 4 if has_int8_dot() else 2
    return types.int64(), lambda *_: ir.Constant(ir.IntType(64), k_per_step)


@intrinsic(prefer_literal=True)
@no_type_check
def gemm_microkernel(typing, weight_dtype, inputs, panels, outputs):
    """out = x @ w, or out += x @ w if `outputs.add`, for one register block.

    Args:
        weight_dtype: literal `WeightDType`. x is float32, for int8 weights quantized: unsigned
            bytes, four k to a step, or int16, two k to a step.
        inputs: `InputRows`.
        panels: `PanelPair`.
        outputs: `OutputBlock`.
    """
    signature = types.void(weight_dtype, inputs, panels, outputs)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # LLVM's function takes the fields of all three records, one after another, as int64.
        fields = [
            context.cast(builder, field, numba_type, types.int64)
            for record_type, record in zip(signature.args[1:], args[1:], strict=True)
            for numba_type, field in zip(
                record_type.types, cgutils.unpack_tuple(builder, record), strict=True
            )
        ]
        builder.call(_microkernel_function(builder.module, weight_dtype.literal_value), fields)
        return context.get_dummy_value()

    return signature, generate


def _microkernel_function(module: Any, weight_dtype: WeightDType) -> Any:
    """`gemm_microkernel` of one kind of weights as a function of an LLVM module.

    Never inlined: it is called from many places, and to compile it once takes seconds.
    """
    name = f"mor_microkernel_{weight_dtype}"
    if name in module.globals:
        return module.globals[name]
    num_inputs, num_panels = len(InputRows._fields), len(PanelPair._fields)
    num_fields = num_inputs + num_panels + len(OutputBlock._fields)
    signature = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * num_fields)
    function = ir.Function(module, signature, name)
    function.linkage = "linkonce_odr"  # each compiled module has one; the linker keeps any
    function.attributes.add("noinline")
    inputs = InputRows(*function.args[:num_inputs])
    panels = PanelPair(*function.args[num_inputs : num_inputs + num_panels])
    outputs = OutputBlock(*function.args[num_inputs + num_panels :])
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    # One variant per number of rows, since the number of registers in use must be a constant.
    max_rows, _ = _register_block()
    variants = [builder.append_basic_block(f"rows{i + 1}") for i in range(max_rows)]
    switch = builder.switch(inputs.num_rows, variants[-1])
    for i, variant in enumerate(variants):
        if i + 1 < max_rows:
            switch.add_case(ir.Constant(ir.IntType(64), i + 1), variant)
        builder.position_at_end(variant)
        code = VectorBuilder(builder)
        sums = _sum_over_k(code, weight_dtype, i + 1, inputs, panels)
        _store_block(code, weight_dtype, sums, inputs, panels, outputs)
        builder.ret_void()
    return function


def _sum_over_k(
    code: VectorBuilder, weight_dtype: WeightDType, rows: int, inputs: InputRows, panels: PanelPair
) -> list[list[Any]]:
    """The loop over k: sums of a block of x @ w, by row and panel, still in registers."""
    builder, (_, num_panels) = code.builder, _register_block()
    int8 = weight_dtype == "int8"
    sums_type = code.ints if int8 else code.floats
    # int8 sums begin with what lies behind the panel's scales: see `PackedLinear.scales`.
    initial = [
        code.load(code.plus(scales, 4 * SIMD_WIDTH), code.ints) if int8 else code.all(0.0)
        for scales in (panels.scales_first, panels.scales_second)[:num_panels]
    ]
    row_starts = [
        builder.add(inputs.address, builder.mul(inputs.row_bytes, ir.Constant(code.i64, i)))
        for i in range(rows)
    ]
    before = builder.block
    loop = builder.append_basic_block("k")
    after = builder.append_basic_block("sums")
    builder.branch(loop)
    builder.position_at_end(loop)
    # What moves on with every step: the offset in all rows (4 bytes: one float32, two int16 or
    # four bytes), the addresses of weights, and those of what is prefetched.
    weight_starts = (panels.first, panels.second)[:num_panels]
    prefetch_starts = (panels.prefetch_first, panels.prefetch_second)[:num_panels]
    starts = [ir.Constant(code.i64, 0), *weight_starts, *prefetch_starts]
    strides = [ir.Constant(code.i64, 4)] + [panels.step_bytes] * (2 * num_panels)
    moving = [builder.phi(code.i64) for _ in starts]
    offset, weight_at = moving[0], moving[1 : 1 + num_panels]
    sums = [[builder.phi(sums_type) for _ in range(num_panels)] for _ in range(rows)]
    columns = [code.weights(address, weight_dtype) for address in weight_at]
    for address in moving[1 + num_panels :]:
        code.prefetch(address)
    new_sums: list[list[Any]] = []
    for row_start, row_sums in zip(row_starts, sums, strict=True):
        # One input in all places of a vector, by 16 columns of each panel.
        at = builder.add(row_start, offset)
        value = code.splat(code.load(at, code.i32 if int8 else code.f32))
        pairs = list(zip(row_sums, columns, strict=True))
        if int8:
            new_sums.append([code.int8_dot(total, value, c) for total, c in pairs])
        else:
            new_sums.append([code.fma(value, c, total) for total, c in pairs])
    # Close the loop: each phi has its first value from before, the next one from the loop's end.
    moved = [builder.add(phi, stride) for phi, stride in zip(moving, strides, strict=True)]
    _add_incoming(moving, (starts, before), (moved, loop))
    for row_sums, row_new_sums in zip(sums, new_sums, strict=True):
        _add_incoming(row_sums, (initial, before), (row_new_sums, loop))
    end = builder.mul(panels.num_steps, ir.Constant(code.i64, 4))
    builder.cbranch(builder.icmp_signed("<", moved[0], end), loop, after)
    builder.position_at_end(after)
    return new_sums


def _add_incoming(phis: list[Any], first: tuple[Any, Any], following: tuple[Any, Any]) -> None:
    """Give each phi its value from the block before the loop and from the loop's own block."""
    for values, block in (first, following):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)


def _store_block(
    code: VectorBuilder,
    weight_dtype: WeightDType,
    sums: list[list[Any]],
    inputs: InputRows,
    panels: PanelPair,
    outputs: OutputBlock,
) -> None:
    """Store a register block: sums by row and panel, scaled if int8, added to what is there."""
    builder = code.builder
    adds = builder.icmp_signed("!=", outputs.add, ir.Constant(code.i64, 0))
    panel_scales = (panels.scales_first, panels.scales_second)
    for i, row in enumerate(sums):
        down = builder.mul(outputs.row_bytes, ir.Constant(code.i64, i))
        starts = (outputs.first, outputs.second)[: len(row)]
        addresses = [builder.add(start, down) for start in starts]
        # All is read before anything is written: both panels may be the same one.
        old = [
            builder.select(adds, code.load(address, code.floats), code.all(0.0))
            for address in addresses
        ]
        for address, before, total, scales in zip(addresses, old, row, panel_scales, strict=False):
            value = total
            if weight_dtype == "int8":  # sum * scale of the row * scale of the column
                scale = code.splat(code.load(code.plus(inputs.scales, 4 * i), code.f32))
                value = builder.sitofp(value, code.floats)
                value = builder.fmul(builder.fmul(value, scale), code.load(scales, code.floats))
            code.store(builder.fadd(value, before), address)


@intrinsic
@no_type_check
def cycles(typing):
    """The processor's time stamp counter; 0 where a program may not read it (not x86)."""
    signature = types.int64()

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        code = VectorBuilder(builder)
        if not builder.module.triple.startswith("x86"):
            return ir.Constant(code.i64, 0)
        return code.call("llvm.readcyclecounter", code.i64)

    return signature, generate
