"""y = W[index] x for the experts chosen by each token, or their sum weighted by gates plus a residual.

W is packed `experts.rows16`: expert after expert, each as `linear` has it, [E][ceil(M/16)][K][16], so the chosen index
is an offset and nothing else of W is read. One token: a block is 16 rows (of one slot, or of the sum). A chunk: a block
is 16 rows of every expert in turn, which serve the slots that `expert_order` sorted, in tiles held in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..tvm_api import T
from . import Built
from ._emit import LANES, Buffer, Expr, Kernel, kernel, let, load, local, splat, store
from .linear import GEMV_UNROLL, _storage, _weights, guard_tail

TILES = (8, 2, 1)


@dataclass(frozen=True)
class ExpertLinear:
    """T tokens, A slots each, E experts of M x K; S inputs a token (1 or A), ldx floats apart.

    gates: y [T,M] is the sum over the slots, with a residual ldr floats apart if there is one; else y [T,A,M].
    """

    T: int
    A: int
    E: int
    M: int
    K: int
    S: int
    ldx: int
    wdtype: str = "float32"
    gates: bool = False
    residual: bool = False
    ldr: int = 0

    @property
    def args(self) -> tuple[str, ...]:
        return ("x", *routing_args(self), "w", *sum_args(self), "y")

    @property
    def groups(self) -> int:
        return -(-self.M // LANES)


def routing_args(p: Any) -> tuple[str, ...]:
    return ("index",) if p.T == 1 else ("order", "start")


def sum_args(p: Any) -> tuple[str, ...]:
    return (*(("gates",) if p.gates else ()), *(("residual",) if p.residual else ()))


def common_sizes(p: Any) -> dict[str, tuple[str, int]]:
    return {
        "index": ("int64", p.A),
        "order": ("int32", p.T * p.A),
        "start": ("int32", p.E + 1),
        "gates": ("float32", p.T * p.A),
        "residual": ("float32", (p.T - 1) * p.ldr + p.M),
        "y": ("float32", p.T * p.M * (1 if p.gates else p.A)),
    }


def build(name: str, p: ExpertLinear) -> Built:
    sizes = common_sizes(p)
    sizes |= {"x": ("float32", (p.T * p.S - 1) * p.ldx + p.K), "w": (_storage(p.wdtype), p.E * p.groups * p.K * LANES)}
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        if p.T == 1:
            acc = local(GEMV_UNROLL * LANES)
            step(k, p, acc, lambda slot, group: _gemv(k, p, acc, slot if p.S > 1 else 0, group))
        else:
            acc = local(TILES[0] * LANES)
            chunk(k, p, acc, lambda group, rows: _gemm(k, p, acc, group, rows))
    return Built(k.func, p.groups * (p.A if p.T == 1 and not p.gates else 1))


def step(k: Kernel, p: Any, acc: Buffer, product: Callable[[Expr, Expr], None]) -> None:
    """One token. product(slot, group of the packed matrix) leaves 16 rows in acc[0:16]."""
    if not p.gates:
        slot, group = let(k.block // p.groups), let(k.block % p.groups)
        _chosen(k, p, acc, slot, group, product)
        first = let(slot * p.M + group * LANES)
        guard_tail(group, p.groups, p.M, lambda lanes: store(k["y"], first, load(acc, 0, lanes), lanes))
        return
    total, group = local(LANES), k.block
    guard_tail(group, p.groups, p.M, lambda lanes: store(total, 0, _before(k, p, 0, group * LANES, lanes), lanes))
    with T.serial(p.A) as slot:
        _chosen(k, p, acc, slot, group, product)
        store(total, 0, load(total, 0) + load(acc, 0) * splat(k["gates"][slot]))
    guard_tail(group, p.groups, p.M, lambda lanes: store(k["y"], group * LANES, load(total, 0, lanes), lanes))


def _chosen(k: Kernel, p: Any, acc: Buffer, slot: Expr, group: Expr, product: Callable[[Expr, Expr], None]) -> None:
    """The product of the slot's expert, or zeros where it has none: then nothing is read."""
    expert = let(T.Cast("int32", k["index"][slot]))
    with T.If(T.And(expert >= 0, expert < p.E)):
        with T.Then():
            product(slot, let(expert * p.groups + group))
        with T.Else():
            store(acc, 0, splat(0.0))


def chunk(k: Kernel, p: Any, acc: Buffer, product: Callable[[Expr, list[Expr]], None]) -> None:
    """All slots. product(group of the packed matrix, rows of x) leaves 16 rows of each in acc[16 i : 16 i + 16]."""
    _clear(k, p)
    with T.serial(p.E) as e:
        group = let(e * p.groups + k.block)
        at, rest = let(k["start"][e]), local(2, "int32")
        T.buffer_store(rest, k["start"][e + 1] - at, [0])
        T.buffer_store(rest, at, [1])
        for tile in TILES:
            with T.serial(let(rest[0] // tile)):
                slots = [let(k["order"][rest[1] + i]) for i in range(tile)]
                tokens = [let(s // p.A) for s in slots]
                product(group, slots if p.S > 1 else tokens)
                for i, (s, t) in enumerate(zip(slots, tokens, strict=True)):
                    guard_tail(k.block, p.groups, p.M, _collect(k, p, acc, i, s, t))
                T.buffer_store(rest, rest[1] + tile, [1])
            T.buffer_store(rest, rest[0] % tile, [0])


def _collect(k: Kernel, p: Any, acc: Buffer, i: int, slot: Expr, token: Expr) -> Callable[[int], None]:
    def body(lanes: int) -> None:
        row = k.block * LANES
        value = load(acc, i * LANES, lanes)
        if not p.gates:
            return store(k["y"], slot * p.M + row, value, lanes)
        at = token * p.M + row
        return store(k["y"], at, load(k["y"], at, lanes) + value * splat(k["gates"][slot], lanes), lanes)

    return body


def _clear(k: Kernel, p: Any) -> None:
    """What slots without an expert leave behind, and what the sums begin with."""
    rows = p.T if p.gates else p.T * p.A
    with T.serial(rows) as t:
        guard_tail(
            k.block, p.groups, p.M,
            lambda lanes: store(k["y"], t * p.M + k.block * LANES, _before(k, p, t, k.block * LANES, lanes), lanes),
        )  # fmt: skip


def _before(k: Kernel, p: Any, t: Expr, row: Expr, lanes: int) -> Expr:
    return load(k["residual"], t * p.ldr + row, lanes) if p.residual else splat(0.0, lanes)


def _gemv(k: Kernel, p: ExpertLinear, acc: Buffer, row: Expr, group: Expr) -> None:
    """acc[0:16] = 16 rows times x[row]; independent accumulators hide the latency of the multiply-add."""
    unroll = GEMV_UNROLL if p.K >= GEMV_UNROLL else 1
    for u in range(unroll):
        store(acc, u * LANES, splat(0.0))
    base, first = let(group * (p.K * LANES)), let(row * p.ldx) if p.S > 1 else 0

    def term(i: Expr, u: int) -> None:
        product = _weights(k["w"], base + i * LANES, p.wdtype) * splat(k["x"][first + i])
        store(acc, u * LANES, load(acc, u * LANES) + product)

    with T.serial(p.K // unroll) as step_:
        for u in range(unroll):
            term(step_ * unroll + u, u)
    for i in range(p.K // unroll * unroll, p.K):
        term(i, 0)
    while unroll > 1:
        unroll //= 2
        for u in range(unroll):
            store(acc, u * LANES, load(acc, u * LANES) + load(acc, (u + unroll) * LANES))


def _gemm(k: Kernel, p: ExpertLinear, acc: Buffer, group: Expr, rows: list[Expr]) -> None:
    """acc[16 i ...] = 16 rows times x[rows[i]]; a vector of weights is loaded once for all."""
    base = let(group * (p.K * LANES))
    firsts = [let(row * p.ldx) for row in rows]
    for i in range(len(rows)):
        store(acc, i * LANES, splat(0.0))
    with T.serial(p.K) as j:
        w = let(_weights(k["w"], base + j * LANES, p.wdtype))
        for i, first in enumerate(firsts):
            store(acc, i * LANES, load(acc, i * LANES) + w * splat(k["x"][first + j]))
