"""Work across the lanes of vectors: transposing, many sums at once, the largest lane. Sixteen lanes, see `_emit`."""

from __future__ import annotations

from ..tvm_api import T, tirx
from ._emit import LANES, Buffer, Expr, let, load, store

HALF = LANES // 2
SQUARE = LANES * LANES


def interleaved(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """a0 b0 a1 b1 … of the lower halves of two vectors, and of the upper ones."""
    lower = [x for lane in range(HALF) for x in (lane, LANES + lane)]
    low, high = (tirx.Shuffle([a, b], [T.int32(x + shift) for x in lower]) for shift in (0, HALF))
    return low, high


def transpose(squares: Buffer) -> None:
    """The sixteen vectors at 0 transposed, by way of those behind them: `squares` holds 2 * SQUARE floats.

    Interleaving the first eight with the last eight turns the bits of an element's index by one; four times swaps row
    and lane.
    """
    for turn in range(4):
        source, target = (turn % 2) * SQUARE, (1 - turn % 2) * SQUARE
        for i in range(HALF):
            pair = interleaved(*(load(squares, source + (i + shift) * LANES) for shift in (0, HALF)))
            for n, mixed in enumerate(pair):
                store(squares, target + (2 * i + n) * LANES, mixed)


def sums_of_sixteen(vectors: Buffer) -> Expr:
    """Lane j is the sum of the lanes of vector j, which begins at j * LANES; the vectors are overwritten.

    As `transpose`, but what is interleaved is added, which halves the vectors each time.
    """
    count = LANES
    while count > 1:
        count //= 2
        for i in range(count):
            low, high = interleaved(load(vectors, i * LANES), load(vectors, (i + count) * LANES))
            store(vectors, i * LANES, low + high)
    return load(vectors, 0)


def horizontal_max(scratch: Buffer, value: Expr) -> Expr:
    """Largest lane, by halving through `scratch` (LANES floats)."""
    store(scratch, 0, value)
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        store(scratch, 0, T.max(load(scratch, 0, lanes), load(scratch, lanes, lanes)), lanes)
    return let(scratch[0])
