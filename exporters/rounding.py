"""Rounding a matrix to 8- or 4-bit codes in blocks of 32 along its rows: W[m,k] = scale[m,k/32] * (code[m,k] - zero).

Symmetric: zero is 128 or 8. Scales are float16 numbers (kept in float32), for the packed weights on a device hold them
in float16; codes are chosen for the scale as rounded. A scale may be negative: then -8 stands for the largest positive
value of its block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgeseq.errors import ExportError

BLOCK = 32
BITS = {"int8": 8, "int4": 4}
ROWS_AT_ONCE = 1 << 20  # elements that are rounded together
LARGEST_SCALE = float(np.finfo(np.float16).max)
NARROW = np.float32(2.0**-24)  # the smallest float16: a block below it is all zeros

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


def blocks(k: int) -> int:
    """Blocks that cover a row of k."""
    return -(-k // BLOCK)


def quantise(name: str, weight: NDArray, bits: int) -> tuple[Codes, Floats]:
    """Codes uint8 [M, blocks, 4 bits] and scales float32 [M, blocks] of `weight` [M,K].

    Two 4-bit codes share a byte, the first in the low half. What pads the last block is zero. ExportError for values
    that are not finite or whose scale float16 cannot hold.
    """
    m, k = weight.shape
    n = blocks(k)
    codes = np.empty((m, n, 4 * bits), np.uint8)
    scales = np.empty((m, n), np.float32)
    for rows in _row_groups(m, n * BLOCK):
        part = np.zeros((rows.stop - rows.start, n * BLOCK), np.float32)
        part[:, :k] = weight[rows]
        if not np.isfinite(part).all():
            raise ExportError(f"weight {name} has values that are not finite", "check the checkpoint")
        part = part.reshape(-1, n, BLOCK)
        if float(np.abs(part).max(initial=0.0)) > LARGEST_SCALE * ((1 << (bits - 1)) - 1):
            raise ExportError(f"weight {name} is too large for float16 scales", "export it with --quant none")
        rounded, scales[rows] = _ROUNDERS[bits](part)
        codes[rows] = _packed(rounded, bits)
    return codes, scales


def dequantise(codes: Codes, scales: Floats, k: int) -> Floats:
    """The matrix float32 [M,k] that codes and scales mean."""
    m, n, width = codes.shape
    bits = width // 4
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(m, n, BLOCK)
    values = (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.float32) * scales[..., None]
    return np.ascontiguousarray(values.reshape(m, n * BLOCK)[:, :k])


def _row_groups(m: int, width: int) -> Iterator[slice]:
    step = max(1, ROWS_AT_ONCE // width)
    for start in range(0, m, step):
        yield slice(start, min(m, start + step))


def _packed(q: Floats, bits: int) -> Codes:
    codes: Codes = (q + (1 << (bits - 1))).astype(np.uint8)
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def _float16(scale: Floats) -> Floats:
    return np.clip(scale, -LARGEST_SCALE, LARGEST_SCALE).astype(np.float16).astype(np.float32)


def _codes_for(w: Floats, scale: Floats, low: int, high: int) -> Floats:
    """Nearest codes, as floats, for scale [M,blocks]; zeros where the scale is 0."""
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=np.abs(scale) >= NARROW)
    return np.clip(np.rint(w * inverse[..., None]), low, high)


def _round8(w: Floats) -> tuple[Floats, Floats]:
    """Absmax: the largest value of a block becomes 127."""
    scale = _float16(np.abs(w).max(axis=-1) * np.float32(1 / 127))
    return _codes_for(w, scale, -127, 127), scale


def _round4(w: Floats) -> tuple[Floats, Floats]:
    """The scale with the least squared error among a grid around the one that maps the block's extreme to -8."""
    extreme = np.take_along_axis(w, np.abs(w).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    best_scale = np.zeros_like(extreme)
    best_error = np.full_like(extreme, np.inf)
    best = np.zeros_like(w)
    for divisor in GRID:
        scale = _float16(extreme * np.float32(-1 / divisor))
        q = _codes_for(w, scale, -8, 7)
        error = np.square(w - q * scale[..., None]).sum(axis=-1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best = np.where(better[..., None], q, best)
    return best, best_scale


GRID = tuple(np.linspace(6.0, 9.5, 15))
"""Code that the extreme of a block stands for: beyond 8 it is clipped, which pays where it is an outlier."""

_ROUNDERS = {8: _round8, 4: _round4}
