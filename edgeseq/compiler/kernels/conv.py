"""y[M,OH,OW] = act(sum over c,i,j of w[M,c,i,j] x[c, oh SH + i DH - PH, ow SW + j DW - PW] + bias[M])

C channels, H x W input (H = 1: a convolution over time), taps KH x KW, strides S, dilations D, padding before P, groups
of C/groups channels and M/groups outputs. w is packed rows16 with K = (C/groups) KH KW: 16 outputs fill one vector, a
tile of neighbouring ow stays in registers, and what lies outside the input is left out rather than multiplied by
zero. One block = 16 outputs of one row oh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..tvm_api import T
from . import Built
from ._emit import LANES, Expr, Kernel, kernel, let, load, local, loop, splat, store
from ._tiles import accumulators, tiles
from .linear import _storage, _weights

if TYPE_CHECKING:
    from ..targets import Target

MAX_UNROLLED = 64
IN_FLIGHT = 8


@dataclass(frozen=True)
class Conv:
    """Parameters of one variant; `tile`: neighbouring outputs held in registers."""

    C: int
    M: int
    H: int
    W: int
    OH: int
    OW: int
    KH: int
    KW: int
    SH: int = 1
    SW: int = 1
    DH: int = 1
    DW: int = 1
    PH: int = 0
    PW: int = 0
    groups: int = 1
    wdtype: str = "float32"
    bias: bool = False
    act: str = "none"
    tile: int = 12

    @property
    def args(self) -> tuple[str, ...]:
        return ("x", "w", *(("bias",) if self.bias else ()), "y")

    @property
    def K(self) -> int:
        return self.C // self.groups * self.KH * self.KW

    def interior(self) -> tuple[int, int]:
        """Outputs begin <= ow < end of a row whose every tap lies inside the input."""
        s, d, p, k = self.SW, self.DW, self.PW, self.KW
        begin = min(-(-p // s), self.OW)
        end = (self.W - 1 - (k - 1) * d + p) // s + 1
        return begin, max(begin, min(end, self.OW))


def candidates(p: Conv, target: Target) -> list[Conv]:
    """What tuning may choose from: how many neighbouring outputs a tile has."""
    widths = [width for width, _ in tiles(p.OW, 1, accumulators(target.features))]
    return [p, *(replace(p, tile=width) for width in widths if width != p.tile)]


def build(name: str, p: Conv) -> Built:
    outputs = -(-p.M // LANES)
    sizes = {
        "x": ("float32", p.C * p.H * p.W),
        "w": (_storage(p.wdtype), outputs * p.K * LANES),
        "bias": ("float32", p.M),
        "y": ("float32", p.M * p.OH * p.OW),
    }
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        group16 = k.block // p.OH if p.OH > 1 else k.block
        oh = k.block % p.OH if p.OH > 1 else 0
        row = _Row(k, p, group16, oh)
        begin, end = p.interior()
        for at, count in _tiles(0, begin, p.tile):
            row.tile(at, count, checked=True)
        whole = (end - begin) // p.tile
        loop(whole, lambda i: row.tile(begin + i * p.tile, p.tile, checked=False))
        for at, count in _tiles(begin + whole * p.tile, end, p.tile):
            row.tile(at, count, checked=False)
        for at, count in _tiles(end, p.OW, p.tile):
            row.tile(at, count, checked=True)
    return Built(k.func, outputs * p.OH)


def _tiles(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(size, end - at)) for at in range(begin, end, size)]


def _once(value: Expr) -> Expr:
    """`let` for what may be a plain number."""
    return value if isinstance(value, int) else let(value)


class _Row:
    """16 outputs of row `oh`."""

    def __init__(self, k: Kernel, p: Conv, group16: Expr, oh: Expr) -> None:
        self.k, self.p, self.group16, self.oh = k, p, group16, oh
        self.channels = p.C // p.groups
        first = group16 * LANES // (p.M // p.groups) * self.channels if p.groups > 1 else 0
        self.first_channel = _once(first) if p.groups > 1 else 0
        self.base = _once(group16 * (p.K * LANES))

    def tile(self, at: Expr, count: int, checked: bool) -> None:
        """Outputs at <= ow < at + count. checked: some taps lie outside, and `at` is a number."""
        p = self.p
        chains = max(1, IN_FLIGHT // count)
        acc = local(chains * count * LANES)
        for i in range(chains * count):
            store(acc, i * LANES, splat(0.0))

        def taps(c: Expr, i: Expr, chain: int) -> None:
            line = _once(((self.first_channel + c) * p.H + self.oh * p.SH + i * p.DH - p.PH) * p.W)
            start = (c * p.KH + i) * p.KW

            def tap(j: Expr, which: int) -> None:
                inside = [t for t in range(count) if not checked or 0 <= self._column(at + t, j) < p.W]
                if not inside:
                    return
                w = let(_weights(self.k["w"], self.base + (start + j) * LANES, p.wdtype))
                for t in inside:
                    slot = (which * count + t) * LANES
                    x = splat(self.k["x"][line + self._column(at + t, j)])
                    store(acc, slot, load(acc, slot) + w * x)

            wide = p.KW
            if checked or wide * count <= MAX_UNROLLED:
                for j in range(wide):
                    tap(j, (chain + j) % chains)
                return
            with T.serial(wide // chains) as step:
                for u in range(chains):
                    tap(step * chains + u, u)
            for j in range(wide // chains * chains, wide):
                tap(j, 0)

        def channel(c: Expr, chain: int) -> None:
            loop(p.KH, lambda i: self._if_row_inside(i, lambda: taps(c, i, chain)))

        unroll = chains if p.KH == p.KW == 1 and self.channels >= chains else 1

        def channels(step: Expr) -> None:
            for u in range(unroll):
                channel(step * unroll + u, u)

        loop(self.channels // unroll, channels)
        for c in range(self.channels // unroll * unroll, self.channels):
            channel(c, 0)
        self._finish(acc, at, count, chains)

    def _column(self, ow: Expr, j: Expr) -> Expr:
        return ow * self.p.SW + j * self.p.DW - self.p.PW

    def _if_row_inside(self, i: Expr, body: Callable[[], None]) -> None:
        p = self.p
        last = (p.OH - 1) * p.SH + (p.KH - 1) * p.DH - p.PH
        if p.PH == 0 and last < p.H:
            body()
            return
        h = self.oh * p.SH + i * p.DH - p.PH
        with T.If(T.And(h >= 0, h < p.H)):
            with T.Then():
                body()

    def _finish(self, acc: Expr, at: Expr, count: int, chains: int) -> None:
        """Sum of the chains, bias, activation, and the 16 outputs to their 16 planes."""
        p, k = self.p, self.k
        row = self.group16 * LANES

        def emit(lanes: int) -> None:
            bias = let(load(k["bias"], row, lanes)) if p.bias else None
            for t in range(count):
                y = load(acc, t * LANES, lanes)
                for chain in range(1, chains):
                    y = y + load(acc, (chain * count + t) * LANES, lanes)
                if bias is not None:
                    y = y + bias
                if p.act == "relu":
                    y = T.max(y, splat(0.0, lanes))
                plane = p.OH * p.OW
                if plane == 1:
                    store(k["y"], row, y, lanes)
                    continue
                store(acc, t * LANES, y, lanes)
                for lane in range(lanes):
                    store(k["y"], (row + lane) * plane + self.oh * p.OW + at + t, acc[t * LANES + lane], 1)

        rest = p.M % LANES
        if not rest:
            emit(LANES)
            return
        with T.If(self.group16 < p.M // LANES):
            with T.Then():
                emit(LANES)
            with T.Else():
                emit(rest)
