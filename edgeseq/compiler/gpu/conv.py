"""Convolution over one or two axes (see kernels/conv): a thread per output, 16 rows of one line of weights together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..kernels.conv import Conv
from ..tvm_api import T
from . import Built
from ._emit import Expr, blocks_of, f32, half, kernel, let, local, loop, store, when

ROWS = 16
PLACES = 8  # neighbouring outputs of a row in one block


def build(name: str, p: Conv, gpu: Any) -> Built:
    groups, strips = blocks_of(p.M, ROWS), blocks_of(p.OW, PLACES)
    sizes = {
        "x": ("float32", p.C * p.H * p.W),
        "w": ("float32" if p.wdtype == "float32" else "uint16", groups * p.K * ROWS),
        "bias": ("float32", p.M),
        "y": ("float32", p.M * p.OH * p.OW),
    }
    grid, threads = groups * p.OH * strips, ROWS * PLACES
    with kernel(name, [(a, *sizes[a]) for a in p.args], grid, threads, gpu) as k:
        rest = let(k.block // strips)
        group, oh = let(rest // p.OH), let(rest % p.OH)
        row, ow = let(group * ROWS + k.thread % ROWS), let(k.block % strips * PLACES + k.thread // ROWS)
        total = local(1)
        store(total, 0, f32(0.0))
        channels = p.C // p.groups
        first = let(group * ROWS // (p.M // p.groups) * channels) if p.groups > 1 else 0
        base = let(group * (p.K * ROWS) + k.thread % ROWS)

        def line(c: Expr, i: Expr) -> None:
            h = oh * p.SH + i * p.DH - p.PH
            with when(_inside(h, p.PH, (p.OH - 1) * p.SH + (p.KH - 1) * p.DH, p.H)):
                start = let(((first + c) * p.H + h) * p.W)
                loop(p.KW, lambda j: tap(c, i, j, start))

        def tap(c: Expr, i: Expr, j: Expr, start: Expr) -> None:
            column = ow * p.SW + j * p.DW - p.PW
            with when(_inside(column, p.PW, (strips * PLACES - 1) * p.SW + (p.KW - 1) * p.DW, p.W)):
                w = _weight(k["w"][base + ((c * p.KH + i) * p.KW + j) * ROWS], p.wdtype)
                store(total, 0, total[0] + w * k["x"][start + column])

        loop(channels, lambda c: loop(p.KH, lambda i: line(c, i)))
        with when(T.And(row < p.M, ow < p.OW)):
            y = total[0] + k["bias"][row] if p.bias else total[0]
            y = T.max(y, f32(0.0)) if p.act == "relu" else y
            store(k["y"], (row * p.OH + oh) * p.OW + ow, y)
    return Built(k.func, grid, threads)


def _inside(at: Expr, padding: int, largest: int, size: int) -> Expr | bool:
    """0 <= at < size; largest: of all `at`, without the padding."""
    if padding == 0 and largest < size:
        return True
    return T.And(at >= 0, at < size)


def _weight(raw: Expr, dtype: str) -> Expr:
    convert: dict[str, Callable[[Expr], Expr]] = {
        "float32": lambda x: x,
        "float16": lambda x: half(T.Cast("uint32", x)),
        "bfloat16": lambda x: T.reinterpret("float32", T.Cast("uint32", x) << T.uint32(16)),
    }
    return convert[dtype](raw)
