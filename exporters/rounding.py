"""Rounding a matrix to 8- or 4-bit codes in blocks of 32 along its rows: W[m,k] = scale[m,k/32] * (code[m,k] - zero).

8 bits take the largest value of a block as 127. 4 bits search the scale, and where the moments of the inputs are known
they pass each column's rounding error on to the columns that follow it.

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
AT_ONCE = 1 << 20  # elements that are rounded together
LARGEST_SCALE = float(np.finfo(np.float16).max)
NARROW = np.float32(2.0**-24)  # the smallest float16: a block below it is all zeros

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


def blocks(k: int) -> int:
    """Blocks that cover a row of k."""
    return -(-k // BLOCK)


def quantise(name: str, weight: NDArray, bits: int, moments: Floats | None = None) -> tuple[Codes, Floats]:
    """Codes uint8 [M, blocks, 4 bits] and scales float32 [M, blocks] of `weight` [M,K].

    moments: sums of x x^T [K,K] over inputs x of the product; 4-bit rounding then corrects itself for them. Two 4-bit
    codes share a byte, the first in the low half. What pads the last block is zero. ExportError for values that are
    not finite or whose scale float16 cannot hold.
    """
    m, k = weight.shape
    n = blocks(k)
    carry = None if moments is None or bits != 4 else carries(moments)
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
        if carry is not None:
            rounded, scales[rows] = _round4_carrying(part, carry)
        else:
            rounded, scales[rows] = (_round8 if bits == 8 else _round4)(part)
        codes[rows] = _packed(rounded, bits)
    return codes, scales


def dequantise(codes: Codes, scales: Floats, k: int) -> Floats:
    """The matrix float32 [M,k] that codes and scales mean."""
    m, n, width = codes.shape
    bits = width // 4
    matrix = np.empty((m, k), np.float32)
    for rows in _row_groups(m, n * BLOCK):
        part = codes[rows]
        if bits == 4:
            part = np.stack([part & 15, part >> 4], axis=-1).reshape(-1, n, BLOCK)
        values = (part.astype(np.int16) - (1 << (bits - 1))).astype(np.float32) * scales[rows, :, None]
        matrix[rows] = values.reshape(-1, n * BLOCK)[:, :k]
    return matrix


def _row_groups(m: int, width: int) -> Iterator[slice]:
    step = max(1, AT_ONCE // width)
    for start in range(0, m, step):
        yield slice(start, min(m, start + step))


def _packed(q: Floats, bits: int) -> Codes:
    codes: Codes = (q + (1 << (bits - 1))).astype(np.uint8)
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def _float16(scale: Floats) -> Floats:
    return np.clip(scale, -LARGEST_SCALE, LARGEST_SCALE).astype(np.float16).astype(np.float32)


def _codes_for(w: Floats, scale: Floats, low: int, high: int) -> Floats:
    """Nearest codes, as floats, for scale [M,blocks]; zeros where the scale is 0."""
    return np.clip(np.rint(w * _inverse(scale)[..., None]), low, high)


def _inverse(scale: Floats) -> Floats:
    return np.divide(1.0, scale, out=np.zeros_like(scale), where=np.abs(scale) >= NARROW)


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


def carries(moments: Floats) -> Floats:
    """How the error of a column is made good by later ones: U [K,K], upper, with inverse(moments + damping) = U^T U.

    From GPTQ (Frantar et al. 2022, section 3.3).
    """
    h = moments.astype(np.float64)
    spread = np.diagonal(h)
    h[np.diag_indices_from(h)] += DAMPING * spread.mean() + np.where(spread > 0, 0.0, 1.0)
    return np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)


def _round4_carrying(w: Floats, carry: Floats) -> tuple[Floats, Floats]:
    """Column by column, each passing what it lost on to those that follow; the scale of a block is chosen when its
    turn comes. w [R,blocks,32] is overwritten."""
    rows, n, _ = w.shape
    k = len(carry)
    left = np.ascontiguousarray(w.reshape(rows, -1).T)  # [K,R]: a column is contiguous
    codes = np.zeros_like(left)
    scales = np.empty((rows, n), np.float32)
    for b in range(n):
        start, stop = b * BLOCK, min(k, (b + 1) * BLOCK)
        _, scales[:, b : b + 1] = _round4(left[start : start + BLOCK].T[:, None])
        scale = np.ascontiguousarray(scales[:, b])
        inverse = _inverse(scale)
        lost = np.empty((stop - start, rows), np.float32)
        for i in range(start, stop):
            codes[i] = np.clip(np.rint(left[i] * inverse), -8, 7)
            lost[i - start] = (left[i] - codes[i] * scale) / carry[i, i]
            left[i + 1 : stop] -= carry[i, i + 1 : stop, None] * lost[i - start]
        left[stop:k] -= carry[start:stop, stop:].T @ lost
    return np.ascontiguousarray(codes.T).reshape(w.shape), scales


GRID = tuple(np.linspace(6.0, 9.5, 15))
"""Code that the extreme of a block stands for: beyond 8 it is clipped, which pays where it is an outlier."""

DAMPING = 0.1
"""Share of the mean moment that is added to each: keeps what few inputs suggest from being believed."""
