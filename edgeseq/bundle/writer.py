"""Encoded plan -> `model.edgeseq`. Weights are asked for one tensor at a time, so memory stays that of one tensor."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from edgeseq.bundle import format as f
from edgeseq.bundle.decode import decode
from edgeseq.bundle.encode import Encoded, encode
from edgeseq.bundle.plan import Plan, PlanTensor, align
from edgeseq.errors import BundleError

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total); done = total on the last call."""


PIECE = 2 << 20
"""Bytes of a large page on x86 and, with pages of 4 KiB, on ARM."""


def write_plan(plan: Plan, path: Path, progress: Progress | None = None) -> int:
    """Write `plan` to `path` under a temporary name, then rename. Returns the plan id.

    Raises BundleError when the plan would not read back or a tensor's data is not as long as it says; then, and on
    any interruption, nothing is left behind.
    """
    encoded = encode(plan)
    decode(encoded.sections, header=_header(plan, 0, 0), weights_bytes=encoded.weights_bytes)
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb", buffering=PIECE) as file:
            _write(plan, encoded, file, progress)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return encoded.plan_id


def _write(plan: Plan, encoded: Encoded, file: BinaryIO, progress: Progress | None) -> None:
    table: list[f.SectionRecord] = []
    n_sections = len(f.SECTION_NAMES)
    file.write(bytes(f.size_of(f.Header) + n_sections * f.size_of(f.SectionRecord)))
    for kind in sorted(encoded.sections):
        _pad(file, f.SECTION_ALIGNMENT)
        data = encoded.sections[kind]
        table.append(f.SectionRecord(kind, zlib.crc32(data), file.tell(), len(data), encoded.counts[kind]))
        file.write(data)
    _pad(file, f.WEIGHTS_ALIGNMENT)
    start = file.tell()
    crc = _write_weights(plan, encoded, file, progress)
    table.append(f.SectionRecord(f.WEIGHTS, crc, start, encoded.weights_bytes, encoded.weights_bytes))

    head = _header(plan, n_sections, file.tell())
    sealed = head._replace(header_crc=zlib.crc32(f.pack([head]) + f.pack(table)))
    file.seek(0)
    file.write(f.pack([sealed]) + f.pack(table))


def _write_weights(plan: Plan, encoded: Encoded, file: BinaryIO, progress: Progress | None) -> int:
    """Append every tensor's data, gaps zero-filled; returns the CRC-32 of the section."""
    crc = end = 0
    for tensor in plan.tensors:
        gap = bytes(encoded.tensor_offsets[tensor.name] - end)
        data = _data(tensor)
        _append(file, gap)
        _append(file, data)
        crc = zlib.crc32(data, zlib.crc32(gap, crc))
        end += len(gap) + tensor.nbytes
        if progress:
            progress("weights", end, encoded.weights_bytes)
    return crc


def _append(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write so that the file grows by whole pieces, which a system with large pages keeps in one each: where small
    pages limit, weights are then read half again as fast (docs/performance.md)."""
    view = memoryview(data).cast("B")
    while len(view):
        room = PIECE - file.tell() % PIECE
        file.write(view[:room])
        view = view[room:]


def _data(tensor: PlanTensor) -> memoryview:
    view = memoryview(tensor.data())
    if view.nbytes != tensor.nbytes or not view.c_contiguous:
        raise BundleError(
            f"tensor {tensor.name!r} was announced with {tensor.nbytes} bytes but packed to {view.nbytes}"
        )
    return view


def _header(plan: Plan, n_sections: int, file_bytes: int) -> f.Header:
    try:
        model_id = bytes.fromhex(plan.manifest.model_id)
    except ValueError:
        model_id = b""
    if len(model_id) != 16:
        raise BundleError(f"model_id {plan.manifest.model_id!r} is not 32 hex digits")
    return f.Header(
        f.MAGIC, f.VERSION, n_sections, file_bytes, model_id, plan.state_bytes, plan.io_bytes, plan.manifest.context, 0
    )


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(align(file.tell(), alignment) - file.tell()))
