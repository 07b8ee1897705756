"""Weight layouts: how tensors of the checkpoint lie in the bundle, so that kernels read them in one stream.

plain        as it is, C order
transposed   [a,b..] -> [b..,a]  ([C,1,k] counts as [C,k])
rows16       [M,K] -> [ceil(M/16)][K][16], rows padded with zeros: 16 outputs per vector
columns16    [K,M] -> rows16 of its transpose
q4x16, q8x16, s8x16   codes [M,ceil(K/32),16 or 32] and scales [M,ceil(K/32)] of MatMulNBits -> see kernels/linear_q;
             s8x16 stores 8-bit codes as signed bytes
experts.*    rows16 or a quantised layout of each of [E,...], expert after expert
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

ROWS = 16
CHUNK_BYTES = 16 << 20
QUANTISED = {"q4x16": 4, "q8x16": 8, "s8x16": 8}
EXPERTS = "experts."


def packed_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the packed array: elements of the source's dtype, bytes for the quantised layouts."""
    if layout.startswith(EXPERTS):
        groups, *rest = packed_shape(layout.removeprefix(EXPERTS), shape[1:])
        return (shape[0] * groups, *rest)
    if layout == "plain":
        return shape
    if layout == "transposed":
        return (math.prod(shape[1:]), shape[0])
    if layout in QUANTISED:
        pairs = -(-shape[1] // 2)
        return (-(-shape[0] // ROWS), pairs, 64 + 2 * 512 * QUANTISED[layout] // 8)
    m, k = shape if layout == "rows16" else shape[::-1]
    return (-(-m // ROWS), k, ROWS)


def pack(layout: str, *arrays: np.ndarray) -> np.ndarray:
    """The packed array. arrays: one tensor, or codes and scales for a quantised layout."""
    parts = [part.reshape(-1) for part in pack_stream(layout, *arrays)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def pack_stream(layout: str, *arrays: np.ndarray) -> Iterator[np.ndarray]:
    """The packed array in C-contiguous pieces of about 16 MB, in order."""
    if layout.startswith(EXPERTS):
        for expert in zip(*arrays, strict=True):
            yield from _PACKERS[layout.removeprefix(EXPERTS)](*expert)
    else:
        yield from _PACKERS[layout](*arrays)


def _plain(array: np.ndarray) -> Iterator[np.ndarray]:
    yield np.ascontiguousarray(array)


def _transposed(array: np.ndarray) -> Iterator[np.ndarray]:
    yield np.ascontiguousarray(array.reshape(array.shape[0], -1).T)


def _rows16(array: np.ndarray) -> Iterator[np.ndarray]:
    m, k = array.shape
    groups = max(1, CHUNK_BYTES // (k * ROWS * array.itemsize))
    for start in range(0, m, groups * ROWS):
        part = _padded(np.asarray(array[start : start + groups * ROWS]), 0)
        yield np.ascontiguousarray(part.reshape(-1, ROWS, k).transpose(0, 2, 1))


def _columns16(array: np.ndarray) -> Iterator[np.ndarray]:
    yield from _rows16(array.T)


def _padded(part: np.ndarray, fill: int) -> np.ndarray:
    """Rows up to a multiple of 16."""
    missing = -part.shape[0] % ROWS
    if not missing:
        return part
    return np.concatenate([part, np.full((missing, *part.shape[1:]), fill, part.dtype)])


def _quantised(bits: int, signed: bool) -> Callable[[np.ndarray, np.ndarray], Iterator[np.ndarray]]:
    zero = 1 << (bits - 1)

    def packer(codes: np.ndarray, scales: np.ndarray) -> Iterator[np.ndarray]:
        m, n = codes.shape[0], codes.shape[1]
        groups = max(1, CHUNK_BYTES // (n * 32 * ROWS))
        for start in range(0, m, groups * ROWS):
            rows = slice(start, start + groups * ROWS)
            yield group(np.asarray(codes[rows]), np.asarray(scales.reshape(m, n)[rows]))

    def group(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        rows, n = codes.shape[:2]
        if bits == 4:  # two codes a byte, the first in the low nibble
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, n, 32)
        codes, scales = _padded(codes, zero), _padded(scales, 0).astype(np.float16)
        if n % 2:
            codes = np.concatenate([codes, np.full((codes.shape[0], 1, 32), zero, np.uint8)], axis=1)
            scales = np.concatenate([scales, np.zeros((scales.shape[0], 1), np.float16)], axis=1)
        pairs = codes.shape[1] // 2
        u = codes.reshape(-1, ROWS, pairs, 2, 8, 4).transpose(0, 2, 3, 4, 1, 5)  # group, pair, half, k/4, row, k%4
        u = u[:, :, :, :4] | (u[:, :, :, 4:] << 4) if bits == 4 else (u ^ 0x80 if signed else u)
        s = np.ascontiguousarray(scales.reshape(-1, ROWS, pairs, 2).transpose(0, 2, 3, 1)).view(np.uint8)
        return np.concatenate(
            [s.reshape(-1, pairs, 64), np.ascontiguousarray(u).reshape(s.shape[0], pairs, -1)], axis=2
        )

    return packer


_PACKERS: dict[str, Callable[..., Iterator[np.ndarray]]] = {
    "plain": _plain,
    "transposed": _transposed,
    "rows16": _rows16,
    "columns16": _columns16,
    "q4x16": _quantised(4, False),
    "q8x16": _quantised(8, False),
    "s8x16": _quantised(8, True),
}
