"""y = W[index] x for the experts chosen by each token, or their sum weighted by gates (see kernels/expert_linear).

A block has 16 rows, and 16 lines of threads share out what is summed. One token: the weights stream past x. A chunk:
8 slots of an expert at a time, in sorted order; a block of sums has every expert in turn, so that no two blocks add to
one number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..kernels.expert_linear import ExpertLinear, common_sizes
from ..tvm_api import T, tirx
from . import Built
from ._emit import Buffer, Expr, Kernel, f32, half, kernel, let, local, loop, shared, store, sync, when, zero

ROWS = 16
LINES = 16
SLOTS = 8
UNROLL = 4
Product = Callable[[Buffer, Expr, list[Expr], list[Expr]], None]


def build(name: str, p: ExpertLinear, gpu: Any) -> Built:
    sizes = common_sizes(p)
    storage = "float32" if p.wdtype == "float32" else "uint16"
    sizes |= {"x": ("float32", (p.T * p.S - 1) * p.ldx + p.K), "w": (storage, p.E * p.groups * p.K * ROWS)}
    grid = grid_of(p)
    with kernel(name, [(a, *sizes[a]) for a in p.args], grid, ROWS * LINES, gpu) as k:
        Experts(k, p, lambda acc, group, rows, gates: _product(k, p, acc, group, rows, gates)).run()
    return Built(k.func, grid, ROWS * LINES)


def grid_of(p: Any) -> int:
    """Blocks: groups of rows, apart for each slot of a token or each expert of a chunk unless they are summed."""
    return p.groups * (1 if p.gates else p.A if p.T == 1 else p.E)


def _product(k: Kernel, p: ExpertLinear, acc: Buffer, group: Expr, rows: list[Expr], gates: list[Expr]) -> None:
    """acc[i] += gates[i] times the line's part of the thread's row of `group` times x[rows[i]]."""
    lane, line = k.thread % ROWS, k.thread // ROWS
    base = let(group * (p.K * ROWS) + lane)
    starts = [let(row * p.ldx) for row in rows]

    def some(first: Expr, count: int) -> None:
        raw = local(count)
        for u in range(count):
            store(raw, u, _weight(k["w"][base + (first + u * LINES + line) * ROWS], p.wdtype))
        for u in range(count):
            for i, start in enumerate(starts):
                x = k["x"][start + first + u * LINES + line]
                store(acc, i, acc[i] + raw[u] * (x * gates[i] if gates else x))

    step = UNROLL * LINES
    loop(p.K // step, lambda n: some(n * step, UNROLL))
    rest = p.K % step
    if rest // LINES:
        some(p.K // step * step, rest // LINES)
    if rest % LINES:
        with when(line < rest % LINES):
            some(p.K // LINES * LINES, 1)


def _weight(raw: Expr, dtype: str) -> Expr:
    if dtype == "float32":
        return raw
    bits = T.Cast("uint32", raw)
    return half(bits) if dtype == "float16" else T.reinterpret("float32", bits << T.uint32(16))


class Experts:
    """What a block does, whatever the weights are made of."""

    def __init__(self, k: Kernel, p: Any, product: Product) -> None:
        self.k, self.p, self.product = k, p, product
        self.tile = 1 if p.T == 1 else min(SLOTS, p.T * p.A)
        self.acc, self.sums = local(self.tile), shared(self.tile * k.threads)
        self.own = k.block % p.groups if grid_of(p) > p.groups else k.block  # group of rows
        self.other = k.block // p.groups  # slot or expert
        self.row = let(self.own * ROWS + k.thread % ROWS)
        self.writes = T.And(k.thread < ROWS, self.row < p.M) if p.M % ROWS else k.thread < ROWS

    def run(self) -> None:
        p = self.p
        if p.T == 1:
            self._step()
            return
        if p.gates:
            with when(self.writes):
                loop(p.T, self._clear)
            loop(p.E, self._expert)
            return
        with when(T.And(self.writes, self.other == 0)), when(self.k["start"][p.E] < p.T * p.A):
            loop(p.T * p.A, self._clear_unchosen)
        self._expert(self.other)

    def _step(self) -> None:
        p, k = self.p, self.k
        zero(self.acc, 1)

        def slot(s: Expr) -> None:
            expert = T.Cast("int32", k["index"][s])  # not in a register, so that all threads visibly agree
            with when(T.And(expert >= 0, expert < p.E)):
                gates = [let(k["gates"][s])] if p.gates else []
                self.product(self.acc, let(expert * p.groups + self.own), [s if p.S > 1 else 0], gates)

        if p.gates:
            loop(p.A, slot)
        else:
            slot(self.other if p.A > 1 else 0)
        self._meet()
        with when(self.writes):
            y = self.sums[k.thread]
            if p.residual:
                y = y + k["residual"][self.row]
            store(k["y"], self.row if p.gates or p.A == 1 else self.other * p.M + self.row, y)

    def _meet(self) -> None:
        """sums[i * threads + row] = acc[i] of all lines."""
        k = self.k
        sync()
        for i in range(self.tile):
            store(self.sums, i * k.threads + k.thread, self.acc[i])
        sync()
        lines = LINES // 2
        while lines:
            with when(k.thread < lines * ROWS):
                for i in range(self.tile):
                    at = i * k.threads + k.thread
                    store(self.sums, at, self.sums[at] + self.sums[at + lines * ROWS])
            sync()
            lines //= 2

    def _clear(self, t: Expr) -> None:
        """What the sums begin with."""
        p, k = self.p, self.k
        before = k["residual"][t * p.ldr + self.row] if p.residual else f32(0.0)
        store(k["y"], t * p.M + self.row, before)

    def _expert(self, e: Expr) -> None:
        p, k = self.p, self.k
        first, end = k["start"][e], k["start"][e + 1]
        group = let(e * p.groups + self.own)
        with T.serial(tirx.floordiv(end - first + (self.tile - 1), self.tile)) as n:
            slots = [let(k["order"][T.min(first + n * self.tile + i, end - 1)]) for i in range(self.tile)]
            zero(self.acc, self.tile)
            self.product(self.acc, group, [s if p.S > 1 else s // p.A for s in slots], [])
            self._meet()
            with when(self.writes):
                for i, slot in enumerate(slots):
                    with when(first + n * self.tile + i < end):
                        value = self.sums[i * k.threads + k.thread]
                        if p.gates:
                            at = let(slot // p.A * p.M + self.row)
                            store(k["y"], at, k["y"][at] + value * k["gates"][slot])
                        else:
                            store(k["y"], slot * p.M + self.row, value)

    def _clear_unchosen(self, slot: Expr) -> None:
        """Zeros where `slot` is not among the sorted ones: no other block writes it."""
        k, chosen = self.k, local(1, "int32")
        store(chosen, 0, T.int32(0))
        with T.serial(k["start"][self.p.E]) as i, when(k["order"][i] == slot):
            store(chosen, 0, T.int32(1))
        with when(chosen[0] == 0):
            store(k["y"], slot * self.p.M + self.row, f32(0.0))
