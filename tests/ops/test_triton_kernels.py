"""The Triton kernels against `mor.ops.reference`.

On a GPU they run compiled. Elsewhere Triton's interpreter runs them; it has to be chosen before
anything imports triton, so `test_in_the_interpreter` runs this file again in its own process.
What the interpreter lets pass, Triton's compiler may refuse: it needs no GPU, so it is tried, too.
"""

import importlib.util
import os
import random
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_batches
from torch import Tensor
from triton_batches import Batch, ints, make

from mor.errors import MissingExtraError
from mor.ops import reference
from mor.ops.paged import PagedKV

LOADED_EARLY = "triton" in sys.modules
kernels = importlib.import_module("mor.ops.triton")
FOUND = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not FOUND, reason="triton is not installed")
in_this_process = pytest.mark.skipif(INTERPRETED, reason="not for the interpreter")
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU here")
runs_kernels = pytest.mark.skipif(
    not FOUND or not (INTERPRETED or torch.cuda.is_available()),
    reason="no GPU here: test_in_the_interpreter runs it" if FOUND else "triton is not installed",
)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_near(ours: Tensor, truth: Tensor) -> None:
    assert ours.dtype == truth.dtype
    torch.testing.assert_close(ours, truth, rtol=TOLERANCE[ours.dtype], atol=TOLERANCE[ours.dtype])


def check_attend(batch: Batch, layer: int = 1, **options: int | None) -> None:
    ours = kernels.attend(batch.q, batch.kv, layer, batch.metadata, **options)
    assert_near(ours, reference.attend(batch.q, batch.kv, layer, batch.metadata))


def copied(kv: PagedKV) -> PagedKV:
    return PagedKV(k=kv.k.clone(), v=kv.v.clone())


def assert_same_cells(ours: PagedKV, truth: PagedKV) -> None:
    assert_near(ours.k, truth.k)  # rotated, maybe
    assert torch.equal(ours.v, truth.v)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend what is wrong and what is slow in the interpreter of Triton 3.7."""
    if not (FOUND and INTERPRETED):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    multiply, patched = interpreter.InterpreterBuilder.create_dot, set()

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:  # it would take the bits for integers
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return multiply(self, a, b, *rest)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.fn.__module__ not in patched:  # at every call it would patch the language again
            interpreter._patch_lang(self.fn)
        patched.add(self.fn.__module__)
        return self.rewrite()(*arguments, **named)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@needs_triton
@in_this_process
def test_in_the_interpreter(pytestconfig: pytest.Config) -> None:
    checked = pytestconfig.getoption("--jaxtyping-packages")
    hook = [f"--jaxtyping-packages={checked}"] if checked else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *hook, __file__]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        command, cwd=pytestconfig.rootpath, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 50, done.stdout


@pytest.mark.skipif(not INTERPRETED, reason="other tests may have imported triton")
def test_triton_is_imported_by_its_own_module_only() -> None:
    assert not LOADED_EARLY


@runs_kernels
@pytest.mark.parametrize("kind", ["decode", "prefill", "mixed"])
@pytest.mark.parametrize("seed", range(3))
def test_attention_of_ragged_batches(kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    shares = {"decode": 1.0, "prefill": 0.0, "mixed": 0.5}
    counts = [
        1 if rng.random() < shares[kind] else rng.randint(2, 6) for _ in range(rng.randint(1, 3))
    ]
    batch = make(
        [(count, count + rng.choice([0, 3, 20, 60])) for count in counts],
        seed=seed,
        heads=rng.choice([(2, 2), (6, 2), (4, 1), (5, 1)]),
        dim=rng.choice([16, 32]),
        size=rng.choice([8, 16, 32]),
        spare=rng.randint(0, 30),  # wide tables: several programs for a tile
    )
    check_attend(batch, layer=seed, max_query_len=(None, max(counts), 1)[seed])


@runs_kernels
@pytest.mark.parametrize(("max_query_len", "splits"), [(1, 1), (1, 4), (20, 2), (20, 8)])
def test_any_number_of_splits_gives_the_same(max_query_len: int, splits: int) -> None:
    check_attend(
        make([(1, 130), (2, 65)], heads=(3, 1)), splits=splits, max_query_len=max_query_len
    )


@runs_kernels
@pytest.mark.parametrize(("dim", "size"), [(24, 8), (16, 12), (8, 5), (64, 128)])
def test_head_and_page_sizes_off_the_grid(dim: int, size: int) -> None:
    check_attend(make([(1, 50), (3, 17)], dim=dim, size=size, heads=(3, 1)))


@runs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cache", TOLERANCE)
def test_types_of_queries_and_cells(dtype: torch.dtype, cache: torch.dtype) -> None:
    check_attend(make([(2, 20), (1, 9)], heads=(3, 1), dtype=dtype, cache=cache))


@runs_kernels
@pytest.mark.parametrize(("max_query_len", "splits"), [(None, 1), (1, 1), (1, 2), (4, 2)])
def test_empty_runs_and_padding(max_query_len: int | None, splits: int) -> None:
    batch = make([(1, 9), (4, 30), (1, 12)], heads=(3, 1))
    truth = reference.attend(batch.q, batch.kv, 0, batch.metadata)
    none, (a, b, c) = (
        torch.full_like(batch.metadata.page_tables[:1], -1),
        batch.metadata.page_tables.split(1),
    )
    metadata = replace(
        batch.metadata,
        positions=ints([0] * 9),
        context_lens=torch.cat((batch.metadata.context_lens, ints([0, 0, 0]))),
        query_start_loc=ints(
            [0, 0, 1, 5, 5, 6, 7, 7, 7]
        ),  # and the last two tokens belong to no run
        page_tables=torch.cat((none, a, b, none, c, none, none, none)),
    )
    q = torch.cat((batch.q, torch.ones_like(batch.q[:3])))
    ours = kernels.attend(q, batch.kv, 0, metadata, max_query_len=max_query_len, splits=splits)
    assert_near(ours[:6], truth)
    assert torch.equal(ours[6:], torch.zeros_like(ours[6:]))


@runs_kernels
def test_nothing_to_attend_to() -> None:
    batch = make([(1, 3)])
    no_runs = replace(
        batch.metadata, query_start_loc=ints([0]), page_tables=batch.metadata.page_tables[:0]
    )
    assert kernels.attend(batch.q, batch.kv, 0, no_runs).eq(0).all()
    no_tokens = replace(
        batch.metadata, positions=ints([]), context_lens=ints([]), query_start_loc=ints([0, 0])
    )
    assert kernels.attend(batch.q[:0], batch.kv, 0, no_tokens).shape == (0, 6, 16)


@runs_kernels
def test_what_no_token_sees_does_not_matter() -> None:
    batch = make([(1, 13), (2, 20)])
    truth = reference.attend(batch.q, batch.kv, 1, batch.metadata)
    k, v = (torch.full_like(x, float("nan")) for x in (batch.kv.k, batch.kv.v))
    for table, reach in zip(batch.metadata.page_tables.tolist(), (13, 20), strict=True):
        for entry in range(reach):
            cell, slot = table[entry // 8] + 1, entry % 8
            k[cell, :, :, slot] = batch.kv.k[cell, :, :, slot]
            v[cell, :, slot] = batch.kv.v[cell, :, slot]
    assert_near(kernels.attend(batch.q, PagedKV(k=k, v=v), 1, batch.metadata), truth)


@runs_kernels
def test_decode_has_the_same_bits_in_any_company() -> None:
    batch = make([(1, 100), (1, 33), (1, 7)], heads=(3, 1))
    together = kernels.attend(batch.q, batch.kv, 0, batch.metadata, max_query_len=1, splits=2)
    seen, tables = (x.split(1) for x in (batch.metadata.context_lens, batch.metadata.page_tables))
    for token, q in enumerate(batch.q.split(1)):
        own = {"context_lens": seen[token], "page_tables": tables[token]}
        alone = replace(batch.metadata, positions=ints([0]), query_start_loc=ints([0, 1]), **own)
        ours = kernels.attend(q, batch.kv, 0, alone, max_query_len=1, splits=2)
        assert torch.equal(ours[0], together[token])


@runs_kernels
@pytest.mark.parametrize("writing", [0, 4, None])
@pytest.mark.parametrize(("dim", "dtype"), [(16, torch.float32), (24, torch.bfloat16)])
def test_rotate_and_store(writing: int | None, dim: int, dtype: torch.dtype) -> None:
    batch = make([(1, 9), (3, 30), (1, 12)], writing=writing, dim=dim, dtype=dtype)
    metadata, turn, mine, fused, truth = (
        batch.metadata,
        batch.rotations,
        *map(copied, [batch.kv] * 3),
    )
    q, k = (reference.rotate(x, turn, metadata) for x in (batch.q, batch.k))
    assert_near(kernels.rotate(batch.q, turn, metadata), q)
    assert_near(kernels.rotate(batch.k, turn, metadata), k)
    reference.store(k, batch.v, truth, 2, metadata)
    kernels.store(k, batch.v, mine, 2, metadata)
    assert_same_cells(mine, truth)
    assert_near(kernels.rotate_and_store(batch.q, batch.k, batch.v, turn, fused, 2, metadata), q)
    assert_same_cells(fused, truth)


@runs_kernels
def test_a_token_without_a_cell_stores_nothing() -> None:
    batch = make([(1, 9), (2, 30)])
    metadata = replace(batch.metadata, slot_cells=batch.metadata.slot_cells.clone())
    metadata.slot_cells[1:] = -1
    first = replace(
        metadata, slot_cells=metadata.slot_cells[:1], slot_offsets=metadata.slot_offsets[:1]
    )
    mine, truth, turn = copied(batch.kv), copied(batch.kv), batch.rotations
    reference.store(batch.k[:1], batch.v[:1], truth, 2, first)
    kernels.store(batch.k, batch.v, mine, 2, metadata)
    assert_same_cells(mine, truth)
    reference.store(reference.rotate(batch.k[:1], turn, metadata), batch.v[:1], truth, 2, first)
    kernels.rotate_and_store(batch.q, batch.k, batch.v, turn, mine, 2, metadata)
    assert_same_cells(mine, truth)


@runs_kernels
def test_parts_of_one_projection_need_no_copy() -> None:
    batch = make([(1, 9), (2, 30)])
    q, k, v = torch.cat((batch.q, batch.k, batch.v), dim=1).split((6, 2, 2), dim=1)
    mine, truth = copied(batch.kv), copied(batch.kv)
    turned = kernels.rotate_and_store(q, k, v, batch.rotations, mine, 0, batch.metadata)
    assert_near(turned, reference.rotate(q, batch.rotations, batch.metadata))
    reference.store(
        reference.rotate(k, batch.rotations, batch.metadata), v, truth, 0, batch.metadata
    )
    assert_same_cells(mine, truth)
    check_attend(replace(batch, q=q))


@runs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 48, 1100])
def test_row_operations(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(3, 2 * width + 1, generator=generator).to(triton_batches.DEVICE, dtype)
    weight = torch.rand(width, generator=generator).to(triton_batches.DEVICE)
    x, gate_up = wide[:, :width], wide[:, 1:]
    assert_near(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert_near(kernels.silu_mul(gate_up), reference.silu_mul(gate_up))
    assert kernels.rms_norm(x[:0], weight, 1e-5).shape == (0, width)


@pytest.mark.parametrize(("max_query_len", "tiles"), [(None, 14), (1, 20), (100, 10)])
def test_launches_depend_on_shapes_only(
    max_query_len: int | None, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(kernels, "launch", lambda _, grid, *rest, **options: grids.append(grid))
    monkeypatch.setattr(triton_batches, "DEVICE", "cpu")
    batch = make([(2, 8)] * 10, spare=20)

    def unreadable(part: Any) -> Any:
        tensors = {n: x for n, x in vars(part).items() if isinstance(x, Tensor)}
        return replace(part, **{name: x.to("meta") for name, x in tensors.items()})

    kv, metadata, turn = map(unreadable, (batch.kv, batch.metadata, batch.rotations))
    q, k, v = (x.to("meta", torch.bfloat16) for x in (batch.q, batch.k, batch.v))
    kernels.rotate_and_store(q, k, v, turn, kv, 0, metadata)
    kernels.attend(q, kv, 0, metadata, max_query_len=max_query_len, splits=4)
    assert grids == [(20,), (tiles, 2, 4), (20, 6)]


@on_gpu
def test_a_captured_graph_follows_its_inputs() -> None:
    batch, graph = make([(1, 300), (1, 9)]), torch.cuda.CUDAGraph()
    kernels.attend(batch.q, batch.kv, 1, batch.metadata, max_query_len=1)  # compiles
    with torch.cuda.graph(graph):
        ours = kernels.attend(batch.q, batch.kv, 1, batch.metadata, max_query_len=1)
    batch.q.neg_()
    batch.metadata.context_lens.copy_(ints([17, 5]))
    graph.replay()
    assert_near(ours, reference.attend(batch.q, batch.kv, 1, batch.metadata))


def compiler(arch: int, launched: list[str]) -> Any:
    """A driver for Triton that has a target, yet no device: kernels are compiled and not run."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # kernels are kept by device; a real one stays untouched
        get_current_stream=lambda device: 0,
        launcher_cls=lambda source, metadata: lambda *rest: launched.append(metadata.name),
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 99 * 1024},  # sm_86 has least
            load_binary=lambda *rest: (None, None, 0, 0, 1024),
        ),
    )


@needs_triton
@in_this_process
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_without_a_gpu(
    arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton.runtime import driver

    launched: list[str] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", compiler(arch, launched))
    monkeypatch.setattr(triton_batches, "DEVICE", "cpu")
    batch = make([(1, 300), (40, 90)], heads=(15, 5), dim=64, size=16, dtype=torch.bfloat16)
    q, k, v, kv, metadata, turn = vars(batch).values()
    kernels.rotate(q, turn, metadata)
    kernels.store(k, v, kv, 1, metadata)
    kernels.rotate_and_store(q, k, v, turn, kv, 1, metadata)
    kernels.attend(q, kv, 1, metadata, max_query_len=1, splits=4)
    kernels.attend(q, kv, 2, metadata, max_query_len=40, splits=1)
    kernels.rms_norm(q[:, 0], q[0, 0], 1e-5)
    kernels.silu_mul(q[:, 0])
    assert len(launched) == 8
    for kernel in kernels._attend.device_caches[arch][0].values():  # cells are read in wide pieces
        assert "0x10" in kernel.asm["ptx"]
        assert not re.search(r"ld\.global[.\w]*\.b16", kernel.asm["ptx"])


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mor.ops.triton_launch")
    module = runpy.run_path(str(kernels.__file__))
    with pytest.raises(MissingExtraError, match=r"triton is not installed.*\[gpu\]"):
        module["silu_mul"](torch.zeros(1, 2))
