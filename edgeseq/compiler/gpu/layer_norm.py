"""y[R,D] = (x - mean) / sqrt(var + eps) * w[D] + b[D] (see kernels/layer_norm): a block per row, narrow rows share
one; the variance is that of the centred row."""

from __future__ import annotations

from typing import Any

from ..kernels.layer_norm import LayerNorm
from ..tvm_api import T
from . import Built
from ._emit import Expr, f32, kernel, let
from ._quantise import output_params
from ._rows import Row, Shape


def build(name: str, p: LayerNorm, gpu: Any) -> Built:
    sizes = {"x": ("float32", (p.R - 1) * p.ldx + p.D), "y": ("float32", p.R * p.D)}
    sizes |= {"w": ("float32", p.D), "b": ("float32", p.D)} | output_params(p.R, p.D)
    shape = Shape(p.R, p.D, gpu)
    with kernel(name, [(a, *sizes[a]) for a in p.args], shape.grid, shape.threads, gpu) as k:
        row = Row(k, shape, p.R, p.D, p.ldx, p.quant)
        mean = row.mean(lambda x: x)
        scale = let(f32(1.0) / T.sqrt(row.mean(lambda x: (x - mean) * (x - mean)) + f32(p.eps)))

        def normed(e: Expr, x: Expr) -> Expr:
            y = (x - mean) * scale
            y = y * k["w"][e] if p.weight else y
            return y + k["b"][e] if p.bias else y

        row.write(normed)
    return Built(k.func, shape.grid, shape.threads)
