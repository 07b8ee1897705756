"""Every defect a bundle can have: its own code, a sentence with the values. The checksums are true unless they are
the defect."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeseq import runtime_abi as abi
from runtimes import C_DIR

from . import handmade
from .handmade import Parts

HEADER = (C_DIR / "include" / "edgeseq.h").read_text()
CLASSES = {name: int(value) for name, value in re.findall(r"#define (ES_CLASS_\w+) (\d+)", HEADER)}
CODES = {
    name: CLASSES[cls] | int(detail) << 8
    for name, cls, detail in re.findall(r"#define (ES_E_\w+) ES_STATUS\((\w+), (\d+)\)", HEADER)
}

BIG = 2**64 - 64


def put(table: str, row: int, column: int, value: object) -> Callable[[Parts], None]:
    def change(p: Parts) -> None:
        getattr(p, table)[row][column] = value

    return change


def field(name: str, value: object) -> Callable[[Parts], None]:
    return lambda p: setattr(p, name, value)


def drop(table: str, *rows: int) -> Callable[[Parts], None]:
    def change(p: Parts) -> None:
        setattr(p, table, [r for i, r in enumerate(getattr(p, table)) if i not in rows])

    return change


def unnamed(p: Parts) -> None:
    p.slots[0][0] = 0


def name_outside(p: Parts) -> None:
    p.graphs[0][0] = len(p.strings)


def two_roles(p: Parts) -> None:
    p.io[1][3] = 1


def more_vocabulary(p: Parts) -> None:
    p.io_bytes += 1024
    p.io[5][6:] = [1, 1, 64, 0, 128, 256]


def negative_init(p: Parts) -> None:
    p.slots[2][5] = 0.5


def gpu(backend: int, *, block: tuple[int, ...] = (1, 1, 1), grid: tuple[int, ...] = (1, 1, 1), only: int = 99):  # type: ignore[no-untyped-def]
    """Every kernel (or the first `only`) for a GPU backend, launch 0 over `grid` and `block`."""

    def change(p: Parts) -> None:
        p.code = b"x" * 100
        for kernel in p.kernels[:only]:
            kernel[2:] = [backend, backend, 0, 50]
        p.launches[0][2:8] = [*grid, *block]

    return change


def other_code(p: Parts) -> None:
    gpu(1)(p)
    p.kernels[1][4] = 1


def other_kind(p: Parts) -> None:
    gpu(1)(p)
    p.kernels[0][3] = 2


def code_outside(p: Parts) -> None:
    gpu(1)(p)
    p.kernels[0][5] = 101


def next_token(dtype: int, elements: int, *graphs: int) -> Callable[[Parts], None]:
    """An output of role `next` in these graphs."""

    def change(p: Parts) -> None:
        at = p.io_bytes
        p.io_bytes += 64
        size = elements * {0: 4, 3: 8, 4: 4}[dtype]
        p.io += [[p.name("next"), dtype, 1, 4, g, 1, elements, 0, 0, 0, at, size] for g in graphs]

    return change


def no_graph(p: Parts) -> None:
    p.graphs, p.io = [], []


DEFECTS: list[tuple[str, str, Callable[[Parts], None]]] = [
    ("ES_E_MAGIC", "does not start with EDGESEQ", field("magic", b"EDGESEX\0")),
    ("ES_E_VERSION", "version 2", field("version", 2)),
    ("ES_E_STRINGS", "NUL", field("strings", b"abc\0")),
    ("ES_E_STRINGS", "NUL", field("strings", b"")),
    ("ES_E_STRING", "slot 0 has no name", unnamed),
    ("ES_E_STRING", "graph 0 lies outside", name_outside),
    ("ES_E_BUNDLE_TOKENIZER", "kind 9", field("tokenizer", struct.pack("<I", 9))),
    ("ES_E_BUNDLE_TOKENIZER", "no kind", field("tokenizer", b"\1")),
    ("ES_E_BUNDLE_TOKENIZER", "no data", field("tokenizer", struct.pack("<II", 1, 0))),
    ("ES_E_STRING", "layout of 'E'", put("tensors", 0, 1, 10**6)),
    ("ES_E_ENUM", "dtype 8", put("tensors", 0, 2, 8)),
    ("ES_E_DIMS", "shape of 'E'", put("tensors", 0, 3, 5)),
    ("ES_E_DIMS", "shape of 'E'", put("tensors", 0, 4, 0)),
    ("ES_E_DIMS", "shape of 'E'", put("tensors", 0, 7, 1)),
    ("ES_E_TENSOR", "'W' is misplaced", put("tensors", 1, 8, 2049)),
    ("ES_E_TENSOR", "'W' is misplaced", put("tensors", 1, 8, BIG)),
    ("ES_E_TENSOR", "'W' is misplaced", put("tensors", 1, 9, BIG)),
    ("ES_E_TENSOR", "'W' overlaps", put("tensors", 1, 8, 0)),
    ("ES_E_ENUM", "update 4", put("slots", 0, 3, 4)),
    ("ES_E_ENUM", "dtype 99", put("slots", 0, 1, 99)),
    ("ES_E_ENUM", "a value that its dtype 0 lacks", put("slots", 0, 5, float("nan"))),
    ("ES_E_ENUM", "a value that its dtype 4 lacks", negative_init),
    ("ES_E_DIMS", "shape of 'h'", put("slots", 1, 7, 63)),
    ("ES_E_DIMS", "shape of 'h'", put("slots", 1, 6, 2**62)),
    ("ES_E_SLOT", "'h' is misplaced", put("slots", 1, 10, 32)),
    ("ES_E_SLOT", "'h' is misplaced", put("slots", 1, 10, BIG)),
    ("ES_E_SLOT", "overlap", put("slots", 1, 10, 0)),
    ("ES_E_SLOT", "'m' is misplaced", field("state_bytes", 64 + 64 * 64)),
    ("ES_E_AXIS", "'s' has the time axis 0", put("slots", 0, 4, 0)),
    ("ES_E_AXIS", "'h' has the time axis 3", put("slots", 1, 4, 3)),
    ("ES_E_AXIS", "'h' has the time axis -1", put("slots", 1, 4, -1)),
    ("ES_E_AXIS", "64 rows for a context of 65", field("context", 65)),
    ("ES_E_AXIS", "64 rows for a context of 0", field("context", 0)),
    ("ES_E_ENUM", "role 5", put("io", 0, 3, 5)),
    ("ES_E_ENUM", "direction 2", put("io", 0, 5, 2)),
    ("ES_E_DIMS", "shape of 'tokens'", put("io", 0, 11, 16)),
    ("ES_E_IO", "graph 3 of 3", put("io", 0, 4, 3)),
    ("ES_E_IO", "'tokens' is misplaced", put("io", 0, 10, 256)),
    ("ES_E_IO", "overlap", put("io", 0, 10, 64)),
    ("ES_E_ROLE", "'position' plays a role that is taken", two_roles),
    ("ES_E_ROLE", "wrong for its role", put("io", 2, 5, 0)),
    ("ES_E_ROLE", "wrong for its role", put("io", 0, 5, 1)),
    ("ES_E_ROLE", "graph 1 takes or gives other things", drop("io", 3)),
    ("ES_E_ROLE", "graph 1 takes or gives other things", more_vocabulary),
    ("ES_E_ROLE", "gives no logits", drop("io", 2, 5, 8)),
    ("ES_E_GRAPH", "graph 0 consumes 2", put("graphs", 0, 1, 2)),
    ("ES_E_GRAPH", "graph 2 consumes 4", put("graphs", 2, 1, 4)),
    ("ES_E_GRAPH", "no step graph", no_graph),
    ("ES_E_GRAPH", "graph 1 has launches 4", put("graphs", 1, 2, 4)),
    ("ES_E_GRAPH", "graph 2 has launches 6\\+4", put("graphs", 2, 3, 4)),
    ("ES_E_GRAPH", "belong to no graph", put("graphs", 2, 3, 2)),
    ("ES_E_ENUM", "backend 3", put("kernels", 0, 2, 3)),
    ("ES_E_KERNEL", "outside its section", put("kernels", 0, 4, 1)),
    ("ES_E_KERNEL", "0 bytes of code", put("kernels", 0, 2, 1)),
    ("ES_E_LAUNCH", "kernel 7 of 7", put("launches", 0, 0, 7)),
    ("ES_E_LAUNCH", "unknown flags 2", put("launches", 0, 1, 2)),
    ("ES_E_LAUNCH", "out of range", put("launches", 0, 2, 0)),
    ("ES_E_LAUNCH", "out of range", put("launches", 0, 2, 2**31)),
    ("ES_E_LAUNCH", "out of range", put("launches", 0, 5, 0)),
    ("ES_E_LAUNCH", "more than one dimension", put("launches", 0, 3, 2)),
    ("ES_E_LAUNCH", "more than one dimension", put("launches", 0, 5, 2)),
    ("ES_E_LAUNCH", "2 arguments to a kernel of 3", put("launches", 0, 9, 2)),
    ("ES_E_LAUNCH", "arguments 1\\+3", put("launches", 0, 8, 1)),
    ("ES_E_ENUM", "space 4", put("args", 0, 0, 4)),
    ("ES_E_ENUM", "access 0", put("args", 0, 1, 0)),
    ("ES_E_ARG", "argument 0: 0 bytes", put("args", 0, 3, 0)),
    ("ES_E_ARG", "argument 0: 257 bytes at 0 of 256", put("args", 0, 3, 257)),
    ("ES_E_ARG", "argument 0:", put("args", 0, 2, BIG)),
    ("ES_E_ARG", "would write weights", put("args", 1, 1, 3)),
    ("ES_E_ARG", "within one tensor", put("args", 1, 2, 64)),
    ("ES_E_ARG", "argument 2: 64 bytes at 0 of 32", put("graphs", 0, 4, 32)),
    ("ES_E_BACKEND", "'gather' needs OpenCL", gpu(1)),
    ("ES_E_BACKEND", "'gather' needs CUDA", gpu(2)),
    ("ES_E_KERNEL", "'leak1' is for backend 0, the first for 1", gpu(1, only=1)),
    ("ES_E_KERNEL", "'leak1' has code of its own", other_code),
    ("ES_E_KERNEL", "'gather' has code of its own or of the wrong kind", other_kind),
    ("ES_E_KERNEL", "the code of kernel 'gather' lies outside", code_outside),
    ("ES_E_LAUNCH", "groups of 1025", gpu(1, block=(1025, 1, 1))),
    ("ES_E_LAUNCH", "groups of 2048", gpu(2, block=(2, 32, 32))),
    ("ES_E_LAUNCH", "grid or block out of range", gpu(1, block=(1, 0, 1))),
    ("ES_E_LAUNCH", "grid or block out of range", gpu(1, grid=(2**16, 2**16, 1))),
    ("ES_E_LAUNCH", "out of CUDA's range", gpu(2, block=(1, 1, 65))),
    ("ES_E_LAUNCH", "out of CUDA's range", gpu(2, grid=(1, 65536, 1))),
    ("ES_E_ROLE", "next token of graph 1", next_token(3, 1, 0)),
    ("ES_E_ROLE", "next token of graph 0", next_token(4, 1, 0, 1, 2)),
    ("ES_E_ROLE", "wrong for its role", next_token(0, 1, 0, 1, 2)),
    ("ES_E_ROLE", "wrong for its role", next_token(3, 2, 0, 1, 2)),
    ("ES_E_PLAN_ID", "compiled for plan", put("launches", 2, 1, 0)),
]


def patched(at: int, layout: str, value: int, reseal: bool = True) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        size = struct.calcsize("<" + layout)
        data = data[:at] + struct.pack("<" + layout, value) + data[at + size :]
        return handmade.resealed(data) if reseal else data

    return change


def section(index: int, column: int) -> int:
    """Where a number of the section table stands."""
    return 64 + 32 * index + (0, 4, 8, 16, 24)[column]


def shorter_weights(data: bytes) -> bytes:
    data = patched(section(11, 3), "Q", 4032)(data)
    return patched(section(11, 4), "Q", 4032)(data)


FILE_DEFECTS: list[tuple[str, str, Callable[[bytes], bytes]]] = [
    ("ES_E_TRUNCATED", "too few", lambda d: d[:63]),
    ("ES_E_TRUNCATED", "truncated: 64 of", lambda d: d[:64]),
    ("ES_E_TRUNCATED", "section table", lambda d: handmade.resealed(d[:16] + struct.pack("<Q", 400) + d[24:400])),
    ("ES_E_TRUNCATED", "truncated: 8191 of 8192", lambda d: d[:-1]),
    ("ES_E_FILE_BYTES", "1 bytes follow", lambda d: d + b"\0"),
    ("ES_E_HEADER_CRC", "header checksum", patched(32, "B", 77, reseal=False)),
    ("ES_E_HEADER_CRC", "header checksum", patched(section(3, 4), "Q", 77, reseal=False)),
    ("ES_E_SECTION_KIND", "11 sections", patched(12, "I", 11)),
    ("ES_E_SECTION_KIND", "kind 13", patched(section(3, 0), "I", 13)),
    ("ES_E_SECTION_KIND", "STRINGS is there twice", patched(section(2, 0), "I", 2)),
    ("ES_E_SECTION_ALIGN", "IO starts at", patched(section(4, 2), "Q", 1025)),
    ("ES_E_SECTION_BOUNDS", "IO ends beyond", patched(section(4, 2), "Q", BIG)),
    ("ES_E_SECTION_BOUNDS", "WEIGHTS ends beyond", patched(section(11, 3), "Q", 2**63)),
    ("ES_E_SECTION_BOUNDS", "TENSORS overlaps", patched(section(2, 2), "Q", 448)),
    ("ES_E_SECTION_COUNT", "SLOTS has 216 bytes for 4", patched(section(3, 4), "Q", 4)),
    ("ES_E_SECTION_COUNT", "SLOTS has 215 bytes", patched(section(3, 3), "Q", 215)),
    ("ES_E_SECTION_CRC", "META is damaged", patched(448, "B", 77, reseal=False)),
    ("ES_E_SECTION_GAP", "byte 450 before", patched(450, "B", 1)),
    ("ES_E_SECTION_GAP", "IO starts 296 bytes late", patched(section(4, 2), "Q", 1280)),
    ("ES_E_SECTION_END", "the last section ends at", shorter_weights),
]


@pytest.fixture(scope="module")
def library(handmade_bundle: Path) -> ctypes.CDLL:
    return abi.open_library(handmade_bundle / "libmodel.so")


def refusal(library: ctypes.CDLL, path: Path) -> tuple[int, str]:
    handle, why, options = ctypes.c_void_p(), abi.Error(), abi.Options(n_threads=1)
    status = library.es_model_open(str(path).encode(), ctypes.byref(options), ctypes.byref(handle), ctypes.byref(why))
    assert not handle.value or status == 0
    if status == 0:
        library.es_model_close(ctypes.byref(handle))
    return status, why.text.decode()


def check(library: ctypes.CDLL, path: Path, code: str, sentence: str) -> None:
    status, text = refusal(library, path)
    names = {value: name for name, value in CODES.items()}
    assert names.get(status, status) == code, text
    assert re.search(sentence, text), text


@pytest.mark.parametrize(("code", "sentence", "change"), DEFECTS, ids=[f"{c[5:]}-{s[:30]}" for c, s, _ in DEFECTS])
def test_a_defect_of_a_record(
    library: ctypes.CDLL, tmp_path: Path, code: str, sentence: str, change: Callable[[Parts], None]
) -> None:
    p = handmade.parts()
    change(p)
    (tmp_path / "m").write_bytes(p.build())
    check(library, tmp_path / "m", code, sentence)


@pytest.mark.parametrize(
    ("code", "sentence", "change"), FILE_DEFECTS, ids=[f"{c[5:]}-{s[:30]}" for c, s, _ in FILE_DEFECTS]
)
def test_a_defect_of_the_file(
    library: ctypes.CDLL, tmp_path: Path, code: str, sentence: str, change: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "m").write_bytes(change(handmade.parts().build()))
    check(library, tmp_path / "m", code, sentence)


def test_the_file_without_defect_opens(library: ctypes.CDLL, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(handmade.parts().build())
    assert refusal(library, tmp_path / "m") == (0, "")


def test_every_code_has_a_sentence_and_a_test(library: ctypes.CDLL) -> None:
    sentences = {name: library.es_status_text(code).decode() for name, code in CODES.items()}
    assert "unknown status" not in sentences.values() and len(set(sentences.values())) == len(sentences)
    tested = {code for code, _, _ in DEFECTS + FILE_DEFECTS}
    formats = {name for name, code in CODES.items() if code & 0xFF == CLASSES["ES_CLASS_FORMAT"]}
    assert formats - tested == {"ES_E_WEIGHTS_CRC"}, "es_model_check has its own test"
