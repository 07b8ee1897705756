"""Norms: a row of elements shared out over neighbouring threads, kept in registers between its passes if it fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..tvm_api import T
from ._emit import Expr, Kernel, add, blocks_of, f32, let, local, power_of_two, reduce_all, reduce_within, shared, store
from ._emit import when as when_
from ._quantise import BLOCK, blocks, write_block

EACH = 4  # elements of a row that a thread has, where the block is wide enough
HELD = 16  # most of them in registers


class Shape:
    """How R rows of D elements lie on threads: `width` threads a row, `rows` rows a block."""

    def __init__(self, R: int, D: int, gpu: Any) -> None:
        self.width = max(32, min(gpu.threads, 1024, power_of_two(blocks_of(D, EACH))))
        narrow = self.width <= 32
        self.rows = min(256 // self.width, power_of_two(R)) if narrow else 1
        self.threads = self.width * self.rows
        self.grid = blocks_of(R, self.rows)


class Row:
    """The row of the thread it is emitted for. padded: elements that are written, zeros behind D."""

    def __init__(self, k: Kernel, shape: Shape, R: int, D: int, ldx: int, quant: int | None) -> None:
        self.k, self.shape, self.D, self.quant = k, shape, D, quant
        self.padded = D if quant is None else blocks(D) * BLOCK
        self.each = blocks_of(self.padded, shape.width)
        several = shape.rows > 1
        self.lane = let(k.thread % shape.width) if several else k.thread
        self.index = let(k.block * shape.rows + k.thread // shape.width) if several else k.block
        self.exists: Expr | bool = True if R % shape.rows == 0 else self.index < R
        self.start = let(self.index * ldx)
        self.scratch = shared(shape.threads)
        self.held = None
        if self.each <= HELD:
            self.held = local(self.each)
            for j in range(self.each):
                self._read(j, self.held, j)

    def _inside(self, j: Expr, limit: int) -> Expr | bool:
        """Element j of this thread lies before `limit`."""
        if isinstance(j, int) and (j + 1) * self.shape.width <= limit:
            return True
        if not isinstance(j, int) and limit % self.shape.width == 0:
            return True
        return j * self.shape.width + self.lane < limit

    def _read(self, j: Expr, into: Any, to: int) -> None:
        store(into, to, f32(0.0))
        with when_(self.exists), when_(self._inside(j, self.D)):
            store(into, to, self.k["x"][self.start + j * self.shape.width + self.lane])

    def _elements(self, body: Callable[[Expr, Expr], None]) -> None:
        """body(j, x) for every element of this thread, those behind the end included."""
        if self.held is not None:
            for j in range(self.each):
                body(j, self.held[j])
            return
        with T.serial(self.each) as j:
            x = local(1)
            self._read(j, x, 0)
            body(j, x[0])

    def mean(self, term: Callable[[Expr], Expr]) -> Expr:
        """The mean of term(x) over the row."""
        total = local(1)
        store(total, 0, f32(0.0))

        def one(j: Expr, x: Expr) -> None:
            with when_(self._inside(j, self.D)):
                store(total, 0, total[0] + term(x))

        self._elements(one)
        if self.shape.rows == 1:
            whole = reduce_all(self.k, total[0], add, self.scratch)
        else:
            whole = reduce_within(self.k, total[0], self.shape.width, add, self.scratch)
        return let(whole * f32(1.0 / self.D))

    def write(self, normed: Callable[[Expr, Expr], Expr]) -> None:
        """y = normed(element, x), as floats or as int8 blocks."""

        def one(j: Expr, x: Expr) -> None:
            e = let(j * self.shape.width + self.lane)
            if self.quant is None:
                with when_(self.exists), when_(self._inside(j, self.D)):
                    store(self.k["y"], self.index * self.D + e, normed(e, x))
                return
            y = local(1)
            store(y, 0, f32(0.0))
            with when_(self._inside(j, self.D)):
                store(y, 0, normed(e, x))
            inside = self._both(self._inside(j, self.padded))
            write_block(self.k, self.index * blocks(self.D) + e // BLOCK, y[0], self.quant, self.scratch, inside)

        self._elements(one)

    def _both(self, inside: Expr | bool) -> Expr | bool:
        if inside is True or self.exists is True:
            return self.exists if inside is True else inside
        return T.And(inside, self.exists)
