"""Files made to hurt: each defect is refused with its own sentence, and no damage raises anything but BundleError."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeseq.bundle import format as f
from edgeseq.bundle.plan import align
from edgeseq.bundle.reader import BundleFile
from edgeseq.bundle.writer import write_plan
from edgeseq.errors import BundleError, UsageError
from tests.bundle.plans import gpu_plan, recurrent_plan

HEADER = f.size_of(f.Header)
TABLE = f.size_of(f.SectionRecord)
N = len(f.SECTION_NAMES)


class File:
    """A bundle taken apart: header, table, sections. `build` puts it together again with checksums that fit."""

    def __init__(self, data: bytes) -> None:
        self.header = f.unpack(f.Header, data[:HEADER])[0]
        self.table = f.unpack(f.SectionRecord, data[HEADER : HEADER + N * TABLE])
        self.sections = {s.kind: bytearray(data[s.offset : s.offset + s.bytes]) for s in self.table}

    def rows(self, kind: int) -> list[Any]:
        return f.unpack(f.RECORDS[kind], bytes(self.sections[kind]))

    def edit(self, kind: int, index: int, **changes: Any) -> None:
        rows = self.rows(kind)
        rows[index] = rows[index]._replace(**changes)
        self.sections[kind] = bytearray(f.pack(rows))

    def edit_meta(self, change: Callable[[dict[str, Any]], None]) -> None:
        meta = json.loads(bytes(self.sections[f.META]))
        change(meta)
        self.sections[f.META] = bytearray(json.dumps(meta).encode())

    def build(self) -> bytes:
        body = bytearray(HEADER + N * TABLE)
        table = []
        for s in self.table:
            body += bytes(align(len(body), 4096 if s.kind == f.WEIGHTS else 64) - len(body))
            data = self.sections[s.kind]
            record = f.RECORDS.get(s.kind)
            count = len(data) // f.size_of(record) if record else len(data)
            table.append(f.SectionRecord(s.kind, zlib.crc32(data), len(body), len(data), count))
            body += data
        self.header = self.header._replace(file_bytes=len(body))
        return seal(bytes(body), self.header, table)


def seal(body: bytes, header: f.Header, table: list[f.SectionRecord]) -> bytes:
    packed = f.pack(table)
    head = header._replace(header_crc=0)
    head = head._replace(header_crc=zlib.crc32(f.pack([head]) + packed))
    return f.pack([head]) + packed + body[HEADER + len(packed) :]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "model.edgeseq"
    write_plan(recurrent_plan(), path)
    return path.read_bytes()


def refuse(data: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "model.edgeseq"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=sentence) as caught:
        BundleFile(path)
    assert caught.value.hint and "\n" not in str(caught.value)


def test_the_helper_rebuilds_the_same_file(good: bytes) -> None:
    assert File(good).build() == good


def test_a_missing_file_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a bundle"):
        BundleFile(tmp_path)
    with pytest.raises(UsageError, match="is not a bundle"):
        BundleFile(tmp_path / "missing")


@pytest.mark.parametrize("size", [0, 1, 63])
def test_shorter_than_a_header(size: int, good: bytes, tmp_path: Path) -> None:
    refuse(good[:size], "less than a header", tmp_path)


@pytest.mark.parametrize("size", [64, 100, 1000, -1])
def test_truncated(size: int, good: bytes, tmp_path: Path) -> None:
    refuse(good[:size], "its header says", tmp_path)


def test_longer_than_it_says(good: bytes, tmp_path: Path) -> None:
    refuse(good + b"x", "its header says", tmp_path)


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"EDGESEQ2"}, "starts with"),
    "version": ({"version": 2}, "format version 2, this edgeseq reads version 1"),
    "sections": ({"n_sections": 0xFFFFFFFF}, "4294967295 sections"),
    "state too small for the slots": ({"state_bytes": 128}, "takes 128 bytes at 128 of the state block"),
    "io too small": ({"io_bytes": 64}, "of the io block, which has 64"),
    "model id": ({"model_id": b"x" * 16}, "META names the model"),
    "context": ({"context": 5}, "META says context 0, the header 5"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header(name: str, good: bytes, tmp_path: Path) -> None:
    changes, sentence = HEADERS[name]
    file = File(good)
    refuse(seal(good, file.header._replace(**changes), file.table), sentence, tmp_path)


TABLES: dict[str, tuple[int, dict[str, Any], str]] = {
    "unknown kind": (3, {"kind": 99}, "unknown kind 99"),
    "twice": (3, {"kind": f.META}, "two META sections"),
    "off its alignment": (2, {"offset": 8}, "not a multiple of 64"),
    "weights off the page": (11, {"offset": 4096 + 64}, "not a multiple of 4096"),
    "overlapping": (4, {"offset": 64}, "before the end of what precedes it"),
    "past the end": (4, {"bytes": 1 << 62}, "after the file's"),
    "a gap": (10, {"offset": 4032}, "a gap before TOKENIZER"),
    "records that do not fill it": (4, {"records": 1}, "bytes of IO for 1 records"),
    "bytes behind the last": (11, {"bytes": 4, "records": 4}, "bytes after its last section"),
    "checksum": (4, {"crc": 1}, "IO section whose checksum"),
}


@pytest.mark.parametrize("name", TABLES)
def test_section_table(name: str, good: bytes, tmp_path: Path) -> None:
    index, changes, sentence = TABLES[name]
    file = File(good)
    file.table[index] = file.table[index]._replace(**changes)
    refuse(seal(good, file.header, file.table), sentence, tmp_path)


def test_a_gap_that_is_not_zero(good: bytes, tmp_path: Path) -> None:
    weights = File(good).table[-1].offset
    refuse(good[: weights - 1] + b"x" + good[weights:], "not zero-filled", tmp_path)


ROWS: dict[str, tuple[int, int, dict[str, Any], str]] = {
    "name outside": (f.TENSORS, 0, {"name": 1 << 30}, "STRINGS has"),
    "no name": (f.KERNELS, 0, {"name": 0}, "a kernel has no name"),
    "dtype": (f.TENSORS, 0, {"dtype": 8}, "dtype of tensor 'embed' is 8"),
    "rank": (f.TENSORS, 0, {"rank": 5}, "rank 5"),
    "dimension behind the rank": (f.TENSORS, 0, {"d3": 1}, "rank 2 with dimensions"),
    "dimension 0": (f.TENSORS, 0, {"d0": 0}, "rank 2 with dimensions"),
    "tensor past the weights": (f.TENSORS, 1, {"bytes": 1 << 63}, "of WEIGHTS, which has"),
    "tensor in front of its predecessor": (f.TENSORS, 1, {"offset": 0}, "before the one in front of it ends"),
    "slot of other size": (f.SLOTS, 0, {"d1": 4}, "float32 .1, 4, 8. but has 96 bytes"),
    "slot whose size overflows": (f.SLOTS, 0, {"d1": 1 << 63, "d2": 1 << 63}, "but has 96 bytes"),
    "update": (f.SLOTS, 0, {"update": 4}, "update of state slot 'conv.0' is 4"),
    "axis": (f.SLOTS, 0, {"axis": -2}, "axis -2"),
    "io of no graph": (f.IO, 0, {"graph": 2}, "belongs to graph 2, there are 2"),
    "role": (f.IO, 0, {"role": 9}, "role of 'tokens' is 9"),
    "direction": (f.IO, 0, {"direction": 2}, "direction of 'tokens' is 2"),
    "launches past the end": (f.GRAPHS, 1, {"n_launches": 9}, "launches 3.9"),
    "launches shared": (f.GRAPHS, 1, {"first_launch": 0}, "expected them to follow 3"),
    "launches left over": (f.GRAPHS, 1, {"n_launches": 2}, "traffic|LAUNCHES has 6 records"),
    "no step": (f.GRAPHS, 0, {"tokens": 2}, "consume .2, 8. tokens"),
    "backend": (f.KERNELS, 0, {"backend": 3}, "backend of kernel 'gather' is 3"),
    "code past the end": (f.KERNELS, 0, {"code_bytes": 1}, "CODE has 0 bytes"),
    "kernel": (f.LAUNCHES, 0, {"kernel": 3}, "launches kernel 3, there are 3"),
    "flags": (f.LAUNCHES, 0, {"flags": 2}, "unknown flags 0x2"),
    "grid": (f.LAUNCHES, 0, {"grid_x": 0}, "over the grid"),
    "block": (f.LAUNCHES, 0, {"block_x": 2}, "CPU kernel"),
    "arguments past the end": (f.LAUNCHES, 5, {"first_arg": 18}, "expected them to follow 17"),
    "argument count": (f.LAUNCHES, 0, {"n_args": 2}, "2 arguments, the kernel takes 3"),
    "space": (f.ARGS, 0, {"space": 4}, "space of an argument in graph 'step' is 4"),
    "access": (f.ARGS, 0, {"access": 0}, "access of an argument in graph 'step' is 0"),
    "argument past its block": (f.ARGS, 2, {"offset": (1 << 64) - 1}, "of arena, which has 256"),
    "argument between tensors": (f.ARGS, 1, {"offset": 20, "bytes": 560}, "outside any one tensor"),
}


@pytest.mark.parametrize("name", ROWS)
def test_records(name: str, good: bytes, tmp_path: Path) -> None:
    kind, index, changes, sentence = ROWS[name]
    file = File(good)
    file.edit(kind, index, **changes)
    refuse(file.build(), sentence, tmp_path)


GPU_ROWS: dict[str, tuple[int, int, dict[str, Any], str]] = {
    "two backends": (f.KERNELS, 1, {"backend": 2, "code": 2}, "is for cuda, the first for another"),
    "kind of code": (f.KERNELS, 0, {"code": 2}, "code of its own or of the wrong kind"),
    "code of its own": (f.KERNELS, 2, {"code_bytes": 9}, "code of its own"),
    "code elsewhere": (f.KERNELS, 2, {"code_offset": 1, "code_bytes": 9}, "code of its own"),
    "code past the end": (f.KERNELS, 0, {"code_offset": 1}, "the code of kernel 'gather' ends at"),
    "group": (f.LAUNCHES, 0, {"block_x": 1025}, "beyond opencl"),
    "groups": (f.LAUNCHES, 1, {"grid_x": 1 << 31, "grid_y": 1}, "over the grid"),
    "no group": (f.LAUNCHES, 1, {"grid_z": 0}, "over the grid"),
    "next of one graph": (f.IO, 2, {"role": 4}, "not an output of every graph"),
}


@pytest.mark.parametrize("name", GPU_ROWS)
def test_records_of_a_gpu(name: str, tmp_path: Path) -> None:
    write_plan(gpu_plan(), tmp_path / "gpu.edgeseq")
    kind, index, changes, sentence = GPU_ROWS[name]
    file = File((tmp_path / "gpu.edgeseq").read_bytes())
    file.edit(kind, index, **changes)
    refuse(file.build(), sentence, tmp_path)


@pytest.mark.parametrize("changes", [{"grid_y": 65536}, {"block_x": 1, "block_z": 65}])
def test_what_cuda_cannot_launch(changes: dict[str, int], tmp_path: Path) -> None:
    write_plan(gpu_plan(), tmp_path / "gpu.edgeseq")
    file = File((tmp_path / "gpu.edgeseq").read_bytes())
    for i in range(3):
        file.edit(f.KERNELS, i, backend=2, code=2)
    file.edit(f.LAUNCHES, 0, **changes)
    refuse(file.build(), "beyond cuda", tmp_path)


def test_a_next_token_of_the_wrong_kind(tmp_path: Path) -> None:
    """The logits of every graph cannot be the next token."""
    write_plan(gpu_plan(), tmp_path / "gpu.edgeseq")
    file = File((tmp_path / "gpu.edgeseq").read_bytes())
    roles = [i for i, r in enumerate(f.unpack(f.IoRecord, bytes(file.sections[f.IO]))) if f.ROLES[r.role] == "logits"]
    for i in roles:
        file.edit(f.IO, i, role=4)
    refuse(file.build(), "cannot be the next token", tmp_path)


def _nest(meta: dict[str, Any]) -> None:
    meta["manifest"]["graphs"] = {"0": 1}


METAS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no target": (lambda m: m.pop("target"), "no object 'target'"),
    "no traffic": (lambda m: m["traffic"].pop("step"), "no traffic for the 3 launches"),
    "graphs are no list": (_nest, "graphs is .* expected a list"),
    "a path as file name": (
        lambda m: m["manifest"]["graphs"][0].update(file="../../etc/passwd"),
        "not a plain file name",
    ),
    "vocabulary as text": (lambda m: m["manifest"].update(vocab_size="17"), "vocab_size is '17'"),
}


@pytest.mark.parametrize("name", METAS)
def test_meta(name: str, good: bytes, tmp_path: Path) -> None:
    change, sentence = METAS[name]
    file = File(good)
    file.edit_meta(change)
    refuse(file.build(), sentence, tmp_path)


RAW: dict[str, tuple[int, bytes, str]] = {
    "META is not JSON": (f.META, b"{", "META is not JSON"),
    "META is a list": (f.META, b"[]", "META is not a JSON object"),
    "META nests without end": (f.META, b"[" * 100_000, "META is not JSON"),
    "STRINGS empty": (f.STRINGS, b"", "STRINGS does not start and end with a NUL"),
    "STRINGS open": (f.STRINGS, b"\0embed", "STRINGS does not start and end with a NUL"),
    "STRINGS not UTF-8": (f.STRINGS, b"\0" + b"\xff" * 200 + b"\0", "not UTF-8"),
    "TOKENIZER empty": (f.TOKENIZER, b"", "TOKENIZER section has 0 bytes"),
    "TOKENIZER unknown": (f.TOKENIZER, b"\7\0\0\0", "tokenizer is 7"),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_sections(name: str, good: bytes, tmp_path: Path) -> None:
    kind, data, sentence = RAW[name]
    file = File(good)
    file.sections[kind] = bytearray(data)
    refuse(file.build(), sentence, tmp_path)


def test_every_flipped_byte_is_noticed(good: bytes, tmp_path: Path) -> None:
    generator = random.Random(0)
    path = tmp_path / "model.edgeseq"
    for _ in range(150):
        data = bytearray(good)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        with pytest.raises(BundleError):
            BundleFile(path)


def test_damage_behind_valid_checksums_never_crashes(good: bytes, tmp_path: Path) -> None:
    generator = random.Random(1)
    write_plan(gpu_plan(), tmp_path / "gpu.edgeseq")
    sources = [good, (tmp_path / "gpu.edgeseq").read_bytes()]
    path = tmp_path / "model.edgeseq"
    refused = 0
    for round_ in range(400):
        file = File(sources[round_ % 2])
        kind = generator.choice([k for k in file.sections if k != f.WEIGHTS and file.sections[k]])
        section = file.sections[kind]
        for _ in range(generator.randrange(1, 4)):
            section[generator.randrange(len(section))] = generator.choice([0, 1, 0x7F, 0xFF, generator.randrange(256)])
        path.write_bytes(file.build())
        try:
            BundleFile(path).close()
        except BundleError:
            refused += 1
    assert refused > 200


def test_weights_can_be_left_unchecked(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.edgeseq"
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BundleError, match="WEIGHTS section whose checksum"):
        BundleFile(path)
    BundleFile(path, check_weights=False).close()
