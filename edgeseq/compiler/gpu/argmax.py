"""The greedy next token, the first of equals, picked where the logits are: a step then needs no round trip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeseq.spec import TensorSpec

from ..ir import Arg, KernelRef, Value
from ..tvm_api import T
from . import Built
from ._emit import Expr, f32, kernel, local, shared, store, sync, when

if TYPE_CHECKING:
    from ..lowering import Lowering

NEXT = TensorSpec("next", "int64", (1,), "next")
LOWEST = -3.4028234663852886e38


@dataclass(frozen=True)
class Argmax:
    """n logits."""

    n: int
    args = ("x", "y")


def pick_next(low: Lowering) -> None:
    """Append the choice to the calls of a graph of tokens and logits."""
    logits = next((s for s in low.signature.outputs if s.role == "logits"), None)
    tokens = next((s for s in low.signature.inputs if s.role == "tokens"), None)
    if logits is None or tokens is None:
        return
    value = low.value(logits.name)
    n = value.cols
    port = Value(NEXT.name, NEXT.dtype, NEXT.shape, low.memory.port(NEXT.name, NEXT.nbytes))
    low.call(KernelRef("argmax", Argmax(n)), Arg(value, "r"), Arg(port, "w"))


def build(name: str, p: Argmax, gpu: Any) -> Built:
    threads = min(gpu.threads, 1024)
    with kernel(name, [("x", "float32", p.n), ("y", "int64", 1)], 1, threads, gpu) as k:
        best, at = shared(threads), shared(threads, "int32")
        top, where = local(1), local(1, "int32")
        store(top, 0, f32(LOWEST))
        store(where, 0, T.int32(0))

        def consider(i: Expr) -> None:
            x = local(1)
            store(x, 0, k["x"][i])
            with when(x[0] > top[0]):
                store(top, 0, x[0])
                store(where, 0, i)

        with T.serial(-(-p.n // threads)) as step, when(step * threads + k.thread < p.n):
            consider(step * threads + k.thread)
        store(best, k.thread, top[0])
        store(at, k.thread, where[0])
        half = threads // 2
        while half:
            sync()
            with when(k.thread < half):
                a, b = k.thread, k.thread + half
                with when(T.Or(best[b] > best[a], T.And(best[b] == best[a], at[b] < at[a]))):
                    store(best, a, best[b])
                    store(at, a, at[b])
            half //= 2
        with when(k.thread == 0):
            store(k["y"], 0, T.Cast("int64", at[0]))
    return Built(k.func, 1, threads)
