"""A bundle written by hand, so that the runtime is tested without the compiler.

The model, with channels C = 16, vocabulary V = 32, context N = 64 rows of history:
    e = E[token];  s <- s/2 + e;  m <- m + position;  h[position] <- e;  logits = W s + sum(h[0..position]) + m
`s` overwrites, `h` appends along axis 1, `m` is an int32 that starts at 3. Step graph and chunks of 4 and 8.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

C, V, N = 16, 32, 64
CHUNKS = (1, 4, 8)
DTYPE = {"float32": 0, "float16": 1, "bfloat16": 2, "int64": 3, "int32": 4, "int8": 5}


def align(n: int, to: int = 64) -> int:
    return -(-n // to) * to


def embedding() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((V, C)).astype(np.float32)


def head() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((V, C)).astype(np.float32)


class Reference:
    """The same model in numpy: `step(token) -> logits [V]`."""

    def __init__(self) -> None:
        self.E, self.W = embedding().astype(np.float64), head().astype(np.float64)
        self.s, self.sum, self.m, self.position = np.zeros(C), 0.0, 3, 0

    def step(self, token: int) -> np.ndarray:
        e = self.E[token]
        self.s = self.s / 2 + e
        self.m += self.position
        self.sum += e.sum()
        self.position += 1
        return self.W @ self.s + self.sum + self.m


@dataclass
class Parts:
    """Everything that goes into a file, open to vandalism: change a field, then `build()`."""

    strings: bytes = b""
    tensors: list[list] = field(default_factory=list)
    slots: list[list] = field(default_factory=list)
    io: list[list] = field(default_factory=list)
    graphs: list[list] = field(default_factory=list)
    kernels: list[list] = field(default_factory=list)
    launches: list[list] = field(default_factory=list)
    args: list[list] = field(default_factory=list)
    code: bytes = b""
    tokenizer: bytes = struct.pack("<I", 1)
    meta: bytes = b"{}"
    weights: bytes = b""
    magic: bytes = b"EDGESEQ\0"
    version: int = 1
    model_id: bytes = bytes(range(16))
    state_bytes: int = 0
    io_bytes: int = 0
    context: int = N

    def name(self, text: str) -> int:
        """Offset of a name in STRINGS, added when new."""
        data = text.encode() + b"\0"
        at = self.strings.find(b"\0" + data)
        if at < 0:
            self.strings += data if self.strings else b"\0" + data
            at = self.strings.rfind(b"\0" + data)
        return at + 1

    def sections(self) -> list[tuple[int, bytes, int]]:
        """(kind, bytes, count) in file order."""

        def rows(layout: str, records: list[list]) -> tuple[bytes, int]:
            return b"".join(struct.pack("<" + layout, *r) for r in records), len(records)

        raw = [(1, self.meta), (2, self.strings), (10, self.code), (11, self.tokenizer), (12, self.weights)]
        made = [
            (3, *rows("4I4QQQ", self.tensors)), (4, *rows("4Iif4QQQ", self.slots)), (5, *rows("6I4QQQ", self.io)),
            (6, *rows("4IQ", self.graphs)), (7, *rows("4IQQ", self.kernels)), (8, *rows("10I", self.launches)),
            (9, *rows("IIQQ", self.args)),
        ]  # fmt: skip
        return sorted([(kind, data, len(data)) for kind, data in raw] + made)

    @property
    def plan_id(self) -> int:
        crc = 0
        for kind, data, _ in self.sections():
            crc = zlib.crc32(data, crc) if kind in (7, 8, 9) else crc
        return crc

    def build(self) -> bytes:
        sections = self.sections()
        table, body, at = [], b"", 64 + 32 * len(sections)
        for kind, data, count in sections:
            start = align(at, 4096 if kind == 12 else 64)
            body += bytes(start - at) + data
            at = start + len(data)
            table.append([kind, zlib.crc32(data), start, len(data), count])
        return seal(self.header(len(sections), at), table, body)

    def header(self, n_sections: int, file_bytes: int) -> list:
        return [
            self.magic, self.version, n_sections, file_bytes, self.model_id, self.state_bytes, self.io_bytes,
            self.context, 0,
        ]  # fmt: skip


def seal(header: list, table: list[list], body: bytes) -> bytes:
    """Header, table and the rest, with a true header checksum."""
    rows = b"".join(struct.pack("<IIQQQ", *row) for row in table)
    crc = zlib.crc32(rows, zlib.crc32(struct.pack("<8sIIQ16sQQII", *header)))
    return struct.pack("<8sIIQ16sQQII", *header[:-1], crc) + rows + body


def resealed(data: bytes) -> bytes:
    """The same file after vandalism, every checksum made true again (where the table still makes sense)."""
    data = bytearray(data)
    n = min(struct.unpack_from("<I", data, 12)[0], (len(data) - 64) // 32, 64)
    for i in range(n):
        _, _, offset, size, _ = struct.unpack_from("<IIQQQ", data, 64 + 32 * i)
        if offset + size <= len(data):
            struct.pack_into("<I", data, 64 + 32 * i + 4, zlib.crc32(data[offset : offset + size]))
    blank = data[:60] + bytes(4) + data[64 : 64 + 32 * n]
    struct.pack_into("<I", data, 60, zlib.crc32(blank))
    return bytes(data)


def parts() -> Parts:
    """The model above as records."""
    p = Parts()
    p.name("")
    p.weights = embedding().tobytes() + head().tobytes()
    table = V * C * 4
    p.tensors = [
        [p.name("E"), p.name("plain"), 0, 2, V, C, 0, 0, 0, table],
        [p.name("W"), p.name("plain"), 0, 2, V, C, 0, 0, table, table],
    ]
    s, h, m = 0, 64, 64 + N * C * 4
    p.state_bytes = m + 64
    p.slots = [
        [p.name("s"), 0, 2, 0, -1, 0.0, 1, C, 0, 0, s, C * 4],
        [p.name("h"), 0, 3, 3, 1, 0.0, 1, N, C, 0, h, N * C * 4],
        [p.name("m"), 4, 1, 0, -1, 3.0, 1, 0, 0, 0, m, 4],
    ]
    kernels = [("gather", 3), *((f"leak{t}", 5) for t in CHUNKS), *((f"logits{t}", 6) for t in CHUNKS)]
    p.kernels = [[p.name(k), n, 0, 0, 0, 0] for k, n in kernels]
    logits_at = 2 * 64
    p.io_bytes = logits_at + V * 4
    for g, tokens in enumerate(CHUNKS):
        e = tokens * C * 4
        p.graphs.append([p.name(f"chunk{tokens}"), tokens, len(p.launches), 3, align(e) + 64])
        p.io += [
            [p.name("tokens"), 3, 2, 1, g, 0, 1, tokens, 0, 0, 0, tokens * 8],
            [p.name("position"), 3, 1, 2, g, 0, 1, 0, 0, 0, 64, 8],
            [p.name("logits"), 0, 3, 3, g, 1, 1, 1, V, 0, logits_at, V * 4],
        ]
        launches = [
            ("gather", 0, tokens, [(3, 1, 0, tokens * 8), (0, 1, 0, table), (1, 2, 0, e)]),
            (f"leak{tokens}", 0, 1, [(1, 1, 0, e), (3, 1, 64, 8), (2, 3, s, C * 4), (2, 3, h, N * C * 4),
                                     (2, 3, m, 4)]),
            (f"logits{tokens}", 1, V, [(2, 1, s, C * 4), (2, 1, h, N * C * 4), (2, 1, m, 4), (3, 1, 64, 8),
                                       (0, 1, table, table), (3, 2, logits_at, V * 4)]),
        ]  # fmt: skip
        for name, flags, grid, args in launches:
            kernel = [k for k, _ in kernels].index(name)
            p.launches.append([kernel, flags, grid, 1, 1, 1, 1, 1, len(p.args), len(args)])
            p.args += [list(a) for a in args]
    return p
