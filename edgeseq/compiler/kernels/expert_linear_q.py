"""The product of `expert_linear` with 4- or 8-bit weights in blocks of 32 and int8 activations, as `linear_q` has them.

W is packed `experts.q4x16`, `experts.q8x16` or `experts.s8x16`: expert after expert, each in the layout of `linear_q`.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import Built
from ._emit import LANES, kernel, local
from ._quantise import BLOCK, blocks
from .expert_linear import TILES, chunk, common_sizes, routing_args, step, sum_args
from .linear_q import PAIR_BYTES, multiply_tile


@dataclass(frozen=True)
class ExpertLinearQ:
    """Letters as in `ExpertLinear`; isa and bits as in `LinearQ`."""

    T: int
    A: int
    E: int
    M: int
    K: int
    S: int
    bits: int
    isa: str
    gates: bool = False
    residual: bool = False
    ldr: int = 0

    @property
    def args(self) -> tuple[str, ...]:
        return ("q", "scale", "offset", *routing_args(self), "w", "ws", *sum_args(self), "y")

    @property
    def groups(self) -> int:
        return -(-self.M // LANES)


def build(name: str, p: ExpertLinearQ) -> Built:
    n, rows = blocks(p.K), p.T * p.S
    weight_bytes = p.E * p.groups * (n // 2) * PAIR_BYTES[p.bits]
    sizes = common_sizes(p) | {
        "q": ("int32", rows * n * BLOCK // 4),
        "scale": ("float32", rows * n),
        "offset": ("int32", rows * n),
        "w": ("uint8", weight_bytes),
        "ws": ("float16", weight_bytes // 2),
    }
    with kernel(name, [(a, *sizes[a]) for a in p.args]) as k:
        if p.T == 1:
            acc = local(LANES)
            step(k, p, acc, lambda slot, group: multiply_tile(k, p, acc, [slot if p.S > 1 else 0], [group], n))
        else:
            acc = local(TILES[0] * LANES)
            chunk(k, p, acc, lambda group, x: multiply_tile(k, p, acc, x, [group], n))
    return Built(k.func, p.groups * (p.A if p.T == 1 and not p.gates else 1))
