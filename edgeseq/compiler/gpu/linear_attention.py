"""Every recurrence with a matrix state per head, the state in place (see kernels/linear_attention for the rules).

A block has up to 32 value columns of one head; its lines of threads share out the K rows, which stay in registers over
all tokens. Tokens go in tiles: queries, keys and the decays' exponentials pass through shared memory; what a delta rule
reads from the state is summed over the lines once per token, the outputs once per tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..kernels.linear_attention import LinearAttention
from ..tvm_api import T, tirx
from . import Built
from ._emit import (
    Buffer,
    Expr,
    Kernel,
    blocks_of,
    f32,
    kernel,
    let,
    local,
    loop,
    power_of_two,
    shared,
    silu,
    softplus,
    store,
    strided,
    sync,
    when,
    zero,
)

COLUMNS = 32
FEW_BLOCKS = 96  # below that many, narrower ones
EACH = 8  # rows of a thread, as long as a block has no more than THREADS
MOST = 64  # rows of a thread, as long as the device has threads
THREADS = 256
TILE = 8


@dataclass(frozen=True)
class SteppedAttention(LinearAttention):
    """Mamba-2's recurrence, all that is computed by head and channel around it included. Of token t, head h:

    dt = clip(softplus(dt_t + dt_bias), dt_min, dt_max)    decay = dt A[h]    value = dt v_t
    o = (scale q^T S + D[h] v_t) silu(z_t)

    softplus: else dt is as given. skip, gate: whether there is a D, a z. lddt, ldz: floats between tokens.
    """

    softplus: bool = True
    dt_min: float = 0.0
    dt_max: float = math.inf
    skip: bool = True
    gate: bool = True
    lddt: int = 0
    ldz: int = 0

    @property
    def args(self) -> tuple[str, ...]:
        bias, skip, gate = ("dt_bias",) * self.softplus, ("D",) * self.skip, ("z",) * self.gate
        return ("q", "k", "v", "dt", *bias, "A", *skip, *gate, "past", "o")

    def size(self, name: str) -> int:
        rows = {"dt": (self.lddt, self.H), "z": (self.ldz, self.H * self.V)}
        if name in rows:
            return (self.T - 1) * rows[name][0] + rows[name][1]
        return self.H if name in ("dt_bias", "A", "D") else super().size(name)


def build(name: str, p: LinearAttention, gpu: Any) -> Built:
    columns, lines = _cut(p, gpu)
    grid, threads = p.H * blocks_of(p.V, columns), columns * lines
    with kernel(name, [(a, "float32", p.size(a)) for a in p.args], grid, threads, gpu) as k:
        _Head(k, p, columns, lines, gpu.local_bytes).run()
    return Built(k.func, grid, threads)


def _cut(p: LinearAttention, gpu: Any) -> tuple[int, int]:
    """Columns of a block, and lines of its threads."""
    columns = max(8, min(COLUMNS, power_of_two(p.V)))
    if columns == COLUMNS and p.H * p.V < FEW_BLOCKS * COLUMNS:
        columns //= 2
    lines = 1
    while (p.K > EACH * lines and 2 * lines * columns <= THREADS) or (
        p.K > MOST * lines and 2 * lines * columns <= gpu.threads
    ):
        lines *= 2
    return columns, lines


class _Head:
    """One thread: its rows of one column."""

    def __init__(self, k: Kernel, p: LinearAttention, columns: int, lines: int, local_bytes: int) -> None:
        self.k, self.p, self.columns, self.lines = k, p, columns, lines
        tiles = blocks_of(p.V, columns)
        self.head = k.block // tiles if tiles > 1 else k.block
        self.lane = k.thread % columns if lines > 1 else k.thread
        self.line = k.thread // columns if lines > 1 else 0
        self.v = k.block % tiles * columns + self.lane if tiles > 1 else self.lane
        self.exists: Expr | bool = True if p.V % columns == 0 else self.v < p.V
        self.each = blocks_of(p.K, lines)
        self.S = local(self.each)
        self._stage(local_bytes)
        self.constant = let(T.exp(k["decay"][self.head])) if p.decay == "constant" else None

    def _stage(self, local_bytes: int) -> None:
        """Shared memory: vectors by token of the tile, and where the lines' sums meet."""
        p, line = self.p, self.lines * self.columns
        widths = {"q": p.group * p.K, "k": p.K}
        if isinstance(p, SteppedAttention):
            widths["dt"] = 1
        if p.decay in ("head", "key"):
            widths["decay"] = p.K if p.decay == "key" else 1
        if p.erase == "key":
            widths["beta"] = 1
        elif p.erase == "free":
            widths |= {"a": p.K, "b": p.K}
        self.read: Buffer = shared(2 * line) if p.erase != "none" else None
        room = local_bytes // 4 - (2 * line if self.read is not None else 0) - 32
        self.tile = max(1, min(TILE, p.T, room // (sum(widths.values()) + p.group * line)))
        self.widths = widths
        self.staged: dict[str, Buffer] = {n: shared(self.tile * w) for n, w in widths.items()}
        self.sums = shared(self.tile * p.group * line)

    def _rows(self) -> list[tuple[int, Expr, Expr | bool]]:
        """(register, row of the state, whether there is such a row)."""
        whole = self.p.K // self.lines
        found = [(i, i * self.lines + self.line) for i in range(self.each)]
        return [(i, c, True if i < whole else self.line < self.p.K % self.lines) for i, c in found]

    def _state(self, c: Expr) -> Expr:
        return (self.head * self.p.K + c) * self.p.V + self.v

    def run(self) -> None:
        p, past = self.p, self.k["past"]
        zero(self.S, self.each) if p.V % self.columns or p.K % self.lines else None
        for i, c, inside in self._rows():
            with when(self.exists), when(inside):
                store(self.S, i, past[self._state(c)])
        loop(p.T // self.tile, lambda i: self._tile(i * self.tile, self.tile))
        if p.T % self.tile:
            self._tile(p.T // self.tile * self.tile, p.T % self.tile)
        for i, c, inside in self._rows():
            with when(self.exists), when(inside):
                store(past, self._state(c), self.S[i])

    def _tile(self, t0: Expr, count: int) -> None:
        for name, width in self.widths.items():
            self._fetch(name, width, t0, count)
        sync()
        loop(count, lambda u: self._token(t0, u))
        sync()
        self._finish(t0, count)
        if self.p.T > count:
            sync()

    def _fetch(self, name: str, width: int, t0: Expr, count: int) -> None:
        """`count` tokens' parts of argument `name` that this head reads."""
        p = self.p
        if isinstance(p, SteppedAttention) and name in ("dt", "decay"):
            if name == "dt":
                strided(self.k, count, lambda n: self._step_size(p, t0, n))
            return
        ld = {"q": p.ldq, "k": p.ldk, "decay": p.ldg, "beta": p.ldb, "a": p.lda, "b": p.ldb}[name]
        if name == "q":
            first = self.head * width if p.Hq >= p.H else self.head // (p.H // p.Hq) * p.K
        elif name == "k":
            first = self.head // (p.H // p.Hk) * p.K
        else:
            first = self.head * width

        def one(n: Expr) -> None:
            at = (t0 + n // width) * ld + first + n % width if width > 1 else (t0 + n) * ld + first
            x = self.k[name][at]
            store(self.staged[name], n, T.exp(x) if name == "decay" else x)

        strided(self.k, count * width, one)

    def _step_size(self, p: SteppedAttention, t0: Expr, n: Expr) -> None:
        """dt and e^decay of the tile's token n."""
        k, h = self.k, self.head
        dt = k["dt"][(t0 + n) * p.lddt + h]
        if p.softplus:
            dt = softplus(let(dt + k["dt_bias"][h]))
        dt = let(dt)
        if p.dt_min > 0.0:
            dt = let(tirx.Select(dt < f32(p.dt_min), f32(p.dt_min), dt))
        if math.isfinite(p.dt_max):
            dt = let(tirx.Select(dt > f32(p.dt_max), f32(p.dt_max), dt))
        store(self.staged["dt"], n, dt)
        store(self.staged["decay"], n, T.exp(dt * k["A"][h]))

    def _vector(self, name: str, u: Expr, c: Expr, g: int = 0) -> Expr:
        return self.staged[name][u * self.widths[name] + g * self.p.K + c]

    def _decayed(self, i: int, c: Expr, u: Expr) -> Expr:
        kind = self.p.decay
        if kind == "none":
            return self.S[i]
        if kind == "constant":
            return self.constant * self.S[i]
        return self._vector("decay", u, c if kind == "key" else 0) * self.S[i]

    def _token(self, t0: Expr, u: Expr) -> None:
        p = self.p
        value, out = local(1), local(p.group)
        store(value, 0, f32(0.0))
        zero(out, p.group)
        with when(self.exists):
            v = self.k["v"][(t0 + u) * p.ldv + self.head * p.V + self.v]
            store(value, 0, v * self.staged["dt"][u] if isinstance(p, SteppedAttention) else v)
        read = self._read(u) if p.erase != "none" else None
        if p.erase == "key":
            store(value, 0, self.staged["beta"][u] * (value[0] - read))
        for i, c, inside in self._rows():
            with when(inside):
                s = self.S[i] if p.erase == "key" else self._decayed(i, c, u)
                s = s + self._vector("k", u, c) * value[0]
                if p.erase == "free":
                    s = s + self._vector("b", u, c) * read
                store(self.S, i, s)
                for g in range(p.group):
                    store(out, g, out[g] + self._vector("q", u, c, g) * self.S[i])
        for g in range(p.group):
            at = (u * p.group + g) * self.lines + self.line
            store(self.sums, at * self.columns + self.lane, out[g])

    def _read(self, u: Expr) -> Expr:
        """k^T D S, which leaves D S in the registers, or a^T S; two buffers in turn make one barrier enough."""
        total = local(1)
        store(total, 0, f32(0.0))
        for i, c, inside in self._rows():
            with when(inside):
                if self.p.erase == "key":
                    store(self.S, i, self._decayed(i, c, u))
                store(total, 0, total[0] + self._vector("k" if self.p.erase == "key" else "a", u, c) * self.S[i])
        half = u % 2 * self.lines
        store(self.read, (half + self.line) * self.columns + self.lane, total[0])
        sync()
        whole = self.read[half * self.columns + self.lane]
        for line in range(1, self.lines):
            whole = whole + self.read[(half + line) * self.columns + self.lane]
        return let(whole)

    def _finish(self, t0: Expr, count: int) -> None:
        """Each line adds up its share of the tile's outputs."""
        p, outputs = self.p, count * self.p.group

        def one(n: Expr) -> None:
            o = self.sums[n * self.lines * self.columns + self.lane]
            for line in range(1, self.lines):
                o = o + self.sums[(n * self.lines + line) * self.columns + self.lane]
            at = ((t0 * p.group + n // p.group * p.group) * p.H + self.head * p.group + n % p.group) * p.V + self.v
            o = o * f32(p.scale)
            if isinstance(p, SteppedAttention):
                column = self.head * p.V + self.v
                if p.skip:
                    o = o + self.k["D"][self.head] * self.k["v"][(t0 + n) * p.ldv + column]
                if p.gate:
                    o = o * silu(let(self.k["z"][(t0 + n) * p.ldz + column]))
            store(self.k["o"], at, o)

        with when(self.exists):
            loop(outputs // self.lines, lambda i: one(i * self.lines + self.line))
            if outputs % self.lines:
                with when(self.line < outputs % self.lines):
                    one(outputs // self.lines * self.lines + self.line)
