"""Helpers for writing GPU kernels in TIR: raw pointers, one grid axis, one thread axis.

Every thread of a block runs every statement outside `when`, so reductions with their barriers go there only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from ..tvm_api import IRBuilder, PrimFunc, T, tirx

Expr = Any
Buffer = Any


class Kernel:
    """The function under construction. block, thread: indices; threads: of a block; warp: 0 if lockstep is unknown."""

    def __init__(self, threads: int, warp: int) -> None:
        self.buffers: dict[str, Buffer] = {}
        self.threads, self.warp = threads, warp
        self.block: Expr = None
        self.thread: Expr = None
        self.func: PrimFunc | None = None

    def __getitem__(self, name: str) -> Buffer:
        return self.buffers[name]

    def part(self, number: int, args: Iterable[str], start: int) -> Kernel:
        """The kernel as one of several in it sees it: its blocks begin at `start`, its arguments have its number."""
        own = copy(self)
        own.buffers = {a: self.buffers[f"{a}{number}"] for a in args}
        own.block = self.block - start
        return own


def choose(block: Expr, starts: Sequence[int], bodies: Sequence[Callable[[], None]]) -> None:
    """The body that a block belongs to, as they begin at `starts`. No barriers: PoCL 3.1 mistakes them in branches."""
    if len(bodies) == 1:
        bodies[0]()
        return
    with T.If(block < starts[1]):
        with T.Then():
            bodies[0]()
        with T.Else():
            choose(block, starts[1:], bodies[1:])


@contextmanager
def kernel(
    name: str, params: Sequence[tuple[str, str, int]], grid: int, threads: int, gpu: Any, early: bool = False
) -> Iterator[Kernel]:
    """Open a kernel of `grid` blocks of `threads`; params are (name, dtype, elements) in the order of the arguments.

    early: the body calls `await_inputs` itself, after it has asked for weights, which nothing before it writes.
    """
    k = Kernel(threads, gpu.subgroup if gpu.subgroup and threads % gpu.subgroup == 0 else 0)
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True, "calling_conv": 2, "tirx.is_global_func": True})
            handles = [(n, d, size, T.arg(n, T.handle(d, "global"))) for n, d, size in params]
            for n, d, size, handle in handles:
                k.buffers[n] = T.decl_buffer((size,), d, data=handle)
            with T.launch_thread("blockIdx.x", grid) as block, T.launch_thread("threadIdx.x", threads) as thread:
                k.block, k.thread = block, thread
                if not early:
                    await_inputs()
                yield k
    k.func = builder.get()


def await_inputs() -> None:
    """The launch before this one is complete and its writes are seen.

    On GPUs where a launch may begin while the one before it ends (CUDA 9.0), every kernel does this before it reads or
    writes anything but weights; elsewhere it is nothing.
    """
    T.evaluate(T.call_extern("void", "es_await"))


def local(elements: int, dtype: str = "float32") -> Buffer:
    """Registers of one thread; indices must be constants."""
    return T.alloc_buffer((elements,), dtype, scope="local")


def shared(elements: int, dtype: str = "float32") -> Buffer:
    """Memory of one block."""
    return T.alloc_buffer((elements,), dtype, scope="shared")


def store(buffer: Buffer, at: Expr, value: Expr) -> None:
    T.buffer_store(buffer, value, [at])


def let(value: Expr) -> Expr:
    """Evaluate once. TVM inlines bindings again, so the value goes through a register; a number needs none."""
    if isinstance(value, int):
        return value
    register = local(1, str(value.ty.dtype))
    store(register, 0, value)
    return register[0]


def words(buffer: Buffer, at: Expr, register: Buffer, to: int = 0, count: int = 4) -> None:
    """Element `at` of a buffer whose elements are vectors of `count` words, in one access."""
    T.buffer_store(register, buffer[at], [T.ramp(to, 1, count)])


def f32(value: float) -> Expr:
    return T.float32(value)


def zero(buffer: Buffer, elements: int, value: float = 0.0) -> None:
    for i in range(elements):
        store(buffer, i, f32(value))


def sync() -> None:
    """All threads of the block have come here, and see each other's writes to shared memory."""
    T.evaluate(T.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def sync_memory() -> None:
    """`sync`, and their accesses to global memory are in order too: read before, written behind it."""
    T.evaluate(T.call_extern("void", "es_sync_memory"))


@contextmanager
def when(condition: Expr | bool) -> Iterator[None]:
    """Statements of the threads where `condition` holds; no barrier inside. True emits no branch."""
    if condition is True:
        yield
        return
    with T.If(condition), T.Then():
        yield


def loop(extent: int, body: Callable[[Expr], None]) -> None:
    """A serial loop; a single iteration is emitted straight."""
    if extent == 1:
        body(0)
    elif extent > 1:
        with T.serial(extent) as i:
            body(i)


def strided(k: Kernel, count: int, body: Callable[[Expr], None]) -> None:
    """body(i) for i in 0..count-1, shared out over the threads of the block."""
    whole = count // k.threads
    loop(whole, lambda i: body(i * k.threads + k.thread))
    if count % k.threads:
        with when(k.thread < count % k.threads):
            body(whole * k.threads + k.thread)


def elementwise(k: Kernel, grid_threads: int, count: int, body: Callable[[Expr], None]) -> None:
    """body(i) with one thread of the whole grid per element."""
    i = k.block * k.threads + k.thread
    with when(True if count == grid_threads else i < count):
        body(i)


def blocks_of(count: int, threads: int) -> int:
    """Thread blocks that give every one of `count` elements a thread."""
    return -(-count // threads)


def add(a: Expr, b: Expr) -> Expr:
    return a + b


def maximum(a: Expr, b: Expr) -> Expr:
    return T.max(a, b)


def shuffle(value: Expr, mask: int) -> Expr:
    """The float32 of the thread whose number in the warp differs by `mask`; every thread of the block comes here."""
    return T.call_pure_extern("float32", "es_shuffle", value, T.int32(mask))


def reduce_within(k: Kernel, value: Expr, width: int, op: Callable[[Expr, Expr], Expr], scratch: Buffer) -> Expr:
    """`op` over each aligned run of `width` threads (a power of two), known to all of the run.

    scratch: shared, k.threads elements; it may be used again after the next barrier only.
    """
    if k.warp and width <= k.warp:
        v = let(value)
        mask = width // 2
        while mask:
            v = let(op(v, shuffle(v, mask)))
            mask //= 2
        return v
    sync()
    store(scratch, k.thread, value)
    sync()
    half = width // 2
    within = k.thread % width if width < k.threads else k.thread
    while half:
        with when(within < half):
            store(scratch, k.thread, op(scratch[k.thread], scratch[k.thread + half]))
        sync()
        half //= 2
    return let(scratch[k.thread - within if width < k.threads else 0])


def reduce_all(k: Kernel, value: Expr, op: Callable[[Expr, Expr], Expr], scratch: Buffer) -> Expr:
    """`op` over all threads of the block, known to all. scratch: shared, k.threads elements."""
    if not k.warp or k.threads <= k.warp:
        return reduce_within(k, value, k.threads, op, scratch)
    v = reduce_within(k, value, k.warp, op, scratch)
    warps = k.threads // k.warp
    sync()
    with when(k.thread % k.warp == 0):
        store(scratch, k.thread // k.warp, v)
    sync()
    total = scratch[0]
    for w in range(1, warps):
        total = op(total, scratch[w])
    return let(total)


def rows_scratch(k: Kernel, each: int, stride: int) -> Buffer:
    """Shared memory that `reduce_rows` takes: where a warp adds up within itself, what its first threads have found."""
    lanes = k.threads // k.warp * stride if k.warp and stride <= k.warp else k.threads
    return shared(lanes * each)


def reduce_rows(k: Kernel, registers: Buffer, each: int, stride: int, scratch: Buffer) -> Callable[[Expr], Expr]:
    """Sums over the threads whose number has the same rest by `stride` (a power of two), `each` registers a thread.

    Returns total(o): sum number o = rest * each + register, valid for every thread until the next barrier.
    scratch: `rows_scratch`, or shared memory of k.threads * each elements.
    """
    if k.warp and stride <= k.warp:
        mask = k.warp // 2
        while mask >= stride:
            for r in range(each):
                store(registers, r, registers[r] + shuffle(registers[r], mask))
            mask //= 2
        warps, lane = k.threads // k.warp, k.thread % k.warp
        sync()
        with when(lane < stride):
            for r in range(each):
                store(scratch, (k.thread // k.warp * stride + lane) * each + r, registers[r])
        sync()

        def across(o: Expr) -> Expr:
            total = scratch[o]
            for w in range(1, warps):
                total = total + scratch[w * stride * each + o]
            return total

        return across
    sync()
    for r in range(each):
        store(scratch, k.thread * each + r, registers[r])
    sync()
    half = k.threads // 2
    while half >= stride:
        with when(k.thread < half):
            for r in range(each):
                at = k.thread * each + r
                store(scratch, at, scratch[at] + scratch[at + half * each])
        sync()
        half //= 2
    return lambda o: scratch[o]


def sigmoid(x: Expr) -> Expr:
    return f32(1.0) / (f32(1.0) + T.exp(f32(0.0) - x))


def silu(x: Expr) -> Expr:
    return x * sigmoid(x)


def softplus(x: Expr) -> Expr:
    """log(1 + exp x), the identity above 20 as in torch."""
    return tirx.Select(x > f32(20.0), x, T.log1p(T.exp(x)))


def half(bits: Expr) -> Expr:
    """float32 of the 16-bit float in the low half of a uint32."""
    return T.call_pure_extern("float32", "es_half", bits)


def unpack(word: Expr, dtype: str) -> list[Expr]:
    """The float32 numbers in a uint32: one float32, or two 16-bit floats, the first in the low half."""
    if dtype == "float32":
        return [T.reinterpret("float32", word)]
    if dtype == "float16":
        return [half(word & T.uint32(0xFFFF)), half(word >> T.uint32(16))]
    return [
        T.reinterpret("float32", word << T.uint32(16)),
        T.reinterpret("float32", word & T.uint32(0xFFFF0000)),
    ]


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << max(0, n - 1).bit_length()
