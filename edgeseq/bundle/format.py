"""The records of docs/bundle-format.md: field names and byte layouts, in one place.

Each record is a named tuple decorated with its layout; `pack` and `unpack` turn lists of records into bytes and back.
Little-endian, packed, no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct
from typing import Any, NamedTuple, TypeVar

MAGIC = b"EDGESEQ\0"
VERSION = 1
MODEL_FILE = "model.edgeseq"
SECTION_ALIGNMENT = 64
WEIGHTS_ALIGNMENT = 4096
MAX_RANK = 4

META, STRINGS, TENSORS, SLOTS, IO, GRAPHS, KERNELS, LAUNCHES, ARGS, CODE, TOKENIZER, WEIGHTS = range(1, 13)
SECTION_NAMES = {
    META: "META", STRINGS: "STRINGS", TENSORS: "TENSORS", SLOTS: "SLOTS", IO: "IO", GRAPHS: "GRAPHS",
    KERNELS: "KERNELS", LAUNCHES: "LAUNCHES", ARGS: "ARGS", CODE: "CODE", TOKENIZER: "TOKENIZER", WEIGHTS: "WEIGHTS",
}  # fmt: skip

# Position in the tuple is the number in the file.
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
UPDATES = ("overwrite", "shift", "ring", "append")
ROLES = ("data", "tokens", "position", "logits", "next")
DIRECTIONS = ("in", "out")
BACKENDS = ("cpu", "opencl", "cuda")
CODE_KINDS = ("none", "source", "binary")
SPACES = ("weights", "arena", "state", "io")
ACCESSES = ("", "r", "w", "rw")
TOKENIZERS = ("none", "bytes")
LAUNCH_OUTPUTS_ONLY = 1

R = TypeVar("R")
LAYOUTS: dict[type, Struct] = {}
"""Byte layout of each record class."""


def record(layout: str) -> Callable[[type[R]], type[R]]:
    """Class decorator: the fields of the class lie in a file as `layout` (struct's language) says."""

    def register(kind: type[R]) -> type[R]:
        LAYOUTS[kind] = Struct(layout)
        return kind

    return register


def size_of(kind: type) -> int:
    """Bytes of one record."""
    return LAYOUTS[kind].size


@record("<8sIIQ16sQQII")
class Header(NamedTuple):
    magic: bytes
    version: int
    n_sections: int
    file_bytes: int
    model_id: bytes
    state_bytes: int
    io_bytes: int
    context: int
    header_crc: int


@record("<IIQQQ")
class SectionRecord(NamedTuple):
    kind: int
    crc: int
    offset: int
    bytes: int
    records: int


@record("<4I4QQQ")
class TensorRecord(NamedTuple):
    name: int
    layout: int
    dtype: int
    rank: int
    d0: int
    d1: int
    d2: int
    d3: int
    offset: int
    bytes: int


@record("<4Iif4QQQ")
class SlotRecord(NamedTuple):
    name: int
    dtype: int
    rank: int
    update: int
    axis: int
    init: float
    d0: int
    d1: int
    d2: int
    d3: int
    offset: int
    bytes: int


@record("<6I4QQQ")
class IoRecord(NamedTuple):
    name: int
    dtype: int
    rank: int
    role: int
    graph: int
    direction: int
    d0: int
    d1: int
    d2: int
    d3: int
    offset: int
    bytes: int


@record("<4IQ")
class GraphRecord(NamedTuple):
    name: int
    tokens: int
    first_launch: int
    n_launches: int
    arena_bytes: int


@record("<4IQQ")
class KernelRecord(NamedTuple):
    name: int
    n_args: int
    backend: int
    code: int
    code_offset: int
    code_bytes: int


@record("<10I")
class LaunchRecord(NamedTuple):
    kernel: int
    flags: int
    grid_x: int
    grid_y: int
    grid_z: int
    block_x: int
    block_y: int
    block_z: int
    first_arg: int
    n_args: int


@record("<IIQQ")
class ArgRecord(NamedTuple):
    space: int
    access: int
    offset: int
    bytes: int


RECORDS: dict[int, Any] = {
    TENSORS: TensorRecord, SLOTS: SlotRecord, IO: IoRecord, GRAPHS: GraphRecord,
    KERNELS: KernelRecord, LAUNCHES: LaunchRecord, ARGS: ArgRecord,
}  # fmt: skip
"""Sections made of fixed-size records."""


def pack(records: Iterable[Any]) -> bytes:
    """Records of one kind, one after the other."""
    return b"".join(LAYOUTS[type(r)].pack(*r) for r in records)


def unpack(kind: type[R], data: bytes | memoryview) -> list[R]:
    """The records of class `kind` in `data`, whose length must be a multiple of the record's."""
    return [kind(*fields) for fields in LAYOUTS[kind].iter_unpack(data)]


def dims4(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A shape of rank <= 4, its unused dimensions 0."""
    d = (*shape, 0, 0, 0, 0)
    return d[0], d[1], d[2], d[3]
