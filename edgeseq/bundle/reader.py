"""`model.edgeseq` -> Plan, through a memory map. Hostile files are refused with a sentence, never with a crash."""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

from edgeseq.bundle import format as f
from edgeseq.bundle.decode import decode
from edgeseq.bundle.plan import align
from edgeseq.errors import BundleError, UsageError

HINT = "compile the model again"
_CHUNK = 1 << 24


class BundleFile:
    """An open, checked `model.edgeseq`.

    header:   format.Header          sections: kind -> SectionRecord
    plan:     Plan; tensors' `data()` are views of the map and live as long as this object is open
    plan_id:  the number the library is stamped with

    path: the file, or the bundle directory that holds it. check_weights=False skips the CRC of WEIGHTS, the one
    check whose time grows with the model. Raises UsageError if there is no such file, BundleError for any defect.
    """

    def __init__(self, path: Path, check_weights: bool = True) -> None:
        path = Path(path)
        self.path = path / f.MODEL_FILE if path.is_dir() else path
        if not self.path.is_file():
            raise UsageError(f"{path} is not a bundle: there is no {self.path.name}", "make one with 'edgeseq compile'")
        with open(self.path, "rb") as file:
            size = self.path.stat().st_size
            if size < f.size_of(f.Header):
                raise self._refuse(f"has {size} bytes, less than a header")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        try:
            self._open(size, check_weights)
        except BundleError as error:
            raise self._refuse(error.sentence) from None

    def _refuse(self, reason: str) -> BundleError:
        return BundleError(f"{self.path}: {reason}", HINT)

    def _open(self, size: int, check_weights: bool) -> None:
        self.header = f.unpack(f.Header, self._view[: f.size_of(f.Header)])[0]
        table = _table(self.header, self._view, size)
        _check_layout(table, self._view, size, f.size_of(f.Header) + len(table) * f.size_of(f.SectionRecord))
        self.sections = {section.kind: section for section in table}
        for section in table:
            if section.kind != f.WEIGHTS or check_weights:
                _check_section(section, self._view)
        self._weights = self.sections[f.WEIGHTS]
        data = {s.kind: self._section(s) for s in table if s.kind != f.WEIGHTS}
        self.plan = decode(data, self.header, self._weights.bytes, self._read_weights)
        self.plan_id = 0
        for kind in (f.KERNELS, f.LAUNCHES, f.ARGS):
            self.plan_id = zlib.crc32(data[kind], self.plan_id)

    def _section(self, section: f.SectionRecord) -> memoryview:
        return self._view[section.offset : section.offset + section.bytes]

    def _read_weights(self, offset: int, nbytes: int) -> memoryview:
        start = self._weights.offset + offset
        return self._view[start : start + nbytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the map; views of it that are still held keep it alive."""
        self._view.release()


def _table(header: f.Header, view: memoryview, size: int) -> list[f.SectionRecord]:
    if header.magic != f.MAGIC:
        raise BundleError(f"starts with {header.magic!r}, not with {f.MAGIC!r}")
    if header.version != f.VERSION:
        raise BundleError(f"has format version {header.version}, this edgeseq reads version {f.VERSION}")
    if header.file_bytes != size:
        raise BundleError(f"has {size} bytes, its header says {header.file_bytes}")
    if header.n_sections != len(f.SECTION_NAMES):
        raise BundleError(f"has {header.n_sections} sections, expected {len(f.SECTION_NAMES)}")
    start, record = f.size_of(f.Header), f.size_of(f.SectionRecord)
    end = start + header.n_sections * record
    if end > size:
        raise BundleError(f"ends inside its section table, at {size} bytes")
    blank = header._replace(header_crc=0)
    if zlib.crc32(view[start:end], zlib.crc32(f.pack([blank]))) != header.header_crc:
        raise BundleError("has a header whose checksum does not fit")
    return f.unpack(f.SectionRecord, view[start:end])


def _check_layout(table: list[f.SectionRecord], view: memoryview, size: int, end: int) -> None:
    """Sections are known, unique, sorted, aligned, disjoint, separated by zeros, and end with the file."""
    seen: set[int] = set()
    for section in table:
        name = f.SECTION_NAMES.get(section.kind)
        if name is None:
            raise BundleError(f"has a section of unknown kind {section.kind}")
        if section.kind in seen:
            raise BundleError(f"has two {name} sections")
        seen.add(section.kind)
        alignment = f.WEIGHTS_ALIGNMENT if section.kind == f.WEIGHTS else f.SECTION_ALIGNMENT
        if section.offset % alignment:
            raise BundleError(f"has {name} at {section.offset}, not a multiple of {alignment}")
        if section.offset < end:
            raise BundleError(f"has {name} at {section.offset}, before the end of what precedes it at {end}")
        if section.offset + section.bytes > size:
            raise BundleError(f"has {name} ending at {section.offset + section.bytes}, after the file's {size} bytes")
        if section.offset != align(end, alignment) or any(view[end : section.offset]):
            raise BundleError(f"has a gap before {name} that is not zero-filled alignment")
        end = section.offset + section.bytes
    if end != size:
        raise BundleError(f"has {size - end} bytes after its last section")


def _check_section(section: f.SectionRecord, view: memoryview) -> None:
    name = f.SECTION_NAMES[section.kind]
    record = f.RECORDS.get(section.kind)
    if section.records * (f.size_of(record) if record else 1) != section.bytes:
        raise BundleError(f"has {section.bytes} bytes of {name} for {section.records} records")
    crc = 0
    for start in range(section.offset, section.offset + section.bytes, _CHUNK):
        crc = zlib.crc32(view[start : min(start + _CHUNK, section.offset + section.bytes)], crc)
    if crc != section.crc:
        raise BundleError(f"has a {name} section whose checksum does not fit")
