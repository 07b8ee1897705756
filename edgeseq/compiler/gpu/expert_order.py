"""The slots of a chunk sorted by expert (see kernels/expert_order): a thread per expert, in one block."""

from __future__ import annotations

from typing import Any

from ..kernels.expert_order import ExpertOrder
from ..tvm_api import T
from . import Built
from ._emit import Expr, kernel, let, local, power_of_two, shared, store, strided, sync, when


def build(name: str, p: ExpertOrder, gpu: Any) -> Built:
    sizes = {"index": ("int64", p.slots), "order": ("int32", p.slots), "start": ("int32", p.experts + 1)}
    threads = max(32, min(gpu.threads, power_of_two(p.experts)))
    with kernel(name, [(a, *sizes[a]) for a in p.args], 1, threads, gpu) as k:
        counts = shared(p.experts, "int32")

        def each_slot(e: Expr, body: Any) -> None:
            with T.serial(p.slots) as s, when(k["index"][s] == T.Cast("int64", e)):
                body(s)

        def count(e: Expr) -> None:
            found = local(1, "int32")
            store(found, 0, T.int32(0))
            each_slot(e, lambda s: store(found, 0, found[0] + 1))
            store(counts, e, found[0])

        def place(e: Expr) -> None:
            at = local(1, "int32")
            store(at, 0, T.int32(0))
            with T.serial(e) as before:
                store(at, 0, at[0] + counts[before])
            store(k["start"], e, at[0])

            def one(s: Expr) -> None:
                store(k["order"], let(at[0]), s)
                store(at, 0, at[0] + 1)

            each_slot(e, one)
            with when(e == p.experts - 1):
                store(k["start"], p.experts, at[0])

        strided(k, p.experts, count)
        sync()
        strided(k, p.experts, place)
    return Built(k.func, 1, threads)
