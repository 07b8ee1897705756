"""Tensor cores: fragments as the PTX ISA defines them, products on an emulation of it, and what CUDA's compiler makes.

The emulation (OpenCL text of `gpu/source.py`) finds the element that a sum needs; the tables here say where an element
is. They are written from either end, so that a mistake in one shows.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from devices.profile import Gpu
from edgeseq.compiler.gpu import halves
from edgeseq.compiler.gpu._mma import tiling
from edgeseq.compiler.gpu.halves import Halves
from edgeseq.compiler.gpu.linear_mma import LinearMma
from edgeseq.compiler.gpu.merge import merge
from edgeseq.compiler.gpu.source import preamble
from edgeseq.compiler.ir import Arg, Call, GenericRef, KernelRef, Storage, Value
from edgeseq.compiler.kernels.linear import Linear
from edgeseq.compiler.kernels.linear_q import LinearQ
from edgeseq.compiler.pack import pack
from edgeseq.compiler.targets import Target, resolve

from .library import DeviceLibrary, ref, refs, unset
from .ptx import loops, made_for, needs_nvcc, nvcc, stack_of
from .test_kernels import Draw, close
from .test_quantised import test_product as quantised_product

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
KINDS = {"f16": ("float16", 16, 2), "bf16": ("bfloat16", 16, 2), "s8": ("int8", 32, 4)}
LANES = np.arange(32)


def emulated(**facts: Any) -> Target:
    """OpenCL with what tensor cores do computed step by step."""
    target = resolve("opencl")
    assert target.gpu is not None
    return replace(target, gpu=replace(target.gpu, mma=True, **facts))


def place(operand: str, i: int, each: int) -> tuple[NDArray, NDArray]:
    """Row and column of every lane's element i, `each` of them to a word: PTX ISA, "Matrix fragments for mma.m16n8k16
    with floating point type" and "for mma.m16n8k32"."""
    group, thread = LANES >> 2, LANES % 4
    if operand == "c":
        return group + (8 if i >= 2 else 0), thread * 2 + (i & 1)
    k = thread * each + i % each
    if operand == "a":
        upper = i % (2 * each) >= each  # a0 a1, then 8 rows below, of the 16-bit types; a0..a3, then below, of bytes
        return group + (8 if upper else 0), k + (4 * each if i >= 2 * each else 0)
    return k + (4 * each if i >= each else 0), group


def fragment(matrix: NDArray, operand: str, words: int, each: int) -> NDArray:
    """uint32 [32, words]: the registers of every lane."""
    elements = np.stack([matrix[place(operand, i, each)] for i in range(words * each)], axis=1)
    return np.ascontiguousarray(elements).view(np.uint32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_emulation_multiplies_fragments_of_the_ptx_isa(kind: str) -> None:
    cl = pytest.importorskip("pyopencl")
    dtype, K, each = KINDS[kind]
    library = DeviceLibrary([], emulated())
    number = "int" if kind == "s8" else "float"
    text = (
        preamble(Gpu("opencl", mma=True))
        + f"""
    __attribute__((reqd_work_group_size(64, 1, 1)))
    __kernel void multiply(__global const uint* a, __global const uint* b, __global {number}* c)
    {{
        __local uint es_fragments[64 * 6];
        uint i = get_local_id(0);
        {number} d[4];
        for (uint j = 0; j < 4; j++) d[j] = c[4 * i + j];
        es_mma_{kind}(&d[0], a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], b[2 * i], b[2 * i + 1]);
        for (uint j = 0; j < 4; j++) c[4 * i + j] = d[j];
    }}
    """
    )
    kernel = cl.Kernel(cl.Program(library.context, text).build(), "multiply")
    rng = np.random.default_rng(0)
    registers, wants = [], []
    for _ in range(2):  # warps
        draw = lambda *s: rng.integers(-128, 128, s).astype(np.int8)  # noqa: E731
        if kind != "s8":
            draw = lambda *s: rng.standard_normal(s).astype(DTYPES[dtype])  # noqa: E731
        a, b = draw(16, K), draw(K, 8)
        c = rng.integers(-9, 9, (16, 8)).astype(np.int32 if kind == "s8" else np.float32)
        parts = np.stack([c[place("c", i, 1)] for i in range(4)], axis=1)
        registers.append((fragment(a, "a", 4, each), fragment(b, "b", 2, each), parts))
        wide = np.int64 if kind == "s8" else np.float64
        wants.append(c + a.astype(wide) @ b.astype(wide))
    a, b, c = (np.ascontiguousarray(np.concatenate(parts)) for parts in zip(*registers, strict=True))
    flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
    buffers = [cl.Buffer(library.context, flags, hostbuf=x) for x in (a, b, c)]
    kernel(library.queue, (64,), (64,), *buffers)
    cl.enqueue_copy(library.queue, c, buffers[2])
    for warp, want in enumerate(wants):
        got = np.zeros_like(want)
        for i in range(4):
            got[place("c", i, 1)] = c[32 * warp : 32 * warp + 32, i]
        np.testing.assert_allclose(got, want, rtol=0 if kind == "s8" else 1e-5, atol=0 if kind == "s8" else 1e-5)


SMALL = [
    LinearMma(9, 35, 97, 97, "float16", bias=True, residual=True, ldr=40, act="silu"),
    LinearMma(5, 17, 33, 33, "bfloat16"),
]
PRODUCTS = [
    *SMALL,
    LinearMma(2, 1, 1, 1, "float16", bias=True),
    LinearMma(16, 130, 64, 64, "float16"),
    LinearMma(16, 48, 300, 300, "bfloat16", residual=True, ldr=48),
    LinearMma(70, 20, 40, 40, "float16"),  # 9 octets in two blocks of 5
]
QUANTISED = [
    LinearQ(t, m, k, bits, "dp4a", bias, bias, m + 3 if bias else 0, "silu" if bias else "none")
    for bits in (4, 8)
    for t, m, k, bias in ((9, 35, 97, True), (16, 64, 300, False), (70, 20, 40, False))
]
ON = [pytest.param({}, id="two splits of k"), pytest.param({"sm": (90,)}, id="eight splits")]


def source_of(p: LinearMma, gap: int = 3) -> Halves:
    return Halves(p.T, p.K, p.K + gap, p.wdtype)


def library_of(products: list[Any], **facts: Any) -> DeviceLibrary:
    return DeviceLibrary(
        refs([*products, *(source_of(p) for p in products if isinstance(p, LinearMma))]), emulated(**facts)
    )


def halved(library: DeviceLibrary, h: Halves, x: NDArray) -> list[NDArray]:
    """h as uint32, scale."""
    shapes = halves.sizes(h.T, h.K, h.wdtype)
    words = np.full(4 * shapes["h"][1], 0x7FC17FC1, np.uint32)
    return library.call(ref(h), [x, words, unset(shapes["scale"][1])], "rww")


def check(library: DeviceLibrary, p: LinearMma) -> None:
    d, h = Draw(3), source_of(p)
    x, x64 = d.rows(p.T, h.ldx, p.K)
    w = d.normal(p.M, p.K).astype(DTYPES[p.wdtype])
    want, optional = x64[0] @ w.astype(np.float64).T, []
    if p.bias:
        optional.append(d.normal(p.M))
        want = want + optional[-1]
    want = want / (1 + np.exp(-want)) if p.act == "silu" else want
    if p.residual:
        residual, r64 = d.rows(p.T, p.ldr, p.M)
        optional.append(residual)
        want = want + r64[0]
    arrays = [*halved(library, h, x), pack("rows16", w).view(np.uint16), *optional, unset(p.T, p.M)]
    (y,) = library.call(ref(p), arrays, "r" * (len(arrays) - 1) + "w")
    close(y, want)


def test_small_products_equal_their_definition() -> None:
    quantised = next(p for p in QUANTISED if p.bits == 4)
    library = library_of([*SMALL, quantised], sm=(90,))
    for p in SMALL:
        check(library, p)
    quantised_product.hypothesis.inner_test(library, quantised, seed=0)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("facts", ON)
def test_products_equal_their_definition(facts: dict[str, Any]) -> None:
    library = library_of([*PRODUCTS, *QUANTISED], **facts)
    for p in PRODUCTS:
        check(library, p)
    for q in QUANTISED:
        quantised_product.hypothesis.inner_test(library, q, seed=1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("wdtype", DTYPES)
def test_halves_keep_the_digits_whatever_the_size(wdtype: str) -> None:
    """Tokens far beyond the range of half precision either way, zeros, and sizes that differ within a token."""
    h = Halves(10, 75, 80, wdtype)
    library = DeviceLibrary(refs([h]), emulated())
    factors = np.array([1, 1e30, 1e-30, 0, 65504 * 40, 2.0**-20, 1, 1e38, 1e-38, 3], np.float32)
    rows = (0.3 * Draw(5).normal(h.T, h.ldx) * factors[:, None]).astype(np.float32)
    rows[6, 10] = 1e4
    x = rows.reshape(-1)[: (h.T - 1) * h.ldx + h.K].copy()
    rows = rows[:, : h.K]
    words, scale = halved(library, h, x)
    parts, steps, octets = halves.PARTS[wdtype], -(-h.K // 32), -(-h.T // 8)
    own = words.reshape(octets, steps, parts, 32, 4).view(DTYPES[wdtype]).reshape(octets, steps, parts, 8, 4, 2, 2, 2)
    # octet, step, part, token, i, s, r, which of two -> token, k = 32 step + 16 s + 8 r + 4 which + i
    numbers = own.astype(np.float64).sum(2).transpose(0, 2, 1, 4, 5, 6, 3).reshape(octets * 8, steps * 32)
    numbers = numbers * scale.reshape(-1, 1).astype(np.float64)
    assert not numbers[h.T :].any() and not numbers[:, h.K :].any()
    largest = np.abs(rows).max(1, keepdims=True).astype(np.float64)
    error = np.abs(numbers[: h.T, : h.K] - rows)
    if wdtype == "bfloat16":
        normal = np.abs(rows) > 1e-30
        assert not error[normal].any() and error.max() < 1e-38
        return
    assert (error <= np.maximum(np.abs(rows) * 2.0**-22, largest * 2.0**-38)).all()


def _product(x: Storage, y: str, p: Linear) -> Call:
    w = Value("w", p.wdtype, (p.M, p.K), Storage("weight", "w", 2 * p.M * p.K))
    value = Value(x.name, "float32", (p.T, p.K), x)
    out = Value(y, "float32", (p.T, p.M), Storage("arena", y, 4 * p.T * p.M))
    return Call(KernelRef("linear", p), (Arg(value, "r"), Arg(w, "r"), Arg(out, "w")))


def test_the_compiler_gives_products_of_16_bit_weights_to_tensor_cores() -> None:
    gpu = resolve("cuda-sm87").gpu
    assert gpu is not None and gpu.mma
    x = Storage("arena", "x", 4 * 8 * 32)
    p = Linear(8, 48, 32, 32, "float16")
    single = replace(p, wdtype="float32")
    rewrite = Call(GenericRef("", "", None, 1), (Arg(Value("x", "float32", (8, 32), x), "w"),))
    calls = [_product(x, "a", p), _product(x, "b", p), _product(x, "c", single), rewrite, _product(x, "d", p)]
    merge(calls, gpu)
    ops = [getattr(c.kernel, "op", "other") for c in calls]
    assert ops == ["halves", "linear_mma", "linear_mma", "linear", "other", "halves", "linear_mma"]
    halves_of = [c.args[0].value.storage for c, op in zip(calls, ops, strict=True) if op == "linear_mma"]
    assert halves_of[0] is halves_of[1] is not halves_of[2], "what was overwritten is halved again"
    calls = [_product(x, "a", p)]
    merge(calls, replace(gpu, mma=False))
    assert [c.kernel.op for c in calls] == ["linear"]


def test_there_are_blocks_for_every_multiprocessor_where_rows_are_few() -> None:
    assert [tiling(m, 64, 24, Gpu("cuda", sm=(90,))).rows for m in (768, 10240, 32768)] == [1, 2, 4]
    assert [tiling(m, 64, 24, Gpu("cuda", sm=(87, 90))).rows for m in (768, 3072)] == [1, 4]


FULL_SIZE = [
    *(LinearMma(t, m, k, k, d, residual=True, ldr=m)
      for d in DTYPES for t, m, k in ((64, 5120, 2560), (64, 3072, 768), (8, 5120, 2560), (512, 5120, 2560))),
    *(LinearQ(t, m, k, bits, "dp4a", residual=True, ldr=m)
      for bits in (4, 8) for t, m, k in ((64, 5120, 2560), (64, 3072, 768), (8, 5120, 2560))),
]  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize(
    ("p", "shape", "loads"),
    [
        (LinearMma(64, 5120, 2560, 2560, "float16"), "m16n8k16.row.col.f32.f16.f16.f32", {"v4.u32": 16, "u32": 16}),
        (LinearMma(64, 5120, 2560, 2560, "bfloat16"), "m16n8k16.row.col.f32.bf16.bf16.f32", {"v4.u32": 24, "u32": 16}),
        (LinearQ(64, 5120, 2560, 4, "dp4a"), "m16n8k32.row.col.s32.s8.s8.s32", {"v2.u32": 2, "u32": 34, "f32": 16}),
        (LinearQ(64, 5120, 2560, 8, "dp4a"), "m16n8k32.row.col.s32.s8.s8.s32", {"v2.u32": 4, "u32": 18, "f32": 16}),
    ],
    ids=["f16", "bf16", "int4", "int8"],
)
def test_the_loop_is_loads_and_mma_alone(p: Any, shape: str, loads: dict[str, int], tmp_path: Path) -> None:
    """Of 32 rows x 64 tokens: each weight once, no shared memory, no barrier."""
    (loop,) = loops("cuda-sm87", (ref(p).op, p), tmp_path)
    multiplied = 2 * halves.PARTS[p.wdtype] if isinstance(p, LinearMma) else 1
    assert loop.count(f"mma.sync.aligned.{shape}") == 2 * 8 * multiplied
    assert "shared" not in loop and "bar.sync" not in loop and ".local" not in loop
    assert dict(Counter(re.findall(r"ld\.global\.(\S+)", loop))) == loads


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("sm", [87, 90, 100])
def test_accumulators_and_fragments_stay_in_registers(sm: int, tmp_path: Path) -> None:
    source, names = made_for(f"cuda-sm{sm}", [(ref(p).op, p) for p in FULL_SIZE])
    found = stack_of(nvcc(source, tmp_path, "-cubin", f"-arch=sm_{sm}", "-Xptxas", "-v"))
    assert {name: found[name] for name in names if found[name] != (0, 0)} == {}
