"""Helpers for writing CPU kernels in TIR: a kernel is a C function of raw pointers and one block index.

The vector width is 16 floats everywhere: LLVM splits it into two AVX2 or four NEON registers, so that one packed
layout and one kernel text serve every CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..tvm_api import IRBuilder, PrimFunc, T, tvm

LANES = 16
_FLOAT = tvm.DataType("float32").type_code
Expr = Any
Buffer = Any


class Kernel:
    """The function under construction: its buffers by name, its block index, and in the end its PrimFunc."""

    def __init__(self) -> None:
        self.buffers: dict[str, Buffer] = {}
        self.block: Expr = None
        self.func: PrimFunc | None = None

    def __getitem__(self, name: str) -> Buffer:
        return self.buffers[name]


@contextmanager
def kernel(name: str, params: Sequence[tuple[str, str, int]]) -> Iterator[Kernel]:
    """Open a kernel `void name(dtype *param…, int32_t block)`; params are (name, dtype, elements)."""
    k = Kernel()
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            handles = [(n, d, size, T.arg(n, T.handle(d, "global"))) for n, d, size in params]
            k.block = T.arg("block", T.int32())
            for n, d, size, handle in handles:
                k.buffers[n] = T.decl_buffer((size,), d, data=handle)
            align_frame()
            yield k
    k.func = builder.get()


def load(buffer: Buffer, offset: Expr, lanes: int = LANES) -> Expr:
    return buffer[offset] if lanes == 1 else buffer[T.ramp(offset, 1, lanes)]


def store(buffer: Buffer, offset: Expr, value: Expr, lanes: int = LANES) -> None:
    T.buffer_store(buffer, value, [offset if lanes == 1 else T.ramp(offset, 1, lanes)])


def splat(value: Expr | float, lanes: int = LANES) -> Expr:
    scalar = T.float32(value) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def let(value: Expr) -> Expr:
    """Evaluate once and name the result. TVM inlines bindings again, so a float goes through a register buffer.

    A number known now, such as the index of a lone last element, needs no name.
    """
    if isinstance(value, int):
        return value
    dtype = tvm.DataType(str(value.ty.dtype))
    if dtype.type_code != _FLOAT:
        return T.Bind(value)
    lanes = int(dtype.lanes)
    register = T.alloc_buffer((lanes,), str(value.ty.dtype).split("x")[0], scope="local")
    store(register, 0, value, lanes)
    return load(register, 0, lanes)


def local(elements: int, dtype: str = "float32") -> Buffer:
    """Scratch of a block; constant indices into it become registers."""
    return T.alloc_buffer((elements,), dtype, scope="local")


def fill(buffer: Buffer, elements: int, value: float = 0.0) -> None:
    for offset, lanes in pieces(elements):
        store(buffer, offset, splat(value, lanes), lanes)


def pieces(elements: int, lanes: int = LANES) -> list[tuple[int, int]]:
    """Cover `elements` by (offset, lanes) pieces: whole vectors, then one narrower tail."""
    whole = [(i, lanes) for i in range(0, elements - lanes + 1, lanes)]
    rest = elements % lanes
    return whole + ([(elements - rest, rest)] if rest else [])


def prefetch(buffer: Buffer, offset: Expr, level: int = 1) -> None:
    """Ask for the cache line of an element ahead of its use, into the first or second level of the caches; a hint, any
    address is allowed."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(buffer[offset]), 0, 4 - level, 1))


def align_frame() -> None:
    """Make LLVM align the stack frame to a vector, and so the vectors that it spills, which would else lie across cache
    lines: it does that for a vector whose address somebody takes, not for those it spills later."""
    prefetch(T.alloc_buffer((1,), f"float32x{LANES}", scope="local"), 0)


def loop(extent: int, body: Callable[[Expr], None]) -> None:
    """A serial loop; a single iteration is emitted straight."""
    if extent == 1:
        body(0)
    elif extent > 1:
        with T.serial(extent) as i:
            body(i)


def horizontal_sum(scratch: Buffer, value: Expr, lanes: int = LANES) -> Expr:
    """Sum of the lanes by halving through `scratch` (LANES floats), which LLVM turns into shuffles."""
    store(scratch, 0, value, lanes)
    while lanes > 1:
        half = lanes // 2
        store(scratch, 0, load(scratch, 0, half) + load(scratch, lanes - half, half), half)
        lanes -= half
    return let(scratch[0])


def split_blocks(block: Expr, elements: int, per_block: int, body: Callable[[Expr, int], None]) -> int:
    """Emit `body(first_element, count)` for a grid over `elements`; the last block may be narrower.

    Returns the grid extent.
    """
    full, rest = divmod(elements, per_block)
    if not rest:
        body(block * per_block, per_block)
    elif not full:
        body(0, rest)
    else:
        with T.If(block < full):
            with T.Then():
                body(block * per_block, per_block)
            with T.Else():
                body(full * per_block, rest)
    return full + (1 if rest else 0)


def silu(x: Expr) -> Expr:
    return x * T.sigmoid(x)


# 2 artanh(s) / s as a polynomial of s^2 <= 1/9, from the highest power; relative error 4e-9
_LOG1P = (0.28178334, 0.27960604, 0.40024909, 0.66666317, 2.0)


def softplus(x: Expr, lanes: int) -> Expr:
    """log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|, the latter as 2 artanh(y / (2 + y)): no case apart, relative
    error 3e-7. From 20 on it is x to the last digit, as in torch."""
    x = let(x)
    y = let(T.exp(T.min(x, splat(0.0, lanes) - x)))
    s = let(y / (y + splat(2.0, lanes)))
    z = let(s * s)
    p = splat(_LOG1P[0], lanes)
    for c in _LOG1P[1:]:
        p = let(p * z + splat(c, lanes))
    return T.max(x, splat(0.0, lanes)) + s * p
