"""The compiled CPU kernels against the plain torch operations in float64.

Tolerances follow from float32's rounding, 6e-8, so that a wrong term shows.
"""

import math
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from mor.ops import reference
from mor.ops.cpu import kernels as cpu
from mor.ops.cpu.cpu_features import has_int8_dot, has_wide_registers
from mor.ops.cpu.packed_weights import PackedLinear, WeightDType, dtype_code
from mor.ops.cpu.records import QKV, AttentionBatch, CosSin, KVCells, PackedWeight, Quantized
from mor.ops.cpu.simd_rows import exp_row
from mor.ops.paged import AttentionMetadata, PagedKV, RopeTable

WEIGHT_DTYPES: tuple[WeightDType, ...] = ("float32", "bfloat16", "int8")
EPS = 2.0**-23


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def threads(wanted: int) -> int:
    return cpu.use_threads(wanted)


# -- products -------------------------------------------------------------------------------------


def product(x: Tensor, packed: PackedLinear, out: np.ndarray, rows: int, add: int) -> None:
    """out[:rows] = x[:rows] @ packed.T, or += if `add`."""
    bytes_ = 2 * packed.in_features + 6 & ~3
    quantized = Quantized(
        values=np.full((rows, bytes_), 77, np.uint8), scales=np.zeros(rows, np.float32)
    )
    weight = PackedWeight(dtype_code(packed.weight_dtype), *packed.pointers)
    cpu.linear(threads(2), x[:rows].numpy(), weight, out, add, quantized)


def meant(weight: Tensor, weight_dtype: WeightDType) -> Tensor:
    """The float64 weights that a packed matrix stands for."""
    if weight_dtype == "float32":
        return weight.double()
    if weight_dtype == "bfloat16":
        return weight.bfloat16().double()
    scales = weight.abs().amax(1, keepdim=True).double() / 127
    return (weight.double() / scales).round() * scales


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@settings(max_examples=12)
@given(
    rows=st.integers(1, 40),
    inputs=st.sampled_from((1, 2, 7, 16, 33, 100, 577)),
    outputs=st.sampled_from((1, 5, 16, 17, 48, 100, 257)),
    add=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_linear(
    weight_dtype: WeightDType, rows: int, inputs: int, outputs: int, add: int, seed: int
) -> None:
    x, weight = drawn(seed, rows + 2, inputs), drawn(seed + 1, outputs, inputs)
    packed = PackedLinear(weight, weight_dtype)
    assert packed.padded_features % 16 == 0
    before = drawn(seed + 2, rows + 2, packed.padded_features)
    out = before.clone()
    product(x, packed, out.numpy(), rows, add)
    assert torch.equal(out[rows:], before[rows:])  # rows beyond stay
    exact = x[:rows].double()
    target = meant(weight, weight_dtype)
    want = exact @ target.T + add * before[:rows, :outputs].double()
    sums = exact.abs() @ target.abs().T + before[:rows, :outputs].abs()
    bound = (2 + math.sqrt(inputs)) * EPS * sums
    if weight_dtype == "int8":  # inputs are rounded to multiples of a step
        step = exact.abs().amax(1, keepdim=True) / packed.max_quantized_input
        bound = bound + 0.501 * step * target.abs().sum(1) + 4 * EPS * sums
    assert ((out[:rows, :outputs] - want).abs() <= bound).all()
    padding = out[:rows, outputs:] - add * before[:rows, outputs:]
    assert (padding == 0).all()


def test_int8_rounding_is_worth_its_bits() -> None:
    """Not only bounded: the error is what 12-bit inputs, or 8-bit ones, must have."""
    x, weight = drawn(0, 24, 576), drawn(1, 64, 576)
    packed = PackedLinear(weight, "int8")
    assert packed.max_quantized_input == (127 if has_int8_dot() else 4095)
    out = torch.zeros(24, 64)
    product(x, packed, out.numpy(), 24, 0)
    want = x.double() @ meant(weight, "int8").T
    # Uniform rounding: a step of max / max_quantized_input, about 3.2 deviations, over sqrt(12).
    assert (out - want).std() / want.std() < 1.3 * 3.2 / packed.max_quantized_input / math.sqrt(12)
    true = x.double() @ weight.double().T
    assert (out - true).std() / true.std() < 1.5e-2


def test_int8_of_zeros_and_of_large_numbers() -> None:
    x = torch.zeros(3, 40)
    x[1], x[2, 5] = 1e30, -1e-30
    packed = PackedLinear(torch.cat((drawn(0, 20, 40), torch.zeros(1, 40))), "int8")
    out = torch.full((3, 32), 5.0)
    product(x, packed, out.numpy(), 3, 0)
    assert (out[0] == 0).all()
    assert (out[:, 20] == 0).all()
    want = x.double() @ meant(drawn(0, 20, 40), "int8").T
    assert torch.allclose(out[:, :20].double(), want, rtol=1e-3, atol=0)


def test_the_largest_int8_sums_do_not_run_over() -> None:
    inputs = 6000
    packed = PackedLinear(torch.ones(16, inputs), "int8")
    assert packed.max_quantized_input * 127 * inputs < 2**31
    out = torch.zeros(2, 16)
    x = torch.stack((torch.ones(inputs), -torch.ones(inputs)))
    product(x, packed, out.numpy(), 2, 0)
    assert torch.allclose(out[0], torch.tensor(float(inputs)), rtol=1e-5)
    assert torch.allclose(out[1], -torch.tensor(float(inputs)), rtol=1e-5)


# -- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 48, 576])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(width: int, scale: float) -> None:
    x, weight = scale * drawn(width, 9, width), 1 + 0.1 * drawn(1, width)
    out = torch.full((9, width), 3.0)
    cpu.rms_norm(threads(2), x[:7].numpy(), weight.numpy(), 1e-5, out.numpy())
    want = reference.rms_norm(x[:7].double(), weight.double(), 1e-5)
    assert torch.allclose(out[:7].double(), want, rtol=8 * EPS, atol=0)
    assert (out[7:] == 3).all()


def test_silu_mul() -> None:
    gate_up = 4 * drawn(0, 11, 96)
    gate_up[3, :48] = torch.linspace(-100, 100, 48)
    out = torch.full((11, 48), 3.0)
    cpu.silu_mul(threads(2), gate_up[:9].numpy(), out.numpy())
    want = reference.silu_mul(gate_up[:9].double())
    assert torch.allclose(out[:9].double(), want, rtol=16 * EPS, atol=1e-30)
    assert (out[9:] == 3).all()


@njit
def exp_in_place(x, subtracted):  # type: ignore[no-untyped-def]
    return exp_row(x.ctypes.data, x.shape[0], subtracted)


def test_exp_is_right_to_two_units_in_the_last_place() -> None:
    grid = np.linspace(-87, 80, 2**18, dtype=np.float32)
    for top in (np.float32(0), np.float32(3.7)):
        x = grid.copy()
        total = exp_in_place(x, top)
        want = np.exp((grid - top).astype(np.float64))
        fine = grid - top > -87
        assert np.abs(x[fine] / want[fine] - 1).max() < 2.1 * EPS
        assert total == pytest.approx(want.sum(), rel=1e-4)
    low = np.full(16, -1e30, np.float32)
    low[3:] = np.linspace(-1000, -87.1, 13, dtype=np.float32)
    assert exp_in_place(low, np.float32(0)) == 0
    assert (low == 0).all()
    one = np.zeros(16, np.float32)
    assert exp_in_place(one, np.float32(0)) == 16
    assert (one == 1).all()


@pytest.mark.parametrize("vocabulary", [5, 8, 61, 1000])
def test_greedy(vocabulary: int) -> None:
    padded = -vocabulary % 16 + vocabulary
    logits = 5 * drawn(vocabulary, 7, padded)
    logits[:, vocabulary:] = 1e9  # padding never counts
    logits[2, :vocabulary] = 1.5  # all are equal: the first wins
    logits[3, vocabulary - 1] = logits[3, 0] = 100
    tokens, logprobs = np.empty(7, np.int64), np.empty(7, np.float32)
    cpu.greedy(threads(2), logits.numpy(), vocabulary, tokens, logprobs)
    want = logits[:, :vocabulary].double().log_softmax(-1)
    assert tokens.tolist() == want.argmax(-1).tolist()
    assert (tokens[2], tokens[3]) == (0, 0)
    best = want.max(-1).values
    assert torch.allclose(torch.from_numpy(logprobs).double(), best, rtol=1e-6, atol=1e-6)


# -- attention ------------------------------------------------------------------------------------

Run = tuple[int, int]
"""Entries before a run's tokens, and tokens."""


def paged(
    runs: list[Run], *, groups: int, size: int, page: int, height: int = 2, gaps: bool = False
) -> tuple[PagedKV, AttentionMetadata]:
    """A pool whose pages lie about in any order, and tokens of these runs in it.

    What no token sees is large, so that a look at it shows.
    """
    source = torch.Generator().manual_seed(sum(a * 7 + b for a, b in runs))
    entries = [before + num_tokens * (2 if gaps else 1) for before, num_tokens in runs]
    num_pages = [-(-e // page) for e in entries]
    pages = torch.randperm(sum(num_pages) + 3, generator=source)
    cells = len(pages) * height
    kv = PagedKV(
        k=torch.full((cells, groups, size, page), 50.0),
        v=torch.full((cells, groups, page, size), 1e6),
    )
    tables = torch.zeros(len(runs), max(num_pages), dtype=torch.int32)
    context_lens, at = [], 0
    for number, ((before, num_tokens), e) in enumerate(zip(runs, entries, strict=True)):
        own = pages[at : at + num_pages[number]].int() * height
        at += num_pages[number]
        tables[number, : len(own)] = own
        seen = [before + (2 if gaps else 1) * (i + 1) for i in range(num_tokens)]
        context_lens += seen
        for entry in range(seen[-1]):
            for layer in range(height):
                cell = int(own[entry // page]) + layer
                kv.k[cell, :, :, entry % page] = torch.randn(groups, size, generator=source)
                kv.v[cell, :, entry % page] = torch.randn(groups, size, generator=source)
        assert seen[-1] <= e
    bounds = torch.tensor([0, *(num_tokens for _, num_tokens in runs)]).cumsum(0)
    none = torch.zeros(0, dtype=torch.int32)
    metadata = AttentionMetadata(
        positions=torch.tensor(context_lens, dtype=torch.int32) - 1,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        query_start_loc=bounds.int(),
        page_tables=tables,
        slot_cells=none,
        slot_offsets=none,
    )
    return kv, metadata


CASES: dict[str, list[Run]] = {
    "one token": [(0, 1)],
    "decode": [(5, 1), (0, 1), (31, 1), (15, 1), (16, 1), (130, 1)],
    "prefill": [(0, 20), (40, 33), (3, 70)],
    "mixed": [(0, 1), (100, 7), (17, 1), (0, 40), (250, 1)],
    "long": [(1500, 1), (700, 3)],
}


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("groups", "per_group"), [(1, 1), (2, 3), (1, 4), (3, 2)])
@pytest.mark.parametrize("case", CASES)
def test_attend(case: str, groups: int, per_group: int, num_threads: int) -> None:
    size, page = (32, 16) if per_group % 2 else (16, 32)
    kv, metadata = paged(CASES[case], groups=groups, size=size, page=page, gaps=per_group == 2)
    num = len(metadata.context_lens)
    q = drawn(num, num, groups * per_group, size) * (6 if per_group == 3 else 1)  # sharp, too
    exact = PagedKV(k=kv.k.double(), v=kv.v.double())
    for layer in (0, 1):
        out = torch.full((num, q[0].numel()), 7.0)
        cpu.attend(
            threads(num_threads),
            q.flatten(1).numpy(),
            KVCells.of(kv),
            layer,
            AttentionBatch.of(metadata),
            out.numpy(),
        )
        want = reference.attend(q.double(), exact, layer, metadata).flatten(1)
        assert (out - want).abs().max() < (2e-5 if per_group == 3 else 3e-6)


def test_attend_follows_the_definition() -> None:
    """The reference itself, one token at a time."""
    kv, metadata = paged(CASES["mixed"], groups=2, size=16, page=16)
    q = drawn(0, len(metadata.context_lens), 4, 16).double()
    exact = PagedKV(k=kv.k.double(), v=kv.v.double())
    got = reference.attend(q, exact, 1, metadata)
    bounds = metadata.query_start_loc.tolist()
    for run, first in enumerate(bounds[:-1]):
        for token in range(first, bounds[run + 1]):
            places = [divmod(entry, 16) for entry in range(int(metadata.context_lens[token]))]
            cells = [(int(metadata.page_tables[run, page]) + 1, slot) for page, slot in places]
            for head in range(4):
                k = torch.stack([exact.k[cell, head // 2, :, slot] for cell, slot in cells])
                v = torch.stack([exact.v[cell, head // 2, slot] for cell, slot in cells])
                weights = (k @ q[token, head] / 4).softmax(0)
                assert torch.allclose(got[token, head], weights @ v, atol=1e-12)


@pytest.mark.parametrize(("writing", "groups", "heads"), [(9, 2, 4), (4, 1, 4), (0, 3, 3)])
def test_rotate_and_store(writing: int, groups: int, heads: int) -> None:
    num, size, page, layer = 9, 16, 16, 1
    source = torch.Generator().manual_seed(writing)
    angles = drawn(5, 50, size // 2)
    rotations = RopeTable(cos=angles.cos(), sin=angles.sin())
    places = torch.randperm(5 * page, generator=source)[:writing]
    positions = torch.randint(0, 50, (num,), generator=source, dtype=torch.int32)
    metadata = AttentionMetadata(
        positions=positions,
        context_lens=positions + 1,
        query_start_loc=torch.tensor([0, num], dtype=torch.int32),
        page_tables=torch.zeros(1, 1, dtype=torch.int32),
        slot_cells=(places // page * 2).int(),
        slot_offsets=(places % page).int(),
    )
    kv = PagedKV(k=drawn(1, 10, groups, size, page), v=drawn(2, 10, groups, page, size))
    exact = PagedKV(k=kv.k.double(), v=kv.v.double())
    q, both = drawn(3, num, heads * size), drawn(4, num, 2 * groups * size)
    want_q = reference.rotate(q.view(num, heads, size).double(), rotations, metadata)
    new = both[:writing].view(writing, 2, groups, size).double()
    k = reference.rotate(new[:, 0], rotations, metadata)
    reference.store(k, new[:, 1], exact, layer, metadata)
    cpu.rotate_and_store(
        threads(2),
        QKV(q=q.numpy(), kv=both[:writing].numpy()),
        KVCells.of(kv),
        layer,
        AttentionBatch.of(metadata),
        CosSin.of(rotations),
    )
    assert torch.allclose(q.double(), want_q.flatten(1), rtol=0, atol=1e-6)
    assert torch.allclose(kv.k.double(), exact.k, rtol=0, atol=1e-6)
    assert torch.equal(kv.v.double(), exact.v)
    changed = (kv.k != drawn(1, 10, groups, size, page)).any(2).sum()
    assert changed <= writing * groups  # and nothing else


def test_rotation_turns_pairs_of_halves() -> None:
    """RoPE as Llama has it: (x1, x2) turned by the angle of its position."""
    rotations = RopeTable(cos=torch.tensor([[0.6]]), sin=torch.tensor([[0.8]]))
    metadata = AttentionMetadata(
        positions=torch.zeros(1, dtype=torch.int32),
        context_lens=torch.ones(1, dtype=torch.int32),
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        page_tables=torch.zeros(1, 1, dtype=torch.int32),
        slot_cells=torch.zeros(0, dtype=torch.int32),
        slot_offsets=torch.zeros(0, dtype=torch.int32),
    )
    turned = reference.rotate(torch.tensor([[[1.0, 2.0]]]), rotations, metadata)
    assert torch.allclose(turned, torch.tensor([[[0.6 - 1.6, 1.2 + 0.8]]]))
    assert math.isclose(float(F.normalize(turned, dim=-1).norm()), 1, rel_tol=1e-6)


# -- another processor ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")
@pytest.mark.skipif(not has_wide_registers(), reason="this processor is the narrow one")
def test_narrow_registers_do_the_same() -> None:
    """Everything above for a processor without AVX-512: other register blocks, other int8 code."""
    arguments = ["-q", "-m", "not slow", "-n", "0", __file__]
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64-v3"}
    run = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
