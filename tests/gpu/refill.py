"""Weights too large to carry: `strip` leaves the matrices out of a bundle, `refill` puts random ones in their place.

What is small (norms, biases, decay rates, convolutions) stays as it was, so that the numbers stay tame; the matrices
become normals of a small scale, quantised ones random codes with small scales. Speed is that of the model, its text is
not. Standard library alone; edgeseq/compiler/pack.py says what the layouts are.
"""

from __future__ import annotations

import json
import random
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FILE, STRIPPED = "model.edgeseq", "model.stripped"
KEPT_BYTES = 512 << 10
TILE = 4 << 20
SCALE = 0.02
STRINGS, TENSORS, WEIGHTS = 2, 3, 12
QUANTISED = {"q4x16": 4, "q8x16": 8, "s8x16": 8}
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2


class Tensor(NamedTuple):
    layout: str
    dtype: int
    offset: int
    bytes: int


class Head(NamedTuple):
    """The bundle up to its weights. table: (kind, crc, offset, bytes, count) of each section."""

    data: bytes
    table: list[tuple[int, ...]]
    tensors: list[Tensor]

    @property
    def weights(self) -> tuple[int, ...]:
        return next(s for s in self.table if s[0] == WEIGHTS)


def read_head(data: bytes) -> Head:
    """data: at least the bytes before the weights."""
    (n,) = struct.unpack_from("<I", data, 12)
    table = [struct.unpack_from("<IIQQQ", data, 64 + 32 * i) for i in range(n)]
    places = {kind: (offset, size) for kind, _, offset, size, _ in table}
    strings = data[places[STRINGS][0] : sum(places[STRINGS])]
    tensors = []
    for at in range(places[TENSORS][0], sum(places[TENSORS]), 64):
        _, layout, dtype, *_, offset, size = struct.unpack_from("<4I4QQQ", data, at)
        tensors.append(Tensor(strings[layout : strings.index(b"\0", layout)].decode(), dtype, offset, size))
    return Head(data[: places[WEIGHTS][0]], table, tensors)


def strip(bundle: Path) -> None:
    """Replace model.edgeseq by model.stripped, a zip file of its head and its small tensors."""
    with open(bundle / FILE, "rb") as file:
        prefix = file.read(64 + 32 * 16)
        (n,) = struct.unpack_from("<I", prefix, 12)
        table = [struct.unpack_from("<IIQQQ", prefix, 64 + 32 * i) for i in range(n)]
        start = next(s[2] for s in table if s[0] == WEIGHTS)
        file.seek(0)
        head = read_head(file.read(start))
        kept = [t for t in head.tensors if t.bytes <= KEPT_BYTES]
        with zipfile.ZipFile(bundle / STRIPPED, "w", zipfile.ZIP_DEFLATED) as out:
            out.writestr("head", head.data)
            out.writestr("kept.json", json.dumps([[t.offset, t.bytes] for t in kept]))
            with out.open("kept", "w", force_zip64=True) as data:
                for t in kept:
                    file.seek(start + t.offset)
                    data.write(file.read(t.bytes))
    (bundle / FILE).unlink()


def refill(bundle: Path) -> bool:
    """Make model.edgeseq from model.stripped where only that is there; True when it was made."""
    if (bundle / FILE).is_file() or not (bundle / STRIPPED).is_file():
        return False
    with zipfile.ZipFile(bundle / STRIPPED) as source:
        head = read_head(source.read("head"))
        data, at, kept = source.read("kept"), 0, {}
        for offset, size in json.loads(source.read("kept.json")):
            kept[offset] = data[at : at + size]
            at += size
    part = bundle / (FILE + ".part")
    with open(part, "w+b") as file:
        file.write(head.data)
        crc = 0
        for piece in _weights(head, kept):
            file.write(piece)
            crc = zlib.crc32(piece, crc)
        file.seek(0)
        file.write(_sealed(head, crc))
    part.rename(bundle / FILE)
    return True


def _weights(head: Head, kept: dict[int, bytes]) -> Iterator[bytes]:
    tiles: dict[tuple[str, int], bytes] = {}
    end = 0
    for t in head.tensors:
        yield bytes(t.offset - end)
        end = t.offset + t.bytes
        if t.offset in kept:
            yield kept[t.offset]
            continue
        key = (t.layout if t.layout in QUANTISED else "", t.dtype)
        tile = tiles.setdefault(key, tiles.get(key) or _tile(*key))
        for at in range(0, t.bytes, len(tile)):
            yield tile[: t.bytes - at]
    yield bytes(head.weights[3] - end)


def _tile(layout: str, dtype: int) -> bytes:
    """A few megabytes of random weights; of a quantised layout whole records: 32 scales, then codes."""
    chance = random.Random(11)
    if layout:
        record = 64 + 2 * 512 * QUANTISED[layout] // 8
        codes = chance.randbytes(TILE)
        scales = _halves(chance, 32)
        return b"".join(scales + codes[at : at + record - 64] for at in range(0, TILE - record, record))
    if dtype == FLOAT16:
        return _halves(chance, TILE // 2)
    if dtype in (FLOAT32, BFLOAT16):
        values = array("f", _normals(chance, TILE // 4))
        if dtype == FLOAT32:
            return values.tobytes()
        return array("H", array("H", values.tobytes())[1::2]).tobytes()  # the upper half of each float
    return bytes(TILE)


def _normals(chance: random.Random, n: int) -> list[float]:
    """n values from 4096 different ones: drawing is what takes time."""
    some = [chance.gauss(0, SCALE) for _ in range(4096)]
    return chance.choices(some, k=n)


def _halves(chance: random.Random, n: int) -> bytes:
    some = [struct.pack("<e", value) for value in _normals(chance, 4096)]
    return b"".join(chance.choices(some, k=n))


def _sealed(head: Head, crc: int) -> bytes:
    """Header and table with the checksum of the new weights, and their own."""
    table = b"".join(struct.pack("<IIQQQ", *(s if s[0] != WEIGHTS else (s[0], crc, *s[2:]))) for s in head.table)
    blank = head.data[:60] + bytes(4)
    return head.data[:60] + struct.pack("<I", zlib.crc32(blank + table)) + table
