"""Weight layouts: how a tensor of the checkpoint lies in the bundle, so that kernels read it in one stream.

plain        as it is, C order
transposed   [a,b] -> [b,a]  (trailing axes of a merged into b's place: [C,1,k] counts as [C,k])
rows16       [M,K] -> [ceil(M/16)][K][16], rows padded with zeros: 16 outputs per vector
columns16    [K,M] -> rows16 of its transpose
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

ROWS = 16
_STORAGE = {"bfloat16": "uint16"}


def packed_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the packed array (elements of the same dtype)."""
    if layout == "plain":
        return shape
    if layout == "transposed":
        return (math.prod(shape[1:]), shape[0])
    m, k = shape if layout == "rows16" else shape[::-1]
    return (-(-m // ROWS), k, ROWS)


def pack(layout: str, array: np.ndarray) -> np.ndarray:
    """The whole packed array; see `pack_stream` for large ones."""
    return np.concatenate([part.reshape(-1) for part in pack_stream(layout, array)]).reshape(
        packed_shape(layout, array.shape)
    )


def pack_stream(layout: str, array: np.ndarray) -> Iterator[np.ndarray]:
    """The packed array in C-contiguous pieces of at most about 16 MB, in order."""
    yield from _PACKERS[layout](array)


def _plain(array: np.ndarray) -> Iterator[np.ndarray]:
    yield np.ascontiguousarray(array)


def _transposed(array: np.ndarray) -> Iterator[np.ndarray]:
    yield np.ascontiguousarray(array.reshape(array.shape[0], -1).T)


def _rows16(array: np.ndarray) -> Iterator[np.ndarray]:
    m, k = array.shape
    groups = max(1, (16 << 20) // (k * ROWS * array.itemsize))
    for start in range(0, m, groups * ROWS):
        part = np.asarray(array[start : start + groups * ROWS])
        if part.shape[0] % ROWS:
            part = np.concatenate([part, np.zeros((-part.shape[0] % ROWS, k), part.dtype)])
        yield np.ascontiguousarray(part.reshape(-1, ROWS, k).transpose(0, 2, 1))


def _columns16(array: np.ndarray) -> Iterator[np.ndarray]:
    yield from _rows16(array.T)


_PACKERS: dict[str, Callable[[np.ndarray], Iterator[np.ndarray]]] = {
    "plain": _plain,
    "transposed": _transposed,
    "rows16": _rows16,
    "columns16": _columns16,
}
