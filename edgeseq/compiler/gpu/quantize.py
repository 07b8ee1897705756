"""Activations to int8 by blocks of 32 (see kernels/quantize): a thread per activation, the padding included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..kernels.quantize import Quantize
from . import Built
from ._emit import Expr, Kernel, blocks_of, choose, f32, kernel, let, local, shared, store, when
from ._quantise import BLOCK, OUTPUTS, blocks, output_params, round_block, store_block

THREADS = 128


@dataclass(frozen=True)
class Quantizes(Quantize):
    """`several` vectors (T = 1) of one length; arguments follow one another, each with its part's number behind it."""

    several: int = 2

    @property
    def args(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{a}{i}" for i in range(self.several) for a in ("x", *OUTPUTS))


def build(name: str, p: Quantize, gpu: Any) -> Built:
    width = blocks(p.K) * BLOCK
    outputs = output_params(p.T, p.K)
    one = [("x", "float32", (p.T - 1) * p.ldx + p.K), *((o, *outputs[o]) for o in OUTPUTS)]
    grid = blocks_of(p.T * width, THREADS)
    parts = p.several if isinstance(p, Quantizes) else 1
    params = [(f"{a}{i}" if parts > 1 else a, d, n) for i in range(parts) for a, d, n in one]
    with kernel(name, params, parts * grid, THREADS, gpu) as k:
        several = [k.part(i, [a for a, _, _ in one], i * grid) for i in range(parts)] if parts > 1 else [k]
        starts = [i * grid for i in range(parts)]
        x = local(1)
        store(x, 0, f32(0.0))
        choose(k.block, starts, [partial(_read, own, p, width, x) for own in several])
        rounded = round_block(k, x[0], shared(THREADS))
        choose(k.block, starts, [partial(_write, own, p, width, rounded) for own in several])
    return Built(k.func, parts * grid, THREADS)


def _place(k: Kernel, p: Quantize, width: int) -> tuple[Expr, Expr | bool]:
    """The thread's activation, padding counted, and whether there is one."""
    i = let(k.block * THREADS + k.thread)
    return i, True if p.T * width % THREADS == 0 else i < p.T * width


def _read(k: Kernel, p: Quantize, width: int, x: Any) -> None:
    i, inside = _place(k, p, width)
    column = let(i % width)
    with when(inside), when(True if p.K == width else column < p.K):
        store(x, 0, k["x"][i // width * p.ldx + column])


def _write(k: Kernel, p: Quantize, width: int, rounded: tuple[Expr, Expr, Expr]) -> None:
    i, inside = _place(k, p, width)
    store_block(k, i // BLOCK, rounded, p.zero, inside)
