"""Tiles worth measuring: blocks of accumulators, rows by groups of 16, that the vector registers hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

GROUPS = (1, 2, 4)
STREAMS = (1, 2, 4, 8)
STEPS = 2
BLOCKS = 6
"""Blocks that streams leave for the threads to share."""


def accumulators(features: Sequence[str]) -> int:
    """Vectors of 16 floats that fit beside the operands: 32 registers of 16 floats, else 16 of 8 or 32 of 4."""
    return 28 if "avx512f" in features else 7


def even(rows: int, most: int) -> int:
    """Rows of a tile when `rows` are cut into as few equal pieces of at most `most` as possible."""
    return -(-rows // -(-rows // most))


def tiles(rows: int, groups: int, room: int) -> list[tuple[int, int]]:
    """(rows, groups) of at most `room` accumulators."""
    found: list[tuple[int, int]] = []
    for wide in GROUPS:
        heights: dict[int, None] = {}
        most = room // wide if wide <= groups else 0
        while most and len(heights) < STEPS:
            most = even(rows, most)
            heights[most] = None
            most -= 1
        found += [(height, wide) for height in heights]
    return found


def variants(params: Any, rows: int, groups: int, room: int) -> list[Any]:
    """`params` as they are, then with every other tile of a product of `rows` by `groups` of 16."""
    height, wide = params.tile
    own = (even(rows, height), min(wide, groups))
    return [params, *(replace(params, tile=tile) for tile in tiles(rows, groups, room) if tile != own)]


def most_streams(groups: int) -> int:
    """Streams into which `groups` of 16 rows may be cut."""
    return max(1, groups // BLOCKS)


def streams(params: Any, groups: int) -> list[Any]:
    """`params` as they are, then with every other number of streams that `groups` allow, with and without ahead."""
    most = most_streams(groups)
    own = (min(params.streams, most), params.ahead)
    several = [n for n in STREAMS if 1 < n <= most]
    others = [(1, params.ahead), *((n, ahead) for ahead in (params.ahead, not params.ahead) for n in several)]
    return [params, *(replace(params, streams=n, ahead=ahead) for n, ahead in others if (n, ahead) != own)]
