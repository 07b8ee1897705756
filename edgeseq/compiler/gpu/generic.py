"""Kernels that TVM derived, for a GPU: a fused function becomes one kernel per computation in it.

What is independent runs as one thread each; a reduction is a loop of its thread. Nothing here depends on a family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..generic import raw_pointers
from ..tvm_api import IRModule, PrimFunc, s_tir, structural_map, tirx, tvm

THREADS = 128


@dataclass(frozen=True)
class Part:
    """One kernel; reads and writes: positions of its parameters, in this order, among the whole function's."""

    func: PrimFunc
    grid: int
    threads: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]


def split(func: PrimFunc) -> list[Part]:
    """The computations of `func`, which holds no memory of its own, in order."""
    root = func.body.block
    everything = tuple(range(len(func.params)))
    if root.name_hint != "root":
        written = _written(func, root)
        reads = tuple(i for i in everything if i not in written)
        return [Part(_with_params(func, (*reads, *written), root.body), 1, 1, reads, written)]
    body = root.body
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    return [_part(func, statement) for statement in statements]


def _part(func: PrimFunc, statement: Any) -> Part:
    blocks = _blocks(statement)
    written = _positions(func, [r.source for b in blocks for r in b.writes])
    read = _positions(func, [r.source for b in blocks for r in b.reads])
    reads = tuple(i for i in read if i not in written)
    alone = _with_params(func, (*reads, *written), statement)
    scheduled, grid, threads = schedule(alone)
    return Part(scheduled, grid, threads, reads, written)


def _blocks(statement: Any) -> list[Any]:
    return _all(statement, s_tir.SBlock)


def _all(root: Any, kind: type) -> list[Any]:
    """Every node of a kind within `root`."""
    found: list[Any] = []

    def note(node: Any) -> Any:
        found.append(node)
        return node

    structural_map(root, [(kind, note)])
    return found


def _positions(func: PrimFunc, buffers: list[Any]) -> tuple[int, ...]:
    return tuple(i for i, p in enumerate(func.params) if any(p.same_as(b) for b in buffers))


def _written(func: PrimFunc, root: Any) -> tuple[int, ...]:
    """Positions that a function of plain loops stores to."""
    stores = [n.buffer for n in _all(root.body, tirx.BufferStore)]
    return _positions(func, stores) or (len(func.params) - 1,)


def _with_params(func: PrimFunc, positions: tuple[int, ...], body: Any) -> PrimFunc:
    """A function of some of `func`'s parameters around `body`."""
    root = s_tir.SBlock([], [], [], "root", body)
    realize = s_tir.SBlockRealize([], True, root)
    return tirx.PrimFunc([func.params[i] for i in positions], realize, func.ret_type).with_attrs(func.attrs)


def schedule(func: PrimFunc) -> tuple[PrimFunc, int, int]:
    """One thread per independent element; all in one thread where the loops do not show what is independent."""
    try:
        sch = s_tir.Schedule(func)
        (block,) = sch.get_child_blocks(sch.get_sblock("root"))
        loops = sch.get_loops(block)
        kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
        if len(loops) != len(kinds) or not any(k == 0 for k in kinds):
            return func, 1, 1
        own = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0]
        rest = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != 0]
        sch.reorder(*own, *rest)
        fused = sch.fuse(*own)
        extent = int(sch.get(fused).extent)
        threads = min(THREADS, extent)
        outer, inner = sch.split(fused, [None, threads])
        sch.bind(outer, "blockIdx.x")
        sch.bind(inner, "threadIdx.x")
        return sch.mod["main"], -(-extent // threads), threads
    except (tvm.error.TVMError, s_tir.ScheduleError, ValueError):
        return func, 1, 1


def to_device_function(func: PrimFunc, name: str, lower_passes: Callable[[IRModule], IRModule]) -> PrimFunc:
    """Lower a scheduled PrimFunc of buffers to a device function of raw pointers; intrinsics stay."""
    lowered, pointers, body = raw_pointers(func, name, lower_passes)
    attributes = [n for n in _all(body, tirx.AttrStmt) if n.attr_key == "thread_extent"]
    bound = [str(n.node.thread_tag) for n in attributes]
    for tag in ("threadIdx.x", "blockIdx.x"):
        if tag not in bound:
            axis = tirx.IterVar((0, 1), tirx.Var(tag, "int32"), 1, tag)
            body = tirx.AttrStmt(axis, "thread_extent", tirx.const(1, "int32"), body)
    body = _awaiting(body)
    made = tirx.PrimFunc(pointers, body)
    marks = {
        "global_symbol": name, "tirx.noalias": True, "target": lowered.attrs["target"], "calling_conv": 2,
        "tirx.is_global_func": True,
    }  # fmt: skip
    for key, value in marks.items():
        made = made.with_attr(key, value)
    return made


def _awaiting(body: Any) -> Any:
    """`await_inputs` as the first thing that every thread does."""
    wait = tirx.Evaluate(tirx.call_extern("void", "es_await"))
    outer = body
    chain = []
    while isinstance(outer, tirx.AttrStmt) and outer.attr_key == "thread_extent":
        chain.append(outer)
        outer = outer.body
    inner = tirx.SeqStmt([wait, outer])
    for attr in reversed(chain):
        inner = tirx.AttrStmt(attr.node, attr.attr_key, attr.value, inner)
    return inner
