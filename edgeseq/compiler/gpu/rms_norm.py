"""y[R,D] = x[R,D] / sqrt(mean(x^2) + eps) * w[D] (see kernels/rms_norm): a block per row, narrow rows share one."""

from __future__ import annotations

from typing import Any

from ..kernels.rms_norm import RmsNorm
from ..tvm_api import T
from . import Built
from ._emit import Expr, f32, kernel, let
from ._quantise import output_params
from ._rows import Row, Shape


def build(name: str, p: RmsNorm, gpu: Any) -> Built:
    sizes = {"x": ("float32", (p.R - 1) * p.ldx + p.D), "w": ("float32", p.D), "y": ("float32", p.R * p.D)}
    sizes |= output_params(p.R, p.D)
    shape = Shape(p.R, p.D, gpu)
    with kernel(name, [(a, *sizes[a]) for a in p.args], shape.grid, shape.threads, gpu) as k:
        row = Row(k, shape, p.R, p.D, p.ldx, p.quant)
        scale = let(f32(1.0) / T.sqrt(row.mean(lambda x: x * x) + f32(p.eps)))

        def normed(e: Expr, x: Expr) -> Expr:
            return x * scale * k["w"][e] if p.weight else x * scale

        row.write(normed)
    return Built(k.func, shape.grid, shape.threads)
