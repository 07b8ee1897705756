"""Products of many tokens on tensor cores: y[T,M] = x[T,K] W[M,K]^T by `mma.sync`, 16 rows x 8 tokens at a time.

A warp has 32 rows (two groups of 16, as weights are packed) and up to 64 tokens; the warps of a block share out rows
and, where rows are few, k. Weights and activations go from memory straight into fragments: which row and which k a
fragment's place stands for is free as long as both operands and the result agree, so rows 2g and 2g+1 of a group stand
where the PTX ISA has g and g+8, and a lane finds both in one word. Nothing is shared in the loop, so no barrier is in
it. A step is 32 k; its products are summed in the tensor core, which truncates, and added up in rounded float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..tvm_api import T, tirx
from ._emit import (
    Buffer,
    Expr,
    Kernel,
    await_inputs,
    blocks_of,
    kernel,
    let,
    local,
    loop,
    shared,
    store,
    sync,
    when,
    zero,
)
from .linear import ROWS, settled

WARP, WARPS = 32, 8
THREADS = WARP * WARPS
GROUPS = 2  # of 16 rows, of a warp
OCTETS = 8  # of tokens, of a block at most
STEP = 32  # k
PROCESSORS = {87: 16, 90: 132, 100: 148}
"""Multiprocessors of the largest GPU of a compute capability: Jetson AGX Orin, H100 and H200, B200."""


@dataclass(frozen=True)
class Tiling:
    """How the products of `steps` steps lie on blocks: `rows` warps side by side, `splits` along k, `octets` of tokens;
    `across` blocks have the rows, `along` the tokens."""

    groups: int
    octets: int
    all_octets: int
    rows: int
    steps: int

    @property
    def splits(self) -> int:
        return WARPS // self.rows

    @property
    def across(self) -> int:
        return blocks_of(self.groups, GROUPS * self.rows)

    @property
    def along(self) -> int:
        return blocks_of(self.all_octets, self.octets)


def tiling(M: int, tokens: int, steps: int, gpu: Any) -> Tiling:
    """The widest blocks of which there are enough for every multiprocessor: they read the activations least often."""
    groups, octets = blocks_of(M, ROWS), blocks_of(tokens, 8)
    each = blocks_of(octets, blocks_of(octets, OCTETS))
    processors = min((PROCESSORS.get(sm, 108) for sm in gpu.sm), default=1)
    for rows in (4, 2, 1):
        found = Tiling(groups, each, octets, rows, steps)
        if found.across * found.along >= processors:
            break
    return found


@contextmanager
def mma_kernel(name: str, params: list[tuple[str, str, int]], t: Tiling, gpu: Any) -> Iterator[Kernel]:
    with kernel(name, params, t.across * t.along, THREADS, gpu, early=True) as k:
        yield k


class Tile:
    """What a warp does; `ask`, `take` and `multiply` depend on what the weights are made of."""

    def __init__(self, k: Kernel, p: Any, t: Tiling) -> None:
        self.k, self.p, self.t = k, p, t
        self.lane = let(k.thread % WARP)
        self.quad, self.place = let(self.lane // 4), let(self.lane % 4)  # the PTX ISA's groupID, threadID_in_group
        warp = let(k.thread // WARP)
        self.warp = let(warp % t.rows) if t.rows > 1 else 0
        self.split = let(warp // t.rows)
        group = let((k.block % t.across * t.rows + self.warp) * GROUPS)
        exact = t.groups % (GROUPS * t.rows) == 0
        self.group = [group + i if exact else let(T.min(group + i, t.groups - 1)) for i in range(GROUPS)]
        self.row = let(group * ROWS + 2 * self.quad)
        self.first = let(k.block // t.across * t.octets) if t.along > 1 else 0
        self.acc = local(t.octets * GROUPS * 4)

    def ask(self, step: Expr) -> None:
        """Load the weights of a step."""
        raise NotImplementedError

    def take(self, valid: Expr | bool) -> None:
        """Weights to fragments; zeros unless valid."""
        raise NotImplementedError

    def multiply(self, step: Expr, n: int) -> None:
        """Add the products of a step with octet n of the tokens to `acc`."""
        raise NotImplementedError

    def scale(self, y: Expr, token: Expr) -> Expr:
        return y

    def octet(self, n: int) -> Expr:
        """Number of the block's octet n; the last one's behind the end."""
        at = self.first + n
        return at if self.t.all_octets % self.t.octets == 0 else T.min(at, self.t.all_octets - 1)

    def run(self) -> None:
        t = self.t
        whole = t.steps % t.splits == 0
        zero(self.acc, t.octets * GROUPS * 4)
        self.ask(self.split if t.steps >= t.splits else T.min(self.split, t.steps - 1))
        await_inputs()

        def one(i: Expr) -> None:
            at = let(i * t.splits + self.split)
            self.take(True if whole else at < t.steps)
            self.ask(let(T.min(at + t.splits, t.steps - 1)))
            step = at if whole else let(T.min(at, t.steps - 1))
            for n in range(t.octets):
                self.multiply(step, n)

        loop(blocks_of(t.steps, t.splits), one)
        self._meet()
        self._finish()

    def _meet(self) -> None:
        """Sums of the splits of k to the first of them."""
        t, k = self.t, self.k
        count, splits = t.octets * GROUPS * 4, t.splits
        if splits == 1:
            return
        lanes = THREADS // 2
        sums = shared(count * lanes)
        while splits > 1:
            splits //= 2
            own = t.rows * WARP * splits  # threads that go on
            sync()
            with when(T.And(k.thread >= own, k.thread < 2 * own)):
                for i in range(count):
                    store(sums, i * lanes + k.thread - own, self.acc[i])
            sync()
            with when(k.thread < own):
                for i in range(count):
                    store(self.acc, i, self.acc[i] + sums[i * lanes + k.thread])

    def _finish(self) -> None:
        """Results: first all that is read, so that no load waits for a store that might be to the same place."""
        k, p = self.k, self.p

        def settle(at: int, token: Expr, row: Expr) -> None:
            store(self.acc, at, settled(k, p, self.scale(self.acc[at], token), token, row))

        with when(self.split == 0):
            self._results(settle)
            self._results(lambda at, token, row: store(k["y"], token * p.M + row, self.acc[at]))

    def _results(self, body: Callable[[int, Expr, Expr], None]) -> None:
        """body(register, token, row) for every result of the thread."""
        t, p = self.t, self.p
        rows_exact = p.M % (ROWS * GROUPS * t.rows) == 0
        tokens_exact = p.T % (8 * t.octets) == 0
        for n, c in product(range(t.octets), range(2)):
            token = let((self.first + n) * 8 + 2 * self.place + c)
            with when(True if tokens_exact else token < p.T):
                for m, r in product(range(GROUPS), range(2)):
                    row = self.row + (m * ROWS + r)
                    with when(True if rows_exact else row < p.M):
                        body((n * GROUPS + m) * 4 + 2 * r + c, token, row)


def masked(word: Expr, valid: Expr | bool) -> Expr:
    """The word, or zero."""
    return word if valid is True else tirx.Select(valid, word, T.uint32(0))


def mma(kind: str, to: Buffer, at: int, a: list[Expr], b: list[Expr]) -> None:
    """to[at..at+3] += the lane's part of A B. kind: "f16" or "bf16", 16 x 16 by 16 x 8 in float32; "s8", 16 x 32 by
    32 x 8 in int32. a, b: four and two uint32, fragments as the PTX ISA lays them out; every thread comes here."""
    T.evaluate(T.call_extern("void", f"es_mma_{kind}", T.address_of(to[at]), *a, *b))
